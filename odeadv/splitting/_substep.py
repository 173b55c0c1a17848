"""Sub-steps: how one operator is advanced over one stage of a composition."""

from __future__ import annotations

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
# A weighted sum c * (k_j + r_1 k_j1 + ...): j, c and the pairs of an index and a ratio. None is the empty sum.
Weighted = tuple[int, float, tuple[tuple[int, float], ...]] | None


class Clock(NamedTuple):
    """The times that an operator sees during a stage.

    Attributes:
        start: the clock when the stage begins.
        stop: the clock when it ends; equal to ``start`` if the scheme freezes the clock.
        own: the start of the operator's own clock, the sum of its earlier weights. An exact flow uses this clock.
    """

    start: float
    stop: float
    own: float

    def at(self, node: float) -> float:
        """Return the time at the fraction ``node`` of the stage; the ends exactly."""
        if node == 0.0:
            return self.start
        return self.stop if node == 1.0 else self.start + node * (self.stop - self.start)


class SubStep(Protocol):
    """Advances one operator. Any object with these three members can be given as ``substep=``.

    It may also have an attribute ``needs``, some of ``"f"``, ``"flow"`` and ``"solve"``: `odeadv.solve` then refuses
    operators without these abilities (`Operator.abilities`) before any work.

    Attributes:
        name: shown in messages.
        order: order of accuracy.
    """

    @property
    def name(self) -> str:
        """The name shown in messages."""
        ...

    @property
    def order(self) -> float:
        """Order of accuracy; infinite for exact flows."""
        ...

    def advance(self, operator: Operator, clock: Clock, h: float, x: Tensor, cost: Cost) -> Tensor:
        """Return ``x`` after the duration ``h`` along ``operator``, whose clock runs from ``clock.start`` to ``stop``.

        Evaluate the operator by ``operator.velocity(time, x, cost)``, which counts and checks. The result must stay in
        the autograd graph of ``x``.
        """
        ...


