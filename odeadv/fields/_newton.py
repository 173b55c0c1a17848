"""Newton's iteration for the equation of an implicit stage, y - c f(t, y) = b, and gradients of its solution."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from odeadv.fields._cost import Cost
from odeadv.support.checks import choice, integer, number
from odeadv.support.isolation import graph_kept, inside_transform, read_value
from odeadv.support.krylov import gmres
from odeadv.support.linearised import Linearised

Function = Callable[[Tensor], Tensor]
Preconditioner = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

DENSE = 512  # largest number of unknowns (per sample, if samples are independent) for which the Jacobian is made
SLOW = 0.1  # the Jacobian is made again if an iteration does not reduce the error to this fraction or less
HALVINGS = 8  # largest number of halvings of a Newton step that leads to a much larger residual
INNER = 1e-3  # GMRES reduces the residual of a Newton step to this fraction; the next step corrects the rest


@dataclass(frozen=True)
class Newton:
    """Solves the equation of an implicit stage, y - c f(t, y) = b, by Newton's iteration.

    An `Operator` without a direct solver uses it. Give ``Operator(f, solve=Newton(...))`` to change the settings. The
    Jacobian is kept as long as the iteration converges fast, also from stage to stage of one sub-step. A Newton step
    is halved if it would more than double the residual.

    Gradients follow from the implicit function theorem, and the iteration is not in the autograd graph. Instead,
    (1 - c df/dx)^-1 times the residual is subtracted from the solution. The value of this correction is zero, and its
    derivatives are the derivatives of the solution. First and second derivatives are correct. Third derivatives would
    be wrong, so they raise ValueError.

    Attributes:
        jacobian: ``"dense"`` makes the Jacobian by reverse mode and factors it. ``"krylov"`` computes only products
            with the Jacobian and solves by GMRES. The default is dense up to 512 unknowns.
        samples: the axis, or a tuple of axes, of samples that do not depend on one another. Give 0 for a batch, and -1
            for a reaction at each point of a line. Each sample then has a separate, small Jacobian. The number of
            products that all these Jacobians need is the number of unknowns per sample. The independence is tested on
            the first sample.
        precondition: ``precondition(t, c, y, r)`` returns an approximation of (1 - c df/dx)^-1 r that is linear in
            ``r`` and has the shape of the state. GMRES uses it.
        rtol: the error of y to reach in each sample, relative to its largest entry; by default 2e-12 in float64 and
            6e-6 in float32.
        most: largest number of iterations.
        restart: number of vectors that GMRES keeps. GMRES fails after ``10 * restart`` products.

    Raises:
        TypeError, ValueError: if an attribute has a wrong type or value. The message names the attribute.

    Example:
        >>> field = odeadv.Operator(lambda t, x: -1e4 * (x**3 - torch.cos(t)), solve=odeadv.Newton(samples=0))
        >>> odeadv.solve(field, torch.ones(8, 1), (0.0, 1.0), scheme="sdirk2", steps=20).xs[-1][0]
        tensor([0.8145])
    """

    jacobian: Literal["dense", "krylov"] | None = None
    samples: int | tuple[int, ...] = ()
    precondition: Preconditioner | None = None
    rtol: float | None = None
    most: int = 30
    restart: int = 40

    def __post_init__(self) -> None:
        if self.jacobian is not None:
            choice("jacobian", self.jacobian, ("dense", "krylov"))
        if self.precondition is not None and not callable(self.precondition):
            raise TypeError(
                f"precondition: got {type(self.precondition).__name__}, expected a callable precondition(t, c, y, r)"
            )
        if self.rtol is not None:
            number("rtol", self.rtol, above=0)
        for axis in self.axes:
            integer("samples", axis, least=None)
        integer("most", self.most)
        integer("restart", self.restart)

    @property
    def axes(self) -> tuple[int, ...]:
        """The attribute ``samples`` as a tuple."""
        return self.samples if isinstance(self.samples, tuple) else (self.samples,)

    def solve(self, f: Function, t: Tensor, c: float, b: Tensor, cost: Cost, kept: Kept) -> Tensor:
        """Return y with y - c f(y) = b. If the iteration fails, return NaN and count the failure in ``cost``.

        Args:
            f: ``f(y)`` at the time of the stage returns a tensor of the shape of the state.
            t: time of the stage, a 0-d tensor.
            c: a duration, the step size times a coefficient of the method.
            b: right-hand side, a tensor of the shape of the state.
            cost: counts evaluations and failures.
            kept: values of the previous stage of the same sub-step, where the iteration starts.

        Raises:
            ValueError: inside torch.func.vmap, where tensor values cannot be read.
        """
        equation = _Equation(self, f, t, c, b, cost)
        if not math.isfinite(equation.norm(b, b)):
            return b * math.nan  # b is not finite, so the failure came earlier and is not counted here
        found = equation.iterate(kept.state.detach(), kept)
        if found is None:
            cost.unsolved += 1
            return b * math.nan
        y, residual = found
        if not (residual.requires_grad or inside_transform() or _has_tangent(residual)):
            return y
        # f needs a gradient here, so the Jacobian must be the Jacobian at the solution, and not a kept one.
        inverse = kept.system = equation.system(y)
        once: Tensor = _ForHigherOrders.apply(y - inverse(residual))
        twice = once - inverse(equation.residual(once))
        counted: Tensor = _OrderLimited.apply(twice, twice, 0)
        return counted


@dataclass
class Kept:
    """Values of an implicit stage that the next stage of the same sub-step uses.

    Attributes:
        state: the state of the previous stage, at which Newton's iteration starts. Extrapolation with its slope is not
            a better start: in a fast transient it overshoots, and may lead to another solution of the equation.
        system: (1 - c df/dx)^-1 of the previous stage.
    """

    state: Tensor
    system: Any = None


class _ForHigherOrders(torch.autograd.Function):
    """The identity. Its gradient is only rounding error, so it is passed on only if it is differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.again = False

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor | None:
        ctx.again = ctx.again or torch.is_grad_enabled()
        return gradient if ctx.again else None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.view_as(tangent)


