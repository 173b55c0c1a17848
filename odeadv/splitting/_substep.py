"""Sub-steps: the methods that advance one operator over one stage of a composition."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from odeadv.fields.operator import (
    Cost,
    Kept,
    Operator,
    Slopes,
    VectorFunction,
    as_time,
    in_graph,
    plus,
    returned,
    same_shape,
    watched,
)
from odeadv.fields.terms import Forcing
from odeadv.splitting import schemes
from odeadv.splitting._tableau import Tableau
from odeadv.support.checks import did_you_mean
from odeadv.support.extras import extra
from odeadv.support.isolation import check_unmodified, version

BoundSubStep = Callable[[Tensor, float, Iterator[Tensor]], Tensor]
# A weighted sum of slopes k, c * (k_j + r_1 k_j1 + ...), as j, c and the pairs (j1, r_1), ... None is the empty sum.
Weighted = tuple[int, float, tuple[tuple[int, float], ...]] | None


class Clock(NamedTuple):
    """The times that an operator sees during a stage.

    Attributes:
        start: time at the start of the stage.
        stop: time at the end of the stage; equal to ``start`` if the scheme freezes the clock.
        own: start of the stage on the operator's own clock, which adds up its earlier stages. Exact flows use it.
    """

    start: float
    stop: float
    own: float

    def at(self, node: float) -> float:
        """Return the time at the fraction ``node`` of the stage: exactly ``start`` for 0, exactly ``stop`` for 1."""
        if node == 0.0:
            return self.start
        return self.stop if node == 1.0 else self.start + node * (self.stop - self.start)


class SubStep(Protocol):
    """Advances one operator. Any object with these three members can be given as ``substep=``.

    It may also have an attribute ``needs``, a set of the names ``"f"``, ``"flow"`` and ``"solve"``. `odeadv.solve` then
    rejects operators without these functions (`Operator.abilities`) before it starts.

    Attributes:
        name: name of the sub-step in messages.
        order: order of accuracy.
    """

    @property
    def name(self) -> str:
        """The name of the sub-step in messages."""
        ...

    @property
    def order(self) -> float:
        """The order of accuracy. It is infinite for exact flows."""
        ...

    def advance(self, operator: Operator, clock: Clock, h: float, x: Tensor, cost: Cost) -> Tensor:
        """Return the state after the duration ``h`` of ``operator``, from the state ``x``.

        The clock of the operator runs from ``clock.start`` to ``clock.stop``. Evaluate the operator by
        ``operator.velocity(time, x, cost)``, which counts the evaluation and checks its result. The returned state must
        stay in the autograd graph of ``x``.

        Args:
            operator: the operator f for this step. It is never a `Jump`, which the solver applies itself.
            clock: the times that the operator sees, see `Clock`. ``clock.at(node)`` is the time of a stage at the
                fraction ``node``.
            h: duration, the step size times the weight of the stage. It is negative if the stage runs backward, and it
                can differ from ``clock.stop - clock.start`` if the clock is frozen.
            x: state at the start of the stage, a tensor of any shape. Do not write to it.
            cost: counts evaluations; give it to every call of ``operator.velocity``.
        """
        ...


class RungeKutta(Tableau):
    """An explicit Runge-Kutta method with s stages, given by its Butcher tableau.

    For a `Forcing` it is the quadrature rule with the same nodes and weights. Give the method as ``substep=`` or
    ``scheme=`` of `odeadv.solve`. solve warns if the measured order is lower than ``order``.

    Attributes:
        name: name of the method in messages.
        order: order of accuracy, see `measure_order`.
        nodes: s numbers c_i.
        matrix: the numbers a_{ij} below the diagonal, as s rows of 0 to s - 1 numbers. Or a square matrix with zeros on
            and above the diagonal.
        weights: s numbers b_i.

    Raises:
        ValueError: if the lengths do not fit, the method is not explicit, or the sum of a row is not its node. The
            message names ``nodes``, ``matrix`` or ``weights``.

    Example:
        >>> ralston = odeadv.RungeKutta("ralston", 2, (0, 2 / 3), ((), (2 / 3,)), (1 / 4, 3 / 4))
        >>> odeadv.solve(lambda t, x: -x, torch.ones(2), (0.0, 1.0), substep=ralston, steps=10).xs[-1]
        tensor([0.3685, 0.3685])
    """

    def _check_rows(self) -> None:
        count = len(self.nodes)
        if len(self.matrix) != count or not all(len(row) in (i, count) for i, row in enumerate(self.matrix)):
            raise ValueError(
                f"matrix: got rows of lengths {[*map(len, self.matrix)]}, expected 0 to {count - 1}, or all {count}"
            )
        if any(a for i, row in enumerate(self.matrix) for a in row[i:]):
            raise ValueError(
                "matrix: got numbers on or above the diagonal, expected an explicit method; odeadv.DIRK is for "
                "diagonally implicit ones"
            )
        object.__setattr__(self, "matrix", tuple(row[:i] for i, row in enumerate(self.matrix)))

    def __post_init__(self) -> None:
        super().__post_init__()
        rows = [_weighted(enumerate(row)) for row in self.matrix]
        stages = list(zip(self.nodes, rows, strict=True))
        object.__setattr__(self, "_table", (stages, _weighted(enumerate(self.weights))))

    @property
    def needs(self) -> frozenset[str]:
        """The function ``"f"``, see `SubStep`."""
        return frozenset(("f",))

    @property
    def is_euler(self) -> bool:
        """True if this is Euler's method, whatever its name: one evaluation, at the start, with weight one."""
        return self.nodes == (0.0,) and self.weights == (1.0,)

    def advance(self, operator: Operator, clock: Clock, h: float, x: Tensor, cost: Cost) -> Tensor:
        """See `SubStep.advance`."""
        if isinstance(operator, Forcing):
            return _quadrature(operator, self.nodes, self.weights, clock, h, x, cost)
        if self.is_euler:
            return operator.euler(clock.start, h, x, cost)  # a `Residual` avoids the rounding of x + (block(x) - x)
        stages: list[tuple[float, Weighted]]
        weights: Weighted
        stages, weights = self._table  # type: ignore[attr-defined]
        held = Slopes(cost)
        for node, row in stages:
            y = _moved(x, held.values, row, h)
            held.add(operator.velocity(clock.at(node), y, cost))
        return _moved(x, held.done(), weights, h)

    def bound(self, f: VectorFunction, *, versioned: bool) -> BoundSubStep:
        """Return a fast function ``bound(x, h, times)`` that does the same as `advance` for the function ``f``.

        ``times`` yields the time of each evaluation in turn, ``clock.at(node)`` for the nodes of the tableau.
        ``versioned`` is True if tensors count the writes to them, which they do outside inference mode.
        """
        stages: list[tuple[float, Weighted]]
        weights: Weighted
        stages, weights = self._table  # type: ignore[attr-defined]
        rows = [row for _, row in stages]

        def advance(x: Tensor, h: float, times: Iterator[Tensor]) -> Tensor:
            slopes: list[Tensor] = []
            dtype, shape = x.dtype, x.shape
            for row in rows:
                if row is None:
                    y = x
                elif not row[2]:  # this repeats `_moved`: Python calls are most of the cost of a step on small states
                    y = x.add(slopes[row[0]], alpha=h * row[1])
                else:
                    y = _moved(x, slopes, row, h)
                before = y._version if versioned else -1
                value = f(next(times), y)
                if not (isinstance(value, Tensor) and value.dtype is dtype and value.shape == shape) or (
                    versioned and y._version != before
                ):
                    value = returned(value, y, before)
                slopes.append(value)
            return _moved(x, slopes, weights, h)

        return advance


