"""The converged costate by collocation: Eq. 7 and Eq. 9 as one boundary-value problem, solved by Newton's method."""

from __future__ import annotations

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
    Jacobians. A step that leads to a larger change is halved.

    Args:
        field: the field, with ``f``, the read-out and the losses.
        x0: initial state of n numbers. The work for linear systems grows as n to the power 3.
        grid: the steps.
        stages: number of Gauss points per step.
        settings: tolerance, and the largest number of Newton steps.
        differentiate: True gives the costate its gradient, by the implicit function theorem.
    """
    rtol = settings.rtol or torch.finfo(x0.dtype).eps ** (2.0 / 3.0)
    with differentiating(field.modules, x0.device):
        equations = _Equations(field, x0, grid, stages)
        path, residuals, converged = _newton(equations, equations.constant(), settings.most, rtol)
        if not converged:
            equations.push, eta = torch.zeros_like(equations.push), equations.push
            free, first, _ = _newton(equations, equations.constant(), settings.most, FREE)
            equations.push = eta
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
            new = equations.size(path, again)
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
            size = equations.size(path, step)
            if first:
                # As for sweeps: a costate that is larger than without a drive by half of all digits is a blow-up.
                free = path.moved(system.step(residual, driven=False))
                largest = equations.costates(free).norm().item() * torch.finfo(path.nodes.dtype).eps ** -0.5
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

    def size(self, path: _Path, step: _Path) -> float:
        """Return the size of ``step`` relative to its end: the larger one of those of x and a at the nodes."""
        end, tiny = path.nodes + step.nodes, torch.finfo(path.nodes.dtype).tiny
        parts = ((step.nodes[:, : self.n], end[:, : self.n]), (step.nodes[:, self.n :], end[:, self.n :]))
        return max(float(change.norm() / value.norm().clamp_min(tiny)) for change, value in parts)

    def residual(self, path: _Path, differentiate: bool = False) -> _Path:
        """Return the residuals: of the ends of the span and of continuity at nodes, and of the equations inside steps.

        The first row of ``nodes`` has the residuals of both ends, x(t_0) - x0 and a(t_N) - dL/dx(t_N).
        """
        self.xs, self.values, self.pulled = list[Tensor](), list[Tensor](), list[Tensor]()
        points = gauss_points(self.stages)
        for step, zs in zip(self.grid, path.inner.detach(), strict=True):
            operator = self.field.f.on(step.t0, step.t1)
            assert not isinstance(operator, Jump)
            for c, z in zip(points, zs, strict=True):
                x, a = z[: self.n].clone().requires_grad_(), z[self.n :]
                t, state = step.time(c), self._state(x)
                value = _vector(operator.velocity(t, state, self.cost)) + 0.0 * x  # so that it has a graph
                energy = value @ a
                if self.field.running is not None:
                    energy = energy + self.field.running_cost(t, state)
                self.xs.append(x)
                self.values.append(value)
                self.pulled.append(_gradient(energy, x) + 0.0 * x)
                self.cost.vjps += 1
        self.last = path.nodes[-1, : self.n].detach().clone().requires_grad_()
        loss = self.field.evaluate(self._state(self.last))[1]
        if not loss.requires_grad and self.field.running is None:
            raise ValueError(
                "loss: does not depend on the state by differentiable operations; expected a function of x"
            )
        self.end = _gradient(loss + 0.0 * self.last.sum(), self.last) + 0.0 * self.last
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

    The values inside of a step are eliminated. The rest, dz_{n+1} = S_n dz_n + c_n with conditions at both ends, is
    solved by da_n = P_n dx_n + q_n, from the last node to the first (the Riccati equation of linear-quadratic control).
    """

    def __init__(self, equations: _Equations, jacobians: Tensor, hessian: Tensor) -> None:
        steps, stages, m, _ = jacobians.shape
        self.n, self.hessian, self.shape = equations.n, hessian, (steps, stages, m)
        inside = torch.einsum("k,ij,kjab->kiajb", equations.h, equations.integrals, jacobians)
        whole = torch.eye(stages * m).to(inside) - inside.reshape(steps, stages * m, stages * m)
        self.factors = torch.linalg.lu_factor_ex(whole)[:2]
        self.first, self.rest = equations.extrapolation
        self.response = self._inside(equations.eye.repeat(stages, 1).expand(steps, -1, -1))
        self.over = self.first * equations.eye + torch.einsum("j,kjab->kab", self.rest, self.response)

    def _inside(self, right: Tensor) -> Tensor:
        """Solve the equations inside of the steps for the right-hand sides ``right``, (N, s * 2 n, any)."""
        found: Tensor = torch.linalg.lu_solve(*self.factors, right).unflatten(1, self.shape[1:])
        return found

    def step(self, residual: _Path, driven: bool = True) -> _Path:
        """Return the Newton step for ``residual``; without ``driven``, for a state that the costate does not drive."""
        inner = self._inside(-residual.inner.flatten(1)[..., None])[..., 0]
        jumps = torch.einsum("j,kja->ka", self.rest, inner) - residual.nodes[1:]
        nodes = self._at_nodes(jumps, residual.nodes[0], driven)
        return _Path(nodes, inner + torch.einsum("kjab,kb->kja", self.response, nodes[:-1]))

    def _at_nodes(self, jumps: Tensor, ends: Tensor, driven: bool) -> Tensor:
        """Return dz_n with dz_{n+1} = S_n dz_n + ``jumps``[n], dx_0 = -``ends``[:n], da_N = P_N dx_N - ``ends``[n:]."""
        n = self.n
        affine = [(self.hessian, -ends[n:])]
        for over, jump in zip(self.over.flip(0), jumps.flip(0), strict=True):
            p, q = affine[0]
            pushed = over[:n, n:] if driven else torch.zeros_like(p)
            right = torch.cat([p @ over[:n, :n] - over[n:, :n], (p @ jump[:n] + q - jump[n:])[:, None]], 1)
            found = torch.linalg.solve_ex(over[n:, n:] - p @ pushed, right)[0]
            affine.insert(0, (found[:, :n], found[:, n]))
        nodes: list[Tensor] = []
        dx = -ends[:n]
        for (p, q), over, jump in zip(affine, [*self.over, None], [*jumps, None], strict=True):
            da = p @ dx + q
            nodes.append(torch.cat([dx, da]))
            if over is not None and jump is not None:
                dx = over[:n, :n] @ dx + jump[:n] + (over[:n, n:] @ da if driven else 0.0)
        return torch.stack(nodes)


def _gradient(y: Tensor, x: Tensor) -> Tensor:
    """Return dy/dx in the graph."""
    found: Tensor
    (found,) = torch.autograd.grad(y, x, create_graph=True)
    return found


def _vector(x: Tensor) -> Tensor:
    """Return ``x`` as a vector of real numbers."""
    return (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).reshape(-1)
