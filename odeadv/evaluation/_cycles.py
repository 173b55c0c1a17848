"""Iterates that come back: after that an attack goes round in a cycle, and everything it would do is known."""

from __future__ import annotations

import torch
from torch import Tensor

SHORTEST, SHARE = 16, 8


class Cycles:
    """Tells whose iterates repeat an earlier one to the last bit.

    A sign step with a fixed length moves a pixel among few values, so long runs mostly end in a cycle of a few steps.
    One earlier iterate of each example is kept, and renewed after `SHORTEST` steps, or after 1 / `SHARE` of all steps
    if that is more: a cycle is found at most that many steps and one period after it was entered, if it is no longer
    than that.

    Args:
        x: the iterates, (n, ...).
        step: how many steps each has made, (n,) int64.

    Attributes:
        kept: the earlier iterates, like ``x``.
        kept_at: their steps, (n,) int64.
    """

    def __init__(self, x: Tensor, step: Tensor) -> None:
        self.kept, self.kept_at = x, step

    def periods(self, x: Tensor, step: Tensor) -> Tensor:
        """(n,) int64: steps since an iterate equal to ``x``, a multiple of the period; 0 for none. For every step."""
        back = (x == self.kept).flatten(1).all(dim=1)
        period = torch.where(back, step - self.kept_at, 0)
        old = ~back & (step - self.kept_at >= (step // SHARE).clamp(min=SHORTEST))
        if old.all():
            self.kept, self.kept_at = x, step
        elif old.any():
            self.kept = torch.where(old.reshape(-1, *(1 for _ in x.shape[1:])), x, self.kept)
            self.kept_at = torch.where(old, step, self.kept_at)
        return period
