"""States at requested times, computed during a solve or after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from odeadv.fields import VectorField
from odeadv.splitting import Grid, Stepper, TimeStep
from odeadv.splitting.interpolation import cubic, like_real
from odeadv.support.checks import shown
from odeadv.support.isolation import Recompute, outside_inference_mode, version, without_effects

_HERMITE_ORDER = 4  # order of the error of cubic interpolation within a step


@dataclass(frozen=True)
class Within:
    """Computes states at times within steps, to the order of the method.

    For explicit methods of order four or less it uses a cubic Hermite polynomial, which costs two evaluations of the
    field per step. For all other methods it repeats the step up to each time. The reason is that the error of the
    polynomial has order four and grows with the slopes of the field. Buffers and the random state are not changed.

    Attributes:
        stepper: the stepper that advances the state.
        order: order of the method.
        field: the field that the stepper advances.
    """

    stepper: Stepper
    order: float
    field: VectorField

    def __call__(self, step: TimeStep, ends: tuple[Tensor, Tensor], t: float) -> Tensor:
        """Return the state at ``t`` within ``step``. ``ends`` are the states at the two ends of the step."""
        if t == step.t0:
            return ends[0]
        return ends[1] if t == step.t1 else self._between(step, ends, [t], (t - step.t0) / step.h)

    def all(self, step: TimeStep, ends: tuple[Tensor, Tensor], times: Sequence[float], moving: Tensor) -> list[Tensor]:
        """Return the states at all ``times``. ``moving`` is a tensor of the same times, and may require a gradient."""
        s = (moving - step.t0) / step.h
        return list(self._between(step, ends, times, s.reshape(-1, *(1,) * ends[0].ndim)).unbind())

    def _between(
        self, step: TimeStep, ends: tuple[Tensor, Tensor], times: Sequence[float], s: Tensor | float
    ) -> Tensor:
        """Return the state at the fraction ``s``, or the states at all ``times`` if ``s`` is a tensor of fractions."""
        before, after = ends
        with without_effects(self.field.modules, before.device):
            if self.order <= _HERMITE_ORDER and self.stepper.explicit:
                left = self.stepper.velocity(before, step.t0, step).clone()
                return cubic(before, after, (left, self.stepper.velocity(after, step.t1, step)), s, step.h)
            found = [self.stepper.advance(before, TimeStep(step.t0, t, t - step.t0)) for t in times]
            if not isinstance(s, Tensor):
                return found[0]
            states = torch.stack(found)
            if s.requires_grad:  # dx/dt is the value of the field, which is correct to the order of the method
                slopes = [self.stepper.velocity(x, t, step).clone() for x, t in zip(found, times, strict=True)]
                states = states + like_real((s - s.detach()) * step.h, states) * torch.stack(slopes)
            return states


class SavedStates(NamedTuple):
    """The states of a solve.

    Attributes:
        times: the requested times that the steps reached. If the steps end early, their end is added.
        states: the states at ``times``.
        nodes: the states at all times of the grid if they are kept; otherwise only the last state.
    """

    times: list[float]
    states: list[Tensor]
    nodes: list[Tensor]


def solve_path(
    within: Within,
    x0: Tensor,
    grid: Grid,
    save_at: Sequence[float] | Literal["steps"] | None,
    *,
    keep_nodes: bool = False,
    segments: Recompute | None = None,
) -> SavedStates:
    """Solve along ``grid`` and return the saved states.

    Args:
        within: contains the stepper, and computes the states between nodes.
        x0: initial state.
        grid: the steps. They may end before the last time of ``save_at`` if a search for steps has failed.
        save_at: the times to save, in the order of the solve; ``"steps"`` for every node, None for the two ends.
        keep_nodes: True keeps the states at all nodes.
        segments: runs the steps in segments and does not keep their autograd graphs.
    """
    ends = list(dict.fromkeys((grid.times[0], grid.times[-1])))
    times = ends if save_at is None else list(grid.times) if save_at == "steps" else _reached(save_at, grid)
    if not len(grid):
        return SavedStates(times, [x0] * len(times), [x0])
    if save_at is None and not keep_nodes:
        final = within.stepper.march(x0, grid, segments)
        return SavedStates(times, [x0, final], [final])
    along = partial(_along, within, keep_nodes)
    nodes, saved = [x0], list[Tensor]()
    if segments is None or within.stepper.merges:
        found, saved = along(x0, grid, times, segments)
        nodes += found
    else:
        for part in grid.parts(segments.every):
            inside = [t for t in times[len(saved) :] if grid.sign * t <= grid.sign * part.times[-1]]
            found, new = segments(along, nodes[-1], part, inside, None)
            nodes, saved = [*nodes, *found], [*saved, *new]
    return SavedStates(times[: len(saved)], saved, nodes if keep_nodes else nodes[-1:])


def _along(
    within: Within, keep_nodes: bool, x: Tensor, grid: Grid, times: Sequence[float], segments: Recompute | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the states at the nodes and the states at ``times``.

    The first node is left out. If ``keep_nodes`` is False, all nodes except the last are left out.
    """
    nodes, saved = list[Tensor](), list[Tensor]()
    for step, end in _strides(within.stepper, x, grid, grid.times if keep_nodes else times, segments):
        while len(saved) < len(times) and grid.sign * times[len(saved)] <= grid.sign * step.t1:
            saved.append(within(step, (x, end), times[len(saved)]))
        x = end
        if keep_nodes:
            nodes.append(x)
    return nodes or [x], saved


