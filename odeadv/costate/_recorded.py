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
from odeadv.splitting.interpolation import cubic, like_real, linear
from odeadv.support.isolation import differentiating, graph_kept, inside_transform


class Costate(Protocol):
    """A function of time, a(t), that can be restricted to a step of its grid."""

    @property
    def grid(self) -> Grid:
        """The times t_n at which it was recorded, as ``grid.times``."""
        ...

    @property
    def nodes(self) -> Sequence[Tensor]:
        """a(t_n), one tensor per time of the grid."""
        ...

    def __call__(self, t: float) -> Tensor:
        """Return a(t), of the shape of the state at ``t``."""
        ...

    def extrapolated(self, t: float) -> Tensor:
        """Return a(t), continued beyond the ends of its span."""
        ...

    def on(self, t0: float, t1: float) -> Callable[[float], Tensor]:
        """Return a(t) restricted to the step from ``t0`` to ``t1``."""
        ...


@dataclass(frozen=True)
class RecordedCostate:
    """The costate recorded at the nodes of a grid, evaluated between them by ``kind``.

    ``"linear"`` is the mean of two nodes (Theorem 3.2 is its midpoint). ``"hermite"`` is the cubic through two nodes
    with the slopes of Eq. 9. ``"exact"`` integrates Eq. 9 back from the later node along the recorded states by the
    midpoint rule: one vector-Jacobian product, third-order local error. At the nodes all three equal the recording.

    Attributes:
        grid: the times t_n.
        nodes: a(t_n), N + 1 tensors shaped like the states.
        states: x(t_n) of the trajectory it was recorded on; not kept for ``"linear"``.
        operator: f, whose Jacobian Eq. 9 needs.
        running: the running cost l(t, x), if there is one: Eq. 9 then is da/dt = -(df/dx)^T a - dl/dx.
        leaving: a(t_n) after the loss at t_n, by n, if the field has losses at given times. ``nodes`` has a(t_n) before
            it, which is dJ/dx(t_n) of the total loss J.
        work: evaluations of f and vector-Jacobian products that the recording took.
        kind: the evaluation between nodes.
        cost: counts the vector-Jacobian products between nodes.
        differentiate: whether a(t) is part of the autograd graph.
        memory: the slope at the last node that was asked for, with its operator and node; the next step may reuse it.
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
    work: int = 0
    memory: list[tuple[Operator, int, Tensor]] = field(default_factory=list, init=False, repr=False, compare=False)

    def __call__(self, t: float | Tensor) -> Tensor:
        """Return a(t), of the shape of the state.

        Args:
            t: a time within the solved span, float or 0-d tensor. If it is a tensor that requires a gradient, da/dt is
                in the graph.

        Raises:
            ValueError: if ``t`` is outside the span, or strictly inside a jump of the field.
        """
        time = self.grid.snap(_float(t))
        n = self.grid.locate(time)
        if n in self.leaving and time == self.grid.times[n]:
            return self.nodes[n]
        return self._within(n)(_in_graph(t, time))

    def extrapolated(self, t: float | Tensor) -> Tensor:
        """Return a(t); outside the span it is continued from the first or last step.

        Warns:
            RuntimeWarning: if ``t`` is outside by more than half of the span. No step of a solver that ends at the end
                of the span should be so far outside.
        """
        time = self.grid.snap(_float(t))
        low, high = sorted((self.grid.times[0], self.grid.times[-1]))
        if max(low - time, time - high) > 0.5 * (high - low):
            warnings.warn(
                f"t: {time:g} is far outside the span of the costate, {low:g} to {high:g}, where dL/dx means nothing; "
                "solve within it, or record the costate on a longer one",
                RuntimeWarning,
                stacklevel=2,
            )
        return self._within(self.grid.locate(min(max(time, low), high)))(_in_graph(t, time))

    def difference(self, finer: RecordedCostate) -> tuple[Tensor, Tensor]:
        """Compare with the recording ``finer`` on a grid of halved steps.

        Returns:
            The largest |h (a - b)| over the nodes of ``finer``, with h the size of its steps, and the largest |x| over
            its states; both entry by entry, of the shape of the state.
        """
        differences = []
        for n, step in enumerate(self.grid):
            middle = self._within(n)(step.time(0.5)) - finer.nodes[2 * n + 1]
            end = self.nodes[n] - finer.nodes[2 * n]
            differences.append(0.5 * abs(step.h) * torch.maximum(middle.detach().abs(), end.detach().abs()))
        return torch.stack(differences).amax(0), torch.stack([x.detach().abs() for x in finer.states]).amax(0)

    def on(self, t0: float, t1: float) -> Callable[[float], Tensor]:
        """Return a(t) on the step from ``t0`` to ``t1``, or a(t) itself if that is not part of one step of the grid."""
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
            if self.kind == "exact":
                if not isinstance(s, Tensor):
                    return self._back(part, n, s)
                # Detached within forward mode, the vector-Jacobian product would lose its derivative by time.
                return _linearised(partial(replace(self, differentiate=True)._back, part, n), s)
            if not slopes:
                slopes.append(self._slope_before(part, n, before))
                slopes.append(self._vjp(part, step.t1, self.states[n + 1], after))
                self.memory[:] = [(part, n + 1, slopes[1])]
            return cubic(before, after, slopes, s, -step.h)  # Eq. 9: the slopes are minus these products

        return value

    def _slope_before(self, part: Operator, n: int, a: Tensor) -> Tensor:
        """Return (df/dx)^T a at the beginning of step ``n``: that at the end of the step before, if it is the same."""
        same = self.memory and self.memory[0][0] is part and self.memory[0][1] == n and n not in self.leaving
        if same and not self.differentiate and not inside_transform():
            return self.memory[0][2]
        return self._vjp(part, self.grid.times[n], self.states[n], a)

    def _back(self, part: Operator, n: int, s: Any) -> Tensor:
        """Return Eq. 9 integrated back from the end of step ``n`` to its fraction ``s``, by the midpoint rule."""
        step, before, after = self.grid[n], self.leaving.get(n, self.nodes[n]), self.nodes[n + 1]
        middle = 0.5 * (1.0 + s)
        with torch.inference_mode(False):
            x, a = linear(self.states[n], self.states[n + 1], middle), linear(before, after, middle)
        pulled, length = self._vjp(part, step.time(middle), x, a), (1.0 - s) * step.h
        if isinstance(length, Tensor):
            back: Tensor = after + like_real(length, after) * pulled
            return back
        return torch.add(after, pulled, alpha=length)  # no product of the size of the state

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
    """The sum of several recordings, which drives with ``ascent=M`` (Eq. 3).

    Attributes:
        parts: the recordings.
    """

    parts: Sequence[RecordedCostate]

    @property
    def grid(self) -> Grid:
        """The times of the recordings, if they are the same for all of them.

        Raises:
            AttributeError: if the times differ, as with adaptive steps.
        """
        first = self.parts[0].grid
        if any(part.grid != first for part in self.parts):
            raise AttributeError("grid: the recordings have different steps; look at each of `parts`")
        return first

    @property
    def nodes(self) -> Sequence[Tensor]:
        """The sums at the times of ``grid``; raises as ``grid`` does."""
        count = len(self.grid.times)
        return [_total(part.nodes[n] for part in self.parts) for n in range(count)]

    def __call__(self, t: float | Tensor) -> Tensor:
        """Return the sum at ``t``; see `RecordedCostate`."""
        return _total(part(t) for part in self.parts)

    def extrapolated(self, t: float | Tensor) -> Tensor:
        """Return the sum at ``t``, outside the span too."""
        return _total(part.extrapolated(t) for part in self.parts)

    def on(self, t0: float, t1: float) -> Callable[[float], Tensor]:
        """Return the sum on the step from ``t0`` to ``t1``."""
        values = [part.on(t0, t1) for part in self.parts]
        return lambda t: _total(value(t) for value in values)


def _float(t: float | Tensor) -> float:
    return float(t.detach()) if isinstance(t, Tensor) else float(t)


def _in_graph(t: float | Tensor, time: float) -> float | Tensor:
    """Return ``time``, which is ``t`` up to rounding, as a tensor with the gradient of ``t`` if it requires one."""
    return t + (time - _float(t)) if isinstance(t, Tensor) and t.requires_grad else time


def _linearised(value: Callable[[Tensor], Tensor], s: Tensor) -> Tensor:
    """Return ``value(s)`` with its derivative by ``s`` in the graph, and no other gradient: the costate is a constant.

    The second derivative is not in the graph.
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
