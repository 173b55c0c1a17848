"""A compiled step compared with an eager one: a field of twenty pointwise operations on 10,000 elements, midpoint rule.

The floor is a bare loop that calls the compiled arithmetic of one step.
"""

import time

import torch
from torch import Tensor

import odeadv

from ._timing import interleaved, machine, ratio, shown, spread
from .limits import Limit

BARE = "bare loop of a compiled step"


def field(t: Tensor, x: Tensor) -> Tensor:
    for _ in range(10):
        x = 0.9 * torch.sin(x)
    return x


def run(quick: bool = False) -> dict[str, object]:
    steps = 5 if quick else 100
    torch.compiler.reset()
    x0 = torch.randn(100 if quick else 10_000, generator=torch.Generator().manual_seed(0))
    solver = odeadv.compile_solver(field, dt=0.01, substep="midpoint")
    first: dict[str, float] = {}
    for count in (steps // 5, steps, 10 * steps):
        began = time.perf_counter()
        solver(x0, (0.0, 0.01 * count))
        first[str(count)] = time.perf_counter() - began

    @torch.compile
    def step(x: Tensor, h: Tensor) -> Tensor:
        return x + h * field(h, x + 0.5 * h * field(h, x))

    h = torch.tensor(0.01)

    def bare_loop() -> None:
        x = x0
        for _ in range(steps):
            x = step(x, h)

    functions = {
        "eager": lambda: odeadv.solve(field, x0, (0.0, 0.01 * steps), dt=0.01, substep="midpoint"),
        "compiled": lambda: solver(x0, (0.0, 0.01 * steps)),
        BARE: bare_loop,
    }
    seconds = interleaved(functions, rounds=2 if quick else 15)
    return {
        "machine": machine(),
        "seconds of the first call, in this order, by steps": first,
        "microseconds a step": {
            name: spread(1e6 * value / steps for value in values) for name, values in seconds.items()
        },
        "eager to compiled": ratio(seconds, "eager", "compiled"),
        "eager to the bare loop": ratio(seconds, "eager", BARE),
    }


def render(data: dict) -> str:
    r = data["eager to compiled"]
    first = data["seconds of the first call, in this order, by steps"]
    lines = ["| | microseconds a step (quartiles) |", "| --- | --- |"]
    lines += [f"| {name} | {shown(value, '.0f')} |" for name, value in data["microseconds a step"].items()]
    calls = ", ".join(f"{steps} steps {seconds:.2f} s" for steps, seconds in first.items())
    lines += [
        "",
        f"Eager takes {r['median']:.2f} times as long ({r['low']:.2f} to {r['high']:.2f}). First calls: {calls}.",
    ]
    return "\n".join(lines)


def limits(data: dict) -> list[Limit]:
    ceiling = data["eager to the bare loop"]
    return [Limit("eager to compiled, time of a step", data["eager to compiled"], ceiling, least=2)]
