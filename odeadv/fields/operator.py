"""`Operator` (one term of dx/dt), `Jump` (a map between two times), and checks of a user's functions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn

from odeadv.fields._cost import Cost as Cost
from odeadv.fields._cost import Slopes as Slopes
from odeadv.fields._linear import Diagonal, Matrix, TransformName
from odeadv.fields._newton import Kept as Kept
from odeadv.fields._newton import Newton as Newton
from odeadv.fields._signature import check_arguments
from odeadv.fields._span import MovingSpan
from odeadv.support.deferred import holds, is_deferring
from odeadv.support.discovery import modules_of
from odeadv.support.isolation import check_unmodified, is_wrapped, version

VectorFunction = Callable[[Tensor, Tensor], Tensor]
Flow = Callable[[Tensor, Tensor, Tensor], Tensor]
Solve = Callable[[Tensor, Tensor, Tensor], Tensor]

NARROW = (torch.float16, torch.bfloat16)
_CLOCKS = {torch.float64: torch.float64, torch.complex128: torch.float64}


def clock_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the times that f receives with a state of ``dtype``: its real dtype, or at least float32.

    A time in the dtype of the state can be joined to the state (``torch.cat``) without a change of dtype. 16 bits are
    too few for a time: bfloat16 has 8 significant bits, which are three digits.
    """
    return _CLOCKS.get(dtype, torch.float32)


