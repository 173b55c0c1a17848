"""Sub-steps: how one operator is advanced over one stage of a composition."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from odeadv.fields.operator import Cost, Operator, VectorFunction, as_time, returned, same_shape
from odeadv.fields.terms import Forcing
from odeadv.support.checks import did_you_mean
from odeadv.support.extras import extra
from odeadv.support.isolation import check_unmodified, version

Bound = Callable[[Tensor, float, Iterator[Tensor]], Tensor]


class Clock(NamedTuple):
    """The times an operator sees during a stage.

    Attributes:
        start: the clock when the stage begins.
        stop: the clock when it ends; equal to ``start`` where the scheme freezes it.
        own: where the operator's own clock begins, the sum of its earlier weights: what an exact flow goes by.
    """

    start: float
    stop: float
    own: float

    def at(self, node: float) -> float:
        """The time at the fraction ``node`` of the stage; the ends exactly."""
        return self.stop if node == 1.0 else self.start + node * (self.stop - self.start)


class SubStep(Protocol):
    """Advances one operator.

    Attributes:
        name: what it is called.
        order: its order of accuracy.
    """

    @property
    def name(self) -> str:
        """What the sub-step is called."""
        ...

    @property
    def order(self) -> float:
        """Order of accuracy; infinite for exact flows."""
        ...

    def advance(self, operator: Operator, clock: Clock, h: float, x: Tensor, cost: Cost) -> Tensor:
        """Move ``x`` for the duration ``h`` along ``operator`` while its clock goes as ``clock`` says."""
        ...


@dataclass(frozen=True)
class RungeKutta:
    """An explicit Runge-Kutta method by its Butcher tableau; for a `Forcing`, the quadrature with its weights."""

    name: str
    order: float
    nodes: tuple[float, ...]
    matrix: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        # The tableau without its zeros: nodes with their rows, and weights, each coefficient with its column.
        rows = [[(j, a) for j, a in enumerate(row) if a] for row in self.matrix]
        weights = [(j, b) for j, b in enumerate(self.weights) if b]
        object.__setattr__(self, "_nonzero", (list(zip(self.nodes, rows, strict=True)), weights))

    @property
    def is_euler(self) -> bool:
        """Whether it is Euler's method under any name: one evaluation, at the start, taken whole."""
        return self.nodes == (0.0,) and self.weights == (1.0,)

    def advance(self, operator: Operator, clock: Clock, h: float, x: Tensor, cost: Cost) -> Tensor:
        """See `SubStep.advance`."""
        if isinstance(operator, Forcing):
            return _quadrature(operator, self.nodes, self.weights, clock, h, x, cost)
        if self.is_euler:
            return operator.euler(clock.start, h, x, cost)  # which a residual block knows without rounding
        stages: list[tuple[float, list[tuple[int, float]]]]
        weights: list[tuple[int, float]]
        stages, weights = self._nonzero  # type: ignore[attr-defined]
        start, length = clock.start, clock.stop - clock.start
        slopes: list[Tensor] = []
        for node, row in stages:
            y = x
            for j, coefficient in row:
                y = torch.add(y, slopes[j], alpha=h * coefficient)
            slopes.append(operator.velocity(start + node * length if node != 1.0 else clock.stop, y, cost))
        for j, weight in weights:
            x = torch.add(x, slopes[j], alpha=h * weight)
        return x

    def bound(self, f: VectorFunction, *, versioned: bool) -> Bound:
        """`advance` along ``f``, with what is the same on every step looked up: ``bound(x, h, times)``.

        ``times`` gives the times of its evaluations in turn, ``clock.at(node)`` for the nodes of the tableau;
        ``versioned`` says whether tensors count what is written to them, as they do outside inference mode.
        """
        stages: list[tuple[float, list[tuple[int, float]]]]
        weights: list[tuple[int, float]]
        stages, weights = self._nonzero  # type: ignore[attr-defined]

        def advance(x: Tensor, h: float, times: Iterator[Tensor]) -> Tensor:
            slopes: list[Tensor] = []
            dtype, shape = x.dtype, x.shape
            for _, row in stages:
                y = x
                for j, coefficient in row:
                    y = y.add(slopes[j], alpha=h * coefficient)
                before = y._version if versioned else -1
                value = f(next(times), y)
                if not (isinstance(value, Tensor) and value.dtype is dtype and value.shape == shape) or (
                    versioned and y._version != before
                ):
                    value = returned(value, y, before)
                slopes.append(value)
            for j, weight in weights:
                x = x.add(slopes[j], alpha=h * weight)
            return x

        return advance


@dataclass(frozen=True)
class Exact:
    """The operator's own exact flow; for a `Forcing`, Simpson's rule, exact for linear and Hermite costates.

    A flow brings its own clock: it is called on the interval of length ``h`` that follows its earlier ones.
    """

    name: str = "exact"
    order: float = float("inf")

    def advance(self, operator: Operator, clock: Clock, h: float, x: Tensor, cost: Cost) -> Tensor:
        """See `SubStep.advance`.

        Raises:
            ValueError: if the operator has no flow.
        """
        if isinstance(operator, Forcing):
            return _quadrature(operator, (0.0, 0.5, 1.0), (1 / 6, 4 / 6, 1 / 6), clock, h, x, cost)
        if operator.flow is None:
            raise ValueError("substep: 'exact' needs the operator's flow; give Operator(f, flow=...) or another method")
        cost.evaluated()
        before = version(x)
        moved = operator.flow(as_time(clock.own, x), as_time(h, x), x)
        check_unmodified("flow", x, before)
        return same_shape("flow", moved, x)


