"""Stiff problems: time and work to reach an accuracy, by odeadv, diffrax (KenCarp4, Kvaerno5) and SciPy (Radau, BDF).

`diffusion-reaction` is u_t = D u_xx + r u (1 - u) on a periodic line of 256 points; its largest eigenvalue is 2600.
Strang splits it: `sdirk2` for diffusion, with one pair of Fourier transforms per stage, and the exact flow of the
reaction. KenCarp4 treats diffusion implicitly. `heat` is u_t = (d(x) u_x)_x + sin(5 t) on 128 points: linear, without
an exact flow. `brusselator` has three species on 201 points, diffusion, and a reaction with the rate 1000; splitting
solves the reaction at each point by itself. `robertson` is a chemical reaction of three species with rates from 0.04 to
3e7, to t = 40. `van der pol` is the oscillator with mu = 1000, over its first jump, to t = 1000.

All solvers are given the same system of ordinary differential equations; SciPy is given the sparsity of its Jacobian.
Errors are maxima relative to the largest component. References are SciPy's Radau at the tolerance 1e-10.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import odeadv

from ._peers import has_diffrax
from ._precision import Answer, Candidate, adaptive, fastest, measure, stepped, worked
from ._timing import machine, ratio
from .limits import Limit
from .work_precision import plot as plot
from .work_precision import render as render

ACCURACIES = [10.0**-k for k in range(2, 8)]
GOAL = "strang, sdirk2 and exact"
Field = Callable[[Any, Any, Any], Any]  # f(xp, t, x), with xp torch, numpy or jax.numpy


class System(NamedTuple):
    """An initial value problem for all solvers.

    Attributes:
        f: the whole right-hand side, ``f(xp, t, x)``.
        x0, span: the problem.
        split: the explicit and the implicit part for KenCarp4; by default the explicit part is 0 and the implicit f.
        sparsity: sparsity of the Jacobian, for SciPy; None if the Jacobian is full.
        atol: absolute tolerance, in units of the relative one.
    """

    f: Field
    x0: Tensor
    span: tuple[float, float]
    split: tuple[Field, Field] | None = None
    sparsity: Any = None
    atol: float = 1.0


class Problem(NamedTuple):
    """A system, the candidates of odeadv, the methods that are drawn, and the exponents of the peers' tolerances."""

    system: System
    own: list[Candidate]
    curves: tuple[str, ...]
    exponents: Sequence[int] = range(2, 9)


def laplacian(n: int, spacing: float, periodic: bool) -> Tensor:
    """Return the matrix of second differences for u_xx; without ``periodic``, the values at both ends do not change."""
    a = torch.diag(torch.full((n - 1,), 1.0, dtype=torch.float64), 1)
    a = a + a.mT - 2 * torch.eye(n, dtype=torch.float64)
    if periodic:
        a[0, -1] = a[-1, 0] = 1.0
    else:
        a[0] = a[-1] = 0.0
    return a / spacing**2


def fixed(method: str, field: Any, system: System, counts: Sequence[int], **options: Any) -> list[Candidate]:
    """Return candidates of odeadv with numbers of steps."""
    return stepped(
        method, lambda n: odeadv.solve(field, system.x0, system.span, steps=n, **options), counts
    )  # fmt: skip


def searched(method: str, system: System, exponents: Sequence[int], f: Any) -> list[Candidate]:
    """Return candidates of odeadv with adaptive steps, for a field that is not split.

    Newton's iteration stops at a thousandth of the tolerance.
    """

    def solve(tolerance: float) -> Answer:
        operator = odeadv.Operator(f, solve=odeadv.Newton(rtol=1e-3 * tolerance * system.atol))
        steps = {"dt": "adaptive", "rtol": tolerance, "atol": tolerance * system.atol}
        return worked(odeadv.solve(operator, system.x0, system.span, scheme=method, **steps))

    return adaptive("odeadv", f"{method}, adaptive", solve, exponents)


# ---- peers ----


