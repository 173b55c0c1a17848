"""Digests of data, models and functions, and seeds that are derived from names."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

# Number of bytes that are read at once. A memory-mapped array may be larger than memory.
_CHUNK = 2**24
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def chunks(tensor: Tensor, release: Callable[[], object] | None = None) -> Iterator[Tensor]:
    """Yield ``tensor``, (n, ...), part by part.

    Args:
        tensor: a tensor with at least one dimension.
        release: a function that is called after each part, to give back the memory of a mapped file.
    """
    rows = max(1, _CHUNK // max(1, tensor.element_size() * tensor[:1].numel()))
    for part in torch.split(tensor, rows):
        yield part
        if release is not None:
            release()


def data_digest(images: Tensor, labels: Tensor, release: Callable[[], object] | None = None) -> str:
    """Return 16 hex digits of a SHA-256 over images and labels: dtypes, shapes and values.

    Floating images (n, channels, h, w) with 1 or 3 channels may hold exact multiples of 1/255. They then have the same
    digest as these images in uint8 with channels last.

    Args:
        images: tensor of shape (n, ...).
        labels: tensor of shape (n,).
        release: as for `chunks`.
    """
    digest = hashlib.sha256()
    if are_255ths(images, release):
        n, channels, height, width = images.shape
        digest.update(f"{torch.uint8} {(n, height, width, channels)}".encode())
        for part in chunks(images, release):
            _add_values(digest, (255 * part.detach()).round().to(torch.uint8).permute(0, 2, 3, 1))
    else:
        add_tensor(digest, images, release)
    add_tensor(digest, labels)
    return digest.hexdigest()[:16]


def are_255ths(images: Tensor, release: Callable[[], object] | None = None) -> bool:
    """Return True if ``images``, floating (n, channels, h, w) with 1 or 3 channels, are exact multiples of 1/255."""
    if not images.is_floating_point() or images.ndim != 4 or images.shape[1] not in (1, 3):
        return False
    return all(torch.equal((255 * part).round() / 255, part) for part in chunks(images.detach(), release))


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return 16 hex digits of a SHA-256 over names (in any order), dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        add_tensor(digest, tensors[name])
    return digest.hexdigest()[:16]


def add_tensor(digest: Any, tensor: Tensor, release: Callable[[], object] | None = None) -> None:
    """Feed dtype, shape and values of ``tensor`` to ``digest``, a hash of hashlib. For ``release`` see `chunks`."""
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    for part in chunks(tensor, release) if tensor.ndim else (tensor,):
        _add_values(digest, part)


def _add_values(digest: Any, tensor: Tensor) -> None:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")


def without_addresses(value: object) -> str:
    """Return ``repr(value)`` without memory addresses, which differ between processes."""
    return _ADDRESS.sub("", repr(value))


def function_name(value: object) -> str:
    """Return the module and qualified name of a function. For other callables return ``repr`` without addresses."""
    if isinstance(value, functools.partial):
        return f"partial of {function_name(value.func)} {without_addresses((value.args, value.keywords))}"
    owner, name = getattr(value, "__self__", None), getattr(value, "__qualname__", None)
    if isinstance(owner, type):  # the function is a class method, such as apply of an autograd.Function
        return f"{owner.__module__}.{owner.__qualname__}.{getattr(value, '__name__', name)}"
    return f"{getattr(value, '__module__', '')}.{name}" if name else without_addresses(value)


def is_local(value: object) -> bool:
    """Return True for a lambda or a nested function. Several such functions may have the same name."""
    return "<" in function_name(value.func if isinstance(value, functools.partial) else value)


def model_digest(model: nn.Module, ignored: Collection[str] = ()) -> str:
    """Return 16 hex digits of a SHA-256 over everything that determines the model's function.

    The digest covers, for every submodule, its class, its ``extra_repr``, its ``config`` and its attributes that are
    plain data, tensors or functions (by name). It also covers names, dtypes, shapes and values of the state dict and of
    the buffers that the state dict leaves out.

    Args:
        model: any module.
        ignored: full names of attributes that a forward pass changes, such as counters.
    """
    digest = hashlib.sha256()
    for prefix, part in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        own = {name: value for name, value in plain_attributes(part).items() if dot + name not in ignored}
        # The iteration order of a set differs between processes.
        own = {
            name: sorted(value, key=repr) if isinstance(value, set | frozenset) else value
            for name, value in own.items()
        }
        config = getattr(part, "config", None)
        digest.update(
            without_addresses(
                (prefix, type(part).__qualname__, part.extra_repr(), config, sorted(own.items()))
            ).encode()
        )
        for name, value in sorted(held(part).items()):
            if dot + name not in ignored:
                digest.update(f"{dot}{name}".encode())
                _add(digest, value)
    for name, buffer in model.named_buffers():
        digest.update(name.encode())
        add_tensor(digest, buffer)
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        _add(digest, value)
    return digest.hexdigest()[:16]


def _add(digest: Any, value: object) -> None:
    if isinstance(value, Tensor):
        add_tensor(digest, value)
    else:
        digest.update((function_name(value) if callable(value) else repr(value)).encode())


def local_functions(model: nn.Module) -> list[str]:
    """Return the full names of all attributes of ``model`` that are lambdas or nested functions."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, part in model.named_modules()
        for name, value in held(part).items()
        if isinstance(value, FunctionType | functools.partial) and is_local(value)
    ]


_INTERNAL = frozenset(vars(nn.Module()))  # torch's own attributes: hooks, parameters, training, ...


def plain_attributes(part: nn.Module) -> dict[str, object]:
    """Return the attributes of ``part`` that are plain values, without torch's own attributes of every module."""
    return {name: value for name, value in vars(part).items() if is_own(name) and is_plain(value)}


def held(part: nn.Module) -> dict[str, object]:
    """Return the attributes of ``part`` that are tensors (not buffers) or functions, without torch's attributes."""
    kinds = (Tensor, FunctionType, MethodType, BuiltinFunctionType, functools.partial)
    return {name: value for name, value in vars(part).items() if is_own(name) and isinstance(value, kinds)}


def is_own(name: str) -> bool:
    """Return True if ``name`` is not the name of one of torch's own attributes of modules or compiled modules."""
    return name not in _INTERNAL and not name.startswith("_torchdynamo_")


def is_plain(value: object) -> bool:
    """Return True for numbers, strings, dtypes and None, and for containers of these."""
    if isinstance(value, list | tuple | set | frozenset):
        return all(is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(is_plain(item) for pair in value.items() for item in pair)
    return value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype | torch.Size)


def derived_seed(seed: int, place: str) -> int:
    """Return a seed of 32 bits for the work named ``place``. Seeds of different places are unrelated."""
    # The older generators of NumPy take at most 32 bits.
    return int.from_bytes(hashlib.sha256(f"{seed} {place}".encode()).digest()[:4], "big")
