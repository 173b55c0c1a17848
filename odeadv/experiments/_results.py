"""The records of a table, read and compared."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from odeadv.experiments._config import parse_method
from odeadv.experiments._tables import PRESETS, Column, Preset, Row, Table, configurations

Record = Mapping[str, Any]

# Two-sided 95 % quantiles of Student's t by degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True)
class Difference:
    """A row less another in one column, in percentage points, paired by seed.

    Attributes:
        values: one a seed.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.values)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of the mean by Student's t; None with one seed."""
        n = len(self.values)
        if n < 2:
            return None
        half = _T95[min(n - 2, len(_T95) - 1)] * statistics.stdev(self.values) / math.sqrt(n)
        return self.mean - half, self.mean + half

    def verdict(self, paper: float) -> str:
        """Whether the sign of the paper's difference is reproduced, contradicted or not resolved."""
        interval = self.interval
        if interval is None:
            return "one seed: not resolved"
        low, high = interval
        if low <= 0 <= high or paper == 0:
            return "not resolved"
        return "reproduced" if (low > 0) == (paper > 0) else "contradicted"

    def __str__(self) -> str:
        interval = self.interval
        return f"{self.mean:+.2f}" if interval is None else f"{self.mean:+.2f} [{interval[0]:+.2f}, {interval[1]:+.2f}]"


@dataclass(frozen=True)
class Results:
    """The records of one table at one preset on one data set.

    Attributes:
        table, preset, dataset: which.
        runs: by row name, the records by seed; only rows that have been run.
        missing: names of runs that have not.
    """

    table: Table
    preset: Preset
    dataset: str
    runs: Mapping[str, Mapping[int, Record]]
    missing: tuple[str, ...]

    @property
    def rows(self) -> list[Row]:
        """The rows that have been run, in the table's order."""
        return [row for row in self.table.rows if row.name in self.runs]

    def accuracies(self, record: Record, which: str = "last", score: str = "robust_accuracy") -> dict[str, float]:
        """Clean accuracy, those under the columns' attacks and their mean, in %."""
        evaluation = record["evaluations"][which][self.table.protocol]
        values = {"acc": 100 * evaluation["clean_accuracy"]}
        for column in self.table.columns:
            values[column.key] = 100 * _attack(evaluation, column)[score]
        if self.table.average:
            values["avg"] = statistics.fmean(values[column.key] for column in self.table.columns)
        return values

    @property
    def sweeps_eta(self) -> bool:
        """Whether the table is about eta: some rows are others with a multiple of it."""
        return any(row.factor != 1.0 for row in self.table.rows)

    def etas(self, row: Row) -> tuple[str, str]:
        """The paper's eta and the one here, as the page says them; empty where they are the same in all rows."""
        if not self.sweeps_eta or not parse_method(row.method).defended:
            return "", ""
        there, here = (f", eta {preset.eta(row, self.dataset):g}" for preset in (PRESETS["paper"], self.preset))
        return there, here

    def difference(self, row: Row, other: Row, key: str) -> Difference | None:
        """``row`` less ``other`` in the column ``key``; None without common seeds."""
        here, there = self.runs[row.name], self.runs.get(other.name, {})
        seeds = sorted(here.keys() & there.keys())
        values = tuple(self.accuracies(here[s])[key] - self.accuracies(there[s])[key] for s in seeds)
        return Difference(values) if values else None


def gather(table: Table, preset: Preset, dataset: str | None, records: Sequence[Record]) -> Results:
    """Those of ``records`` that belong to ``table`` at ``preset`` on ``dataset``, by their keys.

    Raises:
        ValueError: if there are none.
    """
    dataset = dataset or preset.dataset
    by_key = {record["key"]: record for record in records}
    if len(by_key) != len(records):
        keys = [record["key"] for record in records]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"records: two have the key {twice}; keep one of them in the folder")
    runs: dict[str, dict[int, Record]] = {}
    missing = []
    seeds = sorted({*preset.seeds, *(int(record["config"]["training"]["seed"]) for record in records)})
    for row, config in configurations(table, preset, dataset=dataset, seeds=seeds):
        record = by_key.get(config.key)
        if record is None or table.protocol not in record["evaluations"].get("last", {}):
            if config.training.seed in preset.seeds:
                missing.append(f"{row.name} seed {config.training.seed}")
        else:
            runs.setdefault(row.name, {})[config.training.seed] = record
    if not runs:
        raise ValueError(
            f"records: none of the {len(records)} given belongs to {table.name} at preset {preset.name} on {dataset} "
            f"(with protocol {table.protocol}); a record belongs where its configuration is one of those that "
            f"`odeadv table {table.name} --list` names"
        )
    found = [record for by_seed in runs.values() for record in by_seed.values()]
    if len({record["data"]["fingerprint"] for record in found}) > 1:
        raise ValueError("records: those of this table were run on different data; keep one data set in a folder")
    return Results(table, preset, dataset, runs, tuple(missing))


def _attack(evaluation: Mapping[str, Any], column: Column) -> Mapping[str, Any]:
    for attack in evaluation["attacks"]:
        steps = attack["steps"] if attack["name"] != "fgsm" else 1
        if (
            attack["name"] == column.attack
            and steps == column.steps
            and math.isclose(attack["eps_255"], column.eps_255)
        ):
            found: Mapping[str, Any] = attack
            return found
    raise ValueError(f"records: an evaluation by {evaluation.get('protocol')} has no {column.label}")
