"""Evaluations that the converged costate takes, at every accuracy: collocation, sweeps, Newton's method, and shooting.

The problem is dx/dt = f + eta a, da/dt = -(df/dx)^T a, with a(T) the gradient of |x(T)|^2 / 2 (x(T).Q x(T) / 2 for
`linear`). `linear` and `oscillator` are those of work_precision; for `control`, eta is -3, and plain sweeps diverge.
Stiff problems are left out: their costates grow too fast forward in time to be found by shooting. An evaluation of f, a
product with its Jacobian and a derivative of such a product count as one each. So the numbers do not depend on the
speed of the machine. Each method is measured at several numbers of steps or tolerances. A row has its smallest count
with an error of at most the first column. The error is the maximum over x(T), relative to the largest component.

odeadv takes costate="collocation" with sweeps=odeadv.Converge(rtol=1e-2) to 1e-8, or costate="hermite" with 1e-2 or
1e-4 (Newton's method: 1e-4). The state is advanced by the classical Runge-Kutta method, or by an `odeadv.RungeKutta`.
The latter has the weights of Dormand and Prince, of order 5 or of order 8 (DOP853, from SciPy). Shooting begins with
a(0) = 0, and solve_bvp with a constant state and a = 0 on 11 nodes; its Jacobian is by differences.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import odeadv

from . import orders, work_precision
from ._peers import Adversarial, scipy_peers, shooting, shooting_peers, torchdiffeq_ivp
from ._precision import Candidate, worked
from ._timing import machine
from .limits import Limit

ACCURACIES = work_precision.ACCURACIES
STEPS = (1, 2, 3, 4, 6, 8, 16, 32, 64)
DORMAND_PRINCE = odeadv.RungeKutta(
    "dormand-prince", 5, (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1),
    (
        (0, 0, 0, 0, 0, 0),
        (1 / 5, 0, 0, 0, 0, 0),
        (3 / 40, 9 / 40, 0, 0, 0, 0),
        (44 / 45, -56 / 15, 32 / 9, 0, 0, 0),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729, 0, 0),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656, 0),
    ),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)  # fmt: skip
METHODS: dict[str, tuple[Any, str, str, Sequence[int]]] = {  # scheme, costate, method of `Converge`, digits of its rtol
    "collocation, rk4": ("rk4", "collocation", "newton", (2, 4, 6, 8)),
    "collocation, order 8": (work_precision.ORDER_8, "collocation", "newton", (2, 4, 6, 8)),
    "sweeps, rk4": ("rk4", "hermite", "anderson", (2, 4)),
    "sweeps, order 5": (DORMAND_PRINCE, "hermite", "anderson", (2, 4)),
    "newton, rk4": ("rk4", "hermite", "newton", (4,)),
}


class Problem(NamedTuple):
    """The field, what the other solvers need (for PyTorch and for NumPy), and the exact x(T) if it is known."""

    field: odeadv.AdversarialField
    peer: Adversarial
    arrays: tuple[Any, ...]
    exact: Tensor | None = None


def _linear() -> Problem:
    field, peer = work_precision._linear()
    a, q = orders.A.numpy(), orders.Q.numpy()
    arrays = (lambda t, x: a @ x, lambda t, x, p: a.T @ p, lambda x: q @ x)
    return Problem(field, peer, arrays, work_precision.linear_converged_form())


def _squared(
    f: Callable[..., Any], product: Callable[..., Any], x0: Sequence[float], end: float, eta: float
) -> Problem:
    """Return the problem with the loss |x(T)|^2 / 2.

    Args:
        f: ``f(lib, t, x)``, the components of dx/dt, by the functions of ``lib`` (torch or numpy).
        product: ``product(lib, t, x, a)``, the components of (df/dx)^T a.
        x0: x(0).
        end: T.
        eta: strength.
    """
    import numpy

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        return torch.stack(f(torch, t, x))

    return Problem(
        odeadv.AdversarialField(velocity, lambda x: 0.5 * (x * x).sum(), eta),
        Adversarial(lambda k: velocity, lambda x: x, torch.tensor(x0, dtype=torch.float64), eta, (0.0, end)),
        (
            lambda t, x: numpy.stack(f(numpy, t, x)),
            lambda t, x, a: numpy.stack(product(numpy, t, x, a)),
            lambda x: x,
        ),
    )


def _oscillator() -> Problem:
    w = work_precision
    return _squared(
        lambda m, t, x: [x[1], x[0] - x[0] ** 3 - w.DAMPING * x[1] + w.FORCE * m.cos(w.RATE * t)],
        lambda m, t, x, a: [(1 - 3 * x[0] ** 2) * a[1], a[0] - w.DAMPING * a[1]],
        w.START.tolist(), w.SPAN[1], w.ETA,
    )  # fmt: skip


def _control() -> Problem:
    return _squared(
        lambda m, t, x: [x[1] + 0.2 * m.sin(x[2]), m.sin(x[0]) - 0.1 * x[1], 0.5 * m.sin(x[0]) - 0.3 * x[2]],
        lambda m, t, x, a: [
            m.cos(x[0]) * (a[1] + 0.5 * a[2]), a[0] - 0.1 * a[1], 0.2 * m.cos(x[2]) * a[0] - 0.3 * a[2]
        ],
        [0.4, -0.1, 0.3], 1.2, -3.0,
    )  # fmt: skip


PROBLEMS = {"linear": _linear, "oscillator": _oscillator, "control": _control}


def _own(problem: Problem, quick: bool) -> list[Candidate]:
    """Return the solves of odeadv."""
    field, x0, span = problem.field, problem.peer.x0, problem.peer.edges

    def solve(name: str, steps: int, digits: int) -> Any:
        scheme, costate, method, _ = METHODS[name]
        until = odeadv.Converge(rtol=10.0**-digits, method=method)
        return worked(odeadv.solve(field, x0, span, scheme=scheme, steps=steps, costate=costate, sweeps=until))

    return [
        Candidate("odeadv", name, f"{n} steps, 1e-{k}", lambda name=name, n=n, k=k: solve(name, n, k))
        for name, (*_, digits) in METHODS.items()
        for k in ((2,) if quick else digits)
        for n in ((4, 8) if quick else STEPS)
    ]


def _peers(problem: Problem, quick: bool) -> list[Candidate]:
    """Return the solves of the others."""
    exponents = (3,) if quick else range(2, 11)
    peer = problem.peer
    candidates = [c for m in ("dopri5", "dopri8") for c in shooting_peers(peer, exponents, m)]
    return [*candidates, *scipy_peers(*problem.arrays, peer.x0.numpy(), peer.edges, peer.eta, exponents)]


def _measured(candidates: Sequence[Candidate], exact: Tensor) -> dict[str, Any]:
    """Return error and evaluations of every setting, by method; None if it fails.

    A series of settings ends once the error is below the smallest accuracy.
    """
    found: dict[str, dict[str, Any]] = {}
    done: set[tuple[str, str]] = set()
    for candidate in candidates:
        name = candidate.method if candidate.solver == "odeadv" else f"{candidate.solver} {candidate.method}"
        series = (name, candidate.setting.split(", ")[-1] if candidate.solver == "odeadv" else "")
        if series in done:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                state, work = candidate.solve()
            error = float(f"{float((state - exact).abs().max() / exact.abs().max()):.3g}")
        except Exception:  # every solver raises its own exceptions
            error = work = None
        known = error is not None and error < 1e3
        found.setdefault(name, {})[candidate.setting] = [error, work] if known else None
        if known and error < ACCURACIES[-1]:
            done.add(series)
    return found


def least(points: dict[str, Any], accuracy: float) -> tuple[int, str] | None:
    """Return the smallest count of ``points`` whose error is at most ``accuracy``, and its setting."""
    good = [(point[1], setting) for setting, point in points.items() if point and point[0] <= accuracy]
    return min(good, default=None)


def limits(data: dict) -> list[Limit]:
    """Return the evaluations divided by those of shooting and collocation, at the accuracy with the largest ratio."""
    rows = []
    for name, methods in data["problems"].items():
        own = {method: points for method, points in methods.items() if method in METHODS}
        for peer, most in (("torchdiffeq shooting", 1.0), ("scipy collocation", 2.0)):
            peers = [points for method, points in methods.items() if method.startswith(peer)]
            ratios = [
                _fewest(own.values(), accuracy) / _fewest(peers, accuracy)
                for accuracy in ACCURACIES
                if math.isfinite(_fewest(peers, accuracy))
            ]
            if ratios:
                rows.append(Limit(f"{name}: evaluations of odeadv / {peer}, largest ratio", max(ratios), most=most))
    return rows


def _fewest(methods: Iterable[dict[str, Any]], accuracy: float) -> float:
    """Return the smallest count of several methods with an error of at most ``accuracy``; infinity if all fail."""
    found = [least(points, accuracy) for points in methods]
    return min((float(best[0]) for best in found if best), default=math.inf)


def run(quick: bool = False) -> dict[str, object]:
    measured = {}
    for name in ("linear", "control") if quick else PROBLEMS:
        problem = PROBLEMS[name]()
        exact = problem.exact
        if exact is None:
            exact, _ = shooting(torchdiffeq_ivp("dopri8", 1e-12), problem.peer, 1e-12)
        measured[name] = _measured([*_own(problem, quick), *_peers(problem, quick)], exact)
    return {"machine": machine(), "problems": measured}


def render(data: dict) -> str:
    parts = []
    for name, methods in data["problems"].items():
        parts += [
            f"### Evaluations to reach an accuracy: {name}",
            "",
            f"| error at most | {' | '.join(methods)} |",
            f"|{' --- |' * (1 + len(methods))}",
        ]
        for accuracy in ACCURACIES:
            best = [least(points, accuracy) for points in methods.values()]
            cells = ["" if found is None else f"{found[0]} ({found[1].removeprefix('tolerance ')})" for found in best]
            parts.append(f"| {accuracy:.0e} | {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts).rstrip()
