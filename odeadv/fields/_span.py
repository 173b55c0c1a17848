"""A time span that is differentiated with respect to its ends."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MovingSpan:
    """A time span that is differentiated with respect to its ends: time is rescaled, and so is dx/dt.

    The times of the steps are plain numbers. With s as the fraction of the span, t = t0 + s (t1 - t0), so
    dx/ds = (t1 - t0) f(t, x). Here s has units of time and runs from ``first`` to ``last``, so the rate is 1. The
    values of t and of the rate are bit-identical to plain numbers. Only their gradients differ.

    Attributes:
        first, last: the ends as numbers.
        t0, t1: the ends as tensors of the same values, or as numbers.
    """

    first: float
    last: float
    t0: float | Tensor
    t1: float | Tensor

    @property
    def rate(self) -> float | Tensor:
        """(t1 - t0) / (last - first): the number 1, with its gradients with respect to the ends t0 and t1."""
        return 1.0 + (_gradient(self.t1) - _gradient(self.t0)) / (self.last - self.first)

    def __call__(self, t: Tensor) -> Tensor:
        """Return the time ``t`` with its gradients with respect to the ends t0 and t1 of the span."""
        s = (t.detach() - self.first) / (self.last - self.first)
        return t + ((1.0 - s) * _gradient(self.t0) + s * _gradient(self.t1)).to(t.dtype)


def _gradient(t: float | Tensor) -> float | Tensor:
    """Return zero with the gradient of ``t``."""
    return t - t.detach() if isinstance(t, Tensor) else 0.0
