"""The results of a table: reading the records of its runs and comparing its rows."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from odeadv.evaluation import Evaluation
from odeadv.experiments._campaign import planned
from odeadv.experiments._config import RunConfig, parse_method
from odeadv.experiments._presets import PRESETS, Preset, configurations
from odeadv.experiments._records import Record, RecordWarning
from odeadv.experiments._statistics import Contrast, TwoWay, holm, image_error, t_quantile, word
from odeadv.experiments._tables import Column, Row, Table

# docs/results/rules.md defines over-fitting of plain PGD by these two thresholds, in percentage points. GAP is robust
# training minus robust test accuracy. DROP is the best epoch minus the last epoch on validation images.
GAP, DROP = 15.0, 2.0
WEAKEST = 0.01  # a defence is tested only if its strength s in the middle of training is at least this value


@dataclass(frozen=True)
class Difference:
    """One row minus another in one column, in percentage points, paired by seed.

    Attributes:
        values: one difference per seed.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return statistics.fmean(self.values)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % confidence interval of the mean by Student's t; None with one seed."""
        n = len(self.values)
        if n < 2:
            return None
        half = t_quantile(n - 1) * statistics.stdev(self.values) / math.sqrt(n)
        return self.mean - half, self.mean + half

    def __str__(self) -> str:
        interval = self.interval
        return f"{self.mean:+.2f}" if interval is None else f"{self.mean:+.2f} [{interval[0]:+.2f}, {interval[1]:+.2f}]"


@dataclass(frozen=True)
class Decision:
    """A primary contrast of a table and its decision by docs/results/rules.md.

    Attributes:
        row, other: the two rows. The difference is ``row`` minus ``other``.
        contrast: the difference here, in percentage points.
        paper: the paper's difference; None if the paper implies a positive difference but gives no number.
        p: p-value, adjusted by Holm's method over the primary contrasts of the table; None if the difference has no
            error estimate.
        seeds: the seeds that both rows have.
        word: the word that the rules give.
        why: the reason for "not tested", or a restriction of the word.
        strength: strength of the defence of ``row``, see `Results.strength`.
        alone: the difference by the seeds of these two rows alone, without the pooled error.
    """

    row: Row
    other: Row
    contrast: Contrast
    paper: float | None
    p: float | None
    seeds: tuple[int, ...]
    word: str
    why: str
    strength: float | None
    alone: Difference