class _OrderLimited(torch.autograd.Function):
    """The identity of ``x``, which contains derivatives of order ``order`` of the solution ``y``.

    Each differentiation raises the order by one, and a third derivative of ``y`` is a ValueError. Zeros of order 2 are
    added to every second derivative, because only they are certain to be part of each third derivative.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor, order: int) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        _, y, ctx.order = inputs
        ctx.save_for_backward(y)
        ctx.save_for_forward(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        _check_order(ctx.order)
        if not torch.is_grad_enabled():
            return gradient, None, None
        (y,) = ctx.saved_tensors
        second = _OrderLimited.apply(torch.zeros_like(y), y, 2) if ctx.order else None
        return _OrderLimited.apply(gradient, y, 1), second, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, of_solution: Tensor, _: None) -> Tensor:
        _check_order(ctx.order)
        found: Tensor = _OrderLimited.apply(tangent, ctx.saved_tensors[0], ctx.order + 1)
        return found


def _has_tangent(x: Tensor) -> bool:
    """Return True if ``x`` is a dual number of torch.autograd.forward_ad."""
    return unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


def _check_order(order: int) -> None:
    if order == 2:
        raise ValueError(
            "substep: got a third derivative through Newton's iteration, expected a first or second one; take an "
            "explicit sub-step, or an operator with a direct solver"
        )


class _Equation:
    """The equation y - c f(y) = b. Linear algebra uses real matrices (rows, m): samples, and unknowns per sample."""

    def __init__(self, newton: Newton, f: Function, t: Tensor, c: float, b: Tensor, cost: Cost) -> None:
        self.newton, self.f, self.t, self.c, self.b, self.cost = newton, f, t, c, b, cost
        self._axes, self._front = newton.axes, tuple(range(len(newton.axes)))
        self._moved = b.movedim(self._axes, self._front).shape
        self.rows = math.prod(self._moved[: len(self._axes)])
        eps = torch.finfo(b.dtype).eps
        self.target = eps**0.75 if newton.rtol is None else newton.rtol
        self.stalled = max(self.target, eps**0.7)  # below this error, rounding may stop the iteration
        self.tiny, self.size = torch.finfo(b.dtype).tiny, self._largest(b)

    def vector(self, x: Tensor) -> Tensor:
        """Return the state ``x`` as a real matrix (rows, m)."""
        if self._axes:
            x = x.movedim(self._axes, self._front)
        return (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).reshape(self.rows, -1)

    def state(self, v: Tensor) -> Tensor:
        """Return the real matrix ``v``, (rows, m), as a state."""
        x = torch.view_as_complex(v.reshape(*self._moved, 2)) if self.b.is_complex() else v.reshape(self._moved)
        return x.movedim(self._front, self._axes) if self._axes else x

    def residual(self, y: Tensor) -> Tensor:
        """Return the residual y - c f(y) - b."""
        return torch.sub(y - self.b, self.f(y), alpha=self.c)

    def norm(self, x: Tensor, y: Tensor) -> float:
        """Return the largest entry of the state ``x``, relative to the largest entry of b and ``y`` in its sample."""
        size = torch.maximum(self.size, self._largest(y)) + self.tiny
        return read_value((self._largest(x) / size).amax(), "substep: an implicit sub-step")

    def _largest(self, x: Tensor) -> Tensor:
        """Return the largest absolute value of each sample."""
        sizes = x.detach().abs()
        return sizes.amax() if self.rows == 1 else sizes.movedim(self._axes, self._front).reshape(self.rows, -1).amax(1)

    def system(self, y: Tensor) -> _DenseInverse | _Krylov:
        """Return (1 - c df/dx)^-1 at ``y``."""
        unknowns = self.vector(y).shape[1]
        dense = unknowns <= DENSE if self.newton.jacobian is None else self.newton.jacobian == "dense"
        return _DenseInverse(self, y) if dense else _Krylov(self, y)

    def iterate(self, y: Tensor, kept: Kept) -> tuple[Tensor, Tensor] | None:
        """Return the solution and its residual, which is in the autograd graph of f and b. Return None on failure."""
        residual = self.residual(y)
        error, before = self.norm(residual, y), math.nan
        for _ in range(self.newton.most):
            if error <= self.target:
                return y, residual
            self.cost.iterations += 1
            fresh = kept.system is None or kept.system.c != self.c
            if fresh:
                kept.system = self.system(y)
            step = kept.system.step(residual.detach())
            if step is None:
                return None
            moved = self.norm(step, y)
            y, residual, error, whole = self._move(y, step, residual, error)
            if not math.isfinite(error):
                return None
            rate = moved / before if whole else math.nan
            # The sum of all future steps, if each is smaller than the previous step by the factor rate.
            left = moved * rate / (1 - rate) if rate < 1 else math.inf
            if left <= self.target or (fresh and (moved <= self.target or (rate >= 0.5 and moved <= self.stalled))):
                return y, residual
            if rate > SLOW or not whole:
                kept.system = None
            before = moved
        return None

    def _move(self, y: Tensor, step: Tensor, residual: Tensor, error: float) -> tuple[Tensor, Tensor, float, bool]:
        """Return the next y, its residual, the norm of this residual, and True if the step was not shortened."""
        scale = 1.0
        for _ in range(HALVINGS):
            trial = y - scale * step
            residual = self.residual(trial)
            size = self.norm(residual, trial)
            if size <= max(2 * error, self.stalled):
                break
            scale *= 0.5
        return trial, residual, size, scale == 1.0


class _Jacobian:
    """Products with the Jacobian df/dx at a state and with its transpose, by reverse mode. f is evaluated once."""

    def __init__(self, equation: _Equation, y: Tensor) -> None:
        def f(v: Tensor) -> Tensor:
            return equation.vector(equation.f(equation.state(v)))

        v = equation.vector(y.detach())
        self.cost, self.zero = equation.cost, torch.zeros_like(v)
        self._transposed: Function
        if inside_transform():
            pull = torch.func.vjp(f, v)[1]
            self._transposed = lambda u: pull(u)[0]
            self._product: Function = lambda w: torch.func.vjp(self._transposed, self.zero)[1](w)[0]
        else:
            with torch.enable_grad(), graph_kept():
                linear = Linearised(f, v)
            self._transposed, self._product = linear.vjp, linear.jvp
        if equation.rows > 1 and self.cost.iterations <= 1:
            self._check_samples()

    def transposed(self, u: Tensor) -> Tensor:
        """Return the product of the transposed Jacobian and ``u``."""
        self.cost.vjps += 1
        return self._transposed(u)

    def product(self, w: Tensor) -> Tensor:
        """Return the product of the Jacobian and ``w``."""
        self.cost.jvps += 1
        with graph_kept():
            return self._product(w)

    def matrix(self) -> Tensor:
        """Return the Jacobian, of shape (rows, m, m) for ``rows`` samples with m unknowns each."""
        rows, m = self.zero.shape
        self.cost.vjps += m
        seeds = torch.eye(m, dtype=self.zero.dtype, device=self.zero.device)[:, None].expand(m, rows, m)
        try:
            found: Tensor = torch.func.vmap(self._transposed)(seeds)
        except RuntimeError:  # f contains a function without a batching rule for vmap
            found = torch.stack([self._transposed(seed) for seed in seeds])
        return found.transpose(0, 1)

    def _check_samples(self) -> None:
        """Raise ValueError if the first sample depends on other samples."""
        u = torch.zeros_like(self.zero)
        u[0] = torch.linspace(0.5, 1.5, u.shape[1])
        if bool((self.transposed(u)[1:] != 0).any()):
            raise ValueError(
                "samples: got axes of samples that depend on one another (the first one on others), expected "
                "independent ones; leave samples out"
            )


class _DenseInverse:
    """(1 - c df/dx)^-1 at a state, by LU factors of one matrix per sample."""

    def __init__(self, equation: _Equation, y: Tensor) -> None:
        self.c, self._equation = equation.c, equation
        matrix = _Jacobian(equation, y).matrix().detach()
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        self._factors, self._pivots, _ = torch.linalg.lu_factor_ex(eye - self.c * matrix)

    def __call__(self, x: Tensor) -> Tensor:
        v = self._equation.vector(x).unsqueeze(-1)
        return self._equation.state(torch.linalg.lu_solve(self._factors, self._pivots, v).squeeze(-1))

    step = __call__


class _Krylov:
    """(1 - c df/dx)^-1 at a state, by GMRES."""

    def __init__(self, equation: _Equation, y: Tensor) -> None:
        if inside_transform():
            raise ValueError(
                "jacobian: got 'krylov' inside a torch.func transform, expected 'dense' there; for larger states take "
                "torch.autograd"
            )
        self.c, self._equation, self._y = equation.c, equation, y
        self._linear = _Jacobian(equation, y)

    def step(self, x: Tensor) -> Tensor | None:
        """Return the Newton step for the residual ``x``, to a few digits. Return None if GMRES fails."""
        found = self._gmres(self._equation.vector(x), False, INNER, 0.5)
        return None if found is None else self._equation.state(found)

    def __call__(self, x: Tensor) -> Tensor:
        solved: Tensor = _Solved.apply(self._equation.vector(x), self, False)
        return self._equation.state(solved)

    def exactly(self, v: Tensor, transposed: bool) -> Tensor:
        """Solve the system, or the transposed system, for the right-hand side ``v``. Return NaN if GMRES fails."""
        found = self._gmres(v, transposed, self._equation.target, 10 * self._equation.target)
        if found is None:
            self._equation.cost.unsolved += 1
            return torch.full_like(v, math.nan)
        return found

    def _gmres(self, v: Tensor, transposed: bool, rtol: float, enough: float) -> Tensor | None:
        """Solve by GMRES to a residual of ``rtol * |v|``. Return None if the residual exceeds ``enough * |v|``."""
        shape, restart = v.shape, self._equation.newton.restart
        jacobian = self._linear.transposed if transposed else self._linear.product
        precondition = self._precondition(transposed)

        def product(flat: Tensor) -> Tensor:
            w = precondition(flat.reshape(shape))
            return (w - self.c * jacobian(w)).reshape(-1)

        found, solved, _ = gmres(product, v.reshape(-1), rtol=rtol, enough=enough, restart=restart, most=10 * restart)
        return precondition(found.reshape(shape)) if solved else None

    def _precondition(self, transposed: bool) -> Function:
        own = self._equation.newton.precondition
        if own is None:
            return lambda v: v
        equation, c = self._equation, torch.as_tensor(self.c, dtype=self._equation.t.dtype)

        def direct(v: Tensor) -> Tensor:
            return equation.vector(own(equation.t, c, self._y, equation.state(v)))

        if not transposed:
            return direct
        pull = torch.func.vjp(direct, self._linear.zero)[1]
        return lambda v: pull(v)[0]


class _Solved(torch.autograd.Function):
    """The solution of the linear system of a `_Krylov`. Its backward pass solves the transposed system."""

    @staticmethod
    def forward(v: Tensor, system: _Krylov, transposed: bool) -> Tensor:
        return system.exactly(v, transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, _Krylov, bool], output: Tensor) -> None:
        _, ctx.system, ctx.transposed = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Solved.apply(gradient, ctx.system, not ctx.transposed), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        found: Tensor = _Solved.apply(tangent, ctx.system, ctx.transposed)
        return found
