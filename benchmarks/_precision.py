"""Work-precision diagrams: candidates that solve the same problem, their errors, work and times."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

import odeadv

from ._timing import interleaved, middle, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = Mapping[str, Mapping[str, Any]]
Answer = tuple[Tensor, int | None]  # a final state and its number of evaluations; None if it cannot be counted
FLOOR = 1e-13  # smaller errors are rounding
LEAST = 1e-11  # a method with a smaller error is not refined further
SETTLE = 0.005  # seconds; a faster function runs once before it is timed, to fill the caches
PATIENCE = 2.0  # seconds per solve; a slower method is not refined further
NEAR = 2.0  # candidates slower than this multiple of the fastest at their accuracy are not timed again


@dataclass(frozen=True)
class Candidate:
    """A method at one setting.

    Attributes:
        solver: "odeadv", "torchdiffeq", ...
        method: a method of the solver; its settings make one curve.
        setting: steps or tolerance, for the table.
        solve: the function that is timed.
        cold: True if the first call compiles and is timed separately.
    """

    solver: str
    method: str
    setting: str
    solve: Callable[[], Answer]
    cold: bool = False


def adaptive(
    solver: str, method: str, solve: Callable[[float], Answer], exponents: Iterable[int], cold: bool = False
) -> list[Candidate]:
    """Return a method at tolerances 1e-k; with ``cold``, the first candidate compiles."""
    return [
        Candidate(solver, method, f"tolerance 1e-{k}", lambda k=k: solve(10.0**-k), cold=cold and not i)
        for i, k in enumerate(exponents)
    ]


def stepped(method: str, solve: Callable[[int], odeadv.Solution], counts: Iterable[int]) -> list[Candidate]:
    """Return a method of odeadv at several numbers of steps; see `worked` for its work."""
    return [Candidate("odeadv", method, f"{n} steps", lambda n=n: worked(solve(n))) for n in counts]


def worked(solution: odeadv.Solution) -> Answer:
    """Return the final state and the work: evaluations of operators, implicit equations, and products.

    Evaluations of a costate are not counted, because they only read stored values.
    """
    stats = solution.stats
    evaluations = sum(count for name, count in stats.evaluations.items() if name != "costate")
    return solution.xs[-1], evaluations + stats.solves + stats.vjps + stats.jvps


def compiled(
    field: Any, x0: Tensor, span: tuple[float, float], method: str, counts: Iterable[int], **choices: Any
) -> list[Candidate]:
    """Return the solves of `odeadv.compile_solver` at several numbers of steps; the first candidate compiles."""
    solver = odeadv.compile_solver(field, **choices)
    return [
        Candidate(
            "odeadv compiled", method, f"{n} steps", lambda n=n: (solver(x0, span, steps=n).xs[-1], None), cold=not i
        )
        for i, n in enumerate(counts)
    ]


def measure(
    candidates: Iterable[Candidate],
    reference: Tensor,
    rounds: int,
    *,
    longest: float,
    always: Iterable[str] = (),
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Measure errors (maximum norm, relative), work and times of the candidates; record failures with their reasons.

    Every candidate is solved once (twice if the first call compiles) and timed. Candidates near the fastest at their
    accuracy, and the methods in ``always``, are then timed again in interleaved rounds. The settings of a method go
    from coarse to fine, and stop when a solve has taken ``longest`` seconds (`PATIENCE` for the others). The seconds
    of every round are returned too, for ratios.
    """
    points: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    solves: dict[str, Callable[[], object]] = {}
    done: set[tuple[str, str]] = set()
    for candidate in candidates:
        curve = (candidate.solver, candidate.method)
        name = f"{candidate.solver} {candidate.method}, {candidate.setting}"
        if curve in done:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # sub-steps of low order are compared too
                began = time.perf_counter()
                state, work = candidate.solve()
                first = time.perf_counter() - began
                if candidate.cold:
                    began = time.perf_counter()
                    candidate.solve()
                seconds = time.perf_counter() - began
        except Exception as error:  # every solver raises its own exceptions
            failed[name] = (str(error).splitlines() or [type(error).__name__])[0][:120]
            continue
        error = float((state - reference).abs().max() / reference.abs().max())
        if not error < 1e3:
            failed[name] = "diverged"
            continue
        point = {"solver": candidate.solver, "method": candidate.method, "setting": candidate.setting}
        point |= {"error": float(f"{max(error, FLOOR):.6g}"), "work": work, "once": seconds}
        if candidate.cold:
            point["cold"] = first
        points[name], solves[name] = point, candidate.solve
        if error < LEAST or seconds > (longest if candidate.solver == "odeadv" else PATIENCE):
            done.add(curve)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        near = _near(points) | {n for n, point in points.items() if point["method"] in always or "cold" in point}
        again = interleaved(
            {name: solve for name, solve in solves.items() if name in near}, rounds, warmup=0, settle=SETTLE
        )
    for name, seconds in again.items():
        points[name]["seconds"] = spread(seconds)
    for point in points.values():
        point.pop("once")
    return {"points": points, "failed": failed}, again


