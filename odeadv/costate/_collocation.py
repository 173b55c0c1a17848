"""The converged costate by collocation: Eq. 7 and Eq. 9 as one boundary-value problem, solved by Newton's method."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from odeadv.costate._converge import WithGradient
from odeadv.costate._recorded import RecordedCostate
from odeadv.costate._settings import Converge
from odeadv.costate._sweeps import Swept
from odeadv.fields import AdversarialField
from odeadv.fields.operator import Cost, Jump
from odeadv.splitting import Grid
from odeadv.splitting.interpolation import gauss_points, lagrange
from odeadv.support.isolation import differentiating

SLOW = 0.1  # the Jacobians are made again if a step with kept ones does not reduce the error to this fraction
FREE = 1e-2  # relative error of the trajectory without a drive, as a second beginning
SHORTEST = 1e-4  # fraction of a Newton step below which the iteration has failed


class _Path(NamedTuple):
    """(x, a) as vectors of 2 n numbers, or changes of them, or residuals of their equations.

    Attributes:
        nodes: values at the N + 1 nodes, (N + 1, 2 n).
        inner: values at the s Gauss points of each step, (N, s, 2 n).
    """

    nodes: Tensor
    inner: Tensor

    def moved(self, step: _Path, fraction: float = 1.0) -> _Path:
        """Return the path after ``fraction`` of ``step``."""
        return _Path(self.nodes + fraction * step.nodes, self.inner + fraction * step.inner)


def collocated(
    field: AdversarialField, x0: Tensor, grid: Grid, stages: int, settings: Converge, *, differentiate: bool = False
) -> Swept:
    """Solve dx/dt = f + eta a, da/dt = -(df/dx)^T a - dl/dx, x(t_0) = x0, a(t_N) = dL/dx(t_N) by Gauss collocation.

    On each step x and a are polynomials of degree ``stages`` that satisfy the equations at the Gauss points. Their
    error at the nodes has the order 2 * ``stages``. The discrete costate is also the gradient of the discrete loss,
    because Gauss methods are symplectic (Hairer, Lubich, Wanner: Geometric Numerical Integration, II.1 and IV.2).

    Newton's method begins with the constant state x0. If it fails, it begins again with the trajectory of f alone. It
    keeps the Jacobians as long as this reduces the change tenfold per step, so a linear problem takes one set of
    Jacobians. A step that leads to a larger change is halved. If there are several solutions, Newton's method may find
    another one than sweeps do.

    Args:
        field: the field, with ``f``, the read-out and the losses.
        x0: initial state of n numbers. All samples of a batch count: they are solved as one state. The work for linear
            systems grows as n to the power 3.
        grid: the steps.
        stages: number of Gauss points per step.
        settings: tolerance, and the largest number of Newton steps.
        differentiate: True gives the costate its gradient, by the implicit function theorem.

    Raises:
        ValueError: if no loss and no running cost depends on the state by differentiable operations.
    """
    rtol = settings.rtol or torch.finfo(x0.dtype).eps ** (2.0 / 3.0)
    with differentiating(field.modules, x0.device):
        equations = _Equations(field, x0, grid, stages)
        # Linear systems in 16 bits are too inaccurate for Newton's method. The functions of the field keep autocast.
        with torch.autocast(x0.device.type, enabled=False):
            path, residuals, converged = _newton(equations, equations.constant(), settings.most, rtol)
            if not converged:
                undriven = equations.undriven()
                free, first, _ = _newton(undriven, undriven.constant(), settings.most, FREE)
                path, again, converged = _newton(equations, free, settings.most, rtol)
                residuals += first + again
            if differentiate and converged:
                # The residual is zero here, but its gradient is not. The Jacobians must be those at the solution.
                residual = equations.residual(path, differentiate=True)
                path = path.moved(equations.linearised().step(residual))
                path = _Path(*(WithGradient.apply(part, lambda g: g) for part in path))
    return Swept(equations.costate(path, differentiate), tuple(residuals), converged)


def _newton(equations: _Equations, path: _Path, most: int, rtol: float) -> tuple[_Path, list[float], bool]:
    """Return the solution, the relative change of each step, and True if the last change is at most ``rtol``."""
    begin = path
    system: _System | None = None
    step, size, fraction, largest = path, math.inf, 1.0, math.inf
    residuals: list[float] = []
    for _ in range(most):
        residual = equations.residual(path)
        kept = system is not None
        if system is not None:
            again = system.step(residual)
            new = equations.size(path, again, system.rounding / rtol)
            if not new < size and not new <= rtol:
                fraction *= 0.5
                if fraction < SHORTEST:
                    break
                path = begin.moved(step, fraction)
                continue
            kept = new <= rtol or (fraction == 1.0 and new <= SLOW * size)
        if kept:
            step, size = again, new
        else:
            first, system = system is None, equations.linearised()
            step = system.step(residual)
            size = equations.size(path, step, system.rounding / rtol)
            if first:
                # As for sweeps: a costate that is larger than without a drive by half of all digits is a blow-up. This
                # cannot be decided if the loss is flat along the linearised trajectory without a drive.
                free = path.moved(system.undriven().step(residual))
                blow_up = torch.finfo(path.nodes.dtype).eps ** -0.5
                largest = equations.costates(free).norm().item() * blow_up or math.inf
        if not math.isfinite(size):
            break
        residuals.append(size)
        begin, path, fraction = path, path.moved(step), 1.0
        if size <= rtol:
            return path, residuals, equations.costates(path).norm().item() <= largest
    return path, residuals, False


class _Equations:
    """The collocation equations, with the graph of the last evaluation, from which the Jacobians are made."""

    def __init__(self, field: AdversarialField, x0: Tensor, grid: Grid, stages: int) -> None:
        self.field, self.x0, self.grid, self.stages = field, x0, grid, stages
        self.driven = True
        kind = x0.device.type
        self.autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self.cost = Cost()
        self.start = _vector(x0)
        self.n = self.start.numel()
        like: dict[str, Any] = {"dtype": self.start.dtype, "device": x0.device}
        points = gauss_points(stages)
        powers = torch.tensor([[c**k for k in range(stages)] for c in points], dtype=torch.float64)
        integrals = torch.tensor([[c ** (k + 1) / (k + 1) for k in range(stages)] for c in points], dtype=torch.float64)
        self.integrals = torch.linalg.solve(powers, integrals, left=False).to(**like)
        first, *rest = lagrange((0.0, *points), 1.0)
        self.extrapolation = first, torch.tensor(rest, **like)  # the weights of the values at the end of a step
        self.h = torch.tensor([step.h for step in grid], **like)
        self.eye = torch.eye(2 * self.n, **like)
        one = self._state(torch.ones_like(self.start))
        forcing = field.driven_by(lambda t: one).operators["costate"]
        self.push = _vector(forcing.velocity(grid.times[0], one, Cost()))  # eta, one number per number of the state

    def _state(self, v: Tensor) -> Tensor:
        """Return the vector ``v`` as a state."""
        if not self.x0.is_complex():
            return v.reshape(self.x0.shape)
        return torch.view_as_complex(v.reshape(*self.x0.shape, 2).contiguous())

    def constant(self) -> _Path:
        """Return the constant state x0 without a costate."""
        z = torch.cat([self.start.detach(), torch.zeros_like(self.start)])
        return _Path(z.repeat(len(self.grid) + 1, 1), z.repeat(len(self.grid), self.stages, 1))

    def costates(self, path: _Path) -> Tensor:
        """Return the costates at the nodes of ``path``."""
        return path.nodes[:, self.n :]

    def undriven(self) -> _Equations:
        """Return the equations of the trajectory of f alone and of its costate."""
        other = copy.copy(self)
        other.push, other.driven = torch.zeros_like(self.push), False
        return other

    def size(self, path: _Path, step: _Path, least: float) -> float:
        """Return the size of ``step`` relative to its end: the larger one of those of x and a at the nodes.

        The costate counts as at least ``least`` times the state. Near 0 it is a difference of almost equal numbers, and
        its rounding errors do not become small relative to it. Without a drive only the state counts.
        """
        end, tiny = path.nodes + step.nodes, torch.finfo(path.nodes.dtype).tiny
        x, a = end[:, : self.n].norm(), end[:, self.n :].norm()
        scales = torch.stack([x, torch.maximum(a, least * x)]).clamp_min(tiny)
        changes = torch.stack([step.nodes[:, : self.n].norm(), step.nodes[:, self.n :].norm()])
        parts = changes / scales
        return float(parts.max() if self.driven else parts[0])  # unlike Python's max, NaN if one part is NaN

    def residual(self, path: _Path, differentiate: bool = False) -> _Path:
        """Return the residuals: of the ends of the span and of continuity at nodes, and of the equations inside steps.

        The first row of ``nodes`` has the residuals of both ends, x(t_0) - x0 and a(t_N) - dL/dx(t_N).
        """
        enabled, dtype = self.autocast
        with torch.autocast(self.x0.device.type, dtype, enabled=enabled):
            self._evaluate(path)
        values, pulled, end, start, push = (
            torch.stack(self.values), torch.stack(self.pulled), self.end, self.start, self.push
        )  # fmt: skip
        if not differentiate:
            values, pulled, end, start, push = (part.detach() for part in (values, pulled, end, start, push))
        a = path.inner[..., self.n :].reshape(-1, self.n)
        slopes = torch.cat([values + push * a, -pulled], 1).reshape(path.inner.shape)
        moved = self.h[:, None, None] * torch.einsum("ij,kja->kia", self.integrals, slopes)
        first, rest = self.extrapolation
        ends = first * path.nodes[:-1] + torch.einsum("j,kja->ka", rest, path.inner)
        both = torch.cat([path.nodes[0, : self.n] - start, path.nodes[-1, self.n :] - end])
        return _Path(torch.cat([both[None], path.nodes[1:] - ends]), path.inner - path.nodes[:-1, None] - moved)

    def _evaluate(self, path: _Path) -> None:
        """Evaluate f, (df/dx)^T a + dl/dx and the gradient of the loss along ``path``, and keep their graphs."""
        self.xs, self.values, self.pulled = list[Tensor](), list[Tensor](), list[Tensor]()
        points, depends = gauss_points(self.stages), False
        for step, zs in zip(self.grid, path.inner.detach(), strict=True):
            operator = self.field.f.on(step.t0, step.t1)
            assert not isinstance(operator, Jump)
            for c, z in zip(points, zs, strict=True):
                x, a = z[: self.n].clone().requires_grad_(), z[self.n :]
                t, state = step.time(c), self._state(x)
                value = _vector(operator.velocity(t, state, self.cost)) + 0.0 * x  # so that it has a graph
                energy = (value * a).sum()
                if self.field.running is not None:
                    running = self.field.running_cost(t, state)
                    depends |= running.requires_grad
                    energy = energy + running
                self.xs.append(x)
                self.values.append(value)
                self.pulled.append(_gradient(energy, x) + 0.0 * x)
                self.cost.vjps += 1
        self.last = path.nodes[-1, : self.n].detach().clone().requires_grad_()
        loss = self.field.evaluate(self._state(self.last))[1]
        if not (loss.requires_grad or depends):
            raise ValueError(
                "loss: does not depend on the state by differentiable operations; expected a function of x"
            )
        self.end = _gradient(loss + 0.0 * self.last.sum(), self.last) + 0.0 * self.last

    def linearised(self) -> _System:
        """Return the linear system of Newton's method at the last evaluation."""
        n, count = self.n, len(self.xs)
        jacobians = self.eye.new_zeros(count, 2 * n, 2 * n)
        hessian = self.eye.new_zeros(n, n)
        for i, row in enumerate(self.eye[:n, :n]):
            rows = [row] * count
            jacobians[:, i, :n] = torch.stack(torch.autograd.grad(self.values, self.xs, rows, retain_graph=True))
            # (df/dx)^T a + dl/dx is a gradient, so its Jacobian is symmetric: its rows are its columns.
            jacobians[:, n + i, :n] = -torch.stack(torch.autograd.grad(self.pulled, self.xs, rows, retain_graph=True))
            (hessian[i],) = torch.autograd.grad(self.end, self.last, row, retain_graph=True)
        self.cost.jvps += 2 * n * count
        jacobians[:, n:, n:] = -jacobians[:, :n, :n].transpose(1, 2)
        jacobians[:, :n, n:] = self.push.detach().diag()
        return _System(self, jacobians.reshape(len(self.grid), self.stages, 2 * n, 2 * n), hessian)

    def costate(self, path: _Path, differentiate: bool) -> RecordedCostate:
        """Return the costate of ``path``."""
        states, nodes = ([self._state(v) for v in part] for part in (path.nodes[:, : self.n], self.costates(path)))
        inner = [[self._state(z[self.n :]) for z in zs] for zs in path.inner]
        running = None if self.field.running is None else self.field.running_cost
        return RecordedCostate(
            self.grid, nodes, states, self.field.f, "collocation", differentiate, self.cost, running, inner=inner
        )


