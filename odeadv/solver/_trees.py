"""Tuples, lists and mappings of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


def is_structure(value: object) -> bool:
    """Return True for tuples, lists and mappings, which may contain tensors."""
    return isinstance(value, tuple | list | Mapping)


def items(value: Any) -> list[tuple[Any, Any]]:
    """Return the parts of a structure with their keys or positions."""
    return list(value.items() if isinstance(value, Mapping) else enumerate(value))


def named_tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of ``value``, a tensor or a structure, with names such as ``x0['q']``.

    Raises:
        TypeError: if ``value`` contains anything except tensors and structures.
    """
    if isinstance(value, Tensor):
        yield name, value
    elif is_structure(value):
        for key, part in items(value):
            yield from named_tensors(part, f"{name}[{key!r}]")
    else:
        root = name.partition("[")[0]
        raise TypeError(
            f"{name}: got {type(value).__name__}, expected a tensor, or a tuple, list or dict of tensors; "
            f"torch.tensor({root}) makes a tensor of numbers"
        )


def rebuilt(example: Any, parts: Iterator[Any]) -> Any:
    """Return the structure of ``example`` with its tensors replaced by ``parts``, in order. Mappings become dicts."""
    if isinstance(example, Tensor):
        return next(parts)
    found = {key: rebuilt(part, parts) for key, part in items(example)}
    if isinstance(example, Mapping):
        return found
    if hasattr(example, "_fields"):
        return type(example)(*found.values())
    return list(found.values()) if isinstance(example, list) else tuple(found.values())


def mapped(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Return ``value``, a tensor or a structure, with ``function`` applied to its tensors."""
    return rebuilt(value, (function(tensor) for _, tensor in named_tensors(value, "")))
