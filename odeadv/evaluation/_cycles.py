"""Iterates that come back: after that an attack goes round in a cycle, and everything it would do is known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from odeadv.attacks.balls import rows

# Cycles are looked for beyond this many steps only: shorter runs hardly have any, and a batch that examples have left
# may round otherwise.
SHORT = 20
# An earlier iterate is kept for so many steps, or for this share of all steps if that is more.
KEPT_FOR, KEPT_SHARE = 16, 1 / 8


@dataclass(frozen=True)
class Cycles:
    """An earlier iterate of each example, to tell when one comes back to the last bit.

    A sign step with a fixed length moves a pixel among few values, so long runs mostly end in a cycle of a few steps.
    One iterate of each example is kept and replaced by a newer one after `KEPT_FOR` steps, or a `KEPT_SHARE` of all
    steps if that is more: a cycle no longer than that is found at most so many steps and one period after it was
    entered.

    Attributes:
        kept: the earlier iterates, (n, ...).
        kept_at: after how many steps they were reached, (n,) int64.
    """

    kept: Tensor
    kept_at: Tensor

    def rows(self, keep: Tensor) -> Cycles:
        """Of the examples chosen by ``keep``, (n,) bool, only."""
        return Cycles(rows(self.kept, keep), self.kept_at[keep])

    def after(self, x: Tensor, step: Tensor) -> tuple[Cycles, Tensor]:
        """With the iterates ``x`` that are reached after ``step`` steps, (n,) int64, each one more than before.

        Returns:
            What is kept from now on; and how many steps ago an iterate was equal to ``x``, (n,) int64, a multiple of
            the period, or 0 where none is known to have been.
        """
        back = (x == self.kept).flatten(1).all(dim=1)
        ago = torch.where(back, step - self.kept_at, 0)
        old = ~back & (step - self.kept_at >= (KEPT_SHARE * step).clamp(min=KEPT_FOR))
        if not old.any():
            return self, ago
        if old.all():
            return Cycles(x, step), ago
        kept = torch.where(old.reshape(-1, *(1 for _ in x.shape[1:])), x, self.kept)
        return Cycles(kept, torch.where(old, step, self.kept_at)), ago
