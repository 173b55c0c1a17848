"""The loop: a composition of sub-steps over a grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from odeadv.fields._operator import Jump, Operator, Sum, Tally
from odeadv.splitting._grid import Grid, Step
from odeadv.splitting._scheme import Composition, Stage
from odeadv.splitting._substep import Clock, Exact, SubStep

WHOLE: tuple[tuple[float, Composition], ...] = ((1.0, (Stage(0, 1.0, 0.0),)),)


@dataclass
class Stepper:
    """Advances a sum of operators by one step of a scheme.

    Attributes:
        operators: the terms of the field.
        substeps: how each is advanced.
        compositions: the scheme's tables with their factors, numbering ``operators``.
        tallies: what each operator cost so far.
    """

    operators: Sequence[Operator]
    substeps: Sequence[SubStep]
    compositions: Sequence[tuple[float, Composition]] = WHOLE
    tallies: Sequence[Tally] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.tallies:
            self.tallies = [Tally() for _ in self.operators]
        self._rows = [(factor, _with_own_clocks(stages)) for factor, stages in self.compositions]
        # Operators that are the same on every step need not be asked for each of them.
        self._constant = all(operator.constant for operator in self.operators)

    @property
    def counted(self) -> Sequence[Tally]:
        """The tallies of the terms of the field, those within a sum included."""
        first = self.operators[0]
        return first.tallies if isinstance(first, Sum) and first.tallies is not None else self.tallies

    def advance(self, x: Tensor, step: Step) -> Tensor:
        """The state at the end of ``step`` from the state ``x`` at its beginning."""
        if self._constant and len(self._rows) == 1:
            return self._through(x, step, self.operators, self._rows[0][1])
        local = [operator.on(step.t0, step.t1) for operator in self.operators]
        flowing = [operator for operator in local if not isinstance(operator, Jump)]
        if len(flowing) == len(local):
            ends = [self._through(x, step, flowing, rows) for _, rows in self._rows]
        else:
            ends = [self._across_jump(x, step, local, rows) for _, rows in self._rows]
        if len(ends) == 1:
            return ends[0]
        total = ends[0] * self._rows[0][0]
        for (factor, _), end in zip(self._rows[1:], ends[1:], strict=True):
            total = torch.add(total, end, alpha=factor)
        return total

    def march(self, x: Tensor, grid: Grid) -> Tensor:
        """The state at the end of ``grid``; stages that continue one another across steps are made one.

        That is done for exact flows only, where it changes the result by rounding alone: Strang then costs one flow
        of the outer operator a step instead of two.
        """
        if not len(grid) or not self._joins():
            for step in grid:
                x = self.advance(x, step)
            return x
        ((_, rows),) = self._rows
        outer = rows[0][0].operator
        head, tail = rows[0][0].weight, rows[-1][0].weight
        step = grid[0]
        x = self._outer(outer, x, step.t0, step.h * head)
        for step, following in pairwise(grid):
            x = self._through(x, step, self._flowing(step), rows[1:-1])
            x = self._outer(outer, x, step.time(1.0 - tail), step.h * tail + following.h * head)
        step = grid[len(grid) - 1]
        x = self._through(x, step, self._flowing(step), rows[1:-1])
        return self._outer(outer, x, step.time(1.0 - tail), step.h * tail)

    def velocity(self, x: Tensor, t: float, step: Step) -> Tensor:
        """dx/dt at the time ``t`` of ``step``, all operators added up.

        Raises:
            ValueError: if the field jumps there.
        """
        values = []
        for operator, tally in zip(self.operators, self.tallies, strict=True):
            local = operator.on(step.t0, step.t1)
            if isinstance(local, Jump):
                raise ValueError(
                    f"save_at: the field jumps from {step.t0:g} to {step.t1:g}, where no state is defined in between"
                )
            values.append(local.velocity(t, x, tally))
        return sum(values[1:], start=values[0])

    def _joins(self) -> bool:
        """Whether the last stage of a step and the first of the next are the same exact flow."""
        if len(self._rows) > 1 or any(operator.edges for operator in self.operators):
            return False
        ((_, rows),) = self._rows
        (first, _), (last, own) = rows[0], rows[-1]
        contiguous = not (first.frozen or last.frozen) and abs(own + last.weight - 1.0) < 1e-12
        exact = isinstance(self.substeps[first.operator], Exact) and self.operators[first.operator].flow is not None
        return len(rows) > 1 and first.operator == last.operator and contiguous and exact

    def _flowing(self, step: Step) -> list[Operator]:
        local = [operator.on(step.t0, step.t1) for operator in self.operators]
        return [operator for operator in local if not isinstance(operator, Jump)]

    def _outer(self, i: int, x: Tensor, t: float, h: float) -> Tensor:
        return self.substeps[i].advance(self.operators[i], Clock(t, t + h, t), h, x, self.tallies[i])

    def _through(self, x: Tensor, step: Step, local: Sequence[Operator], rows: Sequence[tuple[Stage, float]]) -> Tensor:
        """A step on which every operator is an ODE."""
        for stage, own in rows:
            i, start = stage.operator, step.time(stage.start)
            stop = start if stage.frozen else step.time(stage.stop)
            origin = start if own == stage.start and step.own is None else step.own_time(own)
            h = step.h * stage.weight
            x = self.substeps[i].advance(local[i], Clock(start, stop, origin), h, x, self.tallies[i])
        return x

    def _across_jump(
        self, x: Tensor, step: Step, local: Sequence[Operator | Jump], rows: Sequence[tuple[Stage, float]]
    ) -> Tensor:
        """A jump takes the place of its operator's stages; the others act before it at t0, after it at t1.

        It takes place where its operator would have passed the middle of the step.
        """
        jumped, passed = False, 0.0
        for stage, own in rows:
            operator = local[stage.operator]
            tally = self.tallies[stage.operator]
            if isinstance(operator, Jump):
                passed += stage.weight
                if not jumped and passed >= 0.5 - 1e-12:
                    x, jumped = operator.across(x, tally), True
            else:
                end = step.t1 if jumped else step.t0
                clock = Clock(end, end, step.own_time(own))
                x = self.substeps[stage.operator].advance(operator, clock, step.h * stage.weight, x, tally)
        return x


def integrate(stepper: Stepper, x0: Tensor, grid: Grid) -> Iterator[Tensor]:
    """The states at ``t_1 ... t_N`` from ``x0`` at ``t_0``, one at a time."""
    x = x0
    for step in grid:
        x = stepper.advance(x, step)
        yield x


def _with_own_clocks(stages: Composition) -> list[tuple[Stage, float]]:
    """Each stage with the time on its operator's own clock, the sum of the operator's earlier weights."""
    acted: dict[int, float] = {}
    rows = []
    for stage in stages:
        own = acted.get(stage.operator, 0.0)
        rows.append((stage, own))
        acted[stage.operator] = own + stage.weight
    return rows
