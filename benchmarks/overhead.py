"""Cost of a step above the field's own, in eager mode."""

import statistics

import torch
import torchdiffeq
from torch import Tensor

import odeadv

from ._timing import interleaved, machine

STEPS = 1000


def field(t: Tensor, x: Tensor) -> Tensor:
    return -x


def run() -> dict[str, object]:
    x0, t = torch.ones(4), torch.tensor(0.0)
    split = odeadv.SplitField(a=field, b=field)
    ends = torch.tensor([0.0, 1.0])

    def alone() -> None:
        for _ in range(STEPS):
            field(t, x0)

    def bare_loop() -> None:
        x = x0
        for _ in range(STEPS):
            x = x + 1e-3 * field(t, x)

    def fixed(method: str) -> object:
        options = {"step_size": 1.0 / STEPS}
        return torchdiffeq.odeint(field, x0, ends, method=method, options=options)

    evaluations = {
        "bare Python loop, Euler": 1,
        "odeadv, Euler": 1,
        "torchdiffeq, Euler": 1,
        "odeadv, midpoint": 2,
        "torchdiffeq, midpoint": 2,
        "odeadv, Strang with Euler, two operators": 3,
    }
    functions = {
        "field": alone,
        "bare Python loop, Euler": bare_loop,
        "odeadv, Euler": lambda: odeadv.solve(field, x0, (0.0, 1.0), scheme="euler", steps=STEPS),
        "torchdiffeq, Euler": lambda: fixed("euler"),
        "odeadv, midpoint": lambda: odeadv.solve(field, x0, (0.0, 1.0), scheme="midpoint", steps=STEPS),
        "torchdiffeq, midpoint": lambda: fixed("midpoint"),
        "odeadv, Strang with Euler, two operators": lambda: odeadv.solve(split, x0, (0.0, 1.0), steps=STEPS),
    }
    seconds = interleaved(functions, rounds=15)
    own = statistics.median(seconds["field"]) / STEPS
    rows = {name: 1e6 * (statistics.median(seconds[name]) / STEPS - count * own) for name, count in evaluations.items()}
    return {"machine": machine(), "steps": STEPS, "microseconds a step above the field": rows}


def table(data: dict) -> str:
    rows = data["microseconds a step above the field"]
    lines = ["| solver | microseconds a step above the field |", "| --- | --- |"]
    return "\n".join(lines + [f"| {name} | {value:.1f} |" for name, value in rows.items()])
