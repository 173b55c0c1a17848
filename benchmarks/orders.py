"""Orders of convergence, measured in float64 on linear problems with closed forms (matrix exponentials).

The first problem is dx/dt = A x + eta a(t), L = x(T).Qx(T)/2. The costate a(t) of one recording is either known exactly
or recorded by the solve itself. Strang-Marchuk with the paper's Euler sub-steps has only first order. The value of the
costate in the middle does not matter, because both half steps of the costate use the value at their beginning. The
second problem
applies every scheme, with exact flows, to two matrices that do not commute.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import odeadv

from ._expm import matrix_exp
from ._plots import panels, save
from ._timing import machine

END, ETA = 1.0, 0.5
A = torch.tensor([[-0.6, 1.3, 0.0], [-0.9, 0.2, 0.7], [0.4, -0.5, -0.3]], dtype=torch.float64)
Q = torch.tensor([[1.5, 0.2, 0.0], [0.2, 0.8, -0.3], [0.0, -0.3, 1.1]], dtype=torch.float64)
B = torch.tensor([[0.1, -0.8, 0.5], [0.3, 0.4, -1.1], [0.9, 0.2, -0.5]], dtype=torch.float64)
X0 = torch.tensor([1.0, -0.4, 0.7], dtype=torch.float64)
STEPS = (8, 16, 32, 64, 128)


class Row(NamedTuple):
    """One line of the table: a method, and the values of a(t) that it uses within a step."""

    scheme: str
    f: str
    costate: str
    values: str
    claimed: int


ROWS = (
    Row("lie", "euler", "euler", "a(n+1)", 1),
    Row("lie", "midpoint", "euler", "a(n+1)", 1),
    Row("lie", "exact", "euler", "a(n+1)", 1),
    Row("strang", "euler", "euler", "a(n), then a(n+1/2)", 1),
    Row("strang", "midpoint", "euler", "a(n), then a(n+1/2)", 1),
    Row("strang", "exact", "euler", "a(n), then a(n+1/2)", 1),
    Row("strang-midpoint", "euler", "euler", "a(n), then a(n+1/2), by Eq. 9", 1),
    Row("strang-midpoint", "midpoint", "euler", "a(n), then a(n+1/2), by Eq. 9", 1),
    Row("strang-midpoint", "exact", "euler", "a(n), then a(n+1/2), by Eq. 9", 1),
    Row("strang-symmetric", "euler", "euler", "a(n), then a(n+1)", 1),
    Row("strang-symmetric", "midpoint", "euler", "a(n), then a(n+1)", 2),
    Row("strang-symmetric", "exact", "euler", "a(n), then a(n+1)", 2),
    Row("strang", "midpoint", "midpoint", "a(n+1/4), then a(n+3/4)", 2),
    Row("strang", "exact", "midpoint", "a(n+1/4), then a(n+3/4)", 2),
    Row("strang-midpoint", "midpoint", "midpoint", "a(n+1/4), then a(n+3/4), by Eq. 9", 2),
    Row("strang-midpoint", "exact", "midpoint", "a(n+1/4), then a(n+3/4), by Eq. 9", 2),
)
SHOWN = (
    ("lie", "euler", "euler"),
    ("strang", "euler", "euler"),
    ("strang", "exact", "euler"),
    ("strang-symmetric", "midpoint", "euler"),
    ("strang", "midpoint", "midpoint"),
    ("strang", "exact", "midpoint"),
)


def slope(steps: Sequence[int], errors: Sequence[float]) -> float:
    """Return the order: the slope of log(error) against log(1 / steps), by least squares."""
    logs = [(math.log(1.0 / n), math.log(error)) for n, error in zip(steps, errors, strict=True)]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def closed_form() -> tuple[Tensor, Callable[[float], Tensor]]:
    """Return x(T) driven by the costate of the unperturbed trajectory, and the costate."""
    end = matrix_exp(END * A) @ X0
    grad = Q @ end

    def a(t: float) -> Tensor:
        return matrix_exp((END - t) * A.T) @ grad

    # [y; a]' = [[A, eta], [0, -A^T]] [y; a] from a(0) of the unperturbed trajectory
    block = torch.cat([torch.cat([A, ETA * torch.eye(3, dtype=A.dtype)], 1), torch.cat([0 * A, -A.T], 1)])
    return (matrix_exp(END * block) @ torch.cat([X0, a(0.0)]))[:3], a


def _flow(matrix: Tensor) -> odeadv.Operator:
    return odeadv.Operator(lambda t, x: matrix @ x, flow=lambda t, dt, x: matrix_exp(float(dt) * matrix) @ x)


def _errors(solve: Callable[[int], Tensor], exact: Tensor, steps: Sequence[int]) -> list[float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", odeadv.AccuracyWarning)  # sub-steps of lower order are part of the table
        return [float((solve(n) - exact).norm()) for n in steps]


def run(quick: bool = False) -> dict[str, object]:
    exact, a = closed_form()
    field = odeadv.AdversarialField(_flow(A), lambda x: 0.5 * x @ (Q @ x), ETA)
    known = field.driven_by(a)
    steps = STEPS[:2] if quick else STEPS
    table = []
    for row in ROWS:
        substep = {"f": row.f, "costate": row.costate}
        errors = {
            name: _errors(
                lambda n, p=problem, r=row, s=substep: odeadv.solve(
                    p, X0, (0.0, END), scheme=r.scheme, steps=n, substep=s
                ).xs[-1],
                exact,
                steps,
            )
            for name, problem in (("known", known), ("recorded", field))
        }
        orders = {name: slope(steps, values) for name, values in errors.items()}
        table.append({**row._asdict(), "errors": errors, "orders": orders})

    both = odeadv.SplitField(a=_flow(A), b=_flow(B))
    end = matrix_exp(END * (A + B)) @ X0
    schemes = {}
    for name in odeadv.schemes.names()[: 4 if quick else None]:
        scheme = odeadv.schemes.get(name)
        # These errors are far enough above rounding to measure an order.
        counts = {6: (4, 6, 8), 8: (2, 3, 4)}.get(scheme.order, (8, 16, 32) if scheme.order > 3 else (8, 16, 32, 64))
        errors = _errors(
            lambda n, s=name: odeadv.solve(both, X0, (0.0, END), scheme=s, steps=n, substep="exact").xs[-1], end, counts
        )
        schemes[name] = {"order": scheme.order, "steps": counts, "errors": errors, "measured": slope(counts, errors)}
    return {"machine": machine(), "steps": list(steps), "table": table, "schemes": schemes}


def render(data: dict) -> str:
    last = data["steps"][-1]
    lines = [
        "With a known, every value is exact; recorded, `strang` takes the mean of a(n) and a(n+1) for a(n+1/2).",
        "",
        "| composition | sub-step of f | of the costate | values of a within a step | order, a known | "
        f"order, a recorded | error at {last} steps, a known |",
        f"|{' --- |' * 7}",
    ]
    for row in data["table"]:
        orders = " | ".join(f"{row['orders'][name]:.2f}" for name in ("known", "recorded"))
        lines.append(
            f"| {row['scheme']} | {row['f']} | {row['costate']} | {row['values']} | {orders} | "
            f"{row['errors']['known'][-1]:.1e} |"
        )
    lines += [
        "",
        "Every scheme, exact flows of two matrices that do not commute:",
        "",
        "| scheme | order | measured | error | steps |",
        f"|{' --- |' * 5}",
    ]
    for name, row in data["schemes"].items():
        lines.append(
            f"| {name} | {row['order']} | {row['measured']:.2f} | {row['errors'][-1]:.1e} | {row['steps'][-1]} |"
        )
    return "\n".join(lines)


def plot(data: dict, path: Path) -> None:
    figure, axes = panels(1, 2, width=4.4, height=4.2)
    dts = [END / n for n in data["steps"]]
    rows = {(row["scheme"], row["f"], row["costate"]): row for row in data["table"]}
    drawn = [error for key in SHOWN for errors in rows[key]["errors"].values() for error in errors]
    limits = (0.3 * min(drawn), 3 * max(drawn))
    for axis, a in zip(axes[0], ("known", "recorded"), strict=True):
        for marker, key in zip("osv^Dx", SHOWN, strict=True):
            label = f"{key[0]}; f {key[1]}, a {key[2]}"
            axis.loglog(dts, rows[key]["errors"][a], marker=marker, markersize=4, linewidth=1.2, label=label)
        for order, key in ((1, SHOWN[0]), (2, SHOWN[-1])):
            first = rows[key]["errors"]["known"][0] * (0.5 if order == 2 else 1.6)
            line = [first * (dt / dts[0]) ** order for dt in dts]
            axis.loglog(dts, line, color="0.6", linewidth=0.8, linestyle="--")
            axis.annotate(
                f"order {order}", (dts[-1], line[-1]), (0, 6), textcoords="offset points", fontsize=8, color="0.4"
            )
        axis.set_xlabel("dt")
        axis.set_title(f"a(t) {a}", fontsize=10)
        axis.set_ylim(*limits)
    axes[0, 0].set_ylabel("error of x(T)")
    figure.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    save(figure, path)
