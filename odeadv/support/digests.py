"""Fingerprints of data and models."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Collection
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn


def data_digest(images: Tensor, labels: Tensor) -> str:
    """Return 16 hex digits of a SHA-256 over images and labels: dtypes, shapes and values."""
    digest = hashlib.sha256()
    add_tensor(digest, images)
    add_tensor(digest, labels)
    return digest.hexdigest()[:16]


_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def without_addresses(value: object) -> str:
    """Return ``repr`` of ``value`` without the addresses that change from process to process."""
    return _ADDRESS.sub("", repr(value))


def add_tensor(digest: Any, tensor: Tensor) -> None:
    """Feed dtype, shape and values of ``tensor`` to a hash of hashlib."""
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")


def described_function(value: object) -> str:
    """``value``, a function or other callable, by what it is made of.

    A function of a module is told by its name. A lambda or a function made within another shares its name with others:
    a digest of its code, defaults and what it closes over is added. Of what it closes over, data, tensors and functions
    count, of other objects the type only. Callable objects are told by their ``repr``.
    """
    return _function(value, ())


def _function(value: object, within: tuple[object, ...]) -> str:
    """``value``, met while the functions ``within`` are described."""
    if isinstance(value, functools.partial):
        arguments = _content((value.args, value.keywords), within)
        return f"partial of {_function(value.func, within)} {arguments}"
    if isinstance(value, MethodType):
        return f"{_function(value.__func__, within)} of {_content(value.__self__, within)}"
    named, owner = getattr(value, "__qualname__", None), getattr(value, "__self__", None)
    if isinstance(owner, type):  # a built-in method of a class, such as apply of an autograd.Function
        return f"{owner.__module__}.{owner.__qualname__}.{getattr(value, '__name__', named)}"
    if not named:
        return without_addresses(value)
    text = f"{getattr(value, '__module__', '')}.{named}"
    if isinstance(value, FunctionType) and "<" in named:  # <lambda>, <locals>
        again = any(value is other for other in within)  # it calls itself, or another that calls it
        text += "" if again else f" {hashlib.sha256(_made_of(value, (*within, value)).encode()).hexdigest()[:16]}"
    return text


def _made_of(function: FunctionType, within: tuple[object, ...]) -> str:
    closed = [_cell(cell, within) for cell in function.__closure__ or ()]
    given = _content((function.__defaults__, function.__kwdefaults__), within)
    return repr((_code(function.__code__), closed, given))


def _cell(cell: Any, within: tuple[object, ...]) -> str:
    try:
        return _content(cell.cell_contents, within)
    except ValueError:  # not assigned yet
        return ""


def _code(code: CodeType) -> object:
    constants = [_code(value) if isinstance(value, CodeType) else _content(value, ()) for value in code.co_consts]
    return code.co_code, constants, code.co_names, code.co_varnames


def _content(value: object, within: tuple[object, ...]) -> str:
    if isinstance(value, Tensor):
        digest = hashlib.sha256()
        add_tensor(digest, value)
        return digest.hexdigest()
    if isinstance(value, dict):
        return str({_content(key, within): _content(item, within) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return str([_content(item, within) for item in value])
    if isinstance(value, (set, frozenset)):  # their order depends on the process
        return str(sorted(_content(item, within) for item in value))
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype)):
        return repr(value)
    if isinstance(value, (FunctionType, MethodType, functools.partial)) or getattr(value, "__qualname__", None):
        return _function(value, within)
    return f"{type(value).__module__}.{type(value).__qualname__}"


def model_digest(model: nn.Module, ignored: Collection[str] = ()) -> str:
    """Return 16 hex digits of a SHA-256 over everything that determines the function of ``model``.

    Those are the class, ``extra_repr``, ``config`` and attributes of every part that are plain data, tensors or
    functions; the state dict and buffers outside it: names, dtypes, shapes and values.

    Args:
        model: any module.
        ignored: full names of attributes that a forward pass changes, such as counters.
    """
    digest = hashlib.sha256()
    for prefix, part in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        own = {name: value for name, value in plain_attributes(part).items() if dot + name not in ignored}
        own = {
            name: sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
            for name, value in own.items()
        }
        said = (prefix, type(part).__qualname__, part.extra_repr(), getattr(part, "config", None), sorted(own.items()))
        digest.update(without_addresses(said).encode())
        for name, value in sorted(held(part).items()):
            if dot + name in ignored:
                continue
            digest.update(f"{dot}{name}".encode())
            if isinstance(value, Tensor):
                add_tensor(digest, value)
            else:
                digest.update(described_function(value).encode())
    for name, buffer in model.named_buffers():
        digest.update(name.encode())
        add_tensor(digest, buffer)
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        if isinstance(value, Tensor):
            add_tensor(digest, value)
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()[:16]


_INTERNAL = frozenset(vars(nn.Module()))  # torch's own: hooks, parameters, training, ...


def plain_attributes(part: nn.Module) -> dict[str, object]:
    """Return the attributes of ``part`` that are plain values, except those that torch keeps in every module."""
    return {name: value for name, value in vars(part).items() if _own(name) and _is_plain(value)}


def held(part: nn.Module) -> dict[str, object]:
    """Return the attributes of ``part`` that are tensors (not buffers) or functions, except those of torch."""
    kinds = (Tensor, FunctionType, MethodType, BuiltinFunctionType, partial)
    return {name: value for name, value in vars(part).items() if _own(name) and isinstance(value, kinds)}


def _own(name: str) -> bool:
    """Return True for an attribute of the module itself; torch.compile adds some that hold addresses."""
    return name not in _INTERNAL and not name.startswith("_torchdynamo_")


def _private(name: str, value: object) -> bool:
    return _own(name) and _is_plain(value)


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(_is_plain(item) for pair in value.items() for item in pair)
    return value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.Size))


def derived_seed(seed: int, place: str) -> int:
    """Return a seed for the work at ``place``, unrelated to the seeds of other places.

    It has 32 bits, because every generator accepts these.
    """
    return int.from_bytes(hashlib.sha256(f"{seed} {place}".encode()).digest()[:4], "big")
