"""Tensors and functions as text or bytes, so that two that compute something else are told apart, now and later."""

from __future__ import annotations

import functools
import hashlib
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from odeadv.support.digests import add_tensor, without_addresses


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