def _weighted(coefficients: Iterable[tuple[int, float]]) -> Weighted:
    """Return the weighted sum for pairs of an index and a coefficient, without the zeros. See `Weighted`."""
    nonzero = [(j, c) for j, c in coefficients if c]
    if not nonzero:
        return None
    (first, unit), *others = nonzero
    return first, unit, tuple((j, c / unit) for j, c in others)


def _moved(x: Tensor, slopes: list[Tensor], weighted: Weighted, h: float) -> Tensor:
    """Return x + h times the weighted sum of slopes.

    The slopes are summed first. If they were added to x one by one, each sum would be rounded to the precision of x.
    """
    if weighted is None:
        return x
    j, unit, others = weighted
    total = slopes[j]
    for j, ratio in others:
        total = total.add(slopes[j], alpha=ratio)
    size: Any = h  # h is a tensor if gradients with respect to the span are needed
    return plus(x, total, size * unit) if isinstance(size, Tensor) else x.add(total, alpha=size * unit)


class DIRK(Tableau):
    """A diagonally implicit Runge-Kutta method with s stages, given by its Butcher tableau.

    For a `Forcing` it is the quadrature rule with the same nodes and weights. Stage i solves y_i - h a_{ii} f(t_i, y_i)
    = x + h (a_{i1} k_1 + ... + a_{i,i-1} k_{i-1}) for y_i, see `Operator.implicit`. The slope k_i is computed from this
    equation. An evaluation of f would multiply the error of y_i by the stiffness (Hairer and Wanner 1996, Solving ODEs
    II, IV.8). If the last row of the matrix equals the weights, the result is y_s.

    Attributes:
        name: name of the method in messages.
        order: order of accuracy. On stiff problems the order may fall to the stage order. The stage order is 2 for the
            implicit midpoint rule and Crank-Nicolson, and 1 for the other methods.
        nodes: s numbers c_i.
        matrix: the numbers a_{ij} of the lower triangle, as s rows of 1 to s numbers. A zero on the diagonal is an
            explicit stage.
        weights: s numbers b_i.

    Raises:
        ValueError: if the lengths do not fit, or the sum of a row is not its node. The message names ``nodes``,
            ``matrix`` or ``weights``.

    Example:
        >>> theta = odeadv.DIRK("theta", 1, (0.0, 1.0), ((0.0,), (0.4, 0.6)), (0.4, 0.6))
        >>> odeadv.solve(lambda t, x: -x, torch.ones(2), (0.0, 1.0), scheme=theta, steps=10).xs[-1]
        tensor([0.3712, 0.3712])
    """

    def _check_rows(self) -> None:
        count = len(self.nodes)
        if [len(row) for row in self.matrix] != [*range(1, count + 1)]:
            raise ValueError(f"matrix: got rows of lengths {[*map(len, self.matrix)]}, expected 1 to {count}")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_rows", [(_weighted(enumerate(row[:-1])), row[-1]) for row in self.matrix])
        object.__setattr__(
            self, "_last", None if self.matrix[-1] == self.weights else _weighted(enumerate(self.weights))
        )

    @property
    def needs(self) -> frozenset[str]:
        """The function ``"solve"``, and also ``"f"`` if a stage is explicit; see `SubStep`."""
        return frozenset(("solve", "f") if any(row[-1] == 0.0 for row in self.matrix) else ("solve",))

    def advance(self, operator: Operator, clock: Clock, h: float, x: Tensor, cost: Cost) -> Tensor:
        """See `SubStep.advance`."""
        if isinstance(operator, Forcing):
            return _quadrature(operator, self.nodes, self.weights, clock, h, x, cost)
        rows: list[tuple[Weighted, float]] = self._rows  # type: ignore[attr-defined]
        last: Weighted = self._last  # type: ignore[attr-defined]
        slopes: list[Tensor] = []
        kept, y = Kept(x), x
        for i, (node, (row, diagonal)) in enumerate(zip(self.nodes, rows, strict=True)):
            b = _moved(x, slopes, row, h)
            if diagonal == 0.0:
                y = b
                slopes.append(operator.velocity(clock.at(node), y, cost).clone())  # f may reuse its memory
            else:
                kept.state = y
                y = operator.implicit(clock.at(node), h * diagonal, b, cost, kept)
                if last is not None or i < len(rows) - 1:
                    slopes.append((y - b) / (h * diagonal))
        return y if last is None else _moved(x, slopes, last, h)


