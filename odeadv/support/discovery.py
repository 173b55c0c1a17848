"""Find the modules that a function runs."""

from __future__ import annotations

import contextlib
import functools
import types

from torch import Tensor, nn


def modules_of(*functions: object, owner: object = None) -> tuple[nn.Module, ...]:
    """Return the modules that ``functions`` run, as far as a search of their attributes and variables can find them.

    The search visits modules, bound methods, partial functions, and the items of lists, tuples, sets and dicts. In a
    function it visits the variables that it closes over, the globals that it names, and the defaults of its arguments.
    For operators and fields it takes their tuple ``modules``. For other objects it visits their attributes, but not the
    attributes of these attributes.

    Args:
        functions: the objects to search.
        owner: the object that asks for its own ``modules``. If the search reaches it through a bound method, it visits
            its attributes, because its tuple ``modules`` does not exist yet.
    """
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    waiting = [(function, True) for function in functions]  # True lets the search visit the attributes of an object
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
        elif item is not owner and isinstance(own := _modules_named(item), tuple):
            parts = list(own)
        else:
            parts, inside = (list(vars(item).values()) if inside and hasattr(item, "__dict__") else []), False
        waiting += [(part, inside) for part in parts]
    return tuple(found.values())


#: Types that neither are modules nor hold modules.
_LEAVES = (Tensor, str, bytes, int, float, complex, type, types.ModuleType, types.BuiltinFunctionType)


def _modules_named(item: object) -> object:
    """Return the attribute ``modules`` of an operator or field, or None if it is missing or cannot be read."""
    with contextlib.suppress(Exception):  # a property of an unknown class may raise anything
        return getattr(item, "modules", None)
    return None


def _names_in(function: types.FunctionType) -> list[object]:
    """Return the values that ``function`` closes over, its defaults, and the globals it names."""
    values: list[object] = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # the cell is empty if its variable is defined later
            values.append(cell.cell_contents)
    return values + [function.__globals__.get(name) for name in function.__code__.co_names]
