"""FGSM and IFGSM at several radii, step sizes and lengths, from as few gradients as will do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from odeadv.attacks._linf import Bounds, linf_bounds, sign_step
from odeadv.evaluation._prepare import Scorer

Run = tuple[float, float]  # eps, alpha


@dataclass
class _Branch:
    """Runs whose iterates are the same so far, to the last bit."""

    x: Tensor
    gradient: Tensor
    runs: list[Run]


def shared_outcomes(
    scorer: Scorer, images: Tensor, clean: Tensor, clean_gradient: Tensor, lengths: Mapping[Run, Sequence[int]]
) -> dict[tuple[Run, int], tuple[Tensor, Tensor]]:
    """For every run and each of its lengths: last-iterate and worst-so-far outcomes, (n,) bool each.

    The clean gradient is the first of every run. Runs of one alpha then go on as one for as long as their iterates
    are bitwise equal: within eps / alpha steps a radius is no bound yet. The forward pass that scores an iterate is
    that of its gradient.

    Args:
        scorer: of this batch.
        images: the clean ones, (n, ...).
        clean: which of them are classified correctly.
        clean_gradient: the gradient there.
        lengths: for each (eps, alpha) the numbers of steps that are scored.
    """
    bounds = {run: linf_bounds(images, run[0]) for run in lengths}
    steps = {run: max(counts) for run, counts in lengths.items()}
    worst = dict.fromkeys(lengths, clean)
    scored: dict[tuple[Run, int], tuple[Tensor, Tensor]] = {}
    for alpha in dict.fromkeys(run[1] for run in lengths):
        branches = [_Branch(images, clean_gradient, [run for run in lengths if run[1] == alpha])]
        step = 0
        while branches:
            step += 1
            branches = [
                after
                for branch in branches
                for after in _advance(scorer, branch, bounds, alpha, step, steps, worst, lengths, scored)
            ]
    return scored


def _advance(
    scorer: Scorer,
    branch: _Branch,
    bounds: Mapping[Run, Bounds],
    alpha: float,
    step: int,
    steps: Mapping[Run, int],
    worst: dict[Run, Tensor],
    lengths: Mapping[Run, Sequence[int]],
    scored: dict[tuple[Run, int], tuple[Tensor, Tensor]],
) -> list[_Branch]:
    """One step of all runs of a branch, scored; what they are after it."""
    after: list[_Branch] = []
    moved = sign_step(branch.x, branch.gradient, alpha)
    children: list[tuple[Tensor, list[Run]]] = []
    for run in branch.runs:
        x = bounds[run].project(moved)
        same = next((runs for other, runs in children if torch.equal(other, x)), None)
        if same is None:
            children.append((x, [run]))
        else:
            same.append(run)
    for x, runs in children:
        onward = [run for run in runs if steps[run] > step]
        reported = any(step in lengths[run] for run in runs)
        gradient = None
        if onward:
            unsettled = torch.stack([worst[run] for run in runs]).any(dim=0)
            correct, gradient = scorer.correct_and_gradient(x, open=None if reported else unsettled)
        else:
            correct = scorer.correct(x)
        for run in runs:
            worst[run] = worst[run] & correct
            if step in lengths[run]:
                scored[run, step] = (correct, worst[run])
        if gradient is not None:
            after.append(_Branch(x, gradient, onward))
    return after