@dataclass(frozen=True)
class Exact:
    """The exact flow of the operator. For a `Forcing`, Simpson's rule, which is exact for linear and Hermite costates.

    A flow uses the operator's own clock: each interval of length ``h`` begins at the end of the previous interval.

    Attributes:
        name: name of the sub-step in messages.
        order: order of accuracy; infinite, because a flow is exact.
    """

    name: str = "exact"
    order: float = math.inf

    @property
    def needs(self) -> frozenset[str]:
        """The function ``"flow"``, see `SubStep`."""
        return frozenset(("flow",))

    def advance(self, operator: Operator, clock: Clock, h: float, x: Tensor, cost: Cost) -> Tensor:
        """See `SubStep.advance`.

        Raises:
            ValueError: if the operator lacks a flow, or if a gradient is needed and the flow cuts the autograd graph.
        """
        if isinstance(operator, Forcing):
            return _quadrature(operator, (0.0, 0.5, 1.0), (1 / 6, 4 / 6, 1 / 6), clock, h, x, cost)
        flow = operator.flow
        if flow is None:
            raise ValueError("substep: 'exact' needs the operator's flow; give Operator(f, flow=...) or another method")
        cost.evaluated()
        t, dt = as_time(clock.own, x, operator.time_dtype), as_time(h, x, operator.time_dtype)
        before = version(x)
        moved = watched("flow", lambda: flow(t, dt, x), x) if cost.watch else flow(t, dt, x)
        check_unmodified("flow", x, before)
        return in_graph("flow", same_shape("flow", moved, x), x)


