"""Draw the figure of a table: differences with intervals, or curves over eta if the rows differ in eta."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

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
    contrasts = len(results.findings())
    figure = Figure(figsize=(9.0, 4.2 if results.sweeps_eta else 1.6 + 0.5 * contrasts), layout="constrained")
    FigureCanvasAgg(figure)
    if results.sweeps_eta:
        _over_eta(results, figure, labels)
    else:
        _forest(results, figure)
    # The file gets no date and no version, so equal records give an equal file.
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _forest(results: Results, figure: Figure) -> None:
    """Draw the primary contrasts with their intervals. Ticks mark the differences in the paper."""
    axes = figure.add_subplot()
    found = results.findings()
    for y, finding in enumerate(found):
        contrast = finding.contrast
        half = 0.0 if contrast.half is None else contrast.half
        axes.errorbar(contrast.mean, y, xerr=half, fmt="o", color="C0", capsize=3, label="here" if not y else None)
        if finding.paper is not None:
            axes.plot(finding.paper, y, "|", color="C3", ms=16, mew=2, label="_paper" if y else "paper")
    if not found:
        axes.text(0.5, 0.5, "no two rows of a primary contrast have been run", ha="center", transform=axes.transAxes)
        return
    axes.axvline(0.0, color="0.6", lw=0.8)
    names = [f"{finding.row.label}\nminus {finding.other.label}" for finding in found]
    axes.set_yticks(range(len(found)), names, fontsize="small")
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlabel("mean accuracy under the attacks, difference in points with 95 % interval")
    axes.set_title(f"{results.table.title}, {results.dataset}, preset {results.preset.name}", fontsize="medium")
    axes.legend(fontsize="small")


def _over_eta(results: Results, figure: Figure, labels: Mapping[str, str]) -> None:
    """Draw one panel per column: accuracy minus that of the undefended row, over eta, here and in the paper."""
    panels = figure.subplots(1, len(labels), sharex=True, sharey=True, squeeze=False)[0]
    defended = [row for row in results.table.rows if results.table.baseline(row) is not None]
    there, here = (preset.eta(defended[0], results.dataset) for preset in (PRESETS["paper"], results.preset))
    for axes, (key, label) in zip(panels, labels.items(), strict=True):
        for i, method in enumerate(dict.fromkeys(row.method for row in defended)):
            rows = sorted((row for row in defended if row.method == method), key=lambda row: row.factor)
            _curve(results, axes, rows, key, f"C{i}")
        axes.axhline(0.0, color="0.6", lw=0.8)
        axes.set_xscale("log")
        axes.set_title(label, fontsize="medium")
        axes.set_xlabel("eta" if here == there else f"the paper's eta; here times {here / there:g}")
    panels[0].set_ylabel("accuracy minus that without a defence, points")
    panels[-1].legend(fontsize="small")
    figure.suptitle(f"{results.table.title}, {results.dataset}, preset {results.preset.name}")


def _curve(results: Results, axes: Axes, rows: list[Row], key: str, color: str) -> None:
    paper = results.table.paper(results.dataset)
    here, there = list[tuple[float, float, float]](), list[tuple[float, float]]()
    for row in rows:
        base = results.table.baseline(row)
        assert base is not None
        eta = PRESETS["paper"].eta(row, results.dataset)
        difference = results.difference(row, base, key) if row.name in results.runs else None
        if difference is not None:
            spread = statistics.stdev(difference.values) if len(difference.values) > 1 else 0.0
            here.append((eta, difference.mean, spread))
        figures = paper.get(row.name, {}), paper.get(base.name, {})
        if all(key in f for f in figures):
            there.append((eta, figures[0][key] - figures[1][key]))
    if here:
        x, y, error = zip(*here, strict=True)
        axes.errorbar(x, y, yerr=error, fmt="o-", capsize=2, color=color, label=f"{rows[-1].method}, here")
    if there:
        axes.plot(*zip(*there, strict=True), "o:", mfc="none", color=color, label=f"{rows[-1].method}, paper")
