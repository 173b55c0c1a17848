"""Checks of arguments. Every message of the package has the form ``argument: got X, expected Y``."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from operator import index
from typing import Any

import torch
from torch import Tensor


def shown(value: object) -> str:
    """Return ``repr(value)`` for a message: at most 80 characters, and only the shape if ``value`` is a tensor."""
    if isinstance(value, Tensor) and value.ndim:
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value.item() if isinstance(value, Tensor) and not value.is_meta else value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def integer(name: str, value: Any, *, least: int | None = 1) -> int:
    """Return ``value`` as an int. Python and NumPy integers are accepted.

    Args:
        name: the argument's name, for the message.
        value: the value that the caller gave.
        least: the smallest value allowed; None allows every integer.

    Raises:
        TypeError: if ``value`` is not an integer. A bool or a float does not count as an integer.
        ValueError: if ``value`` is below ``least``.
    """
    try:
        found = None if isinstance(value, bool | Tensor) else index(value)
    except TypeError:
        found = None
    expected = "an integer" if least is None else f"an integer, at least {least}"
    if found is None:
        raise TypeError(f"{name}: got {shown(value)}, expected {expected}")
    if least is not None and found < least:
        raise ValueError(f"{name}: got {found}, expected {expected}")
    return found


def number(
    name: str, value: Any, *, least: float | None = None, above: float | None = None, most: float | None = None
) -> float:
    """Return ``value`` as a finite float. NumPy numbers and 0-d tensors without gradient are accepted.

    Args:
        name: the argument's name, for the message.
        value: the value that the caller gave.
        least: the smallest value allowed.
        above: the value must be larger than this bound.
        most: the largest value allowed.

    Raises:
        TypeError: if ``value`` is not a number (a bool or a str does not count as a number). Also if it is a tensor
            that requires a gradient, because a float would lose the gradient.
        ValueError: if ``value`` is not finite or outside the range.
    """
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(f"{name}: got a tensor that requires a gradient, expected a number; no gradient would reach it")
    range_ = "".join(
        f", {word} {bound:g}"
        for word, bound in (("at least", least), ("above", above), ("at most", most))
        if bound is not None
    )
    try:
        found = None if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        found = None
    if found is None:
        raise TypeError(f"{name}: got {shown(value)}, expected a number{range_}")
    inside = (
        math.isfinite(found)
        and (least is None or found >= least)
        and (above is None or found > above)
        and (most is None or found <= most)
    )
    if not inside:
        raise ValueError(f"{name}: got {found:g}, expected a finite number{range_}")
    return found


def choice(name: str, value: Any, known: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``known``.

    Raises:
        TypeError: if ``value`` is not a string.
        ValueError: if ``value`` is unknown; the message names the nearest known value.
    """
    known = tuple(known)
    expected = f"expected one of {', '.join(map(repr, known))}"
    if not isinstance(value, str):
        raise TypeError(f"{name}: got {shown(value)}, {expected}")
    if value not in known:
        raise ValueError(f"{name}: got {shown(value)}, {expected}{did_you_mean(value, known)}")
    return value


def did_you_mean(word: object, known: Iterable[object], *, most: int = 1) -> str:
    """Return ``"; did you mean ...?"`` with the words of ``known`` nearest to ``word``, or ``""`` if none is near."""
    near = difflib.get_close_matches(str(word).lower(), dict.fromkeys(map(str, known)), n=most)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def check_loss(loss: object) -> None:
    """Check that ``loss`` is a function ``loss(output, targets)``. A loss of `torch.nn` must average over the batch.

    Raises:
        TypeError: if ``loss`` is not callable.
        ValueError: if its attribute ``reduction`` is ``"sum"`` or ``"none"``.
    """
    if not callable(loss):
        raise TypeError(f"loss: got {type(loss).__name__}, expected a callable loss(output, targets)")
    reduction = getattr(loss, "reduction", None)
    if reduction in ("sum", "none"):
        raise ValueError(
            f"loss: got {type(loss).__name__} with reduction={reduction!r}, expected reduction='mean', because eta "
            "belongs to the mean over the batch"
        )


#: What converts integer pixels to images in [0, 1], for messages.
TO_FLOAT = "divide by 255; odeadv.data.to_float(images) does it for uint8 pixels (n, height, width, 3)"


def class_indices(name: str, labels: object, n: int) -> Tensor:
    """Return ``labels`` if they are an int64 tensor with one class index for each of ``n`` images.

    Raises:
        TypeError: if ``labels`` is not a tensor of dtype int64.
        ValueError: if the shape is not ``(n,)``.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name}: got {type(labels).__name__}, expected an int64 tensor ({n},)")
    if labels.dtype != torch.int64:
        if labels.ndim == 2 and labels.shape[1] > 1:
            remedy = ".argmax(1) makes them of one-hot rows"
        elif labels.is_floating_point():
            remedy = "convert class numbers with .long(); targets of a regression are not supported"
        else:
            remedy = "convert with .long()"
        raise TypeError(f"{name}: got dtype {labels.dtype}, expected torch.int64 class indices; {remedy}")
    if labels.shape != (n,):
        remedy = "; .argmax(1) makes them of one-hot rows" if labels.ndim == 2 else ""
        raise ValueError(f"{name}: got shape {tuple(labels.shape)}, expected ({n},), one per image{remedy}")
    return labels
