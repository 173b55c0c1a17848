"""The loop: a composition of sub-steps over a grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from odeadv.fields._operator import Jump, Operator, Tally
from odeadv.splitting._grid import Grid, Step
from odeadv.splitting._scheme import Stage
from odeadv.splitting._substep import Clock, SubStep


@dataclass
class Stepper:
    """Advances a sum of operators by one step of a composition.

    Attributes:
        operators: the terms of the field.
        substeps: how each is advanced.
        stages: the composition, numbering ``operators``.
        tallies: what each operator cost so far.
    """

    operators: Sequence[Operator]
    substeps: Sequence[SubStep]
    stages: Sequence[Stage]
    tallies: Sequence[Tally] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.tallies:
            self.tallies = [Tally() for _ in self.operators]
        acted = [0.0] * len(self.operators)
        self._own: list[float] = []
        for stage in self.stages:
            self._own.append(acted[stage.operator])
            acted[stage.operator] += stage.weight

    def advance(self, x: Tensor, step: Step) -> Tensor:
        """The state at the end of ``step`` from the state ``x`` at its beginning."""
        local = [operator.on(step.t0, step.t1) for operator in self.operators]
        flowing = [operator for operator in local if not isinstance(operator, Jump)]
        return self._through(x, step, flowing) if len(flowing) == len(local) else self._across_jump(x, step, local)

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

    def _through(self, x: Tensor, step: Step, local: Sequence[Operator]) -> Tensor:
        """A step on which every operator is an ODE."""
        for stage, own in zip(self.stages, self._own, strict=True):
            i = stage.operator
            clock = Clock(step.time(stage.start), step.time(stage.stop), step.time(own))
            x = self.substeps[i].advance(local[i], clock, step.h * stage.weight, x, self.tallies[i])
        return x

    def _across_jump(self, x: Tensor, step: Step, local: Sequence[Operator | Jump]) -> Tensor:
        """A jump takes the place of its operator's stages; the others act before it at t0, after it at t1.

        It takes place where its operator would have passed the middle of the step.
        """
        jumped, passed = False, 0.0
        for stage, own in zip(self.stages, self._own, strict=True):
            operator = local[stage.operator]
            tally = self.tallies[stage.operator]
            if isinstance(operator, Jump):
                passed += stage.weight
                if not jumped and passed >= 0.5 - 1e-12:
                    x, jumped = operator.map(x), True
                    tally.evaluations += 1
            else:
                end = step.t1 if jumped else step.t0
                clock = Clock(end, end, step.time(own))
                x = self.substeps[stage.operator].advance(operator, clock, step.h * stage.weight, x, tally)
        return x


def integrate(stepper: Stepper, x0: Tensor, grid: Grid) -> Iterator[Tensor]:
    """The states at ``t_1 ... t_N`` from ``x0`` at ``t_0``, one at a time."""
    x = x0
    for step in grid:
        x = stepper.advance(x, step)
        yield x