class RungeKutta(Tableau):
    """An explicit Runge-Kutta method by its Butcher tableau; for a `Forcing`, the quadrature rule with its weights.

    Give it as ``substep=`` or ``scheme=`` of `odeadv.solve`, which warns if the order is lower than the declared one.

    Attributes:
        name: shown in messages.
        order: order of accuracy, see `measure_order`.
        nodes: c_i, s numbers.
        matrix: a_ij, s rows below the diagonal: of i - 1 numbers, or square with zeros on and above the diagonal.
        weights: b_i, s numbers.

    Raises:
        ValueError: naming ``nodes``, ``matrix`` or ``weights``, if their lengths do not fit, the method is not
            explicit, or the sum of a row is not its node.

    Example:
        >>> ralston = odeadv.RungeKutta("ralston", 2, (0, 2 / 3), ((), (2 / 3,)), (1 / 4, 3 / 4))
        >>> odeadv.solve(lambda t, x: -x, torch.ones(2), (0.0, 1.0), substep=ralston, steps=10).xs[-1]
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
        """``"f"``, see `SubStep`."""
        return frozenset(("f",))

    @property
    def is_euler(self) -> bool:
        """True if it is Euler's method under any name: one evaluation, at the start, with weight one."""
        return self.nodes == (0.0,) and self.weights == (1.0,)

    def advance(self, operator: Operator, clock: Clock, h: float, x: Tensor, cost: Cost) -> Tensor:
        """See `SubStep.advance`."""
        if isinstance(operator, Forcing):
            return _quadrature(operator, self.nodes, self.weights, clock, h, x, cost)
        if self.is_euler:
            return operator.euler(clock.start, h, x, cost)  # a residual block has a form of it without rounding
        stages: list[tuple[float, Weighted]]
        weights: Weighted
        stages, weights = self._table  # type: ignore[attr-defined]
        held = Slopes(cost)
        for node, row in stages:
            y = _moved(x, held.values, row, h)
            held.add(operator.velocity(clock.at(node), y, cost))
        return _moved(x, held.done(), weights, h)

    def bound(self, f: VectorFunction, *, versioned: bool) -> BoundSubStep:
        """Return `advance` along ``f`` as ``bound(x, h, times)``, with everything constant looked up beforehand.

        ``times`` yields the times of its evaluations in turn, ``clock.at(node)`` for the nodes of the tableau.
        ``versioned`` says whether tensors count writes to them, as they do outside inference mode.
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
                elif not row[2]:  # `_moved`, written out: Python calls are most of the cost of a step on small states
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
    """Return the pairs of an index and a coefficient, without zeros, in units of the first coefficient."""
    nonzero = [(j, c) for j, c in coefficients if c]
    if not nonzero:
        return None
    (first, unit), *others = nonzero
    return first, unit, tuple((j, c / unit) for j, c in others)


def _moved(x: Tensor, slopes: list[Tensor], weighted: Weighted, h: float) -> Tensor:
    """Return x + h times the weighted sum of slopes.

    The slopes are summed first. Added to x one by one, each would be rounded to the last place of x.
    """
    if weighted is None:
        return x
    j, unit, others = weighted
    total = slopes[j]
    for j, ratio in others:
        total = total.add(slopes[j], alpha=ratio)
    size: Any = h  # a tensor if a gradient has to reach the span
    return plus(x, total, size * unit) if isinstance(size, Tensor) else x.add(total, alpha=size * unit)


class DIRK(Tableau):
    """A diagonally implicit Runge-Kutta method by its Butcher tableau; for a `Forcing`, its quadrature rule.

    Stage i solves y_i - h a_ii f(t_i, y_i) = x + h (a_i1 k_1 + ... + a_i,i-1 k_i-1), see `Operator.implicit`. The slope
    k_i is taken from this equation and not from f, which would multiply the error of y_i by the stiffness (Hairer and
    Wanner 1996, Solving ODEs II, IV.8). If the last row of the matrix is the weights, the result is y_s.

    Attributes:
        name: shown in messages.
        order: order of accuracy. On stiff problems the order may fall to the order of a stage, 1, or 2 for the implicit
            midpoint rule and Crank-Nicolson.
        nodes: c_i, s numbers.
        matrix: a_ij, the s rows of the lower triangle, the diagonal included. A zero there is an explicit stage.
        weights: b_i, s numbers.

    Raises:
        ValueError: naming ``nodes``, ``matrix`` or ``weights``, if their lengths do not fit, or the sum of a row is not
            its node.

    Example:
        >>> theta = odeadv.DIRK("theta", 1, (0.0, 1.0), ((0.0,), (0.4, 0.6)), (0.4, 0.6))
        >>> odeadv.solve(lambda t, x: -50 * x, torch.ones(2), (0.0, 1.0), scheme=theta, steps=10).xs[-1]
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
        """``"solve"``, and ``"f"`` if a stage is explicit, see `SubStep`."""
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
                slopes.append(operator.velocity(clock.at(node), y, cost).clone())  # f may reuse the memory
            else:
                kept.state = y
                y = operator.implicit(clock.at(node), h * diagonal, b, cost, kept)
                if last is not None or i < len(rows) - 1:
                    slopes.append((y - b) / (h * diagonal))
        return y if last is None else _moved(x, slopes, last, h)


@dataclass(frozen=True)
class Exact:
    """The operator's own exact flow; for a `Forcing`, Simpson's rule, exact for linear and Hermite costates.

    A flow has its own clock: it is called on the interval of length ``h`` that follows its earlier ones.
    """

    name: str = "exact"
    order: float = math.inf

    @property
    def needs(self) -> frozenset[str]:
        """``"flow"``, see `SubStep`."""
        return frozenset(("flow",))

    def advance(self, operator: Operator, clock: Clock, h: float, x: Tensor, cost: Cost) -> Tensor:
        """See `SubStep.advance`.

        Raises:
            ValueError: if the operator's flow is not known, or returns a tensor without the gradient of its state.
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
    """Any method of `torchdiffeq.odeint`. Adaptive methods are told to step to the end of the stage.

    (Otherwise they step beyond the end and interpolate, which costs digits and shows f times outside the stage.)

    Attributes:
        method: torchdiffeq's name of it. ``"scipy_solver"`` gives no gradients, so it is refused if one is needed.
        rtol, atol: tolerances of adaptive methods.
        options: passed on; ``"step_t"`` is in fractions of the stage, from 0 to 1.
        order: the method's order, for warnings and for the step control. If it is not given, fixed-step methods have
            torchdiffeq's own number, and adaptive methods, which follow their tolerances, have infinity.

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
        """The name shown in messages."""
        return f"torchdiffeq:{self.method}"

    @property
    def needs(self) -> frozenset[str]:
        """``"f"``, see `SubStep`."""
        return frozenset(("f",))

    def advance(self, operator: Operator, clock: Clock, h: float, x: Tensor, cost: Cost) -> Tensor:
        """See `SubStep.advance`; all NaN if the steps of the method shrink to nothing.

        Raises:
            ValueError: if it needs more steps than ``options["max_num_steps"]``, or gives no gradient where one is
                needed.
        """
        with extra("torchdiffeq"):
            from torchdiffeq import odeint

        def scaled(s: Tensor, y: Tensor) -> Tensor:
            return h * operator.velocity(clock.at(float(s.detach())), y, cost)

        span = torch.tensor([0.0, 1.0], dtype=as_time(0.0, x).dtype, device=x.device)
        options = ({"step_t": span[1:]} if _is_adaptive(self.method) else {}) | dict(self.options)
        # torchdiffeq keeps its first step size in the graph, through this norm alone. The size is not part of the
        # solution, and its gradient would be wrong, for the times that f is given here are not in the graph.
        norm = self.options.get("norm", _root_mean_square)
        options["norm"] = lambda error: norm(error.detach())
        try:
            path: Tensor = odeint(scaled, x, span, rtol=self.rtol, atol=self.atol, method=self.method, options=options)
        except AssertionError as error:  # torchdiffeq gives up with this type; other assertions are the field's own
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
            # The state needs no gradient, but parameters may: an evaluation that is not counted shows it.
            in_graph(f"substep {self.name!r}", path[-1], operator.velocity(clock.start, x, Cost()))
        return in_graph(f"substep {self.name!r}", path[-1], x)


