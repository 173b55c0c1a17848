"""FGSM and IFGSM with shared work: runs of several radii and lengths, cycles, and the worst-so-far queue."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from odeadv.attacks.balls import Bounds, linf_bounds, rows, sign_step
from odeadv.evaluation._prepare import Prepared, Scorer
from odeadv.evaluation.protocols import AttackSpec

IfgsmRun = tuple[float, float]  # (eps, alpha)
Load = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]  # maps indices to images, labels, indices

# Examples in a cycle leave a batch together, when they are at least this share of it. Rounding depends on the
# composition of a batch, so the composition should change seldom.
LEAVE_TOGETHER = 0.25
# The search for cycles starts after this many steps. Shorter runs (the paper's have 20 steps) rarely have cycles, and
# rounding may change if examples leave the batch.
SHORT = 20
# An earlier iterate is kept for KEPT_FOR steps, or for the share KEPT_SHARE of the steps so far if that is more. Most
# cycles have 2 to 8 steps. The share makes it possible to find longer cycles in long runs.
KEPT_FOR, KEPT_SHARE = 16, 1 / 8


def run_of(spec: AttackSpec) -> IfgsmRun:
    """Return radius and step size of an FGSM or IFGSM attack; both must be the same for all examples."""
    assert isinstance(spec.eps, float)
    assert isinstance(spec.alpha, float)
    return spec.eps, spec.alpha


def queues_of(attacks: Sequence[AttackSpec]) -> dict[IfgsmRun, int]:
    """Return the FGSM and IFGSM runs that need only the worst-so-far score, each with its number of steps."""
    queues: dict[IfgsmRun, int] = {}
    for spec in attacks:
        if spec.shared and spec.score == "worst":
            queues[run_of(spec)] = max(queues.get(run_of(spec), 0), spec.steps or 1)
    return queues


@dataclass(frozen=True)
class Cycles:
    """One earlier iterate of each example. It shows if a later iterate is bitwise equal, so that the run is in a cycle.

    A sign step of fixed length moves a pixel among few values, so long runs mostly end in a cycle of a few steps.
    The kept iterate of an example is replaced after K steps. K is `KEPT_FOR`, or the share `KEPT_SHARE` of the steps
    so far if that is more. A cycle of at most K steps is found at most K steps plus one period after the run enters it.

    Attributes:
        kept: (n, ...), the earlier iterates.
        kept_at: (n,) int64, the number of steps that led to each kept iterate.
    """

    kept: Tensor
    kept_at: Tensor

    def rows(self, keep: Tensor) -> Cycles:
        """Return the earlier iterates of the examples chosen by ``keep``, (n,) bool."""
        return Cycles(rows(self.kept, keep), self.kept_at[keep])

    def after(self, x: Tensor, step: Tensor) -> tuple[Cycles, Tensor]:
        """Compare the iterates ``x`` with the kept iterates, and replace kept iterates that are old.

        Args:
            x: (n, ...), the iterates after ``step`` steps.
            step: (n,) int64, one more than in the last call.

        Returns:
            The iterates that are kept from now on; and (n,) int64, the number of steps since the kept iterate if it
            equals ``x`` (a multiple of the period), or 0 if it differs.
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


