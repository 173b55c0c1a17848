"""A compiled step against an eager one: a field of twenty pointwise operations on 10,000 elements, midpoint rule."""

import statistics
import time

import torch
from torch import Tensor

import odeadv

from ._timing import interleaved, machine, ratio


def field(t: Tensor, x: Tensor) -> Tensor:
    for _ in range(10):
        x = 0.9 * torch.sin(x)
    return x


def run() -> dict[str, object]:
    x0 = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    solver = odeadv.compile_solver(field, dt=0.01, substep="midpoint")
    first: dict[str, float] = {}
    for steps in (10, 100, 1000):
        began = time.perf_counter()
        solver(x0, (0.0, 0.01 * steps))
        first[str(steps)] = time.perf_counter() - began
    functions = {
        "eager": lambda: odeadv.solve(field, x0, (0.0, 1.0), dt=0.01, substep="midpoint"),
        "compiled": lambda: solver(x0, (0.0, 1.0)),
    }
    seconds = interleaved(functions, rounds=15)
    return {
        "machine": machine(),
        "seconds of the first call, in this order, by steps": first,
        "microseconds a step": {name: 1e4 * statistics.median(values) for name, values in seconds.items()},
        "eager to compiled": ratio(seconds, "eager", "compiled"),
    }


def table(data: dict) -> str:
    r = data["eager to compiled"]
    first = data["seconds of the first call, in this order, by steps"]
    lines = ["| | microseconds a step |", "| --- | --- |"]
    lines += [f"| {name} | {value:.0f} |" for name, value in data["microseconds a step"].items()]
    calls = ", ".join(f"{steps} steps {seconds:.2f} s" for steps, seconds in first.items())
    lines += [
        "",
        f"Eager takes {r['median']:.2f} times as long ({r['low']:.2f} to {r['high']:.2f}). First calls: {calls}.",
    ]
    return "\n".join(lines)
