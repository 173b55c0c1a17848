"""FGSM and IFGSM at several radii, step sizes and lengths, from as few gradients as will do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from odeadv.attacks.balls import Bounds, linf_bounds, rows, sign_step
from odeadv.evaluation._prepare import Prepared, Scorer
from odeadv.evaluation.protocols import AttackSpec

Run = tuple[float, float]  # eps, alpha
LEAVE_TOGETHER = 0.25  # examples in a cycle leave when they are this share of a batch: its make-up changes seldom


@dataclass(frozen=True)
class _Branch:
    """Runs whose iterates are the same so far, to the last bit.

    Attributes:
        x: the iterates of the examples that are still under way.
        gradient: there.
        runs: which these are.
        index: the examples' places in the batch.
        bounds: for each run.
        scorer: of these examples.
        cycles: where they have been; None where it is not looked at.
        periods: of the cycles they are in, 0 for none.
        history: whether each iterate so far, from the clean images on, was classified correctly: (batch,) bool each.
    """

    x: Tensor
    gradient: Tensor
    runs: list[Run]
    index: Tensor
    bounds: Mapping[Run, Bounds]
    scorer: Scorer
    cycles: Cycles | None
    periods: Tensor
    history: list[Tensor]

    def without(self, gone: Tensor) -> _Branch:
        """The branch without the examples ``gone``."""
        keep = ~gone
        return replace(
            self,
            x=rows(self.x, keep),
            gradient=rows(self.gradient, keep),
            index=self.index[keep],
            bounds={run: bounds.rows(keep) for run, bounds in self.bounds.items()},
            scorer=self.scorer.part(keep),
            cycles=None if self.cycles is None else self.cycles.rows(keep),
            periods=self.periods[keep],
        )


class SharedRuns:
    """Last-iterate and worst-so-far outcomes of runs that begin at the same images.

    The clean gradient is the first of every run. Runs of one alpha then go on as one for as long as their iterates
    are bitwise equal: within eps / alpha steps a radius is no bound yet. The forward pass that scores an iterate is
    that of its gradient. Examples whose iterates go round in a cycle (`Cycles`) leave a long run: their later outcomes
    are those of the cycle.

    Args:
        scorer: of this batch.
        images: the clean ones, (n, ...).
        clean: which of them are classified correctly.
        clean_gradient: the gradient there.
        lengths: for each (eps, alpha) the numbers of steps that are scored.
        repeatable: the same images always have the same gradients, so that iterates that come back come back again.
    """

    def __init__(
        self,
        scorer: Scorer,
        images: Tensor,
        clean: Tensor,
        clean_gradient: Tensor,
        lengths: Mapping[Run, Sequence[int]],
        *,
        repeatable: bool,
    ) -> None:
        self._scorer, self._images, self._clean, self._gradient = scorer, images, clean, clean_gradient
        self._lengths = lengths
        self._repeatable = repeatable and not scorer.approximate
        self._worst = dict.fromkeys(lengths, clean)
        self._scored = {
            (run, length): (torch.zeros_like(clean), torch.zeros_like(clean))
            for run, counts in lengths.items()
            for length in counts
        }

    def outcomes(self) -> dict[tuple[Run, int], tuple[Tensor, Tensor]]:
        """For every run and each of its lengths: last-iterate and worst-so-far outcomes, (n,) bool each."""
        for alpha in dict.fromkeys(run[1] for run in self._lengths):
            branches = [self._trunk([run for run in self._lengths if run[1] == alpha])]
            step = 0
            while branches:
                step += 1
                branches = [after for branch in branches for after in self._advance(branch, step)]
        return self._scored

    def _trunk(self, runs: list[Run]) -> _Branch:
        everywhere = torch.arange(len(self._clean), device=self._clean.device)
        return _Branch(
            self._images,
            self._gradient,
            runs,
            everywhere,
            {run: linf_bounds(self._images, run[0]) for run in runs},
            self._scorer,
            None,
            torch.zeros_like(everywhere),
            [self._clean],
        )

    def _advance(self, branch: _Branch, step: int) -> list[_Branch]:
        """One step of all runs of a branch, scored; what they are after it."""
        moved = sign_step(branch.x, branch.gradient, branch.runs[0][1])
        children: list[tuple[Tensor, list[Run]]] = []
        for run in branch.runs:
            x = branch.bounds[run].project(moved)
            same = next((runs for other, runs in children if torch.equal(other, x)), None)
            if same is None:
                children.append((x, [run]))
            else:
                same.append(run)
        return [after for x, runs in children if (after := self._scored_at(branch, x, runs, step)) is not None]

    def _scored_at(self, branch: _Branch, x: Tensor, runs: list[Run], step: int) -> _Branch | None:
        """The runs at their iterates ``x``; None if all of them end there."""
        index, scorer = branch.index, branch.scorer
        onward = [run for run in runs if max(self._lengths[run]) > step]
        reported = any(step in self._lengths[run] for run in runs)
        if onward:
            unsettled = torch.stack([self._worst[run] for run in runs]).any(dim=0)[index]
            correct, gradient = scorer.correct_and_gradient(x, open=None if reported else unsettled)
        else:
            correct, gradient = scorer.correct(x), branch.gradient
        for run in runs:
            self._worst[run] = self._worst[run].index_put((index,), self._worst[run][index] & correct)
            if step in self._lengths[run]:
                last, worst = self._scored[run, step]
                last[index], worst[index] = correct, self._worst[run][index]
        if not onward:
            return None
        history = [*branch.history, branch.history[-1].index_put((index,), correct)]
        after = replace(branch, x=x, gradient=gradient, runs=onward, history=history)
        return self._left_by_cycles(after, step)

    def _left_by_cycles(self, branch: _Branch, step: int) -> _Branch | None:
        """The branch without examples that are in a cycle, if these are many enough; None if nobody is left."""
        if not self._repeatable or step < SHORT:
            return branch
        steps = torch.full_like(branch.index, step)
        if branch.cycles is None:
            return replace(branch, cycles=Cycles(branch.x, steps))
        cycles, found = branch.cycles.after(branch.x, steps)
        branch = replace(branch, cycles=cycles, periods=torch.where(branch.periods > 0, branch.periods, found))
        cyclic = branch.periods > 0
        if cyclic.sum() < LEAVE_TOGETHER * len(cyclic):
            return branch
        self._foresee(branch, cyclic, step)
        return None if cyclic.all() else branch.without(cyclic)

    def _foresee(self, branch: _Branch, cyclic: Tensor, step: int) -> None:
        """Outcomes of all later lengths, of examples that are in a cycle."""
        for run in branch.runs:
            for length in self._lengths[run]:
                if length <= step:
                    continue
                last, worst = self._scored[run, length]
                worst[branch.index[cyclic]] = self._worst[run][branch.index[cyclic]]
                for period in set(branch.periods[cyclic].tolist()):
                    there = branch.index[branch.periods == period]
                    last[there] = branch.history[step - (step - length) % period][there]


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


def worst_groups(attacks: Sequence[AttackSpec]) -> dict[Run, list[int]]:
    """Places of the (I)FGSM attacks of which only the worst-so-far score is asked, by radius and step size."""
    groups: dict[Run, list[int]] = {}
    for place, spec in enumerate(attacks):
        if spec.shared and spec.score == "worst":
            groups.setdefault(_run(spec), []).append(place)
    return groups


def _run(spec: AttackSpec) -> Run:
    return spec.eps, spec.eps if spec.alpha is None else spec.alpha
