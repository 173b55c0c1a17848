"""Fisher-KPP, u_t = u_xx / 2 + u (1 - u) on a periodic line of 256 points, to T = 1: time to reach an accuracy.

Splitting takes the exact flows of diffusion (FFT) and of the logistic equation; the others solve the whole right-hand
side, diffrax's KenCarp4 with diffusion implicit. Errors are maxima against torchdiffeq's dopri8 at tolerance 1e-13.
"""

import math
import statistics
from collections.abc import Callable

import torch
import torchdiffeq
from torch import Tensor

import odeadv

from ._peers import diffrax_solvers, torchdiffeq_solvers, torchode_solvers
from ._timing import interleaved, machine

POINTS, LENGTH, DIFFUSION, END = 256, 40.0, 0.5, 1.0
SOLVERS = ("odeadv", "torchdiffeq", "torchode", "diffrax")
ACCURACIES = [10.0**-k for k in range(2, 9)]
WAVES = 2 * math.pi / LENGTH * torch.arange(POINTS // 2 + 1, dtype=torch.float64)
SYMBOL = -DIFFUSION * WAVES**2


def diffuse(t: Tensor, u: Tensor) -> Tensor:
    return torch.fft.irfft(SYMBOL * torch.fft.rfft(u), n=POINTS)


def diffusion_flow(t: Tensor, dt: Tensor, u: Tensor) -> Tensor:
    return torch.fft.irfft(torch.exp(SYMBOL * dt) * torch.fft.rfft(u), n=POINTS)


def react(t: Tensor, u: Tensor) -> Tensor:
    return u * (1 - u)


def reaction_flow(t: Tensor, dt: Tensor, u: Tensor) -> Tensor:
    growth = torch.exp(dt)
    return u * growth / (1 + u * (growth - 1))


def run() -> dict[str, object]:
    place = LENGTH / POINTS * torch.arange(POINTS, dtype=torch.float64)
    u0 = 0.1 + 0.8 * torch.exp(-((place - LENGTH / 2) ** 2) / 8)
    ends = torch.tensor([0.0, END], dtype=torch.float64)

    def whole(t: Tensor, u: Tensor) -> Tensor:
        return diffuse(t, u) + react(t, u)

    reference = torchdiffeq.odeint(whole, u0, ends, method="dopri8", rtol=1e-13, atol=1e-13)[-1]
    field = odeadv.SplitField(
        reaction=odeadv.Operator(react, flow=reaction_flow),
        diffusion=odeadv.Operator(diffuse, flow=diffusion_flow, reversible=False),
    )

    def split(scheme: str, steps: int) -> Tensor:
        return odeadv.solve(field, u0, (0.0, END), scheme=scheme, steps=steps, substep="exact").xs[-1]

    functions: dict[str, Callable[[], Tensor]] = {}
    for scheme, counts in {
        "strang": (1, 2, 4, 8, 16, 32, 64, 128, 256),
        "extrapolated-strang4": (1, 2, 3, 4, 6, 8, 12, 16, 24, 32),
        "extrapolated-strang6": (1, 2, 3, 4, 6, 8, 12),
        "extrapolated-strang8": (1, 2, 3, 4, 6),
    }.items():
        for count in counts:
            functions[f"odeadv {scheme}, {count} steps"] = lambda s=scheme, n=count: split(s, n)
    functions |= torchdiffeq_solvers(whole, u0, END)
    functions |= torchode_solvers(whole, u0, END)
    functions |= diffrax_solvers(SYMBOL, u0, END)
    errors, failed = {}, {}
    for name, function in list(functions.items()):
        try:
            errors[name] = float((function() - reference).abs().max())
        except Exception as error:  # each peer has its own way to give up
            failed[name] = str(error).splitlines()[0]
            del functions[name]
    seconds = interleaved(functions, rounds=7)
    points = {name: {"error": errors[name], "seconds": statistics.median(values)} for name, values in seconds.items()}
    fastest = {}
    for accuracy in ACCURACIES:
        row = {}
        for solver in SOLVERS:
            good = {n: p["seconds"] for n, p in points.items() if n.startswith(solver) and p["error"] <= accuracy}
            if good:
                best = min(good, key=good.__getitem__)
                row[solver] = {"method": best, "seconds": good[best]}
        fastest[f"{accuracy:.0e}"] = row
    return {"machine": machine(), "points": points, "fastest": fastest, "failed": failed}


def table(data: dict) -> str:
    solvers = [solver for solver in SOLVERS if any(solver in row for row in data["fastest"].values())]
    cells = [cell for solver in solvers for cell in (solver, "ms")]
    lines = [f"| error at most | {' | '.join(cells)} |", f"|{' --- |' * (1 + len(cells))}"]
    for accuracy, row in data["fastest"].items():
        line = [accuracy]
        for solver in solvers:
            best = row.get(solver)
            line += [best["method"].removeprefix(f"{solver} "), f"{1e3 * best['seconds']:.2f}"] if best else ["", ""]
        lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines)