def _root_mean_square(error: Tensor) -> Tensor:
    """Return torchdiffeq's default norm."""
    return error.abs().pow(2).mean().sqrt()


def _is_adaptive(method: str) -> bool:
    """Return whether torchdiffeq chooses the steps of ``method`` itself and can be told where one has to end."""
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
    """Return x + h * scale * sum of the weights times the values at the nodes."""
    totals: dict[float, float] = {}  # nodes at the same time are one node, as all are if the clock is frozen
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
    """Return the sub-steps known by name, besides the methods of torchdiffeq."""
    return tuple(_NAMED)


def is_named(substep: SubStep) -> bool:
    """Return True if the sub-step is one of those known by name."""
    return _NAMED.get(substep.name) is substep


def is_substep(value: object) -> bool:
    """Return True for sub-steps and their names. A name of a scheme is not one, even if torchdiffeq has it."""
    if not isinstance(value, str):
        return not isinstance(value, type) and callable(getattr(value, "advance", None))
    key = value.strip().lower()
    if key in _NAMED or key.startswith("torchdiffeq:"):
        return True
    return not schemes.knows(key) and key in _torchdiffeq_methods()


def cheapest_of_order(order: float) -> str:
    """Return the sub-step with the fewest evaluations that has at least ``order``; ``"rk4"`` above order four."""
    return next((name for name in ("euler", "midpoint", "rk4") if _NAMED[name].order >= order), "rk4")


def get_substep(substep: str | SubStep) -> SubStep:
    """Return the sub-step called ``substep``, or ``substep`` itself if it is one.

    ``"dopri5"`` or ``"torchdiffeq:dopri5"`` is a method of torchdiffeq. Without the prefix, names of ours come first.

    Raises:
        TypeError: if it is neither a name nor an object with a method ``advance``.
        ValueError: if the name is unknown; the message lists near matches.
    """
    if isinstance(substep, str):
        key = substep.strip().lower()
        if key.startswith("torchdiffeq:"):
            return TorchDiffEq(key.removeprefix("torchdiffeq:"))
        if key in _NAMED:
            return _NAMED[key]
        methods = _torchdiffeq_methods()
        if key in methods:
            return TorchDiffEq(key)
        missing = "not installed: pip install 'odeadv[torchdiffeq]'"
        known = f"{', '.join(_NAMED)}, or a method of torchdiffeq ({', '.join(methods) or missing})"
        near = did_you_mean(key, [*_NAMED, *methods], most=2)
        raise ValueError(f"substep: got {substep!r}, expected one of {known}{near}")
    if not is_substep(substep):
        raise TypeError(
            f"substep: got {type(substep).__name__}, expected a name, a sub-step such as odeadv.TorchDiffEq('dopri5'), "
            "or a dict of them by operator"
        )
    return substep


def _torchdiffeq_methods() -> tuple[str, ...]:
    """Return the names of torchdiffeq's methods; none if it is not installed."""
    try:
        from torchdiffeq._impl.odeint import SOLVERS
    except ImportError:
        return ()
    return tuple(SOLVERS)
