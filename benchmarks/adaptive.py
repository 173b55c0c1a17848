"""Errors of adaptive solves of adversarial fields against their tolerances.

`rtol` and `atol` bound the error of a step, so the error of a solve grows with the number of steps. The recorded
costate contributes to the error: recordings are refined until the costate also meets the tolerances. The error is the
largest error of an entry of x(T), divided by atol + rtol |x|. So 1 is an error as large as the tolerance of a single
step. The reference has 1,000 equal steps of `yoshida4` with `rk4` and a cubic costate.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import odeadv

from ._plots import panels, save
from ._timing import machine

TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
METHODS = {"strang, midpoint": ("strang", "midpoint"), "yoshida4, rk4": ("yoshida4", "rk4")}
STEPS = 1000


class Problem(NamedTuple):
    """An adversarial field with its initial state and end time."""

    f: Callable[[Tensor, Tensor], Tensor]
    loss: Callable[[Tensor], Tensor]
    eta: float
    x0: list[float]
    end: float


def _lotka(t: Tensor, x: Tensor) -> Tensor:
    return torch.stack([x[0] * (1.1 - 0.4 * x[1]), x[1] * (0.1 * x[0] - 0.4)])


def _tanh(t: Tensor, x: Tensor) -> Tensor:
    weights = torch.tensor([[0.2, -0.9, 0.4], [0.7, 0.1, -0.3], [-0.5, 0.6, 0.2]], dtype=x.dtype)
    return torch.tanh(weights @ x) * (1 + torch.sin(2 * t))


PROBLEMS = {
    "forced pendulum": Problem(
        lambda t, x: torch.stack([x[1] + 0.3 * torch.sin(3 * t), -1.5 * torch.sin(2 * x[0])]),
        lambda x: x[0] ** 2 * x[1] + x[1] ** 2,
        0.2,
        [1.0, -0.5],
        2.0,
    ),
    "decay, fast and slow": Problem(
        lambda t, x: torch.stack([-8.0 * x[0] + x[1], -0.5 * x[1]]), lambda x: 0.5 * (x**2).sum(), 0.5, [1.0, -0.4], 2.0
    ),
    "Lotka-Volterra": Problem(_lotka, lambda x: (x - 3.0).square().sum(), 0.01, [4.0, 2.0], 4.0),
    "van der Pol, mu = 2": Problem(
        lambda t, x: torch.stack([x[1], 2.0 * (1 - x[0] ** 2) * x[1] - x[0]]),
        lambda x: x[0] * x[1] + x[1],
        0.05,
        [2.0, 0.0],
        3.0,
    ),
    "neural, driven by time": Problem(_tanh, lambda x: (x**3).sum(), 0.3, [0.5, -0.2, 0.9], 3.0),
}


def run(quick: bool = False) -> dict[str, object]:
    tolerances = TOLERANCES[:1] if quick else TOLERANCES
    table = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", odeadv.AccuracyWarning)
        for name, problem in list(PROBLEMS.items())[: 1 if quick else None]:
            field = odeadv.AdversarialField(problem.f, problem.loss, problem.eta)
            x0, span = torch.tensor(problem.x0, dtype=torch.float64), (0.0, problem.end)
            fine = {"scheme": "yoshida4", "substep": "rk4", "costate": "hermite", "steps": 50 if quick else STEPS}
            truth = odeadv.solve(field, x0, span, **fine).xs[-1]
            for method, (scheme, substep) in METHODS.items():
                for tolerance in tolerances:
                    sol = odeadv.solve(
                        field, x0, span, scheme=scheme, substep=substep, dt="adaptive", rtol=tolerance, atol=tolerance
                    )
                    scale = tolerance * (1 + truth.abs())
                    error = float(((sol.xs[-1] - truth).abs() / scale).max())
                    row = {"problem": name, "method": method, "tolerance": tolerance, "error": error}
                    cost = {"steps": sol.stats.steps, "recordings": sol.stats.recordings}
                    table.append({**row, **cost, "evaluations": sol.stats.evaluations["f"]})
    return {"machine": machine(), "table": table}


def render(data: dict) -> str:
    tolerances = sorted({row["tolerance"] for row in data["table"]}, reverse=True)
    lines = [
        "Error of x(T) in units of the tolerance of a step (number of steps):",
        "",
        f"| problem | method | {' | '.join(f'{tolerance:.0e}' for tolerance in tolerances)} |",
        f"|{' --- |' * (2 + len(tolerances))}",
    ]
    for name, method in dict.fromkeys((row["problem"], row["method"]) for row in data["table"]):
        rows = {r["tolerance"]: r for r in data["table"] if (r["problem"], r["method"]) == (name, method)}
        cells = [f"{rows[t]['error']:.2g} ({rows[t]['steps']})" for t in tolerances]
        lines.append(f"| {name} | {method} | {' | '.join(cells)} |")
    largest = max(row["error"] for row in data["table"])
    lines += ["", f"The largest error is {largest:.2g} times the tolerance of a step."]
    return "\n".join(lines)


def plot(data: dict, path: Path) -> None:
    figure, axes = panels(1, 1, width=6.6)
    axis = axes[0, 0]
    names = list(dict.fromkeys(row["problem"] for row in data["table"]))
    for marker, method in zip("os", dict.fromkeys(row["method"] for row in data["table"]), strict=False):
        for color, name in enumerate(names):
            rows = [r for r in data["table"] if (r["problem"], r["method"]) == (name, method)]
            errors = [r["error"] * r["tolerance"] for r in rows]
            axis.loglog(
                [r["tolerance"] for r in rows], errors, marker=marker, color=f"C{color}", label=f"{name}; {method}"
            )
    ends = [min(r["tolerance"] for r in data["table"]), max(r["tolerance"] for r in data["table"])]
    axis.loglog(ends, ends, color="0.6", linewidth=0.8, linestyle="--")
    axis.set_xlabel("rtol = atol")
    axis.set_ylabel("error of x(T), relative to 1 + |x|")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    save(figure, path)
