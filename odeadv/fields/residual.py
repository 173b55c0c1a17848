"""A block of a residual network as a term of the equation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from odeadv.fields.operator import Cost, Operator, same_shape, watched
from odeadv.support.isolation import check_unmodified, version


class Residual(Operator):
    """A block x -> block(x) as the velocity f(x) = block(x) - x. Its Euler step of length 1 is exactly block(x).

    In floating point x + (block(x) - x) differs from block(x) by rounding. `euler` therefore returns block(x) itself
    if the step has length 1. Every other step and sub-step uses the difference.

    Args:
        block: ``block(x)`` returns a tensor of the shape and dtype of ``x``. It must not write to ``x``.
        name: name of the block in messages.

    Raises:
        TypeError: if ``block`` is not callable.
    """

    def __init__(self, block: Callable[[Tensor], Tensor], *, name: str = "block") -> None:
        if not callable(block):
            raise TypeError(f"{name}: got {type(block).__name__}, expected a callable block(x)")
        super().__init__(lambda t, x: block(x) - x, modules=(block,))
        self.block = block
        self.name = name

    def euler(self, t: float, h: float, x: Tensor, cost: Cost) -> Tensor:
        """Return block(x) if ``h`` is 1, and x + h (block(x) - x) otherwise; see `Operator.euler`."""
        if h != 1.0:
            return super().euler(t, h, x, cost)
        cost.evaluated()
        before = version(x)
        end = watched(self.name, lambda: self.block(x), x) if cost.watch else self.block(x)
        check_unmodified(self.name, x, before)
        return same_shape(self.name, end, x)

    def widened(self, narrow: torch.dtype) -> Residual:
        """See `Operator.widened`. A step of length 1 is still exactly the block, since float32 contains ``narrow``."""
        block = self.block
        other = Residual(lambda x: block(x.to(narrow)).to(x.dtype), name=self.name)
        other.time_dtype = self.time_dtype
        return other