@dataclass(frozen=True)
class TorchDiffEq:
    """Any method of `torchdiffeq.odeint`. Adaptive methods end a step at the end of the stage.

    (By default torchdiffeq steps beyond the end and interpolates. That loses digits and evaluates f outside the stage.)

    Attributes:
        method: torchdiffeq's name of the method. ``"scipy_solver"`` raises an error if a gradient is needed.
        rtol, atol: relative and absolute tolerance of adaptive methods. The defaults are for float64.
        options: options of `torchdiffeq.odeint`. Times in ``"step_t"`` are fractions of the stage, from 0 to 1.
        order: order of the method, for warnings and for the step control. By default it is torchdiffeq's number for
            fixed-step methods, and infinity for adaptive methods, because their error depends on the tolerances.

    Raises:
        ValueError: if torchdiffeq does not have this method.
    """

    method: str = "dopri5"
    rtol: float = 1e-7
    atol: float = 1e-9
    options: Mapping[str, Any] = field(default_factory=dict)
    order: float = math.nan

    def __post_init__(self) -> None:
        with extra("torchdiffeq"):
            from torchdiffeq._impl.odeint import SOLVERS
            from torchdiffeq._impl.solvers import FixedGridODESolver

        if self.method not in SOLVERS:
            raise ValueError(
                f"substep: torchdiffeq lacks the method {self.method!r}; it has {', '.join(SOLVERS)}"
                f"{did_you_mean(self.method, SOLVERS)}"
            )
        if math.isnan(self.order):
            solver = SOLVERS[self.method]
            fixed = issubclass(solver, FixedGridODESolver)
            object.__setattr__(self, "order", float(solver.order) if fixed else math.inf)

    @property
    def name(self) -> str:
        """The name of the sub-step in messages."""
        return f"torchdiffeq:{self.method}"

    @property
    def adaptive(self) -> bool:
        """True if torchdiffeq chooses the steps of the method."""
        return _is_adaptive(self.method)

    @property
    def needs(self) -> frozenset[str]:
        """The function ``"f"``, see `SubStep`."""
        return frozenset(("f",))

    def advance(self, operator: Operator, clock: Clock, h: float, x: Tensor, cost: Cost) -> Tensor:
        """See `SubStep.advance`. The result is NaN if the steps become too small or the state is not finite.

        Raises:
            ValueError: if the method needs more steps than ``options["max_num_steps"]``, or if a gradient is needed and
                the method cuts the autograd graph.
        """
        with extra("torchdiffeq"):
            from torchdiffeq import odeint

        def scaled(s: Tensor, y: Tensor) -> Tensor:
            return h * operator.velocity(clock.at(float(s.detach())), y, cost)

        span = torch.tensor([0.0, 1.0], dtype=as_time(0.0, x).dtype, device=x.device)
        options = ({"step_t": span[1:]} if self.adaptive else {}) | dict(self.options)
        # torchdiffeq keeps its first step size in the autograd graph, through this norm only. The gradient of the step
        # size would be wrong, because the times that f receives here are not in the graph. So the norm is detached.
        norm = self.options.get("norm", _root_mean_square)
        options["norm"] = lambda error: norm(error.detach())
        try:
            path: Tensor = odeint(scaled, x, span, rtol=self.rtol, atol=self.atol, method=self.method, options=options)
        except AssertionError as error:  # torchdiffeq's errors have this type; other assertions come from the field
            reason = str(error)
            if reason.startswith("max_num_steps exceeded"):
                raise ValueError(
                    f"substep: {self.name!r} needs more steps than its option max_num_steps allows, "
                    f"{self.options.get('max_num_steps')}; expected more, or looser tolerances, or more stages"
                ) from error
            if not reason.startswith(("underflow in dt", "non-finite values in state")):
                raise
            return torch.full_like(x, torch.nan)
        if self.method == "scipy_solver" and torch.is_grad_enabled() and not x.requires_grad:
            # The parameters may need a gradient even if the state does not. An extra evaluation, not counted, shows it.
            in_graph(f"substep {self.name!r}", path[-1], operator.velocity(clock.start, x, Cost()))
        return in_graph(f"substep {self.name!r}", path[-1], x)


