"""The cost of a step above the cost of the field, in eager mode."""

from collections.abc import Callable

import torch
import torchdiffeq
from torch import Tensor

import odeadv

from ._timing import interleaved, machine, shown, spread
from .limits import Limit

STRANG = "odeadv, Strang with Euler, two operators"
ONE, TWO, THREE = (
    f"{count} to the state, nothing else" for count in ("one addition", "two additions", "three additions")
)


def field(t: Tensor, x: Tensor) -> Tensor:
    return -x


def additions(x0: Tensor, t: Tensor, steps: int, *weights: float) -> Callable[[], None]:
    """Return a loop that only adds the field to the state, once per weight: the floor of methods with such steps."""

    def function() -> None:
        x = x0
        for _ in range(steps):
            for weight in weights:
                x = x.add(field(t, x), alpha=weight)

    return function


def run(quick: bool = False) -> dict[str, object]:
    steps, rounds = (20, 2) if quick else (1000, 31)
    x0, t = torch.ones(4), torch.tensor(0.0)
    split = odeadv.SplitField(a=field, b=field)
    ends = torch.tensor([0.0, 1.0])

    def alone() -> None:
        for _ in range(steps):
            field(t, x0)

    def bare_loop() -> None:
        x = x0
        for _ in range(steps):
            x = x + 1e-3 * field(t, x)

    def bare_strang() -> None:
        x = x0
        for _ in range(steps):
            x = x + 0.5e-3 * field(t, x)
            x = x + 1e-3 * field(t, x)
            x = x + 0.5e-3 * field(t, x)

    def fixed(method: str) -> object:
        options = {"step_size": 1.0 / steps}
        return torchdiffeq.odeint(field, x0, ends, method=method, options=options)

    evaluations = {
        "bare Python loop, Euler": 1,
        "odeadv, Euler": 1,
        "torchdiffeq, Euler": 1,
        "odeadv, midpoint": 2,
        "torchdiffeq, midpoint": 2,
        "bare Python loop, Strang with Euler": 3,
        ONE: 1,
        TWO: 2,
        THREE: 3,
        STRANG: 3,
    }
    functions = {
        "field": alone,
        "bare Python loop, Euler": bare_loop,
        "odeadv, Euler": lambda: odeadv.solve(field, x0, (0.0, 1.0), scheme="euler", steps=steps),
        "torchdiffeq, Euler": lambda: fixed("euler"),
        "odeadv, midpoint": lambda: odeadv.solve(field, x0, (0.0, 1.0), scheme="midpoint", steps=steps),
        "torchdiffeq, midpoint": lambda: fixed("midpoint"),
        "bare Python loop, Strang with Euler": bare_strang,
        ONE: additions(x0, t, steps, 1e-3),
        TWO: additions(x0, t, steps, 0.5e-3, 1e-3),
        THREE: additions(x0, t, steps, 0.5e-3, 1e-3, 0.5e-3),
        STRANG: lambda: odeadv.solve(split, x0, (0.0, 1.0), steps=steps, substep="euler"),
    }
    seconds = interleaved(functions, rounds=rounds)
    rows = {
        name: spread(
            1e6 * (whole - count * own) / steps for whole, own in zip(seconds[name], seconds["field"], strict=True)
        )
        for name, count in evaluations.items()
    }
    return {"machine": machine(), "steps": steps, "microseconds a step above the field": rows}


def render(data: dict) -> str:
    rows = data["microseconds a step above the field"]
    lines = ["| solver | microseconds per step above the field (quartiles) |", "| --- | --- |"]
    return "\n".join(lines + [f"| {name} | {shown(value, '.1f')} |" for name, value in rows.items()])


def limits(data: dict) -> list[Limit]:
    rows = data["microseconds a step above the field"]
    return [
        Limit("Euler, microseconds per step above the field", rows["odeadv, Euler"], rows[ONE], most=10, form=".1f"),
        Limit(
            "midpoint, microseconds per step above the field", rows["odeadv, midpoint"], rows[TWO], most=10, form=".1f"
        ),
        Limit(
            "Strang of two operators, three evaluations, microseconds per step above the field",
            rows[STRANG],
            rows[THREE],
            most=10,
            form=".1f",
        ),
        Limit("the same as a bare Python loop", rows["bare Python loop, Strang with Euler"], rows[THREE], form=".1f"),
        Limit("Euler of torchdiffeq, for comparison", rows["torchdiffeq, Euler"], rows[ONE], form=".1f"),
        Limit("midpoint of torchdiffeq, for comparison", rows["torchdiffeq, midpoint"], rows[TWO], form=".1f"),
    ]
