"""The discrete total loss: final loss, losses at nodes, and the running cost by a quadrature rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from odeadv.fields import AdversarialField
from odeadv.splitting import Grid, Stepper, TimeStep
from odeadv.support.isolation import Recompute

Rule = Literal["trapezoid", "simpson"]


@dataclass(frozen=True)
class TotalLoss:
    """J = loss(x_N) + sum of the losses at nodes + sum over the steps of the running cost, by ``rule``.

    ``"trapezoid"``, of order two, uses the states at the nodes. ``"simpson"``, of order four, also uses the middle of
    the cubic through two nodes with the slopes of the driven field.

    Attributes:
        field: gives loss, running cost and the losses at given times.
        rule: the quadrature rule.
        losses: the losses at nodes, by the times of the nodes.
    """

    field: AdversarialField
    rule: Rule
    losses: Mapping[float, Callable[[Tensor], Tensor]]

    @staticmethod
    def on(grid: Grid, field: AdversarialField, rule: Rule) -> TotalLoss:
        """Return the total loss on ``grid``. The times of the field's losses are nodes."""
        return TotalLoss(field, rule, {grid.snap(t): loss for t, loss in field.at.items()})

    def at(self, t: float, x: Tensor) -> list[Tensor]:
        """Return the loss at the node ``t`` with the state ``x``, if there is one."""
        return [self.field.loss_at(self.losses[t], x)] if t in self.losses else []

    def over(self, step: TimeStep, stepper: Stepper, x: Tensor, end: Tensor) -> list[Tensor]:
        """Return the running cost of ``step`` from ``x`` to ``end``, if there is one."""
        if self.field.running is None:
            return []
        cost = self.field.running_cost
        first, last = cost(step.t0, x), cost(step.t1, end)
        if self.rule == "trapezoid":
            return [(first + last) * (0.5 * step.h)]
        bend = stepper.velocity(x, step.t0, step) - stepper.velocity(end, step.t1, step)
        middle = 0.5 * (x + end) + (0.125 * step.h) * bend
        return [(first + 4.0 * cost(step.time(0.5), middle) + last) * (step.h / 6.0)]

    def along(
        self, grid: Grid, stepper: Stepper, states: Sequence[Tensor], segments: Recompute | None = None
    ) -> Tensor:
        """Return J without the loss of the final state, for the states at the nodes of ``grid``.

        ``segments`` runs the running cost of each step again in the backward pass, instead of keeping its graph.
        """
        over = self.over if segments is None else partial(segments, self.over)
        terms = self.at(grid.times[0], states[0])
        for n, step in enumerate(grid):
            terms += over(step, stepper, states[n], states[n + 1]) + self.at(step.t1, states[n + 1])
        return sum(terms[1:], start=terms[0])