def _root_mean_square(error: Tensor) -> Tensor:
    """Return the root mean square of ``error``, which is torchdiffeq's default norm."""
    return error.abs().pow(2).mean().sqrt()


def _is_adaptive(method: str) -> bool:
    """Return True if torchdiffeq chooses the steps of ``method`` and accepts ``"step_t"``, times at which steps end."""
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
    """Return x + h * scale * (the sum of weights times values of the forcing at the nodes)."""
    totals: dict[float, float] = {}  # nodes at the same time are merged; a frozen clock has only one time
    for node, weight in zip(nodes, weights, strict=True):
        time = clock.at(node)
        totals[time] = totals.get(time, 0.0) + weight
    acting = {time: weight for time, weight in totals.items() if weight}
    values = []
    for time in acting:
        cost.evaluated()
        values.append(same_shape("costate", operator.value(time), x))
    return _moved(x, values, _weighted(enumerate(acting.values())), operator.scale * h)


_GAMMA = 1.0 - math.sqrt(0.5)
_NAMED: dict[str, SubStep] = {
    method.name: method
    for method in (
        RungeKutta("euler", 1, (0.0,), ((),), (1.0,)),
        RungeKutta("midpoint", 2, (0.0, 0.5), ((), (0.5,)), (0.0, 1.0)),
        RungeKutta("heun", 2, (0.0, 1.0), ((), (1.0,)), (0.5, 0.5)),
        RungeKutta(
            "rk4", 4, (0.0, 0.5, 0.5, 1.0), ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)
        ),
        DIRK("backward-euler", 1, (1.0,), ((1.0,),), (1.0,)),
        DIRK("crank-nicolson", 2, (0.0, 1.0), ((0.0,), (0.5, 0.5)), (0.5, 0.5)),
        DIRK("implicit-midpoint", 2, (0.5,), ((0.5,),), (1.0,)),
        # Alexander 1977, SIAM J. Numer. Anal. 14: L-stable.
        DIRK("sdirk2", 2, (_GAMMA, 1.0), ((_GAMMA,), (1.0 - _GAMMA, _GAMMA)), (1.0 - _GAMMA, _GAMMA)),
        # Hairer and Wanner 1996, Solving ODEs II, table IV.6.5: L-stable.
        DIRK(
            "sdirk4",
            4,
            (1 / 4, 3 / 4, 11 / 20, 1 / 2, 1.0),
            (
                (1 / 4,),
                (1 / 2, 1 / 4),
                (17 / 50, -1 / 25, 1 / 4),
                (371 / 1360, -137 / 2720, 15 / 544, 1 / 4),
                (25 / 24, -49 / 48, 125 / 16, -85 / 12, 1 / 4),
            ),
            (25 / 24, -49 / 48, 125 / 16, -85 / 12, 1 / 4),
        ),
        Exact(),
    )
}


