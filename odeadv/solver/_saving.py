"""States at the times asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from odeadv.fields import VectorField
from odeadv.splitting import Grid, Stepper, TimeStep
from odeadv.support.isolation import Recompute, without_effects

_HERMITE_ORDER = 4  # the error of cubic interpolation within a step is of fourth order


def states_at(
    stepper: Stepper,
    x0: Tensor,
    grid: Grid,
    save_at: Sequence[float] | Literal["steps"] | None,
    order: float,
    field: VectorField,
    again: Recompute | None = None,
) -> tuple[Tensor, list[float], list[Tensor]]:
    """Solve along ``grid``.

    Args:
        stepper: advances the state.
        x0: initial state.
        grid: the steps; they may end before the last time if a search for steps has failed.
        save_at: the times to save, in the order of the solve; ``"steps"`` for every node, None for the two ends.
        order: of the method, which dense output keeps.
        field: its modules' buffers are put back after evaluations for dense output.
        again: runs the steps in segments, whose autograd graph is not kept.

    Returns:
        The final state, the saved times and the saved states.
    """
    if save_at is None:
        if not len(grid):
            return x0, [grid.times[0]], [x0]
        final = stepper.march(x0, grid, again)
        return final, [grid.times[0], grid.times[-1]], [x0, final]
    times = list(grid.times) if save_at == "steps" else _reached(save_at, grid)
    x, saved = x0, list[Tensor]()
    if not len(grid):
        return x, times, [x] * len(times)
    along = partial(_along, stepper, order, field)
    if again is None or stepper.merges:
        x, *saved = along(x, grid, times, again)
    else:
        for part in grid.parts(again.every):
            inside = [t for t in times[len(saved) :] if grid.sign * t <= grid.sign * part.times[-1]]
            x, *new = again(along, x, part, inside, None)
            saved += new
    return x, times[: len(saved)], saved


def _along(
    stepper: Stepper,
    order: float,
    field: VectorField,
    x: Tensor,
    grid: Grid,
    times: Sequence[float],
    again: Recompute | None,
) -> tuple[Tensor, ...]:
    """Return the state at the end of ``grid``, and the states at ``times``."""
    saved: list[Tensor] = []
    for step, end in _strides(stepper, x, grid, times, again):
        before, x = x, end
        while len(saved) < len(times) and grid.sign * times[len(saved)] <= grid.sign * step.t1:
            saved.append(_within(stepper, step, (before, x), times[len(saved)], order, field))
    return x, *saved


def _reached(times: Sequence[float], grid: Grid) -> list[float]:
    """Return the times to save at; if the grid ends before one of them, those it reaches and its end."""
    last = grid.times[-1]
    snapped = [grid.snap(t) for t in times]
    if grid.sign * snapped[-1] <= grid.sign * last:
        return snapped
    return [*(t for t in snapped if grid.sign * t < grid.sign * last), last]


def _strides(
    stepper: Stepper, x: Tensor, grid: Grid, times: Sequence[float], again: Recompute | None
) -> Iterator[tuple[TimeStep, Tensor]]:
    """Yield steps with their end states.

    Consecutive steps are merged if no state is saved between them and merging saves exact flows.
    """
    if not stepper.merges:
        yield from zip(grid, stepper.states(x, grid, again), strict=True)
        return
    nodes = {0, len(grid)}
    for t in times:
        n = grid.locate(t)
        nodes |= {node for node in (n, n + 1) if grid.times[node] == t} or {n, n + 1}
    for first, last in pairwise(sorted(nodes)):
        x = stepper.march(x, grid.part(first, last), again)
        t0, t1 = grid.times[first], grid.times[last]
        yield grid[first] if last == first + 1 else TimeStep(t0, t1, t1 - t0), x


def _within(
    stepper: Stepper,
    step: TimeStep,
    ends: tuple[Tensor, Tensor],
    t: float,
    order: float,
    field: VectorField,
) -> Tensor:
    """Return the state at ``t`` within ``step``: an end itself, a cubic Hermite polynomial, or a part of the step.

    The polynomial's error grows with the slopes of the field. The step is taken again up to ``t`` if the order of the
    method is higher, or if its sub-steps stay accurate for steep fields, as exact flows do.
    """
    before, after = ends
    if t == step.t0:
        return before
    if t == step.t1:
        return after
    s = (t - step.t0) / step.h
    with without_effects(field.modules, before.device):
        if order > _HERMITE_ORDER or not stepper.explicit:
            return stepper.advance(before, TimeStep(step.t0, t, t - step.t0))
        left, right = stepper.velocity(before, step.t0, step).clone(), stepper.velocity(after, step.t1, step)
    value = torch.lerp(before, after, s * s * (3.0 - 2.0 * s))
    return torch.add(value, s * (1.0 - s) ** 2 * left - s * s * (1.0 - s) * right, alpha=step.h)
