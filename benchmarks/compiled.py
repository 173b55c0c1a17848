"""Compiled solves compared with eager ones, and with a compiled solve of diffrax by the same method and steps.

`oscillator` is a driven Duffing oscillator (2 elements), `linear` is x' = A x (3 elements), and `pointwise` has 100
elements, all by the midpoint rule. `gradient` adds the gradient of the initial state of the oscillator.
`adversarial` is the oscillator under LAD-SM. `Fisher-KPP` is Strang splitting with exact flows (FFT) on 256 points.
`static` is a solver made with `static=True`: like `jax.jit`, and so like diffrax, it does not look for changes of the
field. Before the timing, the values are compared with the values of eager solves. All states are float64, on one
thread. The first call of a solver compiles. The second one has ten times as many steps.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import odeadv

from . import fisher_kpp, orders
from ._peers import float64, has_diffrax
from ._precision import SETTLE
from ._timing import interleaved, machine, ratio, shown, spread
from .limits import Limit
from .work_precision import DAMPING, ETA, FORCE, RATE, START, duffing

EAGER, COMPILED, STATIC, DIFFRAX = "eager", "compiled", "static", "diffrax"
SPAN = (0.0, 2.0)


class Case(NamedTuple):
    """A problem: field, initial state, options, the right-hand side for diffrax, and True to differentiate."""

    field: Any
    x0: Tensor
    choices: dict[str, Any]
    peer: Callable[[Any, Any, Any], Any] | None = None
    gradient: bool = False
    least: float = 8.0


def linear(t: Tensor, x: Tensor) -> Tensor:
    return orders.A @ x


def pointwise(t: Tensor, x: Tensor) -> Tensor:
    return torch.sin(t) - torch.tanh(x)


def cases() -> dict[str, Case]:
    midpoint = {"substep": "midpoint"}
    peers: dict[str, Any] = {}
    if has_diffrax():
        import jax.numpy as jnp

        a = orders.A.numpy()
        peers["linear"] = lambda t, x, args: jnp.asarray(a) @ x
        peers["pointwise"] = lambda t, x, args: jnp.sin(t) - jnp.tanh(x)
        peers["oscillator"] = lambda t, x, args: jnp.stack(
            [x[1], x[0] - x[0] ** 3 - DAMPING * x[1] + FORCE * jnp.cos(RATE * t)]
        )
    adversarial = odeadv.AdversarialField(duffing, lambda x: 0.5 * (x * x).sum(), ETA)
    exact = {"scheme": "strang", "substep": "exact"}
    return {
        "oscillator": Case(duffing, START, midpoint, peers.get("oscillator")),
        "linear": Case(linear, orders.X0, midpoint, peers.get("linear")),
        "pointwise": Case(pointwise, torch.linspace(-1, 1, 100, dtype=torch.float64), midpoint, peers.get("pointwise")),
        "gradient": Case(duffing, START, midpoint, gradient=True),
        "adversarial": Case(adversarial, START, {"scheme": "strang"}),
        "Fisher-KPP": Case(fisher_kpp.split_field(), fisher_kpp.start(), exact, least=1.0),
    }


def answer(case: Case, solve: Callable[[Tensor], odeadv.Solution]) -> Tensor:
    """Return the final state of a solve, or the gradient of its sum with respect to the initial state."""
    x0 = case.x0.clone().requires_grad_(case.gradient)
    end = solve(x0).xs[-1]
    return torch.autograd.grad(end.sum(), x0)[0] if case.gradient else end


def diffrax_solve(case: Case, steps: int) -> Callable[[], Any]:
    """Return diffrax's solve of the case, compiled by jax.jit."""
    import diffrax
    import jax

    term, x0 = diffrax.ODETerm(case.peer), float64(case.x0)

    @jax.jit
    def solve(x: Any) -> Any:
        found = diffrax.diffeqsolve(
            term, diffrax.Midpoint(), *SPAN, (SPAN[1] - SPAN[0]) / steps, x,
            stepsize_controller=diffrax.ConstantStepSize(), max_steps=2 * steps,
        )  # fmt: skip
        assert found.ys is not None
        return found.ys[-1]

    def run() -> Any:
        with jax.enable_x64(True):
            return solve(x0).block_until_ready()

    return run


