"""Draw the figures of a table: differences with intervals, curves over eta (if the rows differ in it), over-fitting."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from odeadv.experiments._presets import PRESETS
from odeadv.support.extras import extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from odeadv.experiments._results import Results
    from odeadv.experiments._tables import Row


def plot(results: Results, path: Path) -> None:
    """Write the figure of ``results`` to ``path``."""
    with extra("plot"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    labels = {"acc": "clean", **{column.key: column.label for column in results.table.columns}}
    if results.table.average:
        labels["avg"] = "average"
    contrasts, curves = len(results.decided()), _is_curve(results)
    lines = math.ceil(len(labels) / 3)
    figure = Figure(figsize=(8.0, 1.3 + 2.6 * lines if curves else 1.8 + 0.5 * contrasts), layout="constrained")
    FigureCanvasAgg(figure)
    if curves:
        _over_eta(results, figure, labels)
    else:
        _forest(results, figure)
    # The file does not contain a date or a version, so equal records give equal files.
    figure.savefig(path, dpi=120, metadata={"Software": None})


def has_picture(results: Results) -> bool:
    """Return True if there is something to draw: a curve over eta, or a primary contrast whose rows have been run."""
    return _is_curve(results) or bool(results.decided())


def _is_curve(results: Results) -> bool:
    """Return True if a method has at least three values of eta, enough for a curve."""
    factors: dict[tuple[str, float | None], set[float]] = {}
    for row in results.table.rows:
        factors.setdefault((row.method, row.weight_decay), set()).add(row.factor)
    return any(len(found) > 2 for found in factors.values())


def plot_over_fitting(results: Results, path: Path) -> None:
    """Write the robust accuracies over the epochs, on training and on validation images, to ``path``.

    Each undefended row of `regimes` gets a panel, with its rows of LAD and LAD-SM.
    """
    with extra("plot"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    panels = sorted(regimes(results), key=lambda rows: _decay(results, rows[0]))
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(max(6.4, 1.5 + 2.6 * columns), 0.8 + 2.7 * lines), layout="constrained")  # the legend fits
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat
    for axes, rows in zip(grid, panels, strict=False):
        for row in rows:
            color = f"C{('', '+lad', '+lad-sm').index(row.method.removeprefix(rows[0].method))}"
            validation = [[100 * v for v in course] for course in results.validation(row)]
            training = [[100 * e["accuracy"] for e in run["epochs"]] for run in results.runs[row.name].values()]
            for courses, style, name in ((training, ":", "training"), (validation, "-", "validation")):
                mean = [statistics.fmean(values) for values in zip(*courses, strict=True)]
                axes.plot(range(1, len(mean) + 1), mean, style, color=color, label=f"{_short(row)}, {name}")
        count = len(results.runs[rows[0].name])
        name = f"{_short(rows[0])}, weight decay {_decay(results, rows[0]):g}" if len(panels) > 1 else rows[0].label
        axes.set_title(f"{name}, {count} seed{'s' if count > 1 else ''}", fontsize="small")
        axes.set_xlabel("epoch")
        axes.label_outer()
    _shared_legend(figure, "outside upper center", columns=3)
    figure.supylabel("robust accuracy, %")
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _decay(results: Results, row: Row) -> float:
    """Return the weight decay of ``row``, also if its label does not name it."""
    run = next(iter(results.runs[row.name].values()))
    return float(run["config"]["training"]["weight_decay"])


def _short(row: Row) -> str:
    """Return the label of ``row`` without its eta and weight decay."""
    return row.label.split(",")[0]


def regimes(results: Results) -> list[Sequence[Row]]:
    """Return each undefended row with its rows of LAD and LAD-SM, if validation images were attacked in every epoch.

    If a method has rows of several eta at the same weight decay, the one with the preset's eta is taken, or the first.
    """
    found: list[Sequence[Row]] = []
    for base in results.rows:
        rows = [base]
        for method in (f"{base.method}+lad", f"{base.method}+lad-sm"):
            alike = [r for r in results.rows if (r.method, r.weight_decay) == (method, base.weight_decay)]
            rows += sorted(alike, key=lambda row: row.factor != 1.0)[:1]
        if "+" not in base.method and len(rows) > 1 and all(results.validation(row) for row in rows):
            found.append(rows)
    return found


def _forest(results: Results, figure: Figure) -> None:
    """Draw the primary contrasts with their intervals. Ticks mark the differences in the paper."""
    axes = figure.add_subplot()
    found = results.decided()
    for y, decision in enumerate(found):
        contrast = decision.contrast
        half = 0.0 if contrast.half is None else contrast.half
        axes.errorbar(contrast.mean, y, xerr=half, fmt="o", color="C0", capsize=3, label="here" if not y else None)
        if decision.paper is not None:
            axes.plot(decision.paper, y, "|", color="C3", ms=16, mew=2, label="_paper" if y else "paper")
    axes.axvline(0.0, color="0.6", lw=0.8)
    names = [f"{decision.row.label}\nminus {decision.other.label}" for decision in found]
    axes.set_yticks(range(len(found)), names, fontsize="small")
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlabel("mean accuracy under the attacks,\ndifference in points with 95 % interval")
    figure.suptitle(f"{results.table.title}, {results.setting}", fontsize="medium")
    figure.legend(loc="outside lower right", ncols=2, fontsize="small")  # in the panel it would cover an interval


def _over_eta(results: Results, figure: Figure, labels: Mapping[str, str]) -> None:
    """Draw one panel per column: accuracy minus the accuracy of the undefended row, over eta, here and in the paper."""
    with extra("plot"):
        from matplotlib.ticker import NullFormatter

    columns = min(3, len(labels))
    lines = math.ceil(len(labels) / columns)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat
    defended = [row for row in results.table.rows if results.table.baseline(row) is not None]
    there, here = (preset.eta(defended[0], results.dataset) for preset in (PRESETS["paper"], results.preset))
    etas = sorted({results.preset.eta(row, results.dataset) for row in defended})
    for axes, (key, label) in zip(grid, labels.items(), strict=False):
        for i, method in enumerate(dict.fromkeys(row.method for row in defended)):
            rows = sorted((row for row in defended if row.method == method), key=lambda row: row.factor)
            _curve(results, axes, rows, key, f"C{i}")
        axes.axhline(0.0, color="0.6", lw=0.8)
        axes.set_xscale("log")
        axes.set_xticks(etas, [f"{eta:g}" for eta in etas], rotation=45 if len(etas) > 4 else 0)
        axes.xaxis.set_minor_formatter(NullFormatter())  # its labels would cover those of the ticks
        axes.set_title(label, fontsize="medium")
        axes.set_xlabel("eta" if here == there else f"eta; the paper's times {here / there:.3g}")
        axes.label_outer()
    for axes in figure.axes[len(labels) :]:
        axes.set_axis_off()
    figure.supylabel("accuracy minus that without a defence, points", fontsize="medium")
    _shared_legend(figure, "outside lower center", columns=4)
    figure.suptitle(f"{results.table.title}, {results.setting}", fontsize="medium")


def _shared_legend(
    figure: Figure, place: Literal["outside upper center", "outside lower center"], columns: int
) -> None:
    """Draw one legend for all panels, outside of them."""
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc=place, ncols=columns, fontsize="small")


def _curve(results: Results, axes: Axes, rows: list[Row], key: str, color: str) -> None:
    paper = results.table.paper(results.dataset)
    here, there = list[tuple[float, float, float]](), list[tuple[float, float]]()
    for row in rows:
        base = results.table.baseline(row)
        assert base is not None
        eta = results.preset.eta(row, results.dataset)  # the paper's points are at the eta that was scaled like this
        difference = results.difference(row, base, key) if row.name in results.runs else None
        if difference is not None:
            spread = statistics.stdev(difference.values) if len(difference.values) > 1 else 0.0
            here.append((eta, difference.mean, spread))
        figures = paper.get(row.name, {}), paper.get(base.name, {})
        if all(key in f for f in figures):
            there.append((eta, figures[0][key] - figures[1][key]))
    if here:
        x, y, error = zip(*here, strict=True)
        axes.errorbar(x, y, yerr=error, fmt="o-", capsize=2, color=color, label=f"{_short(rows[-1])}, here")
    if there:
        axes.plot(*zip(*there, strict=True), "o:", mfc="none", color=color, label=f"{_short(rows[-1])}, paper")