def as_time(value: float | Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the time ``value`` as a 0-d tensor on the device of the state ``like``."""
    if isinstance(value, Tensor):
        return value.to(dtype or clock_dtype(like.dtype))
    return torch.scalar_tensor(value, dtype=dtype or clock_dtype(like.dtype), device=like.device)


def leading(factor: float | Tensor, x: Tensor) -> Tensor:
    """Return ``factor`` times ``x``. If ``factor`` is a tensor, its axes broadcast with the leading axes of ``x``."""
    if not isinstance(factor, Tensor):
        return factor * x
    whole = factor.reshape(factor.shape + (1,) * (x.ndim - factor.ndim))
    return whole.to(x.real.dtype if x.is_complex() else x.dtype) * x


def plus(x: Tensor, slope: Tensor, h: float | Tensor) -> Tensor:
    """Return x + h * slope. ``h`` is a tensor if one compiled graph is used for all step sizes, see `leading`."""
    return x + leading(h, slope) if isinstance(h, Tensor) else x.add(slope, alpha=h)


def same_shape(name: str, value: object, x: Tensor) -> Tensor:
    """Return ``value``, the result of the user's function ``name``, if it fits the state ``x``.

    Raises:
        TypeError: if ``value`` is not a tensor, or has a dtype that would change the dtype of the state.
        ValueError: if its shape differs from the shape of ``x``.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: returned {type(value).__name__}, expected a tensor of shape {tuple(x.shape)}")
    if value.shape != x.shape:
        raise ValueError(
            f"{name}: returned shape {tuple(value.shape)} for a state of shape {tuple(x.shape)}, expected the same"
        )
    if value.dtype != x.dtype and x.dtype not in NARROW:
        # Autocast promotes states of 16 bits, so such a promotion is allowed. Other states must keep their dtype.
        promoted = torch.promote_types(value.dtype, x.dtype)
        if promoted != x.dtype:
            raise TypeError(
                f"{name}: returned {value.dtype} for a state of {x.dtype}; convert x0 to {promoted}, or the result to "
                f"{x.dtype}"
            )
    return value


def checked(f: VectorFunction, t: Tensor, x: Tensor) -> Tensor:
    """Return ``f(t, x)`` after checks. Do not call it under torch.compile, see `version`.

    Raises:
        TypeError, ValueError: if f writes to ``x``, or its result does not fit ``x``.
    """
    if is_wrapped(x):
        before = version(x)
        return returned(f(t, x), x, before)
    before = -1 if x.is_inference() else x._version
    value = f(t, x)
    # This repeats the body of `returned`, because Python calls are most of the cost of a step on small states.
    if before >= 0 and x._version != before:
        check_unmodified("f", x, before)
    if isinstance(value, Tensor) and value.dtype is x.dtype and value.shape == x.shape:
        return value
    return same_shape("f", value, x)


def returned(value: object, x: Tensor, before: int) -> Tensor:
    """Return ``value``, the result of f for ``x``, after the checks of `checked`. ``before`` is the earlier version."""
    check_unmodified("f", x, before)
    return same_shape("f", value, x)


def watched(name: str, function: Callable[[], Tensor], x: Tensor) -> Tensor:
    """Return ``function()`` after comparing the values of the state ``x`` before and after the call.

    `version` does not see a write through ``x.data`` or through a NumPy array that shares the memory. This function
    sees such writes, but it copies the state, so the loops call it on a few steps only.

    Raises:
        ValueError: if the function has written to ``x``. The message names it by ``name``.
    """
    before = x.detach().clone()
    value = function()
    now = x.detach()
    try:
        if is_deferring():  # NaN differs from itself, so a state with NaN fails the check, as intended
            written = not holds((now == before).all())
        else:
            same = torch.equal(now, before)
            written = not same and bool(((now != before) & ~(now.isnan() & before.isnan())).any())
    except RuntimeError:  # values of fake tensors cannot be read
        written = False
    if written:
        raise ValueError(
            f"{name}: modifies the state in place (through x.data or a NumPy array?); return a new tensor and leave x "
            "as it is"
        )
    return value


_NEWTON = Newton()


def _name(function: object) -> str:
    """Return a short name of a callable for a ``repr``."""
    return str(getattr(function, "__name__", type(function).__name__))


class Operator:
    """One term of a vector field, dx/dt = f(t, x), given by f, by its exact flow or by its implicit solve.

    A sub-step uses one of these three functions. Explicit Runge-Kutta methods evaluate ``f``, ``"exact"`` uses
    ``flow``, and implicit methods (``"backward-euler"``, ``"sdirk2"``, ...) use ``solve``. `linear` and `diagonal` make
    operators with all three functions.

    Args:
        f: ``f(t, x)`` with a 0-d tensor ``t`` and the state ``x``. It returns a tensor of the shape of ``x``, and must
            not write to ``t`` or ``x``. Without ``f``, give ``flow`` or a callable ``solve``.
        flow: ``flow(t, dt, x)`` returns the exact solution of dx/dt = f at ``t + dt`` that is ``x`` at time ``t``.
            ``t`` and ``dt`` are 0-d tensors, and ``dt`` may be negative.
        solve: ``solve(t, c, b)`` returns the solution y of y - c f(t, y) = b, with 0-d tensors ``t`` and ``c``. Give it
            if a direct solver is known (multigrid, FFT, a factorisation). Or give a `Newton` with settings of Newton's
            iteration for ``f``. The default is ``Newton()``.
        modules: modules that ``f``, ``flow`` or ``solve`` runs, so that a recording pass can protect their buffers.
            Most modules are found without this argument: ``f`` itself, the module of a bound method, and modules that a
            function closes over or names globally.
        reversible: False for diffusion and other operators that cannot be run backward in time. solve warns if a scheme
            has negative weights for such an operator.

    Raises:
        TypeError: if ``f``, ``flow`` or ``solve`` is not callable, or none of them is given.

    Example:
        >>> decay = odeadv.Operator(lambda t, x: -x, flow=lambda t, dt, x: x * torch.exp(-dt))
        >>> known_by_flow = odeadv.Operator(flow=lambda t, dt, x: x * torch.exp(-dt))
        >>> odeadv.SplitField(decay=decay, growth=lambda t, x: x**2)
        SplitField(decay, growth)
    """

    pieces: Sequence[Operator | Jump] = ()
    edges: Sequence[float] = ()
    time_dtype: torch.dtype | None = None  # dtype of the times that f, flow and solve receive; None: see `clock_dtype`

    def __init__(
        self,
        f: VectorFunction | None = None,
        *,
        flow: Flow | None = None,
        solve: Solve | Newton | None = None,
        modules: Sequence[object] = (),
        reversible: bool = True,
    ) -> None:
        if f is not None and not callable(f):
            raise TypeError(f"f: got {type(f).__name__}, expected a callable f(t, x) returning dx/dt")
        if flow is not None and not callable(flow):
            raise TypeError(f"flow: got {type(flow).__name__}, expected a callable flow(t, dt, x) or None")
        if solve is not None and not isinstance(solve, Newton) and not callable(solve):
            raise TypeError(f"solve: got {type(solve).__name__}, expected a callable solve(t, c, b) or a Newton")
        if f is None and flow is None and not callable(solve):
            raise TypeError("f: got nothing, expected a callable f(t, x), flow=, or a callable solve=")
        check_arguments("f", f, "f(t, x)")
        check_arguments("flow", flow, "flow(t, dt, x)")
        self.f = _unknown if f is None else f
        self.flow = flow
        self.solver = _NEWTON if solve is None else solve
        self.reversible = reversible
        self._runs = (f, flow, solve, *modules)

    @cached_property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules that the operator runs, searched on first use. Only a recording needs them."""
        return modules_of(*self._runs, owner=self)

    def __repr__(self) -> str:
        parts = [] if self.f is _unknown else [_name(self.f)]
        parts += [] if self.flow is None else [f"flow={_name(self.flow)}"]
        parts += [] if isinstance(self.solver, Newton) else [f"solve={_name(self.solver)}"]
        parts += [] if self.reversible else ["reversible=False"]
        return f"{type(self).__name__}({', '.join(parts)})"

    @staticmethod
    def linear(A: Tensor, *, reversible: bool = True) -> Operator:
        """Return the operator dx/dt = A x, with its right-hand side, its exact flow and its implicit solve.

        The exponential exp(dt A) and the factors of 1 - c A are kept for the latest step sizes, unless a gradient has
        to pass through them. They are converted to the dtype and device of the state.

        Args:
            A: matrix of shape ``(n, n)`` for the last axis of the state. Or a tensor of shape ``(..., n, n)`` with
                leading axes that broadcast with the leading axes of the state as in `torch.matmul`. One matrix per
                sample has shape ``(batch, n, n)``.
            reversible: as for `Operator`.

        Raises:
            TypeError, ValueError: if ``A`` is not a square matrix with finite real or complex entries.

        Example:
            >>> turn = odeadv.Operator.linear(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
            >>> odeadv.solve(turn, torch.ones(2), (0.0, 1.0), steps=1, substep="exact").xs[-1]
            tensor([ 1.3818, -0.3012])
        """
        matrix = Matrix(A)
        return Operator(matrix.rhs, flow=matrix.flow, solve=matrix.solve, reversible=reversible)

    @staticmethod
    def diagonal(
        k: Tensor, *, transform: TransformName = None, dims: int | None = None, reversible: bool = True
    ) -> Operator:
        """Return dx/dt = T^-1 k T x, an operator that is diagonal after a transform T, with flow and implicit solve.

        Linear equations with constant coefficients have this form. An example is heat with diffusivity D on a line of
        length L with n points. If the line is periodic, ``k = -D * (2 * pi * torch.fft.fftfreq(n, L / n)) ** 2`` and
        ``transform="fft"``. If its ends are reflecting (Neumann) and the points are the middles of n cells,
        ``k = -D * (pi * torch.arange(n) / L) ** 2`` and ``transform="dct"``. Right-hand side, flow and solve each cost
        one transform and one inverse transform.

        Args:
            k: the symbol, one eigenvalue per frequency, real or complex, on the whole grid.
            transform: ``"fft"``, ``"dct"`` (the cosine transform of type II), or None for ``k * x``. A real state stays
                real. For ``"fft"`` and a real state, the symbol must satisfy k(-w) = conj(k(w)) at each frequency w.
            dims: number of axes of the grid, which are the last axes of ``k`` and of the state. It is needed if ``k``
                has more than one axis and there is a transform. ``(n, m)`` with ``dims=2`` is a plane. The other axes
                of ``k`` broadcast with the state: ``(2, n)`` with ``dims=1`` is two species on a line.
            reversible: as for `Operator`.

        Raises:
            TypeError, ValueError: if ``k``, ``transform`` or ``dims`` is not valid. The message names the argument.

        Example:
            >>> heat = odeadv.Operator.diagonal(-torch.fft.fftfreq(64, 1 / 64) ** 2, transform="fft", reversible=False)
            >>> odeadv.solve(heat, torch.rand(64), (0.0, 0.1), scheme="sdirk2", steps=10).xs[-1].shape
            torch.Size([64])
        """
        symbol = Diagonal(k, transform, dims)
        return Operator(symbol.rhs, flow=symbol.flow, solve=symbol.solve, reversible=reversible)

    @property
    def abilities(self) -> frozenset[str]:
        """The names of the known functions: ``"f"``, ``"flow"``, ``"solve"``. A sub-step needs one of them."""
        evaluates = self.f is not _unknown
        solves = evaluates or not isinstance(self.solver, Newton)
        known = {"f": evaluates, "flow": self.flow is not None, "solve": solves}
        return frozenset(name for name in known if known[name])

    @property
    def acts(self) -> bool:
        """True if the operator can be evaluated. It is False only for a costate that has not been recorded yet."""
        return True

    @property
    def constant(self) -> bool:
        """True if `on` returns the operator itself for every step."""
        return True

    @property
    def jumps(self) -> tuple[tuple[float, float], ...]:
        """The time intervals on which a `Jump` maps the state."""
        return ()

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        """Evaluate dx/dt at the time ``t`` and the state ``x``."""
        return self.f(t, x)

    def on(self, t0: float, t1: float) -> Operator | Jump:
        """Return the operator for the step from ``t0`` to ``t1``: usually itself, or one piece of a `Piecewise`."""
        return self

    def velocity(self, t: float, x: Tensor, cost: Cost) -> Tensor:
        """Evaluate dx/dt at ``t`` and ``x``, count it in ``cost``, and check that the result fits the state."""
        if torch.compiler.is_compiling():
            return same_shape("f", self.f(as_time(t, x, self.time_dtype), x), x)
        cost.evaluations += 1
        if cost.watch:
            return watched("f", lambda: checked(self.f, as_time(t, x, self.time_dtype), x), x)
        return checked(self.f, as_time(t, x, self.time_dtype), x)

    def with_time_dtype(self, dtype: torch.dtype) -> Operator:
        """Return the same operator with functions that receive times of ``dtype``."""
        other = copy.copy(self)
        other.time_dtype = dtype
        return other

    def widened(self, narrow: torch.dtype) -> Operator:
        """Return the same operator for float32 states. Its functions receive each state rounded to ``narrow``."""
        f, flow, solver = self.f, self.flow, self.solver

        def wide_flow(t: Tensor, dt: Tensor, x: Tensor) -> Tensor:
            assert flow is not None
            y = x.to(narrow)
            return same_shape("flow", flow(t, dt, y), y).to(x.dtype)

        def wide(t: Tensor, x: Tensor) -> Tensor:
            y = x.to(narrow)
            value = same_shape("f", f(t, y), y) if torch.compiler.is_compiling() else checked(f, t, y)
            return value.to(x.dtype)

        def wide_solve(t: Tensor, c: Tensor, b: Tensor) -> Tensor:
            assert callable(solver)
            y = b.to(narrow)
            return same_shape("solve", solver(t, c, y), y).to(b.dtype)

        coarse = 4 * torch.finfo(narrow).eps  # Newton's iteration cannot be more accurate than f
        other = Operator(
            None if f is _unknown else wide,
            flow=wide_flow if flow else None,
            solve=replace(solver, rtol=max(solver.rtol or 0.0, coarse)) if isinstance(solver, Newton) else wide_solve,
            modules=self.modules,
            reversible=self.reversible,
        )
        other.time_dtype = self.time_dtype
        return other

    def timed(self, span: MovingSpan) -> Operator:
        """Return the operator rate * f(t, x) with the time and the rate of ``span``, see `MovingSpan`."""
        f, flow, solver = self.f, self.flow, self.solver
        rate = span.rate
        other = copy.copy(self)
        if f is not _unknown:
            other.f = lambda t, x: leading(rate, f(span(t), x))
        if flow is not None:
            other.flow = lambda t, dt, x: flow(span(t), leading(rate, dt), x)
        if not isinstance(solver, Newton):
            other.solver = lambda t, c, b: solver(span(t), leading(rate, c), b)
        return other

    def implicit(self, t: float, c: float, b: Tensor, cost: Cost, kept: Kept | None = None) -> Tensor:
        """Return the solution y of the equation of an implicit stage, y - c f(t, y) = b.

        Args:
            t: time of the stage.
            c: a duration, the step size times a coefficient of the method.
            b: right-hand side, a tensor of the shape of the state.
            cost: counts the solve. If Newton's iteration fails, it counts the failure, and the result is NaN.
            kept: values of the previous stage of the same sub-step; None lets Newton's iteration start at ``b``.

        Raises:
            TypeError, ValueError: if a direct solver writes to ``b``, or its result does not fit ``b``.
        """
        time = as_time(t, b, self.time_dtype)
        solver = self.solver
        if isinstance(solver, Newton):
            cost.solves += 1
            start = Kept(b) if kept is None else kept
            return solver.solve(lambda y: self.velocity(t, y, cost), time, c, b, cost, start)
        duration = as_time(c, b, self.time_dtype)
        if not torch.compiler.is_compiling():
            cost.solves += 1
        before = version(b)
        y = watched("solve", lambda: solver(time, duration, b), b) if cost.watch else solver(time, duration, b)
        check_unmodified("solve", b, before)
        return in_graph("solve", same_shape("solve", y, b), b)

    def euler(self, t: float, h: float, x: Tensor, cost: Cost) -> Tensor:
        """Return x + h f(t, x), one explicit Euler step.

        Args:
            t: time at the start of the step.
            h: signed step size.
            x: state at the start of the step.
            cost: counts the evaluation of f.
        """
        return plus(x, self.velocity(t, x, cost), h)


def _unknown(t: Tensor, x: Tensor) -> Tensor:
    raise ValueError(
        "f: got an operator that is known by its flow or solve alone, so its right-hand side cannot be evaluated; give "
        "odeadv.Operator(f, flow=..., solve=...)"
    )


def in_graph(name: str, end: Tensor, x: Tensor) -> Tensor:
    """Return ``end``, the result of the function ``name`` for the state ``x``, after a check of its gradient.

    Raises:
        ValueError: if ``x`` needs a gradient and ``end`` is not in the autograd graph, like results of SciPy and NumPy.
            In a splitting the remaining gradient would be wrong without an error.
    """
    if x.requires_grad and torch.is_grad_enabled() and not end.requires_grad:
        raise ValueError(
            f"{name}: returned a tensor without a gradient, but the state or the parameters need one (the recording of "
            "a costate does); use a differentiable method, or torch.no_grad() if no gradient is wanted"
        )
    return end


class Jump:
    """A map that replaces the ODE step over a whole time interval, for example because the state changes its shape.

    Args:
        map: ``map(x)`` returns the state at the end of the interval for the state ``x`` at its start.
        modules: modules that ``map`` runs.
    """

    def __init__(self, map: Callable[[Tensor], Tensor], *, modules: Sequence[nn.Module] = ()) -> None:
        if not callable(map):
            raise TypeError(f"map: got {type(map).__name__}, expected a callable map(x)")
        self.map = map
        self._runs = (map, *modules)

    @cached_property
    def modules(self) -> tuple[nn.Module, ...]:
        """See `Operator.modules`."""
        return modules_of(*self._runs, owner=self)

    def across(self, x: Tensor, cost: Cost) -> Tensor:
        """Return the state at the end of the interval from ``x``, and count one evaluation in ``cost``."""
        cost.evaluated()
        before = version(x)
        end = watched("map", lambda: self.map(x), x) if cost.watch else self.map(x)
        check_unmodified("map", x, before)
        return end