@dataclass(frozen=True)
class _Branch:
    """Runs whose iterates are bitwise equal so far.

    Attributes:
        x: the iterates of the examples that are still attacked.
        gradient: the gradient at ``x``.
        runs: the runs.
        index: the places of these examples in the batch.
        bounds: the ball of each run.
        scorer: the scorer of these examples.
        cycles: earlier iterates; None before the search for cycles starts.
        periods: the period of each example's cycle, or a multiple of it; 0 if the example is in no known cycle.
        history: one (batch,) bool per iterate so far, from the clean images on: True if classified correctly.
    """

    x: Tensor
    gradient: Tensor
    runs: list[IfgsmRun]
    index: Tensor
    bounds: Mapping[IfgsmRun, Bounds]
    scorer: Scorer
    cycles: Cycles | None
    periods: Tensor
    history: list[Tensor]

    def without(self, gone: Tensor) -> _Branch:
        """Return the branch without the examples ``gone``."""
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

    All runs share the clean gradient. Runs with the same alpha share all work while their iterates are bitwise equal.
    (Up to rounding, the radius does not act within the first eps / alpha steps.) The forward pass that scores an
    iterate also gives its gradient. Examples whose iterates enter a cycle (`Cycles`) leave a long run, because the
    cycle repeats their outcomes.

    Args:
        scorer: the scorer of this batch.
        images: (n, ...), the clean images.
        clean: (n,) bool, True if the clean image is classified correctly.
        clean_gradient: the gradient at ``images``.
        lengths: for each (eps, alpha), the numbers of steps after which the run is scored.
        repeatable: True if equal images always have equal gradients, so that a cycle repeats.
        passes: number of forward passes that score the last iterate; more than one for random models.

    Attributes:
        losses: (n,), the cross-entropy of the latest differentiated iterate of each run, the largest over all runs;
            NaN before the first such iterate.
    """

    def __init__(
        self,
        scorer: Scorer,
        images: Tensor,
        clean: Tensor,
        clean_gradient: Tensor,
        lengths: Mapping[IfgsmRun, Sequence[int]],
        *,
        repeatable: bool,
        passes: int,
    ) -> None:
        self._scorer, self._images, self._clean, self._gradient = scorer, images, clean, clean_gradient
        self._lengths, self._repeatable, self._passes = lengths, repeatable, passes
        self._worst = dict.fromkeys(lengths, clean)
        self._losses: dict[IfgsmRun, Tensor] = {}
        self._scored = {
            (run, length): (clean.new_zeros(passes, len(clean)), torch.zeros_like(clean))
            for run, counts in lengths.items()
            for length in counts
        }

    @property
    def losses(self) -> Tensor:
        """The largest cross-entropy over all runs, see the attributes of the class."""
        if not self._losses:
            return torch.full(self._clean.shape, torch.nan, device=self._clean.device)
        return torch.stack(list(self._losses.values())).amax(dim=0)

    def outcomes(self) -> dict[tuple[IfgsmRun, int], tuple[Tensor, Tensor]]:
        """Return last-iterate (passes, n) and worst-so-far (n,) outcomes for every run and each of its lengths."""
        for alpha in dict.fromkeys(run[1] for run in self._lengths):
            branches = [self._trunk([run for run in self._lengths if run[1] == alpha])]
            step = 0
            while branches:
                step += 1
                branches = [after for branch in branches for after in self._advance(branch, step)]
        return self._scored

    def _trunk(self, runs: list[IfgsmRun]) -> _Branch:
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
        """Take one step of all runs of a branch and score it; return the branches that continue."""
        moved = sign_step(branch.x, branch.gradient, branch.runs[0][1])
        children: list[tuple[Tensor, list[IfgsmRun]]] = []
        for run in branch.runs:
            x = branch.bounds[run].project(moved)
            same = next((runs for other, runs in children if torch.equal(other, x)), None)
            if same is None:
                children.append((x, [run]))
            else:
                same.append(run)
        return [after for x, runs in children if (after := self._scored_at(branch, x, runs, step)) is not None]

    def _scored_at(self, branch: _Branch, x: Tensor, runs: list[IfgsmRun], step: int) -> _Branch | None:
        """Score the iterates ``x`` of the runs; return the branch that continues, or None if all runs end here."""
        index, scorer = branch.index, branch.scorer
        onward = [run for run in runs if max(self._lengths[run]) > step]
        reported = any(step in self._lengths[run] for run in runs)
        gradient = branch.gradient
        if onward:
            logits, gradient = scorer.logits_and_gradient(x)
            right = scorer.right(logits)[None]
            losses = scorer.losses(logits)
            for run in onward:
                self._losses[run] = (
                    losses if len(losses) == len(self._clean) else self._losses[run].index_put((index,), losses)
                )
        if not onward or (reported and self._passes > 1):
            right = scorer.correct(x, self._passes)
        correct = right[0]
        for run in runs:
            self._worst[run] = self._worst[run].index_put((index,), self._worst[run][index] & correct)
            if step in self._lengths[run]:
                last, worst = self._scored[run, step]
                last[:, index], worst[index] = right, self._worst[run][index]
        if not onward:
            return None
        history = [*branch.history, branch.history[-1].index_put((index,), correct)]
        after = replace(branch, x=x, gradient=gradient, runs=onward, history=history)
        return self._left_by_cycles(after, step)

    def _left_by_cycles(self, branch: _Branch, step: int) -> _Branch | None:
        """Remove examples in a cycle from the branch, if there are enough of them (`LEAVE_TOGETHER`).

        Returns None if no example is left.
        """
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
        """Fill in the outcomes of examples in a cycle for all later lengths."""
        for run in branch.runs:
            for length in self._lengths[run]:
                if length <= step:
                    continue
                last, worst = self._scored[run, length]
                worst[branch.index[cyclic]] = self._worst[run][branch.index[cyclic]]
                for period in set(branch.periods[cyclic].tolist()):
                    there = branch.index[branch.periods == period]
                    last[:, there] = branch.history[step - (step - length) % period][there]


class WorstSoFar:
    """IFGSM in batches that are refilled: an example leaves as soon as it is fooled or can no longer be fooled.

    Args:
        prepared: the model.
        load: maps indices (k,) to images and labels on the model's device.
        waiting: (n,) int64, indices of the examples to attack.
        eps: radius of the L-infinity ball.
        alpha: size of one step.
        steps: an example that was never fooled leaves after this many steps.
        batch_size: images in one forward pass.
        repeatable: True if equal images always have equal gradients. Then an example whose iterates enter a cycle
            leaves, because it will not be fooled.

    Attributes:
        forward_passes: number of images sent through the model so far.
        gradient_evaluations: number of those images that were also differentiated.
        no_gradient: indices of examples whose gradient at the clean image is exactly zero.
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
        self.no_gradient: list[int] = []
        self._prepared, self._load, self._waiting = prepared, load, waiting
        self._eps, self._alpha, self._steps, self._batch_size = eps, alpha, steps, batch_size
        self._repeatable = repeatable

    def run(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (indices, fooled_at), (k,) each, for examples when they leave.

        ``fooled_at`` is the number of the first misclassified iterate (0 is the clean image), or ``steps`` + 1 if no
        iterate is misclassified.
        """
        batch = self._loaded(self._waiting[:0])
        while len(batch.index) or len(self._waiting):
            batch = self._filled(batch)
            scorer = self._prepared.scorer(batch.labels)
            ending = batch.step >= self._steps
            if ending.all():  # the gradient of last iterates is not needed
                logits, gradient = scorer.logits(batch.x), torch.zeros_like(batch.x)
            else:
                logits, gradient = scorer.logits_and_gradient(batch.x)
                zero = (gradient == 0).flatten(1).all(dim=1) & (batch.step == 0)
                self.no_gradient += batch.index[zero].tolist()
            correct = scorer.right(logits)
            self.forward_passes += scorer.forward_passes
            self.gradient_evaluations += scorer.gradient_evaluations
            leaving = ~correct | ending
            if leaving.any():
                fooled_at = torch.where(correct, self._steps + 1, batch.step)
                yield batch.index[leaving].cpu(), fooled_at[leaving].cpu()
                gradient = gradient[~leaving]
                batch = batch.subset(~leaving)
            batch.x = batch.bounds.project(sign_step(batch.x, gradient, self._alpha))
            batch.step = batch.step + 1
            if self._repeatable:
                batch.cycles, ago = batch.cycles.after(batch.x, batch.step)
                again = (ago > 0) & (batch.step > SHORT)
                if again.any():  # every iterate of the cycle was classified correctly
                    yield batch.index[again].cpu(), torch.full_like(batch.step[again], self._steps + 1).cpu()
                    batch = batch.subset(~again)

    def _filled(self, batch: _UnderAttack) -> _UnderAttack:
        room = self._batch_size - len(batch.index)
        if not room or not len(self._waiting):
            return batch
        coming, self._waiting = self._waiting[:room], self._waiting[room:]
        return batch.joined(self._loaded(coming))

    def _loaded(self, index: Tensor) -> _UnderAttack:
        images, labels, _ = self._load(index)
        step = torch.zeros(len(index), dtype=torch.int64, device=labels.device)
        bounds = linf_bounds(images, self._eps)
        return _UnderAttack(index.to(labels.device), images, labels, bounds, step, Cycles(images, step))


@dataclass
class _UnderAttack:
    """Examples under attack.

    Attributes:
        index: places of the examples in the data.
        x: iterates of the examples.
        labels: labels of the examples.
        bounds: balls around the clean images.
        step: number of steps so far, per example.
        cycles: earlier iterates.
    """

    index: Tensor
    x: Tensor
    labels: Tensor
    bounds: Bounds
    step: Tensor
    cycles: Cycles

    def subset(self, keep: Tensor) -> _UnderAttack:
        """Return the examples chosen by ``keep``, (n,) bool."""
        bounds, cycles = self.bounds.rows(keep), self.cycles.rows(keep)
        return _UnderAttack(self.index[keep], rows(self.x, keep), self.labels[keep], bounds, self.step[keep], cycles)

    def joined(self, other: _UnderAttack) -> _UnderAttack:
        """Return these examples followed by ``other``."""
        if not len(self.index):
            return other
        bounds = Bounds(
            torch.cat([self.bounds.lower, other.bounds.lower]), torch.cat([self.bounds.upper, other.bounds.upper])
        )
        cycles = Cycles(
            torch.cat([self.cycles.kept, other.cycles.kept]), torch.cat([self.cycles.kept_at, other.cycles.kept_at])
        )
        return _UnderAttack(
            torch.cat([self.index, other.index]),
            torch.cat([self.x, other.x]),
            torch.cat([self.labels, other.labels]),
            bounds,
            torch.cat([self.step, other.step]),
            cycles,
        )
