"""A table in the terminal: aligned accuracies, differences with intervals, and the limits of the runs."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path

from odeadv.experiments._config import parse_method
from odeadv.experiments._presets import Preset
from odeadv.experiments._records import load_records
from odeadv.experiments._report import differences
from odeadv.experiments._results import Decision, Results, gather
from odeadv.experiments._tables import Table

WIDTH = 100  # characters per line of a sentence


def summary(table: Table, preset: Preset, dataset: str | None, records: Path) -> str:
    """Return the result of a table as lines of text, for a terminal.

    The lines are, in this order:

    - the mean accuracies of all rows;
    - the primary differences with 95 % intervals;
    - one sentence with the differences that the runs resolve;
    - one sentence with what runs of this size cannot show.

    Args:
        table: table to show.
        preset: size of the runs.
        dataset: name of the data set; the preset's if None.
        records: folder of records, see `odeadv.experiments.load_records`.

    Raises:
        ValueError: if none of the records belongs to this table.
    """
    results = gather(table, preset, dataset, load_records(records))
    decisions = results.decided()
    lines = [f"{table.title}, {results.dataset}: accuracy in %, mean over the seeds", "", *_accuracies(results)]
    if decisions:
        lines += ["", "Mean accuracy under the attacks, difference in points with 95 % interval", ""]
        lines += _differences(decisions)
    for sentence in (*_verdict(decisions), preset.limits or differences(results)):
        lines += ["", *textwrap.wrap(sentence, WIDTH)]
    return "\n".join(lines)


def _accuracies(results: Results) -> list[str]:
    columns = results.table.columns
    head = ["", "seeds", "clean", *(column.label for column in columns), "average", "s in %"]
    rows = []
    for row in results.rows:
        values = [results.accuracies(run) for run in results.runs[row.name].values()]
        means = [statistics.fmean(value[key] for value in values) for key in ("acc", *(c.key for c in columns))]
        means.append(statistics.fmean(means[1:]))
        pushed = parse_method(row.method).perturbation == "costate"  # s is defined only for pushes along the costate
        strength = results.strength(row) if pushed else None
        shown = "" if strength is None else f"{100 * strength:.2g}"
        rows.append([row.label, str(len(values)), *(f"{mean:.1f}" for mean in means), shown])
    lines = _aligned([head, *rows])
    if any(row[-1] for row in rows):
        lines.append("s: the relative rise of the loss that the push makes, to first order, in the middle of training")
    return lines


def _differences(decisions: Sequence[Decision]) -> list[str]:
    rows = []
    for decision in decisions:
        interval = decision.contrast.interval
        low, high = ("", "") if interval is None else (f"[{interval[0]:+.1f},", f"{interval[1]:+.1f}]")
        paper = "" if decision.paper is None else f"paper {decision.paper:+.1f}"
        name = f"{decision.row.label} minus {decision.other.label}"
        rows.append([name, f"{decision.contrast.mean:+.1f}", low, high, paper])
    return _aligned(rows)


def _verdict(decisions: Sequence[Decision]) -> list[str]:
    """Return a sentence with the differences whose adjusted p-value is below 0.05, and one with the others."""
    if not decisions:
        return []
    clear = [d for d in decisions if d.p is not None and d.p < 0.05 and len(d.seeds) > 1]
    unclear = [d for d in decisions if d not in clear]
    up, down = ([f for f in clear if (f.contrast.mean > 0) == positive] for positive in (True, False))
    lines = []
    for found, word in ((up, "more robust than"), (down, "less robust than")):
        if found:
            lines.append(f"Resolved: {'; '.join(f'{f.row.label} is {word} {f.other.label}' for f in found)}.")
    if unclear:
        lines.append(f"Not resolved: {'; '.join(f'{f.row.label} against {f.other.label}' for f in unclear)}.")
    if any(len(decision.seeds) == 1 for decision in unclear):
        lines.append(
            "With one seed the interval covers chance in the images, not in the training, so such a difference is not "
            "resolved; take several seeds."
        )
    return lines


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines with the first column aligned to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]