def substep_names() -> tuple[str, ...]:
    """Return the names of all sub-steps except the methods of torchdiffeq."""
    return tuple(_NAMED)


def all_names() -> tuple[str, ...]:
    """Return the names of all sub-steps and of the methods of torchdiffeq, if it is installed."""
    return (*_NAMED, *_torchdiffeq_methods())


def shown_names() -> str:
    """Return the names of all sub-steps as text for a message."""
    methods = _torchdiffeq_methods()
    missing = "not installed: pip install 'odeadv[torchdiffeq]'"
    return f"{', '.join(_NAMED)}, or a method of torchdiffeq ({', '.join(methods) or missing})"


def is_named(substep: SubStep) -> bool:
    """Return True if ``substep`` is one of the predefined sub-steps of `substep_names`."""
    return _NAMED.get(substep.name) is substep


def is_substep(value: object) -> bool:
    """Return True for sub-steps and their names. A name of a scheme counts as a scheme, even if torchdiffeq has it."""
    if not isinstance(value, str):
        return not isinstance(value, type) and callable(getattr(value, "advance", None))
    key = value.strip().lower()
    if key in _NAMED or key.startswith("torchdiffeq:"):
        return True
    return not schemes.knows(key) and key in _torchdiffeq_methods()


def cheapest_of_order(order: float) -> str:
    """Return the name of the sub-step of at least ``order`` with the fewest evaluations; ``"rk4"`` for all above 4."""
    return next((name for name in ("euler", "midpoint", "rk4") if _NAMED[name].order >= order), "rk4")


def get_substep(substep: str | SubStep) -> SubStep:
    """Return the sub-step with the name ``substep``. Return ``substep`` itself if it is a sub-step.

    ``"dopri5"`` and ``"torchdiffeq:dopri5"`` are the same method of torchdiffeq. Without the prefix, a name of odeadv
    takes precedence.

    Args:
        substep: a name from `substep_names`, the name of a method of torchdiffeq, or an object with the members of
            `SubStep`.

    Raises:
        TypeError: if ``substep`` is neither a name nor an object with a method ``advance``.
        ValueError: if the name is unknown; the message lists near matches.
    """
    if isinstance(substep, str):
        key = substep.strip().lower()
        if key.startswith("torchdiffeq:"):
            return TorchDiffEq(key.removeprefix("torchdiffeq:"))
        if key in _NAMED:
            return _NAMED[key]
        if key in _torchdiffeq_methods():
            return TorchDiffEq(key)
        near = did_you_mean(key, all_names(), most=2)
        raise ValueError(f"substep: got {substep!r}, expected one of {shown_names()}{near}")
    if not is_substep(substep):
        raise TypeError(
            f"substep: got {type(substep).__name__}, expected a name, a sub-step such as odeadv.TorchDiffEq('dopri5'), "
            "or a dict of them by operator"
        )
    return substep


def _torchdiffeq_methods() -> tuple[str, ...]:
    """Return the names of torchdiffeq's methods, or an empty tuple if torchdiffeq is not installed."""
    with contextlib.suppress(ImportError):
        from torchdiffeq._impl.odeint import SOLVERS

        return tuple(SOLVERS)
    return ()
