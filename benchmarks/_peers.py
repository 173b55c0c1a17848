"""The other solvers, each as a function that solves an initial value problem. Missing solvers are left out.

The costate of one recording needs three solves: the state forward, the adjoint equation backward, then all equations
together forward. The converged costate is computed by shooting.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._precision import Answer, Candidate, adaptive

Field = Callable[[Tensor, Tensor], Tensor]
Ivp = Callable[[Field, Tensor, float, float], tuple[Tensor, int]]  # (f, x0, t0, t1) -> x(t1), number of evaluations
TOLERANCES = range(2, 11)


class Counted:
    """A field that counts its evaluations."""

    def __init__(self, f: Field) -> None:
        self.f, self.count = f, 0

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        self.count += 1
        return self.f(t, x)


def torchdiffeq_ivp(method: str, tolerance: float) -> Ivp:
    import torchdiffeq

    def solve(f: Field, x0: Tensor, t0: float, t1: float) -> tuple[Tensor, int]:
        field, ends = Counted(f), torch.tensor([t0, t1], dtype=x0.dtype)
        with torch.no_grad():
            # Without step_t the end is interpolated, and dopri8 loses several digits.
            path = torchdiffeq.odeint(
                field, x0, ends, method=method, rtol=tolerance, atol=tolerance, options={"step_t": ends[1:]}
            )
        return path[-1], field.count

    return solve


def torchode_ivp(method: str, tolerance: float) -> Ivp:
    import torchode

    def solve(f: Field, x0: Tensor, t0: float, t1: float) -> tuple[Tensor, int]:
        shape = x0.shape
        # The state is a batch of one. s is the time since t0, because each sample of torchode has its own times.
        sign = 1.0 if t1 > t0 else -1.0
        field = Counted(lambda s, x: sign * f(t0 + sign * s[0], x.reshape(shape)).reshape(1, -1))
        term = torchode.ODETerm(field)
        controller = torchode.IntegralController(atol=tolerance, rtol=tolerance, term=term)
        solver = torchode.AutoDiffAdjoint(getattr(torchode, method)(term=term), controller)
        start = torch.tensor([0.0], dtype=x0.dtype)
        problem = torchode.InitialValueProblem(y0=x0.reshape(1, -1), t_start=start, t_end=start + abs(t1 - t0))
        with torch.no_grad():
            return solver.solve(problem).ys[0, -1].reshape(shape), field.count

    return solve


METHODS: tuple[tuple[str, Callable[[str, float], Ivp], str, Sequence[int]], ...] = (
    ("torchdiffeq", torchdiffeq_ivp, "bosh3", range(2, 6)),
    ("torchdiffeq", torchdiffeq_ivp, "dopri5", TOLERANCES),
    ("torchdiffeq", torchdiffeq_ivp, "dopri8", TOLERANCES),
    ("torchode", torchode_ivp, "Tsit5", TOLERANCES),
)


def torch_peers(solve: Callable[[Ivp], Answer], exponents: Sequence[int] | None = None) -> list[Candidate]:
    """Return torchdiffeq and torchode at several tolerances; ``solve`` applies an `Ivp` to the problem."""
    candidates = []
    for solver, make, method, own in METHODS:
        if importlib.util.find_spec(solver) is not None:
            chosen = own if exponents is None else exponents
            candidates += adaptive(solver, method, lambda tol, m=method, make=make: solve(make(m, tol)), chosen)
    return candidates


# ---- the costate with other solvers ----


@dataclass(frozen=True)
class Adversarial:
    """Eq. 7 in the form for other solvers: f, the gradient of the final loss, and the pieces of the time span.

    Attributes:
        f: ``f(k)(t, x)`` is the field on piece k of the span.
        gradient: dL/dx at a final state.
        edges: the times between which f is smooth.
    """

    f: Callable[[int], Field]
    gradient: Callable[[Tensor], Tensor]
    x0: Tensor
    eta: float
    edges: tuple[float, ...]


def pulled(f: Field, t: Tensor, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Return f(t, x) and (df/dx)^T a."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = f(t, x)
        return value.detach(), torch.autograd.grad(value, x, a)[0]


def recorded(ivp: Ivp, problem: Adversarial) -> Answer:
    """Return x(T) of Eq. 7 with the costate a(t) of one recording; an evaluation of f or a product counts as one."""
    work = 0
    states = [problem.x0]
    for k, (t0, t1) in enumerate(zip(problem.edges, problem.edges[1:], strict=False)):
        x, count = ivp(problem.f(k), states[-1], t0, t1)
        states.append(x)
        work += count
    costates = [problem.gradient(states[-1])]
    for k in reversed(range(len(states) - 1)):
        f = problem.f(k)

        def backward(t: Tensor, both: Tensor, f: Field = f) -> Tensor:
            value, product = pulled(f, t, both[0], both[1])
            return torch.stack([value, -product])

        both, count = ivp(backward, torch.stack([states[k + 1], costates[-1]]), problem.edges[k + 1], problem.edges[k])
        costates.append(both[1])
        work += 2 * count
    costates.reverse()
    y = problem.x0
    for k, (t0, t1) in enumerate(zip(problem.edges, problem.edges[1:], strict=False)):
        f = problem.f(k)

        def forward(t: Tensor, three: Tensor, f: Field = f) -> Tensor:
            value, product = pulled(f, t, three[0], three[1])
            return torch.stack([value, -product, f(t, three[2]) + problem.eta * three[1]])

        three, count = ivp(forward, torch.stack([states[k], costates[k], y]), t0, t1)
        y = three[2]
        work += 3 * count
    return y, work


def shooting(ivp: Ivp, problem: Adversarial, tolerance: float) -> Answer:
    """Return x(T) of Eq. 7 with its converged costate: find a(0) such that a(T) is the gradient of the loss at x(T)."""
    import numpy
    from scipy.optimize import root

    work, shape, (t0, t1) = 0, problem.x0.shape, problem.edges
    f = problem.f(0)

    def both(t: Tensor, z: Tensor) -> Tensor:
        value, product = pulled(f, t, z[0], z[1])
        return torch.stack([value + problem.eta * z[1], -product])

    seen: dict[bytes, Tensor] = {}

    def end(a0: Any) -> Tensor:
        nonlocal work
        if a0.tobytes() in seen:  # the root, and the point where its Jacobian is taken, are given twice
            return seen[a0.tobytes()]
        start = torch.as_tensor(a0, dtype=problem.x0.dtype).reshape(shape)
        z, count = ivp(both, torch.stack([problem.x0, start]), t0, t1)
        work += 2 * count
        seen[a0.tobytes()] = z
        return z

    def miss(a0: Any) -> Any:
        z = end(a0)
        return (z[1] - problem.gradient(z[0])).reshape(-1).numpy()

    found = root(miss, numpy.zeros(problem.x0.numel()), tol=tolerance)
    if not found.success and float(numpy.abs(found.fun).max()) > 1e2 * tolerance:
        raise RuntimeError(f"shooting did not converge: {found.message}")
    return end(found.x)[0], work


def shooting_peers(
    problem: Adversarial, exponents: Sequence[int] = range(3, 11), method: str = "dopri5"
) -> list[Candidate]:
    """Return candidates that shoot with torchdiffeq."""

    def solve(tolerance: float) -> Answer:
        return shooting(torchdiffeq_ivp(method, tolerance), problem, tolerance)

    return adaptive("torchdiffeq shooting", method, solve, exponents)


def scipy_peers(
    f: Callable[[float, Any], Any],
    product: Callable[[float, Any, Any], Any],
    gradient: Callable[[Any], Any],
    x0: Any,
    span: tuple[float, float],
    eta: float,
    exponents: Sequence[int] = range(3, 11),
) -> list[Candidate]:
    """Return the converged costate by SciPy: shooting and collocation (solve_bvp), with the Jacobian by hand."""
    import numpy
    from scipy.integrate import solve_bvp, solve_ivp
    from scipy.optimize import root

    n = len(x0)

    def both(t: Any, z: Any) -> Any:
        return numpy.concatenate([f(t, z[:n]) + eta * z[n:], -product(t, z[:n], z[n:])])

    def shoot(tolerance: float) -> Answer:
        work, seen = 0, dict[bytes, Any]()

        def end(a0: Any) -> Any:
            nonlocal work
            if a0.tobytes() in seen:
                return seen[a0.tobytes()]
            path = solve_ivp(both, span, numpy.concatenate([x0, a0]), method="DOP853", rtol=tolerance, atol=tolerance)
            work += 2 * path.nfev
            seen[a0.tobytes()] = path.y[:, -1]
            return path.y[:, -1]

        def miss(a0: Any) -> Any:
            z = end(a0)
            return z[n:] - gradient(z[:n])

        return torch.from_numpy(end(root(miss, numpy.zeros(n), tol=tolerance).x)[:n]), work

    def collocate(tolerance: float) -> Answer:
        counted = 0

        def rows(t: Any, z: Any) -> Any:
            nonlocal counted
            counted += 2 * z.shape[1]
            return both(t, z)

        def ends(za: Any, zb: Any) -> Any:
            return numpy.concatenate([za[:n] - x0, zb[n:] - gradient(zb[:n])])

        mesh = numpy.linspace(*span, 11)
        guess = numpy.concatenate([numpy.tile(x0[:, None], 11), numpy.zeros((n, 11))])
        result = solve_bvp(rows, ends, mesh, guess, tol=tolerance, max_nodes=20000)
        if not result.success:
            raise RuntimeError(result.message)
        return torch.from_numpy(result.y[:n, -1].copy()), counted

    return [
        *adaptive("scipy shooting", "DOP853", shoot, exponents),
        *adaptive("scipy collocation", "solve_bvp", collocate, [k for k in exponents if k < 9]),
    ]


# ---- diffrax: compiled by jax, so its fields are written in jax ----


def has_diffrax() -> bool:
    return importlib.util.find_spec("diffrax") is not None


def float64(x: Tensor) -> Any:
    """Return ``x`` for jax in float64; jax uses 32 bits by default."""
    import jax

    jax.config.update("jax_enable_x64", True)
    return jax.numpy.asarray(x.numpy())


def _diffrax_solve(solver: str) -> Callable[..., Any]:
    """Return a function for jit that maps (terms, y0, t0, t1, tolerance) to the final state and the evaluations."""
    import diffrax

    method = getattr(diffrax, solver)()

    def solve(terms: Any, y0: Any, t0: float, t1: float, tolerance: Any) -> Any:
        solution = diffrax.diffeqsolve(
            terms, method, t0, t1, None, y0, max_steps=100_000,
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
        )  # fmt: skip
        return solution.ys[-1], solution.stats["num_steps"]

    return solve


STAGES = {"Tsit5": 6, "Dopri8": 13}  # new evaluations per step; implicit stages of KenCarp4 are not counted


def _diffrax(method: str, whole: Callable[[Any], tuple[Any, Any]], exponents: Sequence[int]) -> list[Candidate]:
    """Return candidates for the jitted ``whole(tolerance)``, which returns the final state and the weighted steps."""
    import jax
    import numpy

    compiled = jax.jit(whole)

    def solve(tolerance: float) -> Answer:
        state, steps = compiled(tolerance)
        work = int(steps) * STAGES[method] if method in STAGES else None
        return torch.from_numpy(numpy.array(state.block_until_ready())), work

    return adaptive("diffrax", method, solve, exponents, cold=True)


def diffrax_split(
    explicit: Callable[..., Any], implicit: Callable[..., Any], x0: Tensor, span: tuple[float, float], operators: int,
    exponents: Sequence[int] | None = None,
) -> list[Candidate]:  # fmt: skip
    """Return candidates for a field in two parts. KenCarp4 treats the second part implicitly, the others do not."""
    if not has_diffrax():
        return []
    import diffrax

    start = float64(x0)
    candidates = []
    # Below the tolerance 1e-6 KenCarp4 takes seconds, so it cannot compete.
    for method, own in (("Tsit5", TOLERANCES), ("Dopri8", TOLERANCES), ("KenCarp4", range(2, 7))):
        solve = _diffrax_solve(method)
        if method == "KenCarp4":
            terms: Any = diffrax.MultiTerm(diffrax.ODETerm(explicit), diffrax.ODETerm(implicit))
        else:
            terms = diffrax.ODETerm(lambda t, y, args: explicit(t, y, args) + implicit(t, y, args))

        def whole(tolerance: Any, solve: Any = solve, terms: Any = terms) -> Any:
            state, steps = solve(terms, start, *span, tolerance)
            return state, operators * steps

        candidates += _diffrax(method, whole, own if exponents is None else exponents)
    return candidates


def diffrax_recorded(
    pieces: Sequence[Callable[[Any, Any], Any]], gradient: Callable[[Any], Any], x0: Tensor, edges: Sequence[float],
    eta: float, exponents: Sequence[int] | None = None,
) -> list[Candidate]:  # fmt: skip
    """Return `recorded` (a(t) of one recording) compiled into one function; f is smooth between ``edges``."""
    if not has_diffrax():
        return []
    import diffrax
    import jax
    import jax.numpy as jnp

    start = float64(x0)
    candidates = []
    for method in ("Tsit5", "Dopri8"):
        solve = _diffrax_solve(method)

        def plain(f: Any) -> Any:
            return diffrax.ODETerm(lambda t, x, args: f(t, x))

        def backward(f: Any) -> Any:
            def rates(t: Any, z: Any, args: Any) -> Any:
                value, pull = jax.vjp(lambda x: f(t, x), z[0])
                return jnp.stack([value, -pull(z[1])[0]])

            return diffrax.ODETerm(rates)

        def forward(f: Any) -> Any:
            def rates(t: Any, z: Any, args: Any) -> Any:
                value, pull = jax.vjp(lambda x: f(t, x), z[0])
                return jnp.stack([value, -pull(z[1])[0], f(t, z[2]) + eta * z[1]])

            return diffrax.ODETerm(rates)

        def whole(tolerance: Any, solve: Any = solve) -> Any:
            parts, work, states = list(zip(pieces, edges, edges[1:], strict=False)), 0, [start]
            for f, t0, t1 in parts:
                end, steps = solve(plain(f), states[-1], t0, t1, tolerance)
                states.append(end)
                work += steps
            costates = [gradient(states[-1])]
            for (f, t0, t1), end in zip(reversed(parts), reversed(states), strict=False):
                z, steps = solve(backward(f), jnp.stack([end, costates[0]]), t1, t0, tolerance)
                costates.insert(0, z[1])
                work += 2 * steps
            y = start
            for (f, t0, t1), x, a in zip(parts, states, costates, strict=False):
                z, steps = solve(forward(f), jnp.stack([x, a, y]), t0, t1, tolerance)
                y = z[2]
                work += 3 * steps
            return y, work

        candidates += _diffrax(method, whole, exponents or TOLERANCES)
    return candidates
