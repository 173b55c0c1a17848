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
Answer = tuple[Tensor, int | None]  # a final state, and the evaluations it took, None if they cannot be counted
FLOOR = 1e-13  # errors below are rounding
LEAST = 1e-11  # no finer steps of a method once it is below
SETTLE = 0.005  # seconds
PATIENCE = 2.0  # seconds
NEAR = 2.0  # only candidates this near to the fastest at their accuracy are worth timing again


@dataclass(frozen=True)
class Candidate:
    """A method at one setting.

    Attributes:
        solver: who solves: "odeadv", "torchdiffeq", ...
        method: which method of it; the settings of one method make one curve.
        setting: steps or tolerance, for the table.
        solve: what is timed.
        cold: whether its first call is timed apart, because it compiles.
    """

    solver: str
    method: str
    setting: str
    solve: Callable[[], Answer]
    cold: bool = False


def adaptive(
    solver: str, method: str, solve: Callable[[float], Answer], exponents: Iterable[int], cold: bool = False
) -> list[Candidate]:
    """A method at tolerances 1e-k; with ``cold``, the first of them compiles."""
    return [
        Candidate(solver, method, f"tolerance 1e-{k}", lambda k=k: solve(10.0**-k), cold=cold and not i)
        for i, k in enumerate(exponents)
    ]


def stepped(method: str, solve: Callable[[int], odeadv.Solution], counts: Iterable[int]) -> list[Candidate]:
    """A method of odeadv at numbers of steps; its work is the evaluations of the operators and the products.

    Those of a costate are left out: it is looked up.
    """

    def run(steps: int) -> Answer:
        solution = solve(steps)
        evaluations = sum(count for name, count in solution.stats.evaluations.items() if name != "costate")
        return solution.xs[-1], evaluations + solution.stats.vjps

    return [Candidate("odeadv", method, f"{n} steps", lambda n=n: run(n)) for n in counts]


def measure(
    candidates: Iterable[Candidate],
    reference: Tensor,
    rounds: int,
    *,
    longest: float,
    always: Iterable[str] = (),
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Errors (maximum norm, relative), work and times of the candidates; what failed, and why.

    Every candidate is solved once (twice if the first call compiles) and timed; those near the fastest at their
    accuracy are then timed again in interleaved rounds, and so are the methods in ``always``. Settings of a method come
    from coarse to fine, and stop when a solve has taken ``longest`` seconds (`PATIENCE` for the others). The seconds
    of every round are returned beside the results, for ratios.
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
                warnings.simplefilter("ignore")  # low sub-steps in high schemes are part of the comparison
                began = time.perf_counter()
                state, work = candidate.solve()
                first = time.perf_counter() - began
                if candidate.cold:
                    began = time.perf_counter()
                    candidate.solve()
                seconds = time.perf_counter() - began
        except Exception as error:  # each peer has its own way to give up
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
    """Those that, in a first time, were near the fastest of their solver with no larger error, or are of least work."""
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
    """The names of the points of ``solver`` that no cheaper one of it beats, from large errors to small."""
    own = {name: cost(point) for name, point in points.items() if point["solver"] == solver}
    priced = {name: value for name, value in own.items() if value is not None}
    best = []
    for name in sorted(priced, key=lambda name: (priced[name], points[name]["error"])):
        if not best or points[name]["error"] < points[best[-1]]["error"]:
            best.append(name)
    return best


def fastest(points: Points, accuracies: Iterable[float]) -> dict[str, dict[str, str]]:
    """For every accuracy, the name of each solver's fastest point that reaches it."""
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
    """Markdown of `fastest`: method and setting, milliseconds (median), evaluations."""
    known = dict.fromkeys(point["solver"] for point in points.values())
    solvers = [solver for solver in known if any(solver in row for row in rows.values())]
    lines = [f"| error at most | {' | '.join(f'{solver} | ms | evaluations' for solver in solvers)} |"]
    lines.append(f"|{' --- |' * (1 + 3 * len(solvers))}")
    for accuracy, row in rows.items():
        cells = [accuracy]
        for solver in solvers:
            point = points.get(row.get(solver, ""))
            if point is None:
                cells += ["", "", ""]
            else:
                work = "" if point["work"] is None else str(point["work"])
                cells += [f"{point['method']}, {point['setting']}", f"{1e3 * middle(point['seconds']):.2f}", work]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cold_table(points: Points) -> list[str]:
    """Lines of Markdown on what a first call costs where it compiles; none if nothing does."""
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
    """Two panels: error against seconds, and against evaluations.

    Bold: each solver's Pareto front. Thin: some ``methods`` of odeadv by themselves.
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
                axis.loglog(
                    xs, ys, style, color=colour, marker="o", markersize=3, linewidth=2, label=f"{solver}, front"
                )
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
    if right.has_data():
        right.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside the curves, not on them
