"""Discovery: which modules a function runs."""

from __future__ import annotations

import contextlib
import functools
import types

from torch import Tensor, nn


def modules_of(*functions: object) -> tuple[nn.Module, ...]:
    """The modules that ``functions`` run, as far as can be seen.

    Found are modules themselves, bound methods, partial functions, what a function closes over or names globally,
    objects with a tuple ``modules`` (operators and fields), what lists, tuples, sets and dicts among these hold, and
    the attributes of objects among them, but not those of such attributes.
    """
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    waiting = [(function, True) for function in functions]  # and whether an object's attributes are looked at
    while waiting:
        item, inside = waiting.pop()
        if item is None or isinstance(item, _LEAVES) or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            found[id(item)] = item
            continue
        if isinstance(item, dict):
            parts: list[object] = list(item.values())
        elif isinstance(item, (list, tuple, set, frozenset)):
            parts = list(item)
        elif isinstance(item, functools.partial):
            parts = [item.func, *item.args, *item.keywords.values()]
        elif isinstance(item, types.MethodType):
            parts = [item.__self__, item.__func__]
        elif isinstance(item, types.FunctionType):
            parts = _names_in(item)
        elif isinstance(own := _modules_named(item), tuple):
            parts = list(own)
        else:
            parts, inside = (list(vars(item).values()) if inside and hasattr(item, "__dict__") else []), False
        waiting += [(part, inside) for part in parts]
    return tuple(found.values())


#: Neither modules nor holders of any.
_LEAVES = (Tensor, str, bytes, int, float, complex, type, types.ModuleType, types.BuiltinFunctionType)


def _modules_named(item: object) -> object:
    """The attribute ``modules`` of an operator or field; None where there is none, or it cannot be read."""
    with contextlib.suppress(Exception):  # a property of a stranger's may raise anything
        return getattr(item, "modules", None)
    return None


def _names_in(function: types.FunctionType) -> list[object]:
    """What ``function`` closes over, and the globals it names."""
    values: list[object] = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell: defined later
            values.append(cell.cell_contents)
    return values + [function.__globals__.get(name) for name in function.__code__.co_names]
