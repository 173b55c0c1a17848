"""The recorded costate as a function of time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from odeadv.fields.operator import Cost, Jump, Operator
from odeadv.splitting import CostateKind, Grid
from odeadv.support.isolation import differentiating, inside_transform


class Costate(Protocol):
    """A function of time, a(t), that can be restricted to a step of its grid."""

    @property
    def grid(self) -> Grid:
        """The times t_n at which it was recorded, as ``grid.times``."""
        ...

    @property
    def nodes(self) -> Sequence[Tensor]:
        """a(t_n), one tensor a time of the grid."""
        ...

    def __call__(self, t: float) -> Tensor:
        """a(t), of the shape of the state at ``t``."""
        ...

    def on(self, t0: float, t1: float) -> Callable[[float], Tensor]:
        """a(t) restricted to the step from ``t0`` to ``t1``."""
        ...


@dataclass(frozen=True)
class RecordedCostate:
    """The costate recorded at the nodes of a grid, evaluated between them by ``kind``.

    ``"linear"``: a mean of the two nodes (Theorem 3.2 is its midpoint). ``"hermite"``: the cubic through them with
    the slopes of Eq. 9. ``"exact"``: Eq. 9 integrated back from the later node along the recorded states by the
    midpoint rule, one vector-Jacobian product, third-order local error. On the nodes all three are the recording.

    Attributes:
        grid: the times t_n.
        nodes: a(t_n), N + 1 tensors shaped like the states.
        states: x(t_n) of the trajectory it was recorded on; not kept for ``"linear"``.
        operator: f, whose Jacobian Eq. 9 needs.
        kind: the evaluation between nodes.
        cost: counts the vector-Jacobian products made between nodes.
        differentiate: whether a(t) is part of the autograd graph.
    """

    grid: Grid
    nodes: Sequence[Tensor]
    states: Sequence[Tensor]
    operator: Operator
    kind: CostateKind = "linear"
    differentiate: bool = False
    cost: Cost = field(default_factory=Cost)

    def __call__(self, t: float | Tensor) -> Tensor:
        """a(t).

        Args:
            t: a time within the solved span, float or 0-d tensor.

        Raises:
            ValueError: if ``t`` is outside the span, or strictly inside a jump of the field.
        """
        time = self.grid.snap(float(t))
        return self._within(self.grid.locate(time))(time)

    def extrapolated(self, t: float | Tensor) -> Tensor:
        """a(t), from the first or last step where ``t`` is outside the span.

        Warns:
            RuntimeWarning: where it is outside by more than half of the span, which no step of a solver that ends
                there should be.
        """
        time = self.grid.snap(float(t))
        low, high = sorted((self.grid.times[0], self.grid.times[-1]))
        if max(low - time, time - high) > 0.5 * (high - low):
            warnings.warn(
                f"t: {time:g} is far outside the span of the costate, {low:g} to {high:g}, where dL/dx means nothing; "
                "solve within it, or record the costate on a longer one",
                RuntimeWarning,
                stacklevel=2,
            )
        return self._within(self.grid.locate(min(max(time, low), high)))(time)

    def on(self, t0: float, t1: float) -> Callable[[float], Tensor]:
        """a(t) on the step from ``t0`` to ``t1``, one of the grid or a part of one; otherwise a(t) as it is."""
        low, high = sorted((t0, t1))
        first, last = sorted((self.grid.times[0], self.grid.times[-1]))
        middle = 0.5 * (low + high)
        if first <= middle <= last:
            n = self.grid.locate(middle)
            ends = sorted((self.grid.times[n], self.grid.times[n + 1]))
            slack = 1e-9 * (ends[1] - ends[0])
            if ends[0] - slack <= low and high <= ends[1] + slack:
                return self._within(n)
        return self.extrapolated

    def _within(self, n: int) -> Callable[[float], Tensor]:
        step, before, after = self.grid[n], self.nodes[n], self.nodes[n + 1]
        slopes: list[Tensor] = []

        def value(t: float) -> Tensor:
            if t == step.t0:
                return before
            if t == step.t1:
                return after
            part = self.operator.on(step.t0, step.t1)
            if isinstance(part, Jump):
                raise ValueError(
                    f"t: {t:g} lies within the jump from {step.t0:g} to {step.t1:g}, where no costate is defined"
                )
            s = (t - step.t0) / step.h
            if self.kind == "linear":
                return torch.lerp(before, after, s)
            if self.kind == "exact":
                back = (1.0 - s) * step.h
                middle = 0.5 * (1.0 + s)
                with torch.inference_mode(False):
                    x, a = torch.lerp(self.states[n], self.states[n + 1], middle), torch.lerp(before, after, middle)
                return torch.add(after, self._vjp(part, step.time(middle), x, a), alpha=back)
            if not slopes:
                slopes.append(self._vjp(part, step.t0, self.states[n], before))
                slopes.append(self._vjp(part, step.t1, self.states[n + 1], after))
            ends = torch.lerp(before, after, s * s * (3.0 - 2.0 * s))
            tangents = s * (1.0 - s) ** 2 * slopes[0] - s * s * (1.0 - s) * slopes[1]
            return torch.add(ends, tangents, alpha=-step.h)

        return value

    def _vjp(self, operator: Operator, t: float, x: Tensor, a: Tensor) -> Tensor:
        """(df/dx)^T a at (t, x)."""
        self.cost.vjps += 1
        with differentiating(operator.modules, x.device):
            if inside_transform():
                pulled: Tensor = torch.func.vjp(lambda y: operator.velocity(t, y, self.cost), x)[1](a)[0]
                return pulled if self.differentiate else pulled.detach()
            if not self.differentiate or not x.requires_grad:
                x = x.detach().requires_grad_()
            velocity = operator.velocity(t, x, self.cost)
            if not velocity.requires_grad:
                return torch.zeros_like(a)
            (product,) = torch.autograd.grad(
                velocity, x, a, create_graph=self.differentiate, allow_unused=True, materialize_grads=True
            )
        return product


@dataclass(frozen=True)
class SummedCostate:
    """The sum of several recordings, what ``ascent=M`` adds up (Eq. 3).

    Attributes:
        parts: the recordings.
    """

    parts: Sequence[RecordedCostate]

    @property
    def grid(self) -> Grid:
        """The times of the recordings, if they are the same for all of them.

        Raises:
            AttributeError: if they differ, as with adaptive steps.
        """
        first = self.parts[0].grid
        if any(part.grid != first for part in self.parts):
            raise AttributeError("grid: the recordings have steps of their own; look at each of `parts`")
        return first

    @property
    def nodes(self) -> Sequence[Tensor]:
        """The sums at the times of ``grid``; raises as that does."""
        count = len(self.grid.times)
        return [_total(part.nodes[n] for part in self.parts) for n in range(count)]

    def __call__(self, t: float | Tensor) -> Tensor:
        """The sum at ``t``; see `RecordedCostate`."""
        return _total(part(t) for part in self.parts)

    def extrapolated(self, t: float | Tensor) -> Tensor:
        """The sum at ``t``, outside the span too."""
        return _total(part.extrapolated(t) for part in self.parts)

    def on(self, t0: float, t1: float) -> Callable[[float], Tensor]:
        """The sum on the step from ``t0`` to ``t1``."""
        values = [part.on(t0, t1) for part in self.parts]
        return lambda t: _total(value(t) for value in values)


def _total(values: Iterable[Tensor]) -> Tensor:
    first, *others = values
    return sum(others, start=first)