def _reached(times: Sequence[float], grid: Grid) -> list[float]:
    """Return the times to save. If the grid ends too early, return the times that it reaches, and its end."""
    last = grid.times[-1]
    snapped = [grid.snap(t) for t in times]
    if grid.sign * snapped[-1] <= grid.sign * last:
        return snapped
    return [*(t for t in snapped if grid.sign * t < grid.sign * last), last]


def _strides(
    stepper: Stepper, x: Tensor, grid: Grid, times: Sequence[float], segments: Recompute | None
) -> Iterator[tuple[TimeStep, Tensor]]:
    """Yield steps with their end states.

    Consecutive steps are merged if no state is saved between them and merging saves exact flows.
    """
    if not stepper.merges:
        yield from zip(grid, stepper.states(x, grid, segments), strict=True)
        return
    nodes = {0, len(grid)}
    for t in times:
        n = grid.locate(t)
        nodes |= {node for node in (n, n + 1) if grid.times[node] == t} or {n, n + 1}
    for first, last in pairwise(sorted(nodes)):
        x = stepper.march(x, grid.part(first, last), segments)
        t0, t1 = grid.times[first], grid.times[last]
        yield grid[first] if last == first + 1 else TimeStep(t0, t1, t1 - t0), x


class Dense:
    """Computes the state at any time from the kept steps of a solve.

    Args:
        within: computes the states within steps.
        grid: the steps.
        nodes: the states at the ends of the steps.
        narrow: the 16-bit dtype of returned states, if the states are kept in float32.
    """

    def __init__(self, within: Within, grid: Grid, nodes: Sequence[Tensor], narrow: torch.dtype | None) -> None:
        self._within, self._grid, self._nodes, self._narrow = within, grid, nodes, narrow
        self._weights = self._versions()
        self._graph = torch.is_grad_enabled()

    def __call__(self, t: float | Sequence[float] | Tensor) -> Tensor:
        """See `Solution.__call__`."""
        if self._versions() != self._weights:
            raise ValueError(
                "t: weights of the field have changed since the solve, and states between steps need the old ones; "
                "call the solution before the weights change, or give the times to solve(save_at=...)"
            )
        try:
            given = t if isinstance(t, Tensor) else torch.as_tensor(t, dtype=torch.float64)
        except (TypeError, ValueError):
            raise TypeError(f"t: got {shown(t)}, expected real times") from None
        if given.is_complex() or given.dtype == torch.bool:
            raise TypeError(f"t: got {given.dtype}, expected real times")
        flat = given.reshape(-1).to(torch.float64)
        times = [self._grid.snap(time) for time in flat.tolist()]
        # The values are exactly ``times``, and the gradients are the gradients of the given tensor.
        moving = flat + (flat.new_tensor(times) - flat.detach())
        steps: dict[int, list[int]] = {}
        for i, time in enumerate(times):
            steps.setdefault(self._grid.locate(time), []).append(i)
        found: dict[int, Tensor] = {}
        with outside_inference_mode(), torch.set_grad_enabled(torch.is_grad_enabled() and self._graph):
            for n, members in steps.items():
                found |= zip(members, self._on_step(n, [times[i] for i in members], moving[members]), strict=True)
        shapes = {x.shape for x in found.values()} or {self._nodes[0].shape}
        if len(shapes) > 1:
            raise ValueError("t: the states at these times differ in shape; ask for one time after the other")
        states = [found[i] for i in range(len(times))]
        stacked = torch.stack(states) if states else self._nodes[0].new_empty(0)
        return stacked.reshape(*given.shape, *shapes.pop()).to(self._narrow or stacked.dtype)

    def _on_step(self, n: int, times: Sequence[float], moving: Tensor) -> list[Tensor]:
        """Return the states at ``times``, all within step ``n``. ``moving`` contains the same times as a tensor."""
        step, ends = self._grid[n], (self._nodes[n], self._nodes[n + 1])
        inner = [i for i, t in enumerate(times) if t not in (step.t0, step.t1) or moving.requires_grad]
        if inner and any(start < 0.5 * (step.t0 + step.t1) < stop for start, stop in self._within.field.jumps):
            raise ValueError(
                f"t: {times[inner[0]]:g} lies within the jump from {step.t0:g} to {step.t1:g}, where no state is "
                "defined"
            )
        found = [ends[t == step.t1] for t in times]
        if inner:
            between = self._within.all(step, ends, [times[i] for i in inner], moving[inner])
            for i, x in zip(inner, between, strict=True):
                found[i] = x
        return found

    def _versions(self) -> list[int]:
        return [version(weight) for module in self._within.field.modules for weight in module.parameters()]
