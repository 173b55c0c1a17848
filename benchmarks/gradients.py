"""Gradients against differences in float64: every sub-step, costate and scheme, on a field that depends on time.

The field is sin(5 t) cos(W x) + 0.3 tanh(x), adversarial with eta = 0.2, and two steps of different lengths are taken.
The derivative of the loss by x0 and W, in one direction of both, is compared with a central difference of fourth order.
The costate is a constant in one half of the cases, as it is by default, and is differentiated in the other half. For
the exact flow the field is (sin(5 t) W + 0.3) x. Newton's iteration goes to 1e-13, because a difference sees its error.

Adaptive methods of torchdiffeq choose their steps from the values of states, but gradients take the steps as constants.
So a difference of two solves is not the derivative that autograd returns, because the steps of the solves also differ.
Each such method is therefore tried twice. With equal steps, its gradient is compared with differences, like the other
methods. With a tolerance, its gradient is compared with the gradient of a solve with 20 small steps of `rk4` per
sub-step.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

import odeadv
from odeadv.costate import Costate
from odeadv.splitting import SubStep

from ._timing import machine

W = torch.tensor([[0.2, -0.7], [0.5, 0.1]], dtype=torch.float64)
X0 = torch.tensor([0.3, -0.4], dtype=torch.float64)
DX, DW = X0.flip(0), W.flip(0)  # the direction of the derivative
SPAN, GRID, ETA, EPS, RTOL = (0.0, 1.0), [0.6, 0.4], 0.2, 1e-3, 1e-4
KINDS = ("linear", "exact", "hermite")
ADAPTIVE = {"dopri5": 5, "dopri8": 8, "bosh3": 3, "fehlberg2": 2, "adaptive_heun": 2}
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4")
RALSTON = odeadv.RungeKutta("ralston", 2, (0.0, 2 / 3), ((), (2 / 3,)), (0.25, 0.75))

End = Callable[[Tensor, Tensor], Tensor]


def equal_steps(method: str) -> odeadv.TorchDiffEq:
    """Return an adaptive method that takes equal steps: its norm returns the error at which the step is kept."""
    kept = torch.tensor(0.9 ** ADAPTIVE[method], dtype=torch.float64)
    return odeadv.TorchDiffEq(method, options={"first_step": 0.6, "norm": lambda error: kept})


def substeps() -> dict[str, str | SubStep]:
    """Return all sub-steps with their names."""
    named: dict[str, str | SubStep] = {name: name for name in odeadv.substep_names()}
    named |= {"Nested('rk4', steps=2)": odeadv.Nested("rk4", steps=2), "RungeKutta (Ralston)": RALSTON}
    named |= {f"torchdiffeq:{name}": f"torchdiffeq:{name}" for name in FIXED}
    adams = {"explicit_adams": {}, "implicit_adams": {"max_iters": 50}}  # values also decide its number of iterations
    for name, more in adams.items():
        method = odeadv.TorchDiffEq(name, rtol=1e-13, atol=1e-13, options={"step_size": 0.2, **more})
        named[f"torchdiffeq:{name}"] = method
    return named | {f"torchdiffeq:{name}, equal steps": equal_steps(name) for name in ADAPTIVE}


def operator(w: Tensor, exact: bool) -> odeadv.Operator:
    """Return the field with the weights ``w``."""
    if not exact:
        newton = odeadv.Newton(rtol=1e-13)
        return odeadv.Operator(lambda t, x: torch.sin(5 * t) * torch.cos(w @ x) + 0.3 * torch.tanh(x), solve=newton)

    def flow(t: Tensor, dt: Tensor, x: Tensor) -> Tensor:
        swept = (torch.cos(5 * t) - torch.cos(5 * (t + dt))) / 5
        return torch.linalg.matrix_exp(swept * w + 0.3 * dt * torch.eye(2, dtype=w.dtype)) @ x

    return odeadv.Operator(lambda t, x: torch.sin(5 * t) * (w @ x) + 0.3 * x, flow=flow)


def loss(x: Tensor) -> Tensor:
    return (x**2).sum() + x[0] * x[1]


def adversarial(w: Tensor, exact: bool = False) -> odeadv.AdversarialField:
    return odeadv.AdversarialField(operator(w, exact), loss, ETA)


@cache
def recorded(kind: str, exact: bool) -> Costate:
    """Return a costate that does not depend on x0 and W."""
    return odeadv.solve(adversarial(W, exact), X0, SPAN, dt=GRID, substep="rk4", costate=kind).costate


def ends(substep: str | SubStep, scheme: str, kind: str) -> Iterator[End]:
    """Yield the loss at the end as a function of x0 and W: with a constant costate, then a costate in the graph."""
    exact = substep == "exact"
    how = {"scheme": scheme, "dt": GRID, "substep": {"f": substep, "costate": "rk4" if exact else substep}}

    def driven(x: Tensor, w: Tensor) -> Tensor:
        field = adversarial(w, exact).driven_by(recorded(kind, exact))
        return loss(odeadv.solve(field, x, SPAN, **how).xs[-1])

    def whole(x: Tensor, w: Tensor) -> Tensor:
        field = adversarial(w, exact)
        return odeadv.solve(field, x, SPAN, costate=kind, differentiate_costate=True, **how).loss

    yield driven
    yield whole


def derivative(end: End) -> float:
    """Return the derivative that autograd finds."""
    x, w = X0.clone().requires_grad_(), W.clone().requires_grad_()
    in_x, in_w = torch.autograd.grad(end(x, w), (x, w))
    return float((in_x * DX).sum() + (in_w * DW).sum())


def difference(end: End) -> float:
    """Return the derivative by central differences of fourth order."""
    with torch.no_grad():
        far, near = ([end(X0 + e * DX, W + e * DW) for e in (EPS * k, -EPS * k)] for k in (2, 1))
    return float((8 * (near[0] - near[1]) - (far[0] - far[1])) / (12 * EPS))


def relative(found: float, expected: float) -> float:
    return abs(found - expected) / (1 + abs(expected))


def largest(errors: dict[str, float]) -> dict[str, object]:
    """Return the number of cases, the largest error and its scheme."""
    worst = max(errors, key=errors.__getitem__)
    return {"cases": len(errors), "error": errors[worst], "scheme": worst}


def case(substep: str | SubStep, kind: str, schemes: Sequence[str]) -> dict[str, object]:
    """Return the largest errors of a sub-step and a costate over all schemes."""
    errors: tuple[dict[str, float], ...] = ({}, {})
    for scheme in schemes:
        for found, end in zip(errors, ends(substep, scheme, kind), strict=True):
            found[scheme] = relative(derivative(end), difference(end))
    constant, differentiated = map(largest, errors)
    return {"constant": constant, "differentiated": differentiated}


def tolerant(methods: Sequence[str], schemes: Sequence[str]) -> dict[str, dict[str, object]]:
    """Return the largest errors of the gradient and of the loss of methods that choose their steps."""
    errors: dict[str, tuple[dict[str, float], dict[str, float]]] = {name: ({}, {}) for name in methods}
    for scheme in schemes:
        fine = next(ends(odeadv.Nested("rk4", steps=20), scheme, "hermite"))
        truth, value = difference(fine), float(fine(X0, W))
        for name, (slopes, values) in errors.items():
            end = next(ends(odeadv.TorchDiffEq(name, rtol=RTOL, atol=1e-2 * RTOL), scheme, "hermite"))
            slopes[scheme] = relative(derivative(end), truth)
            values[scheme] = relative(float(end(X0, W)), value)
    return {name: {"gradient": largest(slopes), "loss": largest(values)} for name, (slopes, values) in errors.items()}


def run(quick: bool = False) -> dict[str, object]:
    schemes = odeadv.schemes.names(2)[: 2 if quick else None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", odeadv.AccuracyWarning)
        table = [
            {"substep": name, "costate": kind, **case(substep, kind, schemes)}
            for name, substep in list(substeps().items())[: 1 if quick else None]
            for kind in KINDS
        ]
        adaptive = tolerant(list(ADAPTIVE)[: 1 if quick else None], schemes)
    return {"machine": machine(), "table": table, "rtol": RTOL, "adaptive": adaptive}


def render(data: dict) -> str:
    rows: dict[str, list[dict]] = {}
    for row in data["table"]:
        rows.setdefault(row["substep"], []).append(row)
    modes = ("constant", "differentiated")
    cases = sum(row[mode]["cases"] for row in data["table"] for mode in modes)
    worst = max(row[mode]["error"] for row in data["table"] for mode in modes)
    lines = [
        f"{cases:,} cases. The largest error, relative to 1 + |derivative|, is {worst:.0e}. The largest error of every "
        "sub-step over all schemes:",
        "",
        f"| sub-step | {' | '.join(f'{kind}, {mode}' for mode in modes for kind in KINDS)} |",
        f"|{' --- |' * 7}",
    ]
    for name, found in rows.items():
        by_kind = {row["costate"]: row for row in found}
        cells = [f"{by_kind[kind][mode]['error']:.0e}" for mode in modes for kind in KINDS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Methods that choose their steps, rtol {data['rtol']:.0e}, a constant Hermite costate. The errors of the loss "
        "are those of the method:",
        "",
        "| method | largest error of the gradient | scheme | largest error of the loss | scheme |",
        f"|{' --- |' * 5}",
    ]
    for name, row in data["adaptive"].items():
        cells = [f"{row[what]['error']:.0e} | {row[what]['scheme']}" for what in ("gradient", "loss")]
        lines.append(f"| torchdiffeq:{name} | {' | '.join(cells)} |")
    return "\n".join(lines)
