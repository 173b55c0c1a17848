"""A run again, from its record alone, and what of it comes out the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from torch import Tensor

from odeadv.data import ImageDataset
from odeadv.evaluation import Evaluation
from odeadv.evaluation.protocols import PROTOCOLS
from odeadv.experiments._config import RunConfig
from odeadv.experiments._folder import Record, load_record
from odeadv.experiments._run import Measurement, run, versions
from odeadv.experiments._tables import TABLES

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Agreement:
    """How two runs of one configuration compare.

    Attributes:
        losses: largest relative difference of the training losses of an epoch; 0 if they are the same bits.
        weights: whether the evaluated weights have the same bits; None if nothing says so.
        outcomes: by evaluation and attack, how many outcomes of how many differ.
        not_run: evaluations of the first run that the second does not have.
        versions: by package, the versions of the two, where they differ.
    """

    losses: float
    weights: bool | None
    outcomes: dict[str, tuple[int, int]]
    not_run: tuple[str, ...]
    versions: dict[str, tuple[str, str]]

    @property
    def same(self) -> bool:
        """True if everything that was compared is the same to the bit."""
        return self.losses == 0.0 and self.weights is not False and not any(n for n, _ in self.outcomes.values())

    def __str__(self) -> str:
        losses = "the same to the bit" if self.losses == 0.0 else f"differ by {self.losses:.2g} of themselves at most"
        lines = [f"training losses: {losses}"]
        if self.weights is not None:
            lines.append(f"weights: {'the same to the bit' if self.weights else 'others'}")
        lines += [f"{name}: {different} of {n} outcomes differ" for name, (different, n) in self.outcomes.items()]
        lines += [f"{name}: not run again" for name in self.not_run]
        lines += [f"{name}: {first} then, {second} now" for name, (first, second) in self.versions.items()]
        return "\n".join(lines)


def rerun(
    record: Record,
    data: ImageDataset,
    runs: Path,
    *,
    autoattack: bool = False,
    label: str = "",
    log: TextIO | None = None,
    fabric: Fabric | None = None,
) -> Agreement:
    """Train and evaluate what ``record`` is of again, and compare.

    On the same machine, versions and number of threads everything should be the same to the bit; elsewhere sums are
    rounded otherwise, and two trainings part after some steps.

    Args:
        record: of the run, as `odeadv.experiments.load_records` reads it.
        data: the data set named in it, whole.
        runs: a folder for the new run, which goes on where it was stopped; not the one that the record is from.
        autoattack: run AutoAttack again too (needs the package pyautoattack).
        label: shown with the progress.
        log: where progress goes; standard error if not given.
        fabric: the engine, see `odeadv.training.train`.

    Raises:
        ValueError: if the configuration means another run by now, the data are others, or an evaluation is of a
            version that kept no outcomes; before any work.
        RunLockedError, ImportError: as `odeadv.experiments.run`.
    """
    for evaluations in record["evaluations"].values():
        for name, evaluation in evaluations.items():
            try:
                Evaluation.from_dict(evaluation)  # so that what cannot be compared is refused now
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
    wanted = [_measurement(key, key in record["evaluations"].get("best", {})) for key in record["evaluations"]["last"]]
    chosen = [each for each in wanted if each is not None and (autoattack or not each.key.startswith("autoattack"))]
    return agreement(record, run(config, data, runs, protocols=chosen, label=label, log=log, fabric=fabric))


def agreement(first: Record, second: Record) -> Agreement:
    """Compare the records of two runs of one configuration."""
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
    return Agreement(losses, all(weights) if weights else None, outcomes, tuple(missing), versions)


def _losses(first: Record, second: Record) -> float:
    pairs = [(a["loss"], b["loss"]) for a, b in zip(first["epochs"], second["epochs"], strict=True)]
    return max((float(abs(a - b) / abs(a)) for a, b in pairs if a != b), default=0.0)


def _differing(one: Tensor, other: Tensor) -> int:
    return int((one != other).sum())


def _measurement(key: str, best: bool) -> Measurement | None:
    """Return the protocol by which a record's evaluation ``key`` was measured; None if it lacks a name."""
    name, _, images = key.partition("@")
    named = {table.autoattack.name: table.autoattack for table in TABLES.values()}
    protocol = named.get(name, name)
    if isinstance(protocol, str) and protocol not in (*PROTOCOLS, *TABLES):
        return None
    return Measurement(protocol, int(images) if images else None, best)
