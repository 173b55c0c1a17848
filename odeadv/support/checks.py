"""Checks of arguments: one policy and one wording for the whole package."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from torch import Tensor


def number(name: str, value: Any) -> float:
    """``value`` as a float.

    Raises:
        TypeError: if it is no number, or a tensor that requires a gradient, which a float would lose.
        ValueError: if it is not finite.
    """
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(f"{name}: got a tensor that requires a gradient, expected a number; none would reach it")
    try:
        number = None if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError, RuntimeError):
        number = None
    if number is None:
        raise TypeError(f"{name}: got {value!r}, expected a number")
    if not math.isfinite(number):
        raise ValueError(f"{name}: got {number}, expected a finite number")
    return number


def non_negative(name: str, value: object) -> float:
    """``value`` as a float; TypeError unless it is a real number, ValueError unless finite and >= 0."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {value!r}, expected a number >= 0")
    number = float(value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name}: got {value!r}, expected a finite number >= 0")
    return number


def positive_integer(name: str, value: object) -> int:
    """``value`` as an int; TypeError unless it is an integer, ValueError unless >= 1."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: got {value!r}, expected an integer >= 1")
    if value < 1:
        raise ValueError(f"{name}: got {value!r}, expected an integer >= 1")
    return int(value)


def one_of(name: str, value: object, known: Iterable[str]) -> str:
    """``value``; ValueError unless it is one of ``known``."""
    known = tuple(known)
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, known))}")
    return value