def measure(case: Case, steps: int, rounds: int) -> dict[str, Any]:
    """Compare values, then time the solvers of a case in turn."""
    solver = odeadv.compile_solver(case.field, **case.choices)
    first = []
    for count in (steps, 10 * steps):
        began = time.perf_counter()
        answer(case, lambda x, n=count: solver(x, SPAN, steps=n))  # type: ignore[misc]
        first.append(time.perf_counter() - began)

    def eager() -> Tensor:
        return answer(case, lambda x: odeadv.solve(case.field, x, SPAN, steps=steps, **case.choices))

    def compiled() -> Tensor:
        return answer(case, lambda x: solver(x, SPAN, steps=steps))

    functions: dict[str, Callable[[], Any]] = {EAGER: eager, COMPILED: compiled}
    expected = eager()
    found = {COMPILED: compiled()}
    if case.peer is not None:
        static = odeadv.compile_solver(case.field, static=True, **case.choices)
        functions[STATIC] = lambda: answer(case, lambda x: static(x, SPAN, steps=steps))
        found[STATIC] = functions[STATIC]()
        functions[DIFFRAX] = diffrax_solve(case, steps)
        began = time.perf_counter()
        found[DIFFRAX] = torch.tensor(functions[DIFFRAX]().tolist(), dtype=torch.float64)
        first.append(time.perf_counter() - began)
    differences = {name: float((value - expected).abs().max() / expected.abs().max()) for name, value in found.items()}
    if max(differences.values()) > 1e-10:
        raise AssertionError(f"compiled: the solvers differ by {differences}")
    seconds = interleaved(functions, rounds, settle=SETTLE)
    data: dict[str, Any] = {
        "steps": steps,
        "elements": case.x0.numel(),
        "least": case.least,
        "difference to eager": differences,
        "seconds of the first call": first[0],
        "seconds of a call with ten times the steps": first[1],
        "microseconds": {name: spread(1e6 * value for value in values) for name, values in seconds.items()},
        "eager to compiled": ratio(seconds, EAGER, COMPILED),
    }
    if DIFFRAX in seconds:
        data["seconds of the first call of diffrax"] = first[2]
        data["compiled to diffrax"] = ratio(seconds, COMPILED, DIFFRAX)
        data["static to diffrax"] = ratio(seconds, STATIC, DIFFRAX)
        data["eager to static"] = ratio(seconds, EAGER, STATIC)
    return data


def run(quick: bool = False) -> dict[str, object]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        chosen = {name: case for name, case in cases().items() if not quick or name == "linear"}
        found = {name: measure(case, 20 if quick else 200, 2 if quick else 25) for name, case in chosen.items()}
        about = machine()
    finally:
        torch.set_num_threads(threads)
    return {"machine": about, "cases": found}


def render(data: dict) -> str:
    lines = [
        "| problem | elements | eager µs | compiled µs | static µs | diffrax µs | eager / compiled | "
        "compiled / diffrax | static / diffrax |",
        f"|{' --- |' * 9}",
    ]
    for name, row in data["cases"].items():
        times = [
            shown(row["microseconds"][key], ".0f") if key in row["microseconds"] else ""
            for key in (EAGER, COMPILED, STATIC, DIFFRAX)
        ]
        to = [shown(row[key], ".2f") if key in row else "" for key in ("compiled to diffrax", "static to diffrax")]
        cells = [name, row["elements"], *times, shown(row["eager to compiled"], ".1f"), *to]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    steps = {row["steps"] for row in data["cases"].values()}
    lines += [
        "",
        f"{', '.join(map(str, steps))} steps per call; medians with quartiles.",
        "",
        "| problem | first call, which compiles, s | next call, ten times the steps, s | first call of diffrax, s |",
        "| --- | --- | --- | --- |",
    ]
    for name, row in data["cases"].items():
        peer = row.get("seconds of the first call of diffrax")
        cold = "" if peer is None else f"{peer:.2g}"
        ten = row["seconds of a call with ten times the steps"]
        lines.append(f"| {name} | {row['seconds of the first call']:.2g} | {ten:.2g} | {cold} |")
    return "\n".join(lines)


def limits(data: dict) -> list[Limit]:
    rows = []
    for name, row in data["cases"].items():
        for kind in (COMPILED, STATIC):
            if f"eager to {kind}" in row:
                ahead = row[f"eager to {kind}"]
                rows.append(Limit(f"{name}: time of eager / {kind}", ahead, least=row["least"], form=".1f"))
        for kind in (COMPILED, STATIC):
            if f"{kind} to diffrax" in row:
                rows.append(Limit(f"{name}: time of {kind} / diffrax", row[f"{kind} to diffrax"], most=3))
    return rows
