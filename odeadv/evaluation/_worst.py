"""Worst-so-far IFGSM: examples leave once they are fooled or never will be, and others take their places."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from odeadv.attacks.balls import Bounds, linf_bounds, rows, sign_step
from odeadv.evaluation._cycles import SHORT, Cycles
from odeadv.evaluation._prepare import Prepared

Load = Callable[[Tensor], tuple[Tensor, Tensor]]


class Queue:
    """IFGSM from each of ``waiting``, in batches that are refilled as examples leave.

    Args:
        prepared: the model.
        load: indices (k,) to images and labels on the model's device.
        waiting: indices of examples, (n,) int64.
        eps: radius of the L-infinity ball.
        alpha: size of one step.
        steps: after how many steps an example that was never fooled leaves.
        batch_size: images in one forward pass.
        repeatable: whether the same images always have the same gradients: an example whose iterates come back to
            where they were then leaves, for it will not be fooled.

    Attributes:
        forward_passes: images sent through the model so far.
        gradient_evaluations: how many of these were also differentiated.
    """

    def __init__(
        self,
        prepared: Prepared,
        load: Load,
        waiting: Tensor,
        *,
        eps: float,
        alpha: float,
        steps: int,
        batch_size: int,
        repeatable: bool,
    ) -> None:
        self.forward_passes = self.gradient_evaluations = 0
        self._prepared, self._load, self._waiting = prepared, load, waiting
        self._eps, self._alpha, self._steps, self._batch_size = eps, alpha, steps, batch_size
        self._repeatable = repeatable

    def run(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (indices, fooled_at), (k,) each, of examples as they leave.

        ``fooled_at`` is the number of the first iterate that is misclassified (0: the clean image), or ``steps`` + 1
        if none is.
        """
        batch = self._loaded(self._waiting[:0])
        while len(batch.index) or len(self._waiting):
            batch = self._filled(batch)
            scorer = self._prepared.scorer(batch.labels)
            ending = batch.step >= self._steps
            if ending.all():  # the last iterates: nobody asks for their gradient
                correct, gradient = scorer.correct(batch.x), torch.zeros_like(batch.x)
            else:
                correct, gradient = scorer.correct_and_gradient(batch.x)
            self.forward_passes += scorer.forward_passes
            self.gradient_evaluations += scorer.gradient_evaluations
            leaving = ~correct | ending
            if leaving.any():
                correct = self._confirmed(batch, correct & ending, correct)
                fooled_at = torch.where(correct, self._steps + 1, batch.step)
                yield batch.index[leaving].cpu(), fooled_at[leaving].cpu()
                gradient = gradient[~leaving]
                batch = batch.subset(~leaving)
            batch.x = batch.bounds.project(sign_step(batch.x, gradient, self._alpha))
            batch.step = batch.step + 1
            if self._repeatable:
                batch.cycles, ago = batch.cycles.after(batch.x, batch.step)
                again = (ago > 0) & (batch.step > SHORT)
                if again.any():  # classified correctly all the way round
                    correct = self._confirmed(batch, again, again)
                    fooled_at = torch.where(correct, self._steps + 1, batch.step)
                    yield batch.index[again].cpu(), fooled_at[again].cpu()
                    batch = batch.subset(~again)

    def _confirmed(self, batch: _Batch, chosen: Tensor, correct: Tensor) -> Tensor:
        """``correct``, for ``chosen`` examples by an exact pass if so far only approximate ones have found them so."""
        if not self._prepared.approximate or not chosen.any():
            return correct
        scorer = self._prepared.scorer(batch.labels[chosen])
        confirmed = correct.clone()
        confirmed[chosen] = scorer.correct(rows(batch.x, chosen))
        self.forward_passes += scorer.forward_passes
        return confirmed

    def _filled(self, batch: _Batch) -> _Batch:
        room = self._batch_size - len(batch.index)
        if not room or not len(self._waiting):
            return batch
        coming, self._waiting = self._waiting[:room], self._waiting[room:]
        return batch.joined(self._loaded(coming))

    def _loaded(self, index: Tensor) -> _Batch:
        images, labels = self._load(index)
        step = torch.zeros(len(index), dtype=torch.int64, device=labels.device)
        bounds = linf_bounds(images, self._eps)
        return _Batch(index.to(labels.device), images, labels, bounds, step, Cycles(images, step))


class _Batch:
    """Examples under attack: where each is from, its iterate, how many steps it has made, and where it has been."""

    def __init__(self, index: Tensor, x: Tensor, labels: Tensor, bounds: Bounds, step: Tensor, cycles: Cycles) -> None:
        self.index, self.x, self.labels, self.bounds, self.step, self.cycles = index, x, labels, bounds, step, cycles

    def subset(self, keep: Tensor) -> _Batch:
        bounds, cycles = self.bounds.rows(keep), self.cycles.rows(keep)
        return _Batch(self.index[keep], rows(self.x, keep), self.labels[keep], bounds, self.step[keep], cycles)

    def joined(self, other: _Batch) -> _Batch:
        if not len(self.index):
            return other
        bounds = Bounds(
            torch.cat([self.bounds.lower, other.bounds.lower]), torch.cat([self.bounds.upper, other.bounds.upper])
        )
        cycles = Cycles(
            torch.cat([self.cycles.kept, other.cycles.kept]), torch.cat([self.cycles.kept_at, other.cycles.kept_at])
        )
        return _Batch(
            torch.cat([self.index, other.index]),
            torch.cat([self.x, other.x]),
            torch.cat([self.labels, other.labels]),
            bounds,
            torch.cat([self.step, other.step]),
            cycles,
        )
