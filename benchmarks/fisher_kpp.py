"""Fisher-KPP, u_t = u_xx / 2 + u (1 - u) on a periodic line of 256 points, to T = 1: time to reach an accuracy.

Splitting uses the exact flows of diffusion (FFT) and of the logistic equation, with every scheme without negative steps
and every sub-step for the reaction. The other solvers take the whole right-hand side; diffrax's KenCarp4 treats
diffusion implicitly. Errors are maxima of the difference to torchdiffeq's dopri8 at tolerance 1e-13. The flows of each
winner are also timed separately.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import odeadv

from ._peers import diffrax_split, has_diffrax, torch_peers, torchdiffeq_ivp
from ._plots import panels, save
from ._precision import SETTLE, Candidate, Points, cold_table, draw, fastest, measure, stepped, table
from ._timing import interleaved, machine, middle, ratio, spread
from .limits import Limit

POINTS, LENGTH, DIFFUSION, END = 256, 40.0, 0.5, 1.0
ACCURACIES = [10.0**-k for k in range(2, 9)]
WAVES = 2 * math.pi / LENGTH * torch.arange(POINTS // 2 + 1, dtype=torch.float64)
SYMBOL = -DIFFUSION * WAVES**2
STEPS = {1: (2, 4, 8, 16, 32, 64, 128), 2: (1, 2, 4, 8, 16, 32, 64, 128, 256), 4: (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)}
HIGH = (1, 2, 3, 4, 6, 8, 12)
CURVES = ("lie, exact", "strang, exact", "extrapolated-strang4, exact", "extrapolated-strang8, exact")


def diffuse(t: Tensor, u: Tensor) -> Tensor:
    return torch.fft.irfft(SYMBOL * torch.fft.rfft(u), n=POINTS)


def diffusion_flow(t: Tensor, dt: Tensor, u: Tensor) -> Tensor:
    return torch.fft.irfft(torch.exp(SYMBOL * dt) * torch.fft.rfft(u), n=POINTS)


def react(t: Tensor, u: Tensor) -> Tensor:
    return u * (1 - u)


def reaction_flow(t: Tensor, dt: Tensor, u: Tensor) -> Tensor:
    growth = torch.exp(dt)
    return u * growth / (1 + u * (growth - 1))


def start() -> Tensor:
    """Return smooth initial data in (0, 1)."""
    place = LENGTH / POINTS * torch.arange(POINTS, dtype=torch.float64)
    return 0.1 + 0.8 * torch.exp(-((place - LENGTH / 2) ** 2) / 8)


def split_field() -> odeadv.SplitField:
    """Return diffusion and reaction, each with its exact flow."""
    return odeadv.SplitField(
        reaction=odeadv.Operator(react, flow=reaction_flow),
        diffusion=odeadv.Operator(diffuse, flow=diffusion_flow, reversible=False),
    )


def splitting(u0: Tensor, quick: bool) -> list[Candidate]:
    """Return every scheme that runs diffusion forward only, with every sub-step for the reaction."""
    field = split_field()
    candidates = []
    for name in ("lie", "strang") if quick else odeadv.schemes.names():
        scheme = odeadv.schemes.get(name)
        rows = [scheme.stages] if not scheme.mixture else [row for _, row in scheme.mixture]
        if any(stage.weight < 0 for row in rows for stage in row):
            continue
        for substep in ("exact", "rk4") if quick else ("exact", "rk4", "heun", "midpoint", "euler"):
            counts = (1, 2) if quick else STEPS.get(scheme.order, HIGH)
            candidates += stepped(
                f"{name}, {substep}",
                lambda n, s=name, r=substep: odeadv.solve(
                    field, u0, (0.0, END), scheme=s, steps=n, substep={"diffusion": "exact", "reaction": r}
                ),
                counts,
            )
    return candidates


def flows_alone(points: Points, names: Iterable[str], u0: Tensor, quick: bool) -> dict[str, dict[str, float]]:
    """Return the seconds of the evaluations of the points ``names`` in a bare loop, the floor of every splitting."""
    t, functions = torch.tensor(0.0, dtype=u0.dtype), {}
    for name in sorted(names):
        point = points[name]
        scheme, substep = point["method"].split(", ")
        steps = int(point["setting"].split()[0])
        solution = odeadv.solve(
            split_field(), u0, (0.0, END), scheme=scheme, steps=steps,
            substep={"diffusion": "exact", "reaction": substep},
        )  # fmt: skip
        counts = solution.stats.evaluations
        dt = torch.tensor(END / steps, dtype=u0.dtype)

        def loop(counts=counts, dt=dt, exact=substep == "exact") -> None:
            for _ in range(counts["diffusion"]):
                diffusion_flow(t, dt, u0)
            for _ in range(counts["reaction"]):
                reaction_flow(t, dt, u0) if exact else react(t, u0)

        functions[name] = loop
    seconds = interleaved(functions, rounds=1 if quick else 15, settle=SETTLE)
    return {name: spread(values) for name, values in seconds.items()}


def peers(u0: Tensor, quick: bool) -> list[Candidate]:
    """Return the candidates of the other solvers."""
    exponents = (3,) if quick else None

    def whole(t: Tensor, u: Tensor) -> Tensor:
        return diffuse(t, u) + react(t, u)

    def solve(ivp: Any) -> tuple[Tensor, int]:
        state, count = ivp(whole, u0, 0.0, END)
        return state, 2 * count  # an evaluation counts for both operators

    candidates = torch_peers(solve, exponents)
    if has_diffrax():
        import jax
        import jax.numpy as jnp

        jax.config.update("jax_enable_x64", True)
        symbol = jnp.asarray(SYMBOL.numpy())
        candidates += diffrax_split(
            lambda t, u, args: u * (1 - u),
            lambda t, u, args: jnp.fft.irfft(symbol * jnp.fft.rfft(u), n=POINTS),
            u0,
            (0.0, END),
            2,
            exponents,
        )
    return candidates


def run(quick: bool = False) -> dict[str, object]:
    u0 = start()
    reference, _ = torchdiffeq_ivp("dopri8", 1e-13)(lambda t, u: diffuse(t, u) + react(t, u), u0, 0.0, END)
    candidates = [*splitting(u0, quick), *peers(u0, quick)]
    data, rounds = measure(candidates, reference, rounds=1 if quick else 15, longest=0.2, always=CURVES)
    best = fastest(data["points"], ACCURACIES)
    alone = flows_alone(data["points"], {row["odeadv"] for row in best.values() if "odeadv" in row}, u0, quick)
    return {"machine": machine(), **data, "fastest": best, "ratios": ratios(best, rounds), "flows alone": alone}


def ratios(best: Mapping[str, Mapping[str, str]], rounds: Mapping[str, list[float]]) -> dict[str, dict[str, object]]:
    """Return, for every accuracy, the fastest other solver and its time divided by ours."""
    found: dict[str, dict[str, object]] = {}
    for accuracy, row in best.items():
        others = {solver: name for solver, name in row.items() if solver != "odeadv"}
        if others and "odeadv" in row:
            rival = min(others, key=lambda solver: median(rounds[others[solver]]))
            found[accuracy] = {"to": rival, "times": ratio(rounds, others[rival], row["odeadv"])}
    return found


def render(data: dict) -> str:
    return "\n".join([table(data["points"], data["fastest"]), *cold_table(data["points"])])


def plot(data: dict, path: Path) -> None:
    figure, axes = panels(1, 2)
    draw(axes[0], "Fisher-KPP", data["points"], CURVES)
    save(figure, path)


def limits(data: dict) -> list[Limit]:
    rows = []
    for accuracy, found in data["ratios"].items():
        row, rival = data["fastest"][accuracy], found["to"]
        ceiling = middle(data["points"][row[rival]]["seconds"]) / middle(data["flows alone"][row["odeadv"]])
        what = f"error {accuracy}: time of {rival} / odeadv"
        rows.append(Limit(what, found["times"], ceiling, least=1, form=".1f"))
    return rows
