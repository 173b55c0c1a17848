"""A time span whose ends have gradients."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MovingSpan:
    """A time span whose ends have gradients: time is rescaled, and with it dx/dt.

    The steps are numbers. With s the fraction of the span, t = t0 + s (t1 - t0), so dx/ds = (t1 - t0) f(t, x). Here s
    is counted in units of time, from ``first`` to ``last``: the values of t and of the rate 1 are those of
    plain numbers, bit for bit, and only their gradients differ.

    Attributes:
        first, last: the ends as numbers.
        t0, t1: tensors of these values, or the numbers.
    """

    first: float
    last: float
    t0: float | Tensor
    t1: float | Tensor

    @property
    def rate(self) -> float | Tensor:
        """(t1 - t0) / (last - first): the number 1, with its gradients by the ends."""
        return 1.0 + (_gradient(self.t1) - _gradient(self.t0)) / (self.last - self.first)

    def __call__(self, t: Tensor) -> Tensor:
        """Return the time ``t`` with its gradients by the ends of the span."""
        s = (t.detach() - self.first) / (self.last - self.first)
        return t + ((1.0 - s) * _gradient(self.t0) + s * _gradient(self.t1)).to(t.dtype)


def _gradient(t: float | Tensor) -> float | Tensor:
    """Return zero with the gradient of ``t``."""
    return t - t.detach() if isinstance(t, Tensor) else 0.0
