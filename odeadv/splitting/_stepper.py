"""The loop over the steps of a grid, in its readable form. `_flat` contains the fast form."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from odeadv.fields.operator import Cost, Jump, Operator, Slopes
from odeadv.fields.terms import Sum
from odeadv.splitting._flat import FlatLoop
from odeadv.splitting._grid import Grid, TimeStep
from odeadv.splitting._scheme import Composition, Stage
from odeadv.splitting._substep import Clock, Exact, RungeKutta, SubStep
from odeadv.support.isolation import Recompute, inside_transform

# The first, the last and every 256th step of a solve are watched: the state is compared before and after each
# evaluation. To watch more steps would take time, and a field that writes to its state does so on most steps.
WATCHED = 256
# The steps of a network are different blocks, so each solve watches one step, and the next solve another step.
_TURNS = count()
WHOLE: tuple[tuple[float, Composition], ...] = ((1.0, (Stage(0, 1.0, 0.0),)),)


class ClockedStage(NamedTuple):
    """A `Stage` for the loop. ``own``, the sum of earlier weights, is the start on the operator's own clock."""

    operator: int
    weight: float
    start: float
    stop: float
    frozen: bool
    own: float


@dataclass
class Stepper:
    """Advances a sum of operators by steps of a scheme.

    Attributes:
        operators: the terms of the field.
        substeps: one sub-step per operator.
        compositions: the tables of the scheme with their factors. Their stages refer to ``operators`` by number.
        costs: the current cost of each operator.
    """

    operators: Sequence[Operator]
    substeps: Sequence[SubStep]
    compositions: Sequence[tuple[float, Composition]] = WHOLE
    costs: Sequence[Cost] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.costs:
            self.costs = [Cost() for _ in self.operators]
        self._tables = [(factor, _clocked(stages)) for factor, stages in self.compositions]
        # Constant operators do not need a call of `Operator.on` on every step.
        self._constant = all(operator.constant for operator in self.operators)
        self._piecewise = any(operator.edges for operator in self.operators)

    @property
    def counted(self) -> Sequence[Cost]:
        """The costs of the terms of the field. For a sum these are the costs of its terms."""
        first = self.operators[0]
        return first.costs if isinstance(first, Sum) and first.costs is not None else self.costs

    def advance(self, x: Tensor, step: TimeStep) -> Tensor:
        """Return the state at the end of ``step`` from the state ``x`` at its beginning."""
        if self._constant and len(self._tables) == 1:
            return self._through(x, step, self.operators, self._tables[0][1])
        local = [operator.on(step.t0, step.t1) for operator in self.operators]
        flowing = [operator for operator in local if not isinstance(operator, Jump)]
        total: Tensor | None = None
        for factor, stages in self._tables:
            if len(flowing) == len(local):
                end = self._through(x, step, flowing, stages)
            else:
                end = self._across_jump(x, step, local, stages)
            scaled = end if factor == 1.0 else end * factor
            total = scaled if total is None else total + scaled
        assert total is not None
        return total

    def states(self, x: Tensor, grid: Grid, segments: Recompute | None = None) -> Iterator[Tensor]:
        """Return the states at ``t_1 ... t_N`` of ``grid``, from the state ``x`` at ``t_0``.

        For ``segments`` see `Recompute`.
        """
        return self._states(x, grid) if segments is None else self._states_in_segments(x, grid, segments)

    def _states_in_segments(self, x: Tensor, grid: Grid, segments: Recompute) -> Iterator[Tensor]:
        for part in grid.parts(segments.every):
            ends = segments(lambda x, part: tuple(self._states(x, part)), x, part)
            x = ends[-1]
            yield from ends

    def _states(self, x: Tensor, grid: Grid) -> Iterator[Tensor]:
        flat = None if _hidden() else self._flat_loop()
        watched = self._watched_steps(x, len(grid))
        for first, last in pairwise(sorted({0, *watched, len(grid)})):
            # The first step is readable, because only readable steps are watched and detect functions that reuse
            # memory.
            self._watch(first in watched)
            x = self.advance(x, grid[first])
            self._watch(False)
            yield x
            rest = grid.part(first + 1, last)
            if flat is not None and not any(cost.reuses for cost in self.costs):
                ends = flat.states(x, rest)
            else:
                ends = self._readable_states(x, rest)
            for end in ends if len(rest) else ():
                x = end
                yield x

    def march(self, x: Tensor, grid: Grid, segments: Recompute | None = None) -> Tensor:
        """Return the state at the end of ``grid`` from ``x``.

        If `merges`, exact flows at the ends of two steps become one flow. This changes the result only by rounding.
        Strang then costs one flow of the outer operator per step instead of two. For ``segments`` see `Recompute`.
        """
        if len(grid) < 2 or not self.merges:
            for end in self.states(x, grid, segments):
                x = end
            return x
        ((_, stages),) = self._tables
        outer, head, tail = stages[0].operator, stages[0].weight, stages[-1].weight
        step = grid[0]
        self._watch(not _hidden())
        x = self._outer(outer, x, step.t0, step.h * head)
        every = len(grid) if segments is None else segments.every
        for first in range(0, len(grid) - 1, every):
            part = grid.part(first, min(first + every, len(grid) - 1) + 1)
            x = self.merged(x, part) if segments is None else segments(self.merged, x, part)
        step = grid[len(grid) - 1]
        self._watch(not _hidden())
        x = self._through(x, step, self._flowing(step), stages[1:-1])
        x = self._outer(outer, x, step.time(1.0 - tail), step.h * tail)
        self._watch(False)
        return x

    def merged(self, x: Tensor, grid: Iterable[TimeStep]) -> Tensor:
        """Advance ``x`` over the steps of ``grid`` except the last, with merged flows.

        ``x`` and the result are states after the first flow of a step: of the first step and of the last step.
        """
        ((_, stages),) = self._tables
        outer, head, tail = stages[0].operator, stages[0].weight, stages[-1].weight
        for number, (step, following) in enumerate(pairwise(grid)):
            self._watch(number % WATCHED == 0 and not _hidden())
            x = self._through(x, step, self._flowing(step), stages[1:-1])
            x = self._outer(outer, x, step.time(1.0 - tail), step.h * tail + following.h * head)
        return x

    @property
    def merges(self) -> bool:
        """True if the last stage of a step and the first stage of the next step can be merged into one exact flow."""
        if len(self._tables) > 1 or self._piecewise:
            return False
        ((_, stages),) = self._tables
        first, last = stages[0], stages[-1]
        contiguous = not (first.frozen or last.frozen) and abs(last.own + last.weight - 1.0) < 1e-12
        exact = isinstance(self.substeps[first.operator], Exact) and self.operators[first.operator].flow is not None
        return len(stages) > 1 and first.operator == last.operator and contiguous and exact

    @property
    def explicit(self) -> bool:
        """True if all sub-steps are explicit Runge-Kutta methods, which may be unstable for large steps."""
        return all(isinstance(substep, RungeKutta) for substep in self.substeps)

    def velocity(self, x: Tensor, t: float, step: TimeStep) -> Tensor:
        """Return dx/dt at the state ``x`` and the time ``t`` of ``step``, the sum of all operators.

        Raises:
            ValueError: if the field jumps on the step.
        """
        held = Slopes(Cost())
        for operator, cost in zip(self.operators, self.costs, strict=True):
            local = operator.on(step.t0, step.t1)
            if isinstance(local, Jump):
                raise ValueError(
                    f"save_at: the field jumps from {step.t0:g} to {step.t1:g}, where no state is defined in between"
                )
            held.add(local.velocity(t, x, cost))
        values = held.done()
        return sum(values[1:], start=values[0])

    def _flat_loop(self) -> FlatLoop | None:
        """Return the fast loop, or None if it would not give the same result.

        It needs constant operators with the default evaluation, a single table and Runge-Kutta sub-steps.
        """
        plain = self._constant and all(
            type(operator).velocity is Operator.velocity and type(operator).euler is Operator.euler
            for operator in self.operators
        )
        methods = [substep for substep in self.substeps if type(substep) is RungeKutta]
        if not plain or len(self._tables) > 1 or len(methods) < len(self.substeps):
            return None
        ((_, stages),) = self._tables
        return FlatLoop(self.operators, methods, stages, self.costs)

    def _readable_states(self, x: Tensor, grid: Grid) -> Iterator[Tensor]:
        for step in grid:
            x = self.advance(x, step)
            yield x

    def _watched_steps(self, x: Tensor, steps: int) -> set[int]:
        """Return the numbers of the steps that are checked for writes to the state, see `watched`."""
        if _hidden():
            return set()
        if not self._piecewise:
            return {*range(0, steps, WATCHED), steps - 1}
        if x.device.type != "cpu" and torch.is_grad_enabled():
            return set()  # a comparison would wait for the device in every training step
        return {next(_TURNS) % steps}

    def _watch(self, on: bool) -> None:
        for cost in self.costs:
            cost.watch = on

    def _flowing(self, step: TimeStep) -> list[Operator]:
        local = [operator.on(step.t0, step.t1) for operator in self.operators]
        return [operator for operator in local if not isinstance(operator, Jump)]

    def _outer(self, i: int, x: Tensor, t: float, h: float) -> Tensor:
        return self.substeps[i].advance(self.operators[i], Clock(t, t + h, t), h, x, self.costs[i])

    def _through(self, x: Tensor, step: TimeStep, local: Sequence[Operator], stages: Sequence[ClockedStage]) -> Tensor:
        """Advance ``x`` over a step on which every operator is an ODE."""
        for i, weight, begin, end, frozen, own in stages:
            start = step.time(begin)
            stop = start if frozen else step.time(end)
            origin = start if own == begin and step.own is None else step.own_time(own)
            h = step.h * weight
            x = self.substeps[i].advance(local[i], Clock(start, stop, origin), h, x, self.costs[i])
        return x

    def _across_jump(
        self, x: Tensor, step: TimeStep, local: Sequence[Operator | Jump], stages: Sequence[ClockedStage]
    ) -> Tensor:
        """Advance ``x`` over a step on which one operator is a jump.

        The jump replaces the stages of its operator. It acts once, at the stage in which this operator would pass the
        middle of the step. Stages of the other operators have the time t0 before the jump, and t1 after the jump.
        """
        jumped, passed = False, 0.0
        for stage in stages:
            operator = local[stage.operator]
            cost = self.costs[stage.operator]
            if isinstance(operator, Jump):
                passed += stage.weight
                if not jumped and passed >= 0.5 - 1e-12:  # the weights of a scheme sum to 1 up to rounding
                    before, jumped = x, True
                    x = operator.across(before, cost)
                    if len(local) > 1:
                        _warn_if_kept(before, x)
            else:
                end = step.t1 if jumped else step.t0
                clock = Clock(end, end, step.own_time(stage.own))
                x = self.substeps[stage.operator].advance(operator, clock, step.h * stage.weight, x, cost)
        return x


def _hidden() -> bool:
    """Return True if tensor values and memory addresses cannot be read."""
    return torch.compiler.is_compiling() or inside_transform()


def _warn_if_kept(before: Tensor, after: Tensor) -> None:
    """Warn if a jump keeps the shape of the state while another operator acts."""
    if before.shape == after.shape and before.dtype == after.dtype:
        warnings.warn(
            f"Jump: got a map that keeps the state's shape, {tuple(after.shape)}, expected one that changes it. The "
            "other operators act before and after the jump, so this is another method than a step x + f(x) (Eq. "
            "8); for such a step use odeadv.fields.Residual(map)",
            stacklevel=2,
        )


def _clocked(stages: Composition) -> list[ClockedStage]:
    """Return each stage with its start on the operator's own clock, which is the sum of the earlier weights."""
    acted: dict[int, float] = {}
    clocked = []
    for stage in stages:
        i = stage.operator
        if isinstance(i, str):
            raise TypeError(f"compositions: got a stage of {i!r}, expected numbers; see Scheme.numbered")
        own = acted.get(i, 0.0)
        clocked.append(ClockedStage(i, stage.weight, stage.start, stage.stop, stage.frozen, own))
        acted[i] = own + stage.weight
    return clocked
