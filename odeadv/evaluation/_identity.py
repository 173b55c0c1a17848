"""Functions as text, so that two that compute something else are told apart, in this process and the next."""

from __future__ import annotations

import functools
import hashlib
import re
from types import CodeType, FunctionType, MethodType

from torch import Tensor

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def described_function(value: object) -> str:
    """``value``, a function or other callable, by what it is made of.

    A function of a module is told by its name. A lambda or a function made within another shares its name with others:
    a digest of its code, defaults and what it closes over is added. What a callable object holds is in its ``repr``, or
    not seen.
    """
    if isinstance(value, functools.partial):
        own = (described_function(value.func), value.args, sorted(value.keywords.items()))
        return _ADDRESS.sub("", repr(own))
    if isinstance(value, MethodType):
        return f"{described_function(value.__func__)} of {_content(value.__self__)}"
    named = getattr(value, "__qualname__", None)
    owner = getattr(value, "__self__", None)
    if isinstance(owner, type) and named:  # a built-in method bound to a class, such as apply of an autograd.Function
        return f"{owner.__module__}.{owner.__qualname__}.{getattr(value, '__name__', named)}"
    if not named:
        return _ADDRESS.sub("", repr(value))
    text = f"{getattr(value, '__module__', '')}.{named}"
    if isinstance(value, FunctionType) and "<" in named:  # <lambda>, <locals>
        text += f" {hashlib.sha256(_made_of(value).encode()).hexdigest()[:16]}"
    return text


def _made_of(function: FunctionType) -> str:
    closed = [_content(cell.cell_contents) for cell in function.__closure__ or ()]
    defaults = [_content(value) for value in function.__defaults__ or ()]
    keywords = [(key, _content(value)) for key, value in sorted((function.__kwdefaults__ or {}).items())]
    return repr((_code(function.__code__), closed, defaults, keywords))


def _code(code: CodeType) -> object:
    constants = [_code(value) if isinstance(value, CodeType) else repr(value) for value in code.co_consts]
    return code.co_code, constants, code.co_names, code.co_varnames


def _content(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {value.detach().cpu().tolist()}"
    if callable(value):
        return described_function(value)
    return _ADDRESS.sub("", repr(value))