def scipy_peers(system: System, exponents: Sequence[int]) -> list[Candidate]:
    """Return SciPy's implicit methods."""
    import numpy
    from scipy.integrate import solve_ivp

    shape = tuple(system.x0.shape)

    def solve(method: str, tolerance: float) -> Answer:
        found = solve_ivp(
            lambda t, x: system.f(numpy, t, x.reshape(shape)).reshape(-1), system.span, system.x0.reshape(-1).numpy(),
            method=method, rtol=tolerance, atol=tolerance * system.atol, jac_sparsity=system.sparsity,
        )  # fmt: skip
        return torch.from_numpy(found.y[:, -1].copy()).reshape(shape), int(found.nfev)

    return [
        candidate
        for method in ("Radau", "BDF")
        for candidate in adaptive("scipy", method, lambda tol, m=method: solve(m, tol), exponents)
    ]


def reference(system: System) -> Tensor:
    """Return the final state by Radau at the tolerance 1e-10."""
    return scipy_peers(system, (10,))[0].solve()[0]


def diffrax_peers(system: System, exponents: Sequence[int]) -> list[Candidate]:
    """Return diffrax's implicit methods, compiled and warm."""
    if not has_diffrax():
        return []
    import diffrax
    import jax
    import numpy

    jax.config.update("jax_enable_x64", True)
    jnp = jax.numpy
    start = jnp.asarray(system.x0.numpy())
    explicit, implicit = system.split or (lambda xp, t, x: 0 * x, system.f)

    def term(f: Field) -> Any:
        return diffrax.ODETerm(lambda t, x, args: f(jnp, t, x))

    candidates = []
    for method in ("KenCarp4", "Kvaerno5"):
        terms = diffrax.MultiTerm(term(explicit), term(implicit)) if method == "KenCarp4" else term(system.f)
        solver = getattr(diffrax, method)()

        @jax.jit
        def compiled(tolerance: Any, terms: Any = terms, solver: Any = solver) -> Any:
            controller = diffrax.PIDController(rtol=tolerance, atol=tolerance * system.atol)
            return diffrax.diffeqsolve(
                terms, solver, *system.span, None, start, stepsize_controller=controller, max_steps=20_000
            ).ys[-1]

        def solve(tolerance: float, compiled: Any = compiled) -> Answer:
            return torch.from_numpy(numpy.array(compiled(tolerance).block_until_ready())), None

        candidates += adaptive("diffrax", method, solve, exponents, cold=True)
    return candidates


# ---- problems ----


