"""Fisher-KPP, u_t = u_xx / 2 + u (1 - u) on a periodic line of 256 points, to T = 1: time to reach an accuracy.

Splitting takes the exact flows of diffusion (FFT) and of the logistic equation; torchdiffeq solves the whole
right-hand side. Errors are maxima against a reference of torchdiffeq's dopri8 at tolerance 1e-13.
"""

import math
import statistics
from collections.abc import Callable

import torch
import torchdiffeq
from torch import Tensor

import odeadv

from ._timing import interleaved, machine

POINTS, LENGTH, DIFFUSION, END = 256, 40.0, 0.5, 1.0
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

    def peer(method: str, tolerance: float) -> Tensor:
        return torchdiffeq.odeint(whole, u0, ends, method=method, rtol=tolerance, atol=tolerance)[-1]

    reference = peer("dopri8", 1e-13)
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
    for method, most in (("dopri5", 10), ("dopri8", 11), ("bosh3", 8)):
        for k in range(2, most):
            functions[f"torchdiffeq {method}, tolerance 1e-{k}"] = lambda m=method, k=k: peer(m, 10.0**-k)
    errors, failed = {}, {}
    for name, function in list(functions.items()):
        try:
            errors[name] = float((function() - reference).abs().max())
        except AssertionError as error:  # torchdiffeq's way to give up
            failed[name] = str(error)
            del functions[name]
    seconds = interleaved(functions, rounds=9)
    points = {name: {"error": errors[name], "seconds": statistics.median(values)} for name, values in seconds.items()}
    fastest = {}
    for accuracy in ACCURACIES:
        row = {}
        for solver in ("odeadv", "torchdiffeq"):
            good = {n: p["seconds"] for n, p in points.items() if n.startswith(solver) and p["error"] <= accuracy}
            if good:
                best = min(good, key=good.__getitem__)
                row[solver] = {"method": best, "seconds": good[best]}
        fastest[f"{accuracy:.0e}"] = row
    return {"machine": machine(), "points": points, "fastest": fastest, "failed": failed}


def table(data: dict) -> str:
    lines = [
        "| error at most | odeadv | ms | torchdiffeq | ms | times faster |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for accuracy, row in data["fastest"].items():
        mine, other = row["odeadv"], row["torchdiffeq"]
        lines.append(
            f"| {accuracy} | {mine['method'].removeprefix('odeadv ')} | {1e3 * mine['seconds']:.2f} | "
            f"{other['method'].removeprefix('torchdiffeq ')} | {1e3 * other['seconds']:.2f} | "
            f"{other['seconds'] / mine['seconds']:.1f} |"
        )
    return "\n".join(lines)