@dataclass(frozen=True)
class Results:
    """The records of one table at one preset on one data set.

    Attributes:
        table, preset, dataset: the table, the preset and the name of the data set.
        runs: records by row name, then by seed. Rows without a run are left out.
        missing: names of the runs that lack a record.
        weights: the compared weights: ``"last"``, or ``"best"`` for the weights of the best epoch.
    """

    table: Table
    preset: Preset
    dataset: str
    runs: Mapping[str, Mapping[int, Record]]
    missing: tuple[str, ...]
    weights: Literal["last", "best"] = "last"
    _fits: dict[str | None, TwoWay] = field(default_factory=dict, init=False, compare=False, repr=False)
    _images: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def setting(self) -> str:
        """The network of most runs and the data set, for titles: ``"ResNet-8 of width 16, CIFAR-10"``."""
        runs = [run for by_seed in self.runs.values() for run in by_seed.values()]
        configs = [RunConfig.from_dict(run["config"], imports=False) for run in runs]
        return f"{statistics.mode(config.model.label for config in configs)}, {configs[0].data.label}"

    @property
    def rows(self) -> list[Row]:
        """The rows that have at least one run, in the order of the table."""
        return [row for row in self.table.rows if row.name in self.runs]

    def accuracies(
        self, record: Record, weights: Literal["last", "best"] | None = None, score: str = "robust_accuracy"
    ) -> dict[str, float]:
        """Return the clean accuracy, the accuracy per column and the mean of the columns, in %."""
        evaluation = record["evaluations"][weights or self.weights][self.table.protocol]
        values = {"acc": 100 * evaluation["clean_accuracy"]}
        for column in self.table.columns:
            values[column.key] = 100 * _attack(evaluation, column)[score]
        if self.table.average:
            values["avg"] = statistics.fmean(values[column.key] for column in self.table.columns)
        return values

    @property
    def sweeps_eta(self) -> bool:
        """True if some rows multiply the preset's eta by a factor."""
        return any(row.factor != 1.0 for row in self.table.rows)

    def etas(self, row: Row) -> tuple[str, str]:
        """Return the paper's eta and our eta as text for the page.

        Both are empty if the table does not vary eta or ``row`` is undefended.
        """
        if not self.sweeps_eta or not parse_method(row.method).defended:
            return "", ""
        there, here = (f", eta {preset.eta(row, self.dataset):g}" for preset in (PRESETS["paper"], self.preset))
        return there, here

    def primary(self, record: Record) -> float:
        """Return the mean accuracy under the table's attacks, in %, for the last iterates."""
        values = self.accuracies(record)
        return statistics.fmean(values[column.key] for column in self.table.columns)

    def contrast(self, row: Row, other: Row, key: str | None = None) -> Contrast | None:
        """Return ``row`` minus ``other`` in one column, with the error of the pooled two-way fit.

        Args:
            row: the row.
            other: the row that is subtracted.
            key: key of the column; None for the mean accuracy of `primary`.

        Returns:
            The contrast; None if no chain of common seeds connects the two rows.
        """
        fit = self._fits.get(key)
        if fit is None:
            fit = self._fits[key] = TwoWay(
                {
                    name: {
                        seed: self.primary(run) if key is None else self.accuracies(run)[key]
                        for seed, run in by_seed.items()
                    }
                    for name, by_seed in self.runs.items()
                }
            )
        return fit.contrast(row.name, other.name, self._floor(row, other, key))

    def _floor(self, row: Row, other: Row, key: str | None) -> float:
        """Return the standard error of ``row`` minus ``other`` that comes from the choice of the test images."""
        seeds = self.runs.get(row.name, {}).keys() & self.runs.get(other.name, {}).keys()
        pairs = [[self._outcomes(r.name, seed, key) for r in (row, other)] for seed in sorted(seeds)]
        if not pairs or any(found is None for pair in pairs for found in pair):
            return 0.0
        return image_error([pair[0] for pair in pairs], [pair[1] for pair in pairs])

    def _outcomes(self, name: str, seed: int, key: str | None) -> Any:
        """Return per image the share of attacks that leave it correct; None if the outcomes are not recorded.

        The share is over the attack ``key``, or over all columns if ``key`` is None or ``"avg"``.
        """
        if (name, seed) not in self._images:
            evaluation = self.runs[name][seed]["evaluations"][self.weights][self.table.protocol]
            by_key: dict[str, Any] = {}
            if evaluation.get("clean_outcomes") is not None:
                read = Evaluation.from_dict(evaluation)
                assert read.clean_outcomes is not None
                by_key["acc"] = read.clean_outcomes.numpy().astype(float)
                for column in self.table.columns:
                    found = evaluation["attacks"].index(_attack(evaluation, column))
                    outcomes = read.attacks[found].outcomes
                    if outcomes is not None:
                        by_key[column.key] = outcomes.numpy().astype(float)
            self._images[name, seed] = by_key
        by_key = self._images[name, seed]
        keys = [column.key for column in self.table.columns] if key in (None, "avg") else [key]
        return sum(by_key[k] for k in keys) / len(keys) if all(k in by_key for k in keys) else None

    def decisions(self) -> list[Decision]:
        """Return the primary contrasts of the table with their words, for all pairs of rows that have runs."""
        pairs = [(self.table.row(a), self.table.row(b)) for a, b in self.table.primary_pairs(self.dataset)]
        found = [(row, other, contrast) for row, other in pairs if (contrast := self.contrast(row, other)) is not None]
        adjusted = iter(holm([contrast.p for *_, contrast in found if contrast.p is not None]))
        result = []
        for row, other, contrast in found:
            p = None if contrast.p is None else next(adjusted)
            paper = self.table.paper_difference(row, other, self.dataset)
            base = self.table.baseline(row)
            gain = None if base is None else self.contrast(row, base)
            said = word(contrast, p, paper, gain=None if gain is None else gain.mean)
            seeds = tuple(sorted(self.runs[row.name].keys() & self.runs[other.name].keys()))
            why = self.not_tested(row)
            if why:
                said = "not tested"
            elif len(seeds) < 2:  # one seed gives the error of the images, but not the error of training
                said, why = "undecided", "one seed"
            elif said in ("confirmed", "sign only", "opposite") and not any(
                seed >= self.preset.confirms_from for seed in seeds
            ):
                why = "on the seeds that made the hypothesis"
            alone = Difference(tuple(self._primary_of(row, s) - self._primary_of(other, s) for s in seeds))
            result.append(Decision(row, other, contrast, paper, p, seeds, said, why, self.strength(row), alone))
        return result

    def decided(self) -> list[Decision]:
        """Return `decisions`, each without the seeds that made the hypotheses if both rows have at least two others."""
        first = self.preset.confirms_from
        runs = {
            name: {seed: run for seed, run in by_seed.items() if seed >= first} for name, by_seed in self.runs.items()
        }
        new = replace(self, runs={name: kept for name, kept in runs.items() if kept})
        better = {
            (found.row, found.other): found
            for found in (new.decisions() if new.runs and new.runs != self.runs else ())
            if len(found.seeds) > 1
        }
        return [better.get((found.row, found.other), found) for found in self.decisions()]

    def _primary_of(self, row: Row, seed: int) -> float:
        return self.primary(self.runs[row.name][seed])

    def not_tested(self, row: Row) -> str:
        """Return the reason why these runs cannot test ``row``; empty if they can.

        The reason is too little over-fitting of plain adversarial training, or too weak a defence.
        """
        objective = row.method.split("+")[0]
        why = self.over_fitting(objective)[1] if objective in ("pgd", "trades") else ""
        s = self.strength(row)
        if not why and s is not None and s < WEAKEST:
            why = f"s is {100 * s:.2g} % in the middle of the training, below {100 * WEAKEST:g} %"
        return why

    def strength(self, row: Row) -> float | None:
        """Return the strength s = eta sum |a_n|^2 / L in the middle of training, averaged over the seeds.

        Here a_n is the costate at layer n and L is the loss. The result is None if s is not recorded,
        eta is 0, or ``row`` is undefended.
        """
        if not parse_method(row.method).defended or parse_method(row.method).zero:
            return None
        found = [run["epochs"][(len(run["epochs"]) - 1) // 2] for run in self.runs.get(row.name, {}).values()]
        values = [epoch.get("strength_first_order") for epoch in found]
        return statistics.fmean(values) if values and all(value is not None for value in values) else None

    def over_fitting(self, objective: str = "pgd") -> tuple[tuple[float, float | None] | None, str]:
        """Return the over-fitting of the undefended row in percentage points, and a reason if it is too small.

        Returns:
            A pair. First: robust training minus robust test accuracy, and the best epoch minus the last epoch on
            validation images (None without such images). Without runs, the first entry is None. Second: the reason why
            the over-fitting is too small to test a defence; empty if it is large enough.
        """
        runs = list(self.runs.get(objective, {}).values())
        if not runs:
            return None, ""
        config = RunConfig.from_dict(runs[0]["config"], imports=False)
        eps = 255 * float(getattr(config.training.objective, "eps", 0.0))
        columns = [column for column in self.table.columns if column.attack == "ifgsm"]
        column = min(columns, key=lambda column: abs(column.eps_255 - eps))
        gaps = [100 * run["epochs"][-1]["accuracy"] - self.accuracies(run, "last")[column.key] for run in runs]
        gap, drop = statistics.fmean(gaps), None
        courses = self.validation(self.table.row(objective))
        if courses:
            drop = statistics.fmean(100 * (max(course) - course[-1]) for course in courses)
        if gap < GAP:
            return (gap, drop), f"plain {objective.upper()} over-fits by {gap:.1f} points, fewer than {GAP:g}"
        if drop is not None and drop < DROP:
            return (
                gap,
                drop,
            ), f"plain {objective.upper()} loses {drop:.1f} points after its best epoch, fewer than {DROP:g}"
        return (gap, drop), ""

    def validation(self, row: Row) -> list[list[float]]:
        """Return the robust accuracy on validation images per seed and epoch; empty if an epoch lacks it."""
        courses: list[list[Any]] = [
            [(epoch.get("validation") or {}).get("robust") for epoch in run["epochs"]]
            for run in self.runs.get(row.name, {}).values()
        ]
        whole = all(value is not None for course in courses for value in course)
        return courses if whole else []

    def difference(self, row: Row, other: Row, key: str) -> Difference | None:
        """Return ``row`` minus ``other`` in the column ``key`` per common seed; None without common seeds."""
        here, there = self.runs[row.name], self.runs.get(other.name, {})
        seeds = sorted(here.keys() & there.keys())
        values = tuple(self.accuracies(here[s])[key] - self.accuracies(there[s])[key] for s in seeds)
        return Difference(values) if values else None


class NoRunsError(ValueError):
    """No record belongs to the table."""


def gather(table: Table, preset: Preset, dataset: str | None, records: Sequence[Record]) -> Results:
    """Return the results of ``table`` at ``preset`` on ``dataset``: the ``records`` whose keys match its runs.

    Raises:
        NoRunsError: if no record matches. It is a ValueError.
        ValueError: if two records have the same key, or the records were run on different data.
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
        there = record is not None and table.protocol in record["evaluations"].get("last", {})
        if record is None or not there or not _is_usable(record, config, table):
            # The campaign runs some rows of a table on fewer seeds, or on others, than those of the preset.
            ours = planned(table.name, preset.name, row.name) if dataset == "cifar10" else None
            if config.training.seed in (preset.seeds if ours is None else ours):
                missing.append(f"{row.name} seed {config.training.seed}")
        else:
            runs.setdefault(row.name, {})[config.training.seed] = record
    if not runs:
        raise NoRunsError(
            f"records: none of the {len(records)} given belongs to {table.name} at preset {preset.name} on {dataset} "
            f"(with protocol {table.protocol}); a record belongs where its configuration is one of those that "
            f"`odeadv table {table.name} --list` names"
        )
    found = [record for by_seed in runs.values() for record in by_seed.values()]
    if len({record["data"]["fingerprint"] for record in found}) > 1:
        raise ValueError("records: those of this table were run on different data; keep one data set in a folder")
    return Results(table, preset, dataset, runs, tuple(missing))


def _is_usable(record: Record, config: RunConfig, table: Table) -> bool:
    """Return True if the record is the run of ``config`` and its evaluations can be read; warn otherwise."""
    try:
        if RunConfig.from_dict(record["config"], imports=False).key != config.key:
            raise ValueError("config: got another configuration than the key names")
        for evaluations in record["evaluations"].values():
            for name, evaluation in evaluations.items():
                if name == table.protocol:
                    for column in table.columns:
                        _attack(evaluation, column)
                if name.partition("@")[0] == table.autoattack.name or evaluation.get("clean_outcomes") is not None:
                    Evaluation.from_dict(evaluation)
    except (ValueError, TypeError) as error:
        warnings.warn(f"left out, the record with key {record['key']}: {error}", RecordWarning, stacklevel=3)
        return False
    return True


def _attack(evaluation: Mapping[str, Any], column: Column) -> Mapping[str, Any]:
    for attack in evaluation["attacks"]:
        steps = attack["steps"] if attack["name"] != "fgsm" else 1
        if (
            attack["name"] == column.attack
            and steps == column.steps
            and attack["eps_255"] is not None
            and math.isclose(attack["eps_255"], column.eps_255)
        ):
            found: Mapping[str, Any] = attack
            return found
    raise ValueError(f"records: an evaluation by {evaluation.get('protocol')} lacks {column.label}")


def ranges(seeds: Sequence[int]) -> str:
    """Return the seeds as text: ``"3 to 9"`` for three or more consecutive seeds, otherwise a list."""
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))