def diffusion_reaction(quick: bool) -> Problem:
    n, diffusivity, rate = 32 if quick else 256, 0.01, 5.0
    matrix = diffusivity * laplacian(n, 1 / n, periodic=True)
    dense = matrix.numpy()

    def diffuse(xp: Any, t: Any, u: Any) -> Any:
        return (matrix if xp is torch else dense) @ u

    def react(xp: Any, t: Any, u: Any) -> Any:
        return rate * u * (1 - u)

    def logistic(t: Tensor, dt: Tensor, u: Tensor) -> Tensor:
        growth = torch.exp(rate * dt)
        return u * growth / (1 + u * (growth - 1))

    place = torch.arange(n, dtype=torch.float64) / n
    system = System(
        lambda xp, t, u: diffuse(xp, t, u) + react(xp, t, u),
        0.1 + 0.8 * torch.exp(-((place - 0.5) ** 2) / 0.01),
        (0.0, 1.0),
        (react, diffuse),
        None if quick else (dense != 0),
    )
    symbol = -diffusivity * n**2 * (2 - 2 * torch.cos(2 * math.pi * torch.arange(n, dtype=torch.float64) / n))
    field = odeadv.SplitField(
        diffusion=odeadv.Operator.diagonal(symbol, transform="fft", reversible=False),
        reaction=odeadv.Operator(lambda t, u: react(torch, t, u), flow=logistic),
    )
    counts = (4, 8) if quick else (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
    own = []
    for diffusion, reaction in (
        ("sdirk2", "exact"),
        ("exact", "exact"),
        ("crank-nicolson", "exact"),
        ("sdirk2", "rk4"),
    ):
        pair = {"diffusion": diffusion, "reaction": reaction}
        own += fixed(f"strang, {diffusion} and {reaction}", field, system, counts, scheme="strang", substep=pair)
    pair = {"diffusion": "sdirk4", "reaction": "exact"}
    own += fixed("extrapolated-strang4, sdirk4", field, system, counts, scheme="extrapolated-strang4", substep=pair)
    return Problem(system, own, (GOAL, "strang, exact and exact", "extrapolated-strang4, sdirk4"))


def heat(quick: bool) -> Problem:
    n = 24 if quick else 128
    edge = torch.arange(1, n, dtype=torch.float64) / n  # edges between n cells; the flux through the ends is 0
    differences = torch.diff(torch.eye(n, dtype=torch.float64), dim=0)
    matrix = -(n**2) * differences.mT @ ((0.1 + edge * (1 - edge))[:, None] * differences)
    dense = matrix.numpy()

    def f(xp: Any, t: Any, u: Any) -> Any:
        return (matrix if xp is torch else dense) @ u + xp.sin(5 * t)

    middles = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    system = System(f, torch.cos(math.pi * middles) ** 2, (0.0, 1.0), sparsity=None if quick else (dense != 0))
    source = odeadv.fields.Forcing(lambda t: torch.full((n,), math.sin(5 * t), dtype=torch.float64))
    field = odeadv.SplitField(heat=odeadv.Operator.linear(matrix, reversible=False), source=source)
    counts = (8, 16) if quick else (8, 16, 32, 64, 128, 256, 512)
    own = []
    for method in ("sdirk2", "sdirk4", "crank-nicolson"):
        own += fixed(f"{method}, factors", field, system, counts, scheme=method)
    own += fixed("sdirk4, newton", lambda t, u: f(torch, t, u), system, counts, scheme="sdirk4")
    return Problem(system, own, ("sdirk2, factors", "sdirk4, factors", "sdirk4, newton"))


def brusselator(quick: bool) -> Problem:
    n, feed, target, spread, eps = 11 if quick else 201, 0.6, 2.0, 0.025, 1e-2 if quick else 1e-3
    matrix = spread * laplacian(n, 1 / (n - 1), periodic=False)
    inside = torch.ones(n, dtype=torch.float64)
    inside[0] = inside[-1] = 0.0  # the values at the ends do not change
    dense, mask = matrix.numpy(), inside.numpy()

    def diffuse(xp: Any, t: Any, x: Any) -> Any:
        return x @ (matrix if xp is torch else dense).T

    def react(xp: Any, t: Any, x: Any) -> Any:
        u, v, w = x[0], x[1], x[2]
        join, lost = u * u * v, w * u
        rates = xp.stack([feed - lost - u + join, lost - join, (target - w) / eps - lost])
        return rates * (inside if xp is torch else mask)

    bump = 0.1 * torch.sin(math.pi * torch.arange(n, dtype=torch.float64) / (n - 1))
    start = torch.stack([feed + bump, target / feed + bump, target + bump])
    near = (torch.eye(n) + (matrix != 0)).bool().double()
    sparsity = torch.kron(torch.ones(3, 3, dtype=torch.float64), near).numpy()
    system = System(
        lambda xp, t, x: diffuse(xp, t, x) + react(xp, t, x), start, (0.0, 0.2 if quick else 2.0), sparsity=sparsity
    )
    points = odeadv.Newton(samples=-1)
    field = odeadv.SplitField(
        reaction=odeadv.Operator(lambda t, x: react(torch, t, x), solve=points),
        diffusion=odeadv.Operator.linear(matrix, reversible=False),
    )
    counts = (8,) if quick else (8, 16, 32, 64, 128, 256)
    own = []
    for diffusion, reaction in (("sdirk2", "sdirk2"), ("exact", "sdirk2"), ("exact", "sdirk4")):
        pair = {"diffusion": diffusion, "reaction": reaction}
        own += fixed(f"strang, {diffusion} and {reaction}", field, system, counts, scheme="strang", substep=pair)
    pair = {"diffusion": "exact", "reaction": "sdirk4"}
    own += fixed("extrapolated-strang4, sdirk4", field, system, counts, scheme="extrapolated-strang4", substep=pair)
    whole = odeadv.Operator(lambda t, x: system.f(torch, t, x), solve=odeadv.Newton(jacobian="dense"))
    own += fixed("sdirk4, newton", whole, system, counts[:3], scheme="sdirk4")
    curves = ("strang, sdirk2 and sdirk2", "extrapolated-strang4, sdirk4", "sdirk4, newton")
    return Problem(system, own, curves, range(2, 7))


def robertson(quick: bool) -> Problem:
    def f(xp: Any, t: Any, x: Any) -> Any:
        lost, made, joined = 0.04 * x[0], 1e4 * x[1] * x[2], 3e7 * x[1] * x[1]
        return xp.stack([made - lost, lost - made - joined, joined])

    start = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    system = System(f, start, (0.0, 0.4 if quick else 40.0), atol=1e-4)
    return _unsplit(system, quick, range(2, 7))


def van_der_pol(quick: bool) -> Problem:
    def f(xp: Any, t: Any, x: Any) -> Any:
        return xp.stack([x[1], 1e3 * (1 - x[0] ** 2) * x[1] - x[0]])

    system = System(f, torch.tensor([2.0, 0.0], dtype=torch.float64), (0.0, 10.0 if quick else 1000.0))
    return _unsplit(system, quick, range(3, 6))


def _unsplit(system: System, quick: bool, exponents: Sequence[int]) -> Problem:
    """Return the problem with implicit methods on the whole field, by Newton's iteration."""
    own = []
    for method in ("sdirk2", "sdirk4"):
        own += searched(method, system, exponents[:1] if quick else exponents, lambda t, x: system.f(torch, t, x))
    return Problem(system, own, ("sdirk2, adaptive", "sdirk4, adaptive"))


PROBLEMS: dict[str, Callable[[bool], Problem]] = {
    "diffusion-reaction": diffusion_reaction,
    "heat": heat,
    "brusselator": brusselator,
    "robertson": robertson,
    "van der pol": van_der_pol,
}


def run(quick: bool = False) -> dict[str, object]:
    measured = {}
    odeadv.solve(lambda t, x: -x, torch.ones(1), (0.0, 1.0), steps=1, scheme="sdirk2")  # torch loads code on first use
    for name, make in PROBLEMS.items():
        problem = make(quick)
        exponents = (4,) if quick else problem.exponents
        candidates = [
            *problem.own, *scipy_peers(problem.system, exponents), *diffrax_peers(problem.system, exponents)
        ]  # fmt: skip
        data, rounds = measure(
            candidates, reference(problem.system), rounds=1 if quick else 3, longest=1.0, always=problem.curves
        )
        measured[name] = {
            **data,
            "fastest": fastest(data["points"], ACCURACIES),
            "curves": list(problem.curves),
            "ratios": ratios(data["points"], rounds) if name == "diffusion-reaction" else {},
        }
    return {"machine": machine(), "problems": measured}


def ratios(points: Mapping[str, Any], rounds: Mapping[str, list[float]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return, for the accuracies 1e-3 to 1e-6 and every other solver, its time divided by the time of `GOAL`."""
    ours = {name: point for name, point in points.items() if point["solver"] != "odeadv" or point["method"] == GOAL}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for accuracy, row in fastest(ours, [10.0**-k for k in range(3, 7)]).items():
        others = {solver: name for solver, name in row.items() if solver != "odeadv"}
        if "odeadv" in row:
            found[accuracy] = {solver: ratio(rounds, name, row["odeadv"]) for solver, name in others.items()}
    return found


def limits(data: dict) -> list[Limit]:
    return [
        Limit(f"diffusion-reaction, error {accuracy}: time of {solver} / {GOAL}", times, least=1, form=".1f")
        for accuracy, row in data["problems"]["diffusion-reaction"]["ratios"].items()
        for solver, times in row.items()
    ]
