"""Checks of the number and names of the arguments of a user's functions, before the solve starts."""

from __future__ import annotations

import types

from torch import nn

_STATES = frozenset(("x", "y", "u", "z", "state"))
_VARIABLE = 0x04 | 0x08  # code flags of functions with *args or **kwargs


def check_arguments(name: str, function: object, expected: str) -> None:
    """Raise an error if the arguments of a function or module do not fit ``expected``, such as ``"f(t, x)"``.

    Other callables are not checked.

    Raises:
        TypeError: if the number of arguments differs, or the state is at the place of a time in ``expected``.
    """
    is_module = isinstance(function, nn.Module)
    if isinstance(function, nn.Module):
        function = getattr(function.forward, "__func__", None)
    if not isinstance(function, types.FunctionType):
        return
    code = function.__code__
    if code.co_flags & _VARIABLE:
        return
    names = code.co_varnames[is_module : code.co_argcount]  # self of a module's forward is left out
    needed = len(names) - len(function.__defaults__ or ())
    wanted = expected.count(",") + 1
    if not needed <= wanted <= len(names):
        remedy = "; for a network give net.field(inputs, targets, eta) or lambda t, x: net(x)" if is_module else ""
        raise TypeError(f"{name}: takes ({', '.join(names)}), expected {expected}{remedy}")
    *before, last = (argument.lower() in _STATES for argument in names[:wanted])
    if any(before) and not last:
        raise TypeError(f"{name}: takes ({', '.join(names[:wanted])}), expected {expected}: the state comes last")
