"""Choosing among several attacked images of one example."""

from __future__ import annotations

import torch
from torch import Tensor


class Best:
    """For each example the first candidate that fools the model, and until then the one of highest loss.

    Attributes:
        images: (n, ...), the chosen ones.
        losses: (n,), theirs; -infinity before the first candidate.
        fooled: (n,) bool, whether they fool the model.
    """

    def __init__(self, images: Tensor) -> None:
        self.images = torch.empty_like(images).copy_(images)
        self.losses = torch.full((len(images),), -torch.inf, dtype=torch.float64, device=images.device)
        self.fooled = torch.zeros(len(images), dtype=torch.bool, device=images.device)

    def offer(self, candidates: Tensor, losses: Tensor, fooled: Tensor, index: Tensor | None = None) -> None:
        """Take what is better among ``candidates`` (m, ...), ``losses`` and ``fooled`` (m,).

        Args:
            candidates: attacked images of the examples ``index``.
            losses: theirs.
            fooled: whether they fool the model.
            index: (m,) which examples these are; None means all, m = n.
        """
        rows: Tensor | slice = slice(None) if index is None else index
        better = ~self.fooled[rows] & (fooled | (losses > self.losses[rows]))
        shaped = better.view(-1, *[1] * (candidates.ndim - 1))
        self.images[rows] = torch.where(shaped, candidates, self.images[rows])
        self.losses[rows] = torch.where(better, losses.double(), self.losses[rows])
        self.fooled[rows] |= fooled

    def open(self) -> Tensor:
        """The indices of the examples that no candidate has fooled so far."""
        return (~self.fooled).nonzero()[:, 0]
