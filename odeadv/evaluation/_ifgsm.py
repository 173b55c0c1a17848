"""FGSM and IFGSM at several radii, step sizes and lengths, from as few gradients as will do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from odeadv.attacks.balls import Bounds, linf_bounds, rows, sign_step
from odeadv.evaluation._cycles import SHORT, Cycles
from odeadv.evaluation._prepare import Scorer

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
