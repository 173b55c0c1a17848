"""The figure of a table: bars of its rows, or curves over eta where the rows are values of it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from odeadv.experiments._tables import PRESETS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from odeadv.experiments._results import Results
    from odeadv.experiments._tables import Row


def plot(results: Results, path: Path) -> None:
    """Write the figure of ``results`` to ``path``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = {"acc": "clean", **{column.key: column.label for column in results.table.columns}}
    if results.table.average:
        labels["avg"] = "average"
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    (_over_eta if results.sweeps_eta else _bars)(results, figure, labels)
    # No date in the file: equal records give an equal picture.
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _bars(results: Results, figure: Figure, labels: Mapping[str, str]) -> None:
    """Bars of the measured accuracies with standard deviations, the paper's as open circles."""
    paper = results.table.paper(results.dataset)
    axes = figure.add_subplot()
    width = 0.8 / len(results.rows)
    for i, row in enumerate(results.rows):
        values = [results.accuracies(run) for run in results.runs[row.name].values()]
        at = [j + (i - (len(results.rows) - 1) / 2) * width for j in range(len(labels))]
        means = [statistics.fmean(v[key] for v in values) for key in labels]
        errors = [statistics.stdev([v[key] for v in values]) if len(values) > 1 else 0.0 for key in labels]
        color = f"C{i % 10}"
        axes.bar(at, means, width, yerr=errors, capsize=2, color=color, alpha=0.75, label=row.label)
        figures = paper.get(row.name, {})
        shown = [(x, figures[key]) for x, key in zip(at, labels, strict=True) if key in figures]
        axes.plot([x for x, _ in shown], [y for _, y in shown], "o", mfc="none", mec=color, ms=4)
    axes.set_xticks(range(len(labels)), list(labels.values()))
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, 100)
    axes.set_title(f"{results.table.title}, {results.dataset}, preset {results.preset.name} (circles: paper)")
    axes.legend(ncols=3, fontsize="small")


def _over_eta(results: Results, figure: Figure, labels: Mapping[str, str]) -> None:
    """A panel a column: what eta adds to the accuracy of the undefended row, here and in the paper."""
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
    panels[0].set_ylabel("accuracy less that without a defence, points")
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
