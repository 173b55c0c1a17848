"""The recorded costate as a function of time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from odeadv.fields.operator import Cost, Jump, Operator
from odeadv.splitting import CostateKind, Grid
from odeadv.splitting.interpolation import cubic, gauss_points, lagrange, like_real, linear
from odeadv.support.isolation import differentiating, graph_kept, inside_transform


class Costate(Protocol):
    """The interface of a costate: a function of time, a(t), which can be restricted to a step of its grid."""

    @property
    def grid(self) -> Grid:
        """The grid of the recording, with the times t_n as ``grid.times``."""
        ...

    @property
    def nodes(self) -> Sequence[Tensor]:
        """The costates a(t_n), one tensor per time of the grid."""
        ...

    def __call__(self, t: float) -> Tensor:
        """Return a(t), of the shape of the state at ``t``."""
        ...

    def extrapolated(self, t: float) -> Tensor:
        """Return a(t), also for a time ``t`` outside the span."""
        ...

    def on(self, t0: float, t1: float) -> Callable[[float], Tensor]:
        """Return a(t) restricted to the step from ``t0`` to ``t1``."""
        ...


@dataclass(frozen=True)
class RecordedCostate:
    """The costate a(t), recorded at the nodes of a grid. ``kind`` chooses the evaluation between the nodes.

    ``"linear"`` interpolates between two nodes (Theorem 3.2 uses its value at the midpoint). ``"hermite"`` is the cubic
    through two nodes with the slopes of Eq. 9. ``"exact"`` integrates Eq. 9 back from the later node along the recorded
    states, by the midpoint rule. It takes one vector-Jacobian product, and its local error is of third order. At the
    nodes all three equal the recording. ``"collocation"`` is the polynomial that solves Eq. 7 and Eq. 9 together at the
    Gauss points of each step.

    Attributes:
        grid: the times t_n of N steps.
        nodes: N + 1 costates a(t_n), each of the shape of the state at t_n.
        states: states x(t_n) of the recorded trajectory; empty for ``"linear"``.
        operator: the operator f. Eq. 9 needs its Jacobian df/dx.
        running: the running cost l(t, x), or None. With it Eq. 9 is da/dt = -(df/dx)^T a - dl/dx.
        leaving: costates a(t_n) after the loss at t_n, by n, if the field has losses at given times. ``nodes`` contains
            a(t_n) before this loss, which is dJ/dx(t_n) of the total loss J.
        inner: for ``"collocation"``, the costates at the Gauss points of each step.
        work: number of evaluations of f and vector-Jacobian products of the recording.
        kind: evaluation between nodes.
        cost: counter of the vector-Jacobian products between nodes.
        differentiate: True keeps a(t) in the autograd graph.
        memory: the slope at the latest node, with its operator and the number of the node. The next step may reuse it.
    """

    grid: Grid
    nodes: Sequence[Tensor]
    states: Sequence[Tensor]
    operator: Operator
    kind: CostateKind = "linear"
    differentiate: bool = False
    cost: Cost = field(default_factory=Cost)
    running: Callable[[float | Tensor, Tensor], Tensor] | None = None
    leaving: Mapping[int, Tensor] = field(default_factory=dict)
    inner: Sequence[Sequence[Tensor]] = ()
    work: int = 0
    memory: list[tuple[Operator, int, Tensor]] = field(default_factory=list, init=False, repr=False, compare=False)

    def __call__(self, t: float | Tensor) -> Tensor:
        """Return a(t), of the shape of the state.

        Args:
            t: a time within the solved span, a float or a 0-d tensor. If it is a tensor that requires a gradient, its
                gradient passes through da/dt.

        Raises:
            ValueError: if ``t`` is outside the span, or strictly inside a jump of the field.
        """
        time = self.grid.snap(_float(t))
        n = self.grid.locate(time)
        if n in self.leaving and time == self.grid.times[n]:
            return self.nodes[n]
        return self._within(n)(_in_graph(t, time))

    def extrapolated(self, t: float | Tensor) -> Tensor:
        """Return a(t). Outside the span, extrapolate from the first or last step.

        Warns:
            RuntimeWarning: if ``t`` is outside by more than half of the span. The last step of an adaptive solver
                should not be so far outside.
        """
        time = self.grid.snap(_float(t))
        low, high = sorted((self.grid.times[0], self.grid.times[-1]))
        if max(low - time, time - high) > 0.5 * (high - low):
            warnings.warn(
                f"t: {time:g} is far outside the span of the costate, {low:g} to {high:g}, and the value is not dL/dx; "
                "solve within the span, or record the costate on a longer span",
                RuntimeWarning,
                stacklevel=2,
            )
        return self._within(self.grid.locate(min(max(time, low), high)))(_in_graph(t, time))

    def difference(self, finer: RecordedCostate) -> tuple[Tensor, Tensor]:
        """Compare this costate a(t) with the recording ``finer``, b(t), on a grid of halved steps.

        Returns:
            Two tensors of the shape of the state, each a maximum over the nodes of ``finer``, entry by entry. The first
            is the largest |h (a - b)|, with the step size h of ``finer``. The second is the largest |x| of its states.
        """
        differences = []
        for n, step in enumerate(self.grid):
            middle = self._within(n)(step.time(0.5)) - finer.nodes[2 * n + 1]
            end = self.nodes[n] - finer.nodes[2 * n]
            differences.append(0.5 * abs(step.h) * torch.maximum(middle.detach().abs(), end.detach().abs()))
        return torch.stack(differences).amax(0), torch.stack([x.detach().abs() for x in finer.states]).amax(0)

    def on(self, t0: float, t1: float) -> Callable[[float], Tensor]:
        """Return a(t) on the step from ``t0`` to ``t1``. If it is not part of one step of the grid, return all of a."""
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

    def _within(self, n: int) -> Callable[[float | Tensor], Tensor]:
        """Return a(t) on step ``n``, as a function of a float, or of a 0-d tensor that requires a gradient."""
        step, before, after = self.grid[n], self.leaving.get(n, self.nodes[n]), self.nodes[n + 1]
        slopes: list[Tensor] = []

        def value(t: float | Tensor) -> Tensor:
            if not isinstance(t, Tensor) and t in (step.t0, step.t1):
                return before if t == step.t0 else after
            part = self.operator.on(step.t0, step.t1)
            if isinstance(part, Jump):
                raise ValueError(
                    f"t: {_float(t):g} lies within the jump from {step.t0:g} to {step.t1:g}, where no costate is "
                    "defined"
                )
            s: Any = (t - step.t0) / step.h
            if self.kind == "linear":
                return linear(before, after, s)
            if self.kind == "collocation":
                weights = lagrange((0.0, *gauss_points(len(self.inner[n]))), s)
                values = zip(weights, [before, *self.inner[n]], strict=True)
                return _total(like_real(weight, value) * value for weight, value in values)
            if self.kind == "exact":
                if not isinstance(s, Tensor):
                    return self._back(part, n, s)
                # A detached vector-Jacobian product would lose its time derivative in forward mode.
                return _linearised(partial(replace(self, differentiate=True)._back, part, n), s)
            if not slopes:
                slopes.append(self._slope_before(part, n, before))
                slopes.append(self._vjp(part, step.t1, self.states[n + 1], after))
                self.memory[:] = [(part, n + 1, slopes[1])]
            return cubic(before, after, slopes, s, -step.h)  # by Eq. 9 the slopes are minus these products

        return value

    def _slope_before(self, part: Operator, n: int, a: Tensor) -> Tensor:
        """Return (df/dx)^T a at the beginning of step ``n``. Reuse the product of the previous step if possible."""
        same = self.memory and self.memory[0][0] is part and self.memory[0][1] == n and n not in self.leaving
        if same and not self.differentiate and not inside_transform():
            return self.memory[0][2]
        return self._vjp(part, self.grid.times[n], self.states[n], a)

    def _back(self, part: Operator, n: int, s: Any) -> Tensor:
        """Integrate Eq. 9 back from the end of step ``n`` to the fraction ``s`` of this step, by the midpoint rule."""
        step, before, after = self.grid[n], self.leaving.get(n, self.nodes[n]), self.nodes[n + 1]
        middle = 0.5 * (1.0 + s)
        with torch.inference_mode(False):
            x, a = linear(self.states[n], self.states[n + 1], middle), linear(before, after, middle)
        pulled, length = self._vjp(part, step.time(middle), x, a), (1.0 - s) * step.h
        if isinstance(length, Tensor):
            back: Tensor = after + like_real(length, after) * pulled
            return back
        return torch.add(after, pulled, alpha=length)  # this avoids a temporary tensor of the size of the state

    def _vjp(self, operator: Operator, t: float, x: Tensor, a: Tensor) -> Tensor:
        """Return (df/dx)^T a at (t, x), plus the gradient of the running cost."""
        self.cost.vjps += 1
        running = self.running
        with differentiating(operator.modules, x.device), graph_kept():
            if inside_transform():
                pulled: Tensor = torch.func.vjp(lambda y: operator.velocity(t, y, self.cost), x)[1](a)[0]
                if running is not None:
                    pulled = pulled + torch.func.grad(lambda y: running(t, y))(x)
                return pulled if self.differentiate else pulled.detach()
            if not self.differentiate or not x.requires_grad:
                x = x.detach().requires_grad_()
            ends: list[tuple[Tensor, Tensor | None]] = [(operator.velocity(t, x, self.cost), a)]
            if running is not None:
                ends.append((running(t, x), None))
            ends = [(value, weight) for value, weight in ends if value.requires_grad]
            if not ends:
                return torch.zeros_like(a)
            values, weights = zip(*ends, strict=True)
            (product,) = torch.autograd.grad(
                values, x, weights, create_graph=self.differentiate, allow_unused=True, materialize_grads=True
            )
        return product


@dataclass(frozen=True)
class SummedCostate:
    """The sum of several recordings, which drives the state if ``ascent=M`` (Eq. 3).

    Attributes:
        parts: the recordings.
    """

    parts: Sequence[RecordedCostate]

    @property
    def grid(self) -> Grid:
        """The grid of the recordings, if all recordings have the same grid.

        Raises:
            AttributeError: if the grids differ, for example with adaptive steps.
        """
        first = self.parts[0].grid
        if any(part.grid != first for part in self.parts):
            raise AttributeError("grid: the recordings have different steps; look at each of `parts`")
        return first

    @property
    def nodes(self) -> Sequence[Tensor]:
        """The sums at the times of ``grid``. The errors are those of ``grid``."""
        count = len(self.grid.times)
        return [_total(part.nodes[n] for part in self.parts) for n in range(count)]

    def __call__(self, t: float | Tensor) -> Tensor:
        """Return the sum at ``t``; see `RecordedCostate`."""
        return _total(part(t) for part in self.parts)

    def extrapolated(self, t: float | Tensor) -> Tensor:
        """Return the sum at ``t``, also for times outside the span."""
        return _total(part.extrapolated(t) for part in self.parts)

    def on(self, t0: float, t1: float) -> Callable[[float], Tensor]:
        """Return the sum on the step from ``t0`` to ``t1``."""
        values = [part.on(t0, t1) for part in self.parts]
        return lambda t: _total(value(t) for value in values)


def _float(t: float | Tensor) -> float:
    return float(t.detach()) if isinstance(t, Tensor) else float(t)


def _in_graph(t: float | Tensor, time: float) -> float | Tensor:
    """Return ``time``, which equals ``t`` up to rounding. If ``t`` requires a gradient, the result passes it on."""
    return t + (time - _float(t)) if isinstance(t, Tensor) and t.requires_grad else time


def _linearised(value: Callable[[Tensor], Tensor], s: Tensor) -> Tensor:
    """Return ``value(s)`` with its first derivative with respect to ``s`` in the autograd graph.

    All other gradients are cut, because the costate is treated as a constant. Second derivatives are not in the graph.
    """
    at = s.detach()
    found: Tensor
    slope: Tensor
    found, slope = torch.func.jvp(value, (at,), (torch.ones_like(at),))  # type: ignore[misc]  # without has_aux: two
    moved: Tensor = found.detach() + like_real(s - at, found) * slope.detach()
    return moved


def _total(values: Iterable[Tensor]) -> Tensor:
    first, *others = values
    return sum(others, start=first)
