"""Repeat a run from its record, and compare the two results."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from torch import Tensor

from odeadv.data import ImageDataset
from odeadv.evaluation import Evaluation
from odeadv.evaluation.protocols import PROTOCOLS
from odeadv.experiments._config import RunConfig
from odeadv.experiments._records import Record, load_record
from odeadv.experiments._run import Measurement, run, versions
from odeadv.experiments._tables import TABLES

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Agreement:
    """The differences between two runs of one configuration.

    Attributes:
        losses: largest relative difference between the training losses of an epoch; 0 if they are bit-identical.
        weights: True if the evaluated weights are bit-identical; None if the records do not contain this information.
        outcomes: number of differing outcomes and number of all outcomes, by evaluation and attack.
        not_run: evaluations of the first run that the second run lacks.
        versions: the two versions of each package whose versions differ, by package name.
        machines: the two values of each property of the machine that differs, by name: device, processor, threads,
            processes.
    """

    losses: float
    weights: bool | None
    outcomes: dict[str, tuple[int, int]]
    not_run: tuple[str, ...]
    versions: dict[str, tuple[str, str]]
    machines: dict[str, tuple[str, str]]

    @property
    def same(self) -> bool:
        """True if all compared values are bit-identical."""
        return self.losses == 0.0 and self.weights is not False and not any(n for n, _ in self.outcomes.values())

    def __str__(self) -> str:
        losses = "the same to the bit" if self.losses == 0.0 else f"differ by at most {self.losses:.2g}, relative"
        lines = [f"training losses: {losses}"]
        if self.weights is not None:
            lines.append(f"weights: {'the same to the bit' if self.weights else 'different'}")
        lines += [f"{name}: {different} of {n} outcomes differ" for name, (different, n) in self.outcomes.items()]
        lines += [f"{name}: not run again" for name in self.not_run]
        changed = self.versions | self.machines
        lines += [f"{name}: {first} then, {second} now" for name, (first, second) in changed.items()]
        return "\n".join(lines)


def rerun(
    record: Record,
    data: ImageDataset,
    runs: Path,
    *,
    autoattack: bool = False,
    label: str = "",
    log: TextIO | None = None,
    init: str | os.PathLike[str] | None = None,
    fabric: Fabric | None = None,
) -> Agreement:
    """Train and evaluate the run of ``record`` again, and compare the two runs.

    With the same kind of processor, the same versions and the same number of threads, all results should be
    bit-identical. Otherwise sums are rounded differently, and the two trainings diverge after some steps.

    Args:
        record: record of the run, as `odeadv.experiments.load_records` reads it.
        data: the whole data set that the record names.
        runs: folder for the new run, different from the folder of the record. If the new run is stopped, the same
            call resumes it.
        autoattack: True to also repeat AutoAttack (needs the package pyautoattack).
        label: text shown with the progress.
        log: stream for the progress; standard error if not given.
        init: the weights that the run started from; None if its seed drew the weights.
        fabric: the engine, see `odeadv.training.train`.

    Raises:
        ValueError: if the configuration has another key in this version of odeadv, if the data differ, or if an
            evaluation lacks its outcomes. Also if ``runs`` has a record from other versions. The error is raised before
            any work.
        RunLockedError, ImportError: as `odeadv.experiments.run`.
    """
    for evaluations in record["evaluations"].values():
        for name, evaluation in evaluations.items():
            try:
                Evaluation.from_dict(evaluation)  # an evaluation without outcomes fails here, before the training
            except (ValueError, TypeError) as error:
                raise ValueError(f"record: its evaluation {name} cannot be compared with another: {error}") from None
    config = RunConfig.from_dict(record["config"])
    if config.key != record["key"]:
        raise ValueError(
            f"record: its key is {record['key']}, but its configuration has {config.key} in this version of odeadv; "
            f"run it with the version that made it, {record['versions'].get('odeadv')}"
        )
    fingerprint = config.data.take(data)[0].fingerprint()
    if fingerprint != record["data"]["fingerprint"]:
        raise ValueError(
            f"data: the images of the record have the fingerprint {record['data']['fingerprint']}, these {fingerprint}"
        )
    there = runs / config.name / "record.json"
    if there.exists() and load_record(there)["versions"] != versions():
        raise ValueError(f"runs: {there} is of other versions than those of now; remove it, or give another folder")
    best = record["evaluations"].get("best", {})
    wanted = [_measurement(key, key in best) for key in record["evaluations"].get("last", {})]
    chosen = [each for each in wanted if each is not None and (autoattack or not each.key.startswith("autoattack"))]
    return agreement(record, run(config, data, runs, protocols=chosen, label=label, log=log, init=init, fabric=fabric))


def agreement(first: Record, second: Record) -> Agreement:
    """Compare the records of two runs of one configuration.

    Args:
        first: the record of the first run, see `load_record`.
        second: the record of the second run, for example from `rerun`.
    """
    losses, weights = _losses(first, second), list[bool]()
    outcomes: dict[str, tuple[int, int]] = {}
    missing = []
    for which, evaluations in first["evaluations"].items():
        for key, evaluation in evaluations.items():
            again = second["evaluations"].get(which, {}).get(key)
            if again is None:
                missing.append(f"{key}, {which} weights")
                continue
            a, b = Evaluation.from_dict(evaluation), Evaluation.from_dict(again)
            weights += [a.model == b.model] if a.model and b.model else []
            pairs: list[tuple[str, Tensor | None, Tensor | None]] = [("clean", a.clean_outcomes, b.clean_outcomes)]
            for x, y in zip(a.attacks, b.attacks, strict=True):
                pairs.append((x.label, x.outcomes, y.outcomes))
                pairs.append((f"{x.label}, worst so far", x.worst_so_far_outcomes, y.worst_so_far_outcomes))
            outcomes |= {
                f"{key}, {which} weights, {name}": (_differing(one, other), a.n)
                for name, one, other in pairs
                if one is not None and other is not None
            }
    versions = {
        name: (version, second["versions"].get(name, "none"))
        for name, version in first["versions"].items()
        if version != second["versions"].get(name)
    }
    machines = {
        name: (str(first["machine"].get(name, "not recorded")), str(value))
        for name, value in second["machine"].items()
        if value != first["machine"].get(name)
    }
    return Agreement(losses, all(weights) if weights else None, outcomes, tuple(missing), versions, machines)


def _losses(first: Record, second: Record) -> float:
    pairs = [(a["loss"], b["loss"]) for a, b in zip(first["epochs"], second["epochs"], strict=True)]
    return max((float(abs(a - b) / abs(a)) if a else math.inf for a, b in pairs if a != b), default=0.0)


def _differing(one: Tensor, other: Tensor) -> int:
    return int((one != other).sum())


def _measurement(key: str, best: bool) -> Measurement | None:
    """Return the measurement of the evaluation ``key`` of a record; None if its protocol is not a known name."""
    name, _, images = key.partition("@")
    named = {table.autoattack.name: table.autoattack for table in TABLES.values()}
    protocol = named.get(name, name)
    if isinstance(protocol, str) and protocol not in (*PROTOCOLS, *TABLES):
        return None
    return Measurement(protocol, int(images) if images else None, best)
