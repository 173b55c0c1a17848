"""Make Figure 2, the Eq. 16 ratio during training, from the recorded epochs of the runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from odeadv.diagnostics import Trace
from odeadv.experiments._presets import Preset
from odeadv.experiments._records import load_records
from odeadv.experiments._report import protocol
from odeadv.experiments._results import Results, gather
from odeadv.experiments._tables import TABLES, paper_tables
from odeadv.support.extras import extra
from odeadv.support.files import replacing, write_text

#: The methods in Figure 2.
METHODS = ("pgd", "pgd+lad", "pgd+lad-sm")


def write_figure2(preset: Preset, dataset: str | None, records: Path, out: Path) -> str:
    """Make ``out/figure2.md`` and ``out/figure2.png`` from records of PGD training, and return the Markdown.

    Args:
        preset: size of the runs.
        dataset: name of the data set; None means the preset's. The paper's figure is for cifar100.
        records: folder of records, see `odeadv.experiments.load_records`.
        out: folder for the page and the plot.

    Raises:
        ValueError: if the records of PGD training lack the ratio of Eq. 16.
    """
    results = gather(TABLES["table2"], preset, dataset, load_records(records))
    traces = {
        (row.label, seed): run["epochs"]
        for row in results.rows
        if row.name in METHODS
        for seed, run in sorted(results.runs[row.name].items())
        if any(epoch["ratio"] for epoch in run["epochs"])
    }
    if not traces:
        raise ValueError(f"records: none of PGD training on {results.dataset} has an Eq. 16 ratio")
    text = _page(results, traces)
    write_text(out / "figure2.md", text)
    with replacing(out / "figure2.png") as path:
        _plot(results, traces, path)
    return text


def _page(results: Results, traces: dict[tuple[str, int], list[dict[str, Any]]]) -> str:
    paper = paper_tables()["figure2"]
    lines = [
        f"# Figure 2: the Eq. 16 ratio in PGD training, {results.setting}",
        "",
        "Does the ratio of Eq. 16 fall in training, and how far, compared with the paper's Figure 2?",
        "",
        *protocol(results),
        "",
        "![The ratio of Eq. 16 over the epochs](figure2.png)",
        "",
        "The ratio is ||x(0) + f(x(0), 0)|| / ||dL/dx(0)||, with norms over the whole batch tensor. It is taken on the "
        "last batch of every epoch (attacked images, batch statistics, loss averaged over the batch). In the paper's "
        f"figure, for CIFAR-100, it starts near {paper['start']:.0e}, falls, stays above "
        f"{paper['minimum_above']:.0e}, and is lowest near the end.",
        "",
        "| run | first epoch | lowest | its epoch | last epoch | always above 1e5 | lowest in the last quarter |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (label, seed), epochs in traces.items():
        values = [epoch["ratio"] for epoch in epochs if epoch["ratio"]]
        lowest = min(values)
        at = next(epoch["epoch"] for epoch in epochs if epoch["ratio"] == lowest)
        above = "yes" if lowest > paper["minimum_above"] else "no"
        late = "yes" if at > 0.75 * len(epochs) else "no"
        cells = [f"{label}, seed {seed}", f"{values[0]:.2g}", f"{lowest:.2g}", f"{at} of {len(epochs)}"]
        lines.append(f"| {' | '.join([*cells, f'{values[-1]:.2g}', above, late])} |")
    return "\n".join(lines) + "\n"


def _plot(results: Results, traces: dict[tuple[str, int], list[dict[str, Any]]], path: Path) -> None:
    with extra("plot"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (label, seed), epochs in traces.items():
        trace = Trace()
        for epoch in epochs:
            if epoch["ratio"]:
                trace.add(epoch["epoch"], epoch["ratio"])
        trace.plot(axes, label=f"{label}, seed {seed}")
    axes.set_title(f"Eq. 16 in PGD training, {results.setting}")
    if (own := axes.get_legend()) is not None:
        own.remove()
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")  # in the panel it would cover the curves
    figure.savefig(path, dpi=120, metadata={"Software": None})