class _System:
    """The linear system of a Newton step. Its matrices are constants, so gradients pass through residuals only.

    From the first step to the last, the unknowns of a step are eliminated: its first node, then its Gauss points. An LU
    factorisation exchanges rows among all equations that contain them. The n equations that are left are conditions on
    the next node, as x(t_0) = x0 is for the first one. Equations inside a step, or a Riccati equation between nodes,
    are not solved on their own: they can be singular for a regular problem (f = -2 x / h at one point per step, or a
    conjugate point at a node).

    Attributes:
        rounding: rounding errors of the costate, relative to the state.
    """

    def __init__(self, equations: _Equations, jacobians: Tensor, hessian: Tensor) -> None:
        self.given = equations, jacobians, hessian
        steps, stages, m, _ = jacobians.shape
        n, eye, h = equations.n, equations.eye, equations.h
        first, rest = equations.extrapolation
        inside = torch.einsum("k,ij,kjab->kiajb", h, equations.integrals, jacobians).reshape(steps, stages * m, -1)
        whole = torch.eye(stages * m).to(inside) - inside
        continuity = -torch.cat([first * eye, torch.kron(rest[None], eye)], 1)
        self.unknowns = m + stages * m
        known = eye[:n]  # the equations for the first node of a step: d(x_0) is given
        next_node = torch.cat([eye.new_zeros(n + stages * m, m), eye])
        self.steps = list[tuple[Tensor, Tensor, Tensor]]()
        for inner in whole:
            rows = [torch.nn.functional.pad(known, (0, stages * m)), torch.cat([-eye.repeat(stages, 1), inner], 1)]
            lu, pivots = torch.linalg.lu_factor_ex(torch.cat([*rows, continuity]))[:2]
            order = torch.lu_unpack(lu, pivots, unpack_data=False)[0].argmax(0)
            after, known = self._down(lu, next_node[order])
            self.steps.append((lu, order, after))
        self.last = torch.cat([known, torch.cat([-hessian, eye[:n, :n]], 1)])
        curvature = hessian.norm() + (h.abs() * jacobians[:, :, n:, :n].flatten(2).norm(dim=2).mean(1)).sum()
        self.rounding = 10.0 * torch.finfo(eye.dtype).eps * float(curvature)

    def undriven(self) -> _System:
        """Return the system for a state that the costate does not drive."""
        equations, jacobians, hessian = self.given
        jacobians = jacobians.clone()
        jacobians[:, :, : equations.n, equations.n :] = 0.0
        return _System(equations, jacobians, hessian)

    def step(self, residual: _Path) -> _Path:
        """Return the Newton step for ``residual``."""
        n = self.last.shape[0] // 2
        known, passed = -residual.nodes[0, :n], list[Tensor]()
        for (lu, order, _), inner, jump in zip(self.steps, residual.inner.flatten(1), residual.nodes[1:], strict=True):
            done, left = self._down(lu, torch.cat([known, -inner, -jump])[order, None])
            known = left[:, 0]
            passed.insert(0, done[:, 0])
        node = torch.linalg.solve_ex(self.last, torch.cat([known, -residual.nodes[0, n:]]))[0]
        nodes, inners = [node], list[Tensor]()
        for (lu, _, after), done in zip(reversed(self.steps), passed, strict=True):
            upper, right = lu[: self.unknowns], (done - after @ node)[:, None]
            node, inner = torch.linalg.solve_triangular(upper, right, upper=True)[:, 0].tensor_split([2 * n])
            nodes.insert(0, node)
            inners.insert(0, inner)
        return _Path(torch.stack(nodes), torch.stack(inners).reshape(residual.inner.shape))

    def _down(self, lu: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Eliminate downwards, and return the right-hand sides of the unknowns and of the equations that are left."""
        lower, below = lu[: self.unknowns], lu[self.unknowns :]
        done = torch.linalg.solve_triangular(lower, right[: self.unknowns], upper=False, unitriangular=True)
        return done, right[self.unknowns :] - below @ done


def _gradient(y: Tensor, x: Tensor) -> Tensor:
    """Return dy/dx in the graph."""
    found: Tensor
    (found,) = torch.autograd.grad(y, x, create_graph=True)
    return found


def _vector(x: Tensor) -> Tensor:
    """Return ``x`` as a vector of real numbers."""
    return (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).reshape(-1)
