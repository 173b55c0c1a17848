"""States at the times asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from odeadv.fields import VectorField
from odeadv.splitting import Grid, Stepper, TimeStep
from odeadv.splitting.status import Status
from odeadv.support.isolation import without_effects


def _last_good(
    stepper: Stepper, saved: Sequence[tuple[float, Tensor]], grid: Grid, field: VectorField
) -> tuple[float, Tensor]:
    """The end of the last step up to which all states are finite, by running again the steps between two of ``saved``.

    ``saved`` are times and states of the solve in their order, its start and its end among them.
    """
    bad = next((k for k, (_, x) in enumerate(saved) if not bool(x.isfinite().all())), None)
    if bad is None:
        return saved[-1][0], saved[-1][1].detach()
    limit, nodes = grid.sign * saved[bad][0], set(grid.times)
    t, x = [(t, x.detach()) for t, x in saved[: max(bad, 1)] if t in nodes][-1]
    with without_effects(field.modules, x.device), torch.no_grad():
        for step in grid.part(grid.times.index(t), len(grid)):
            if grid.sign * step.t1 >= limit:
                break
            y = stepper.advance(x, step)
            if not bool(y.isfinite().all()):
                break
            t, x = step.t1, y
    return t, x


def _run(
    stepper: Stepper, x0: Tensor, grid: Grid, times: Sequence[float], field: VectorField, order: float
) -> tuple[Tensor, list[Tensor]]:
    """The final state, and the states at ``times``, which are in the order of the solve."""
    x = x0
    saved: list[Tensor] = []
    if not len(grid):
        return x, [x] * len(times)
    for step, end in _strides(stepper, x, grid, times):
        before, x = x, end
        while len(saved) < len(times) and grid.sign * times[len(saved)] <= grid.sign * step.t1:
            saved.append(_within(stepper, step, before, x, times[len(saved)], field, order))
    return x, saved


def _strides(stepper: Stepper, x: Tensor, grid: Grid, times: Sequence[float]) -> Iterator[tuple[TimeStep, Tensor]]:
    """The steps of ``grid`` with their ends; those between which nothing is saved as one, where that saves flows."""
    if not stepper.joins:
        yield from zip(grid, stepper.states(x, grid), strict=True)
        return
    nodes = {0, len(grid)}
    for t in times:
        n = grid.locate(t)
        nodes |= {node for node in (n, n + 1) if grid.times[node] == t} or {n, n + 1}
    for first, last in pairwise(sorted(nodes)):
        x = stepper.march(x, grid.part(first, last))
        t0, t1 = grid.times[first], grid.times[last]
        yield grid[first] if last == first + 1 else TimeStep(t0, t1, t1 - t0), x


def _reached(times: Sequence[float], grid: Grid, status: Status) -> list[float]:
    """The times to save at; where the solve ended early, those it has reached and its end."""
    if status in (Status.STEP_TOO_SMALL, Status.TOO_MANY_STEPS):
        return [*(t for t in times if grid.sign * t < grid.sign * grid.times[-1]), grid.times[-1]]
    return [grid.snap(t) for t in times]


def _within(
    stepper: Stepper, step: TimeStep, before: Tensor, after: Tensor, t: float, field: VectorField, order: float
) -> Tensor:
    """Dense output of the scheme's order: the ends themselves, a cubic Hermite polynomial or a part of a step between.

    The polynomial's error is of fourth order, and in proportion to slopes of the field. Where the order is not enough,
    or sub-steps stay accurate however steep the field is, as exact flows do, the step is taken again up to ``t`` only.
    """
    if t == step.t0:
        return before
    if t == step.t1:
        return after
    stepper.refuse_jump(step)
    s = (t - step.t0) / step.h
    if order > 4 or not stepper.explicit:
        with without_effects(field.modules, before.device):
            return stepper.advance(before, TimeStep(step.t0, t, t - step.t0))
    with without_effects(field.modules, before.device):
        left, right = stepper.velocity(before, step.t0, step), stepper.velocity(after, step.t1, step)
    value = torch.lerp(before, after, s * s * (3.0 - 2.0 * s))
    return torch.add(value, s * (1.0 - s) ** 2 * left - s * s * (1.0 - s) * right, alpha=step.h)


def _status(so_far: Status, *values: Tensor | None) -> Status:
    """``so_far``, unless a value is not finite, or cannot be looked at."""
    finite = [(value.detach() * 0).sum() == 0 for value in values if value is not None]  # cheaper than isfinite().all()
    try:
        if not bool(torch.stack(finite).all()):
            return Status.NON_FINITE
    except RuntimeError:  # data-dependent control flow, which torch.func.vmap refuses
        return Status.UNKNOWN if so_far is Status.SUCCESS else so_far
    return so_far