@dataclass(frozen=True)
class TorchDiffEq:
    """Any method of `torchdiffeq.odeint`, adaptive ones included, which are told to step to the end of the stage.

    (Otherwise they step beyond and interpolate, which costs digits and shows them times outside the stage.)

    Attributes:
        method: torchdiffeq's name of it.
        rtol, atol: tolerances of adaptive methods.
        options: passed on; ``"step_t"`` goes on the fraction of the stage, from 0 to 1.
        order: what the method's order is taken to be, for warnings.

    Raises:
        ValueError: if torchdiffeq has no such method.
    """

    method: str = "dopri5"
    rtol: float = 1e-7
    atol: float = 1e-9
    options: Mapping[str, Any] = field(default_factory=dict)
    order: float = float("inf")

    def __post_init__(self) -> None:
        with extra("torchdiffeq"):
            from torchdiffeq._impl.odeint import SOLVERS

        if self.method not in SOLVERS:
            raise ValueError(f"substep: torchdiffeq has no method {self.method!r}; it has {', '.join(SOLVERS)}")

    @property
    def name(self) -> str:
        """What the sub-step is called."""
        return f"torchdiffeq:{self.method}"

    def advance(self, operator: Operator, clock: Clock, h: float, x: Tensor, cost: Cost) -> Tensor:
        """See `SubStep.advance`; all NaN where the method's steps shrink to nothing.

        Raises:
            ValueError: if it needs more steps than ``options["max_num_steps"]``.
        """
        with extra("torchdiffeq"):
            from torchdiffeq import odeint

        def scaled(s: Tensor, y: Tensor) -> Tensor:
            return h * operator.velocity(clock.at(float(s.detach())), y, cost)

        span = torch.tensor([0.0, 1.0], dtype=as_time(0.0, x).dtype, device=x.device)
        options = ({"step_t": span[1:]} if _is_adaptive(self.method) else {}) | dict(self.options)
        try:
            path: Tensor = odeint(scaled, x, span, rtol=self.rtol, atol=self.atol, method=self.method, options=options)
        except AssertionError as error:  # torchdiffeq's way to give up; others are the field's own
            reason = str(error)
            if reason.startswith("max_num_steps exceeded"):
                raise ValueError(
                    f"substep: {self.name!r} needs more steps than its option max_num_steps allows, "
                    f"{self.options.get('max_num_steps')}; expected more, or looser tolerances, or more stages"
                ) from error
            if not reason.startswith(("underflow in dt", "non-finite values in state")):
                raise
            return torch.full_like(x, torch.nan)
        return path[-1]


def _is_adaptive(method: str) -> bool:
    """Whether torchdiffeq chooses the steps of ``method`` itself and can be told where one has to end."""
    with extra("torchdiffeq"):
        from torchdiffeq._impl.odeint import SOLVERS
        from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver

    return issubclass(SOLVERS[method], RKAdaptiveStepsizeODESolver)


def _quadrature(
    operator: Forcing,
    nodes: tuple[float, ...],
    weights: tuple[float, ...],
    clock: Clock,
    h: float,
    x: Tensor,
    cost: Cost,
) -> Tensor:
    totals: dict[float, float] = {}  # nodes that fall on the same time are one, as all do where the clock is frozen
    for node, weight in zip(nodes, weights, strict=True):
        time = clock.at(node)
        totals[time] = totals.get(time, 0.0) + weight
    for time, weight in totals.items():
        if weight:
            cost.evaluated()
            x = torch.add(x, same_shape("costate", operator.value(time), x), alpha=operator.scale * h * weight)
    return x


# Adaptive methods follow their tolerances instead. A stage is one step of those of Adams, and their first is by rk4.
_FIXED_ORDERS = {"euler": 1.0, "midpoint": 2.0, "heun2": 2.0, "heun3": 3.0, "rk4": 4.0}
_FIXED_ORDERS |= dict.fromkeys(("explicit_adams", "implicit_adams", "fixed_adams"), 4.0)

_NAMED: dict[str, SubStep] = {
    method.name: method
    for method in (
        RungeKutta("euler", 1, (0.0,), ((),), (1.0,)),
        RungeKutta("midpoint", 2, (0.0, 0.5), ((), (0.5,)), (0.0, 1.0)),
        RungeKutta("heun", 2, (0.0, 1.0), ((), (1.0,)), (0.5, 0.5)),
        RungeKutta(
            "rk4", 4, (0.0, 0.5, 0.5, 1.0), ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)
        ),
        Exact(),
    )
}


def substep_names() -> tuple[str, ...]:
    """The sub-steps known by name; ``"torchdiffeq:METHOD"`` names the methods of torchdiffeq."""
    return tuple(_NAMED)


def get_substep(substep: str | SubStep) -> SubStep:
    """The sub-step called ``substep``, or ``substep`` itself if it is one.

    Raises:
        TypeError: if it is neither a name nor has a method ``advance``.
        ValueError: for an unknown name, listing near matches.
    """
    if isinstance(substep, str):
        key = substep.strip().lower()
        if key.startswith("torchdiffeq:"):
            method = key.removeprefix("torchdiffeq:")
            return TorchDiffEq(method, order=_FIXED_ORDERS.get(method, float("inf")))
        if key not in _NAMED:
            known = f"{', '.join(_NAMED)}, or torchdiffeq:METHOD"
            raise ValueError(f"substep: got {substep!r}, expected one of {known}{did_you_mean(key, _NAMED, most=2)}")
        return _NAMED[key]
    if isinstance(substep, type) or not callable(getattr(substep, "advance", None)):
        raise TypeError(
            f"substep: got {type(substep).__name__}, expected a name, a sub-step such as odeadv.TorchDiffEq('dopri5'), "
            "or a dict of them by operator"
        )
    return substep
