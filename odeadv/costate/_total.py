"""The total loss of a discrete trajectory: final loss, losses at nodes, and the integrated running cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from odeadv.fields import AdversarialField
from odeadv.splitting import Grid, Stepper, TimeStep
from odeadv.support.isolation import Recompute

#: The quadrature rule for the integral of a running cost; see `TotalLoss`.
Rule = Literal["trapezoid", "simpson"]


@dataclass(frozen=True)
class TotalLoss:
    """The total loss J: the loss of the final state x_N, plus the losses at nodes, plus the integrated running cost.

    The integral is a sum over the steps. ``"trapezoid"``, of order two, uses the states at the nodes. ``"simpson"``, of
    order four, also uses the state in the middle of each step. This state is the value of the cubic through two nodes
    with the slopes of the driven field.

    Attributes:
        field: the field with the loss, the running cost and the losses at given times.
        rule: the quadrature rule.
        losses: a dict of the time of a node to the loss at this node.
    """

    field: AdversarialField
    rule: Rule
    losses: Mapping[float, Callable[[Tensor], Tensor]]

    @staticmethod
    def on(grid: Grid, field: AdversarialField, rule: Rule) -> TotalLoss:
        """Return the total loss on ``grid``. The times of the field's losses are nodes.

        Args:
            grid: the steps of the solve.
            field: the field, with its losses and its running cost.
            rule: rule for the integral of the running cost.
        """
        return TotalLoss(field, rule, {grid.snap(t): loss for t, loss in field.at.items()})

    def at(self, t: float, x: Tensor) -> list[Tensor]:
        """Return a list with the loss at the node ``t`` of the state ``x``. It is empty if this node has none."""
        return [self.field.loss_at(self.losses[t], x)] if t in self.losses else []

    def over(self, step: TimeStep, stepper: Stepper, x: Tensor, end: Tensor) -> list[Tensor]:
        """Return a list with the integral of the running cost over ``step``, or an empty list without running cost.

        Args:
            step: the step.
            stepper: computes the slopes for Simpson's rule.
            x: state at the start of the step.
            end: state at the end of the step.
        """
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
        """Return J without the loss of the final state. ``states`` are the states at the nodes of ``grid``.

        ``stepper`` computes the slopes for Simpson's rule. With ``segments`` the graph of the running cost is not
        kept, and the backward pass evaluates it again.
        """
        over = self.over if segments is None else partial(segments, self.over)
        terms = self.at(grid.times[0], states[0])
        for n, step in enumerate(grid):
            terms += over(step, stepper, states[n], states[n + 1]) + self.at(step.t1, states[n + 1])
        return sum(terms[1:], start=terms[0])
