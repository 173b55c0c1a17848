"""Checks of the arguments of a user's functions, by their names, before anything is solved."""

from __future__ import annotations

import types

_STATES = frozenset(("x", "y", "u", "z", "state"))
_VARIABLE = 0x04 | 0x08  # flags of *args and **kwargs


def check_arguments(name: str, function: object, expected: str) -> None:
    """Reject a plain function whose arguments cannot be those of ``expected``, such as ``"f(t, x)"``.

    Callables that are not plain functions are not looked at.

    Raises:
        TypeError: if the number of arguments differs, or the state comes where ``expected`` has a time.
    """
    if not isinstance(function, types.FunctionType):
        return
    code = function.__code__
    if code.co_flags & _VARIABLE:
        return
    names = code.co_varnames[: code.co_argcount]
    needed = code.co_argcount - len(function.__defaults__ or ())
    wanted = expected.count(",") + 1
    if not needed <= wanted <= code.co_argcount:
        raise TypeError(f"{name}: takes ({', '.join(names)}), expected {expected}")
    before = names[: wanted - 1]
    if any(argument in _STATES for argument in before) and names[wanted - 1] not in _STATES:
        raise TypeError(f"{name}: takes ({', '.join(names[:wanted])}), expected {expected}: the state comes last")
