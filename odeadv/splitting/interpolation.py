"""Interpolation within a step, from the values at its two ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def like_real(s: Any, x: Tensor) -> Any:
    """Return ``s`` unchanged if it is a number. Convert a tensor ``s`` to the device and the real dtype of ``x``."""
    return s.to(x.device, x.real.dtype if x.is_complex() else x.dtype) if isinstance(s, Tensor) else s


def linear(before: Tensor, after: Tensor, s: Any) -> Tensor:
    """Return the linear interpolation at the fraction ``s`` of the step. A tensor ``s`` broadcasts with the values."""
    if isinstance(s, Tensor):
        moved: Tensor = before + like_real(s, before) * (after - before)
        return moved
    return torch.lerp(before, after, s)


def cubic(before: Tensor, after: Tensor, slopes: Sequence[Tensor], s: Any, h: float) -> Tensor:
    """Return the cubic Hermite polynomial at the fraction ``s`` of a step of size ``h``.

    Its error is proportional to ``h`` to the power 4.

    Args:
        before: value at the beginning of the step.
        after: value at the end of the step.
        slopes: time derivatives at the beginning and at the end of the step.
        s: fraction of the step, a float or a tensor that broadcasts with the values.
        h: signed size of the step.
    """
    s = like_real(s, before)
    ends = linear(before, after, s * s * (3.0 - 2.0 * s))
    return torch.add(ends, s * (1.0 - s) ** 2 * slopes[0] - s * s * (1.0 - s) * slopes[1], alpha=h)


def lagrange(points: Sequence[float], s: Any) -> list[Any]:
    """Return the weights with which the polynomial through values at ``points`` takes its value at ``s``."""
    return [math.prod((s - other) / (point - other) for other in points if other != point) for point in points]


@lru_cache
def gauss_points(count: int) -> tuple[float, ...]:
    """Return the ``count`` Gauss points of the interval from 0 to 1 (Golub and Welsch 1969, Math. Comp. 23)."""
    off_diagonal = torch.tensor([0.5 * k / math.sqrt(4 * k * k - 1) for k in range(1, count)], dtype=torch.float64)
    matrix = torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1) + 0.5 * torch.eye(count, dtype=torch.float64)
    return tuple(torch.linalg.eigvalsh(matrix).tolist())