def _near(points: Points) -> set[str]:
    """Return candidates with the least work, and those near the fastest of their solver without a larger error."""
    near = set()
    for name, point in points.items():
        rivals = [p for p in points.values() if p["solver"] == point["solver"] and p["error"] <= point["error"]]
        fast = point["once"] <= NEAR * min(rival["once"] for rival in rivals)
        works = [rival["work"] for rival in rivals]
        lean = None not in works and point["work"] == min(works)
        if fast or lean:
            near.add(name)
    return near


def front(points: Points, solver: str, cost: Callable[[Mapping[str, Any]], float | None]) -> Any:
    """Return the names of the points of ``solver`` on its Pareto front, from large errors to small."""
    own = {name: cost(point) for name, point in points.items() if point["solver"] == solver}
    priced = {name: value for name, value in own.items() if value is not None}
    best = []
    for name in sorted(priced, key=lambda name: (priced[name], points[name]["error"])):
        if not best or points[name]["error"] < points[best[-1]]["error"]:
            best.append(name)
    return best


def fastest(points: Points, accuracies: Iterable[float]) -> dict[str, dict[str, str]]:
    """Return, for every accuracy, the name of each solver's fastest point that reaches it."""
    table: dict[str, dict[str, str]] = {}
    solvers = dict.fromkeys(point["solver"] for point in points.values())
    for accuracy in accuracies:
        row = {}
        for solver in solvers:
            good = [n for n, p in points.items() if p["solver"] == solver and "seconds" in p and p["error"] <= accuracy]
            if good:
                row[solver] = min(good, key=lambda name: middle(points[name]["seconds"]))
        table[f"{accuracy:.0e}"] = row
    return table


def table(points: Points, rows: Mapping[str, Mapping[str, str]]) -> str:
    """Return `fastest` as Markdown: milliseconds (median), evaluations, and the method with its setting.

    They share a cell, because three columns per solver are wider than a page. An accuracy that nothing reaches is left
    out.
    """
    known = dict.fromkeys(point["solver"] for point in points.values())
    solvers = [solver for solver in known if any(solver in row for row in rows.values())]
    lines = [f"| error at most | {' | '.join(solvers)} |", f"|{' --- |' * (1 + len(solvers))}"]
    for accuracy, row in rows.items():
        if not row:
            continue
        cells = [accuracy]
        for solver in solvers:
            point = points.get(row.get(solver, ""))
            if point is None:
                cells.append("")
                continue
            work = "" if point["work"] is None else f", {point['work']} evaluations"
            time = f"{1e3 * middle(point['seconds']):.2f} ms"
            cells.append(f"{time}{work} ({point['method']}, {point['setting']})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cold_table(points: Points) -> list[str]:
    """Return lines of Markdown on the cost of first calls that compile; empty without such calls."""
    cold: dict[str, list[tuple[float, float]]] = {}
    for point in points.values():
        if "cold" in point and "seconds" in point:
            pair = (point["cold"], middle(point["seconds"]))
            cold.setdefault(f"{point['solver']} {point['method']}", []).append(pair)
    if not cold:
        return []
    parts = [
        f"{name} {max(first for first, _ in pairs):.2g} s, then {1e3 * min(warm for _, warm in pairs):.2g} ms"
        for name, pairs in cold.items()
    ]
    return ["", f"Cold (first call, compiled in it) and warm: {'; '.join(parts)}. The table has warm times."]


COLOURS = {"odeadv": "C0", "torchdiffeq": "C1", "torchode": "C2", "diffrax": "C3", "scipy": "C4"}


def draw(axes: Iterable[Axes], title: str, points: Points, methods: Iterable[str]) -> None:
    """Draw two panels: error against seconds, and error against evaluations.

    Bold lines are the Pareto fronts of the solvers; thin lines are single ``methods`` of odeadv.
    """
    left, right = axes
    costs = (
        (left, "seconds", lambda p: middle(p["seconds"]) if "seconds" in p else None),
        (right, "evaluations and products", lambda p: p["work"]),
    )
    for axis, label, cost in costs:
        for solver in dict.fromkeys(point["solver"] for point in points.values()):
            names = front(points, solver, cost)
            if names:
                xs, ys = [cost(points[n]) for n in names], [points[n]["error"] for n in names]
                colour = COLOURS.get(solver.split()[0], "C7")
                style = "-" if solver in COLOURS else ":" if "collocation" in solver else "--"
                axis.loglog(xs, ys, style, color=colour, marker="o", markersize=3, linewidth=2, label=f"{solver}, best")
        for k, method in enumerate(methods):
            own = [
                p for p in points.values() if p["solver"] == "odeadv" and p["method"] == method and cost(p) is not None
            ]
            if own:
                xs, ys = [cost(p) for p in own], [p["error"] for p in own]
                axis.loglog(xs, ys, color=f"C{(k + 5) % 10}", marker=".", linewidth=0.8, label=method)
        axis.set_xlabel(label)
        axis.set_ylabel("error")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    # A solver without counted work has a curve only in the left panel.
    curves = {label: line for axis in (left, right) for line, label in zip(*axis.get_legend_handles_labels())}  # noqa: B905
    if curves:
        right.legend(curves.values(), curves, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
