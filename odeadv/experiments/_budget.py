"""How much computing the tables ask for, before any of it is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from odeadv.evaluation import Protocol
from odeadv.evaluation.protocols import resolve_protocol
from odeadv.experiments._config import RunConfig, passes
from odeadv.experiments._tables import TABLES, Preset, configurations
from odeadv.support.files import write_json, write_text

SCHEMA = "odeadv.budget/1"
TRAIN_IMAGES, TEST_IMAGES = {"cifar10": 50_000, "cifar100": 50_000}, {"cifar10": 10_000, "cifar100": 10_000}


def training_passes(config: RunConfig) -> int:
    """Images sent through the network in training: forward, to activations and weight gradients count 1 each.

    Divided by the passes a second of a machine (three times its images a second in natural training) this is how
    long the training takes. 0 for data of unknown size.
    """
    training = config.training
    images = config.data.train_images or TRAIN_IMAGES.get(config.data.name, 0)
    return passes(config) * (images // training.batch_size) * training.batch_size * training.epochs


def evaluation_passes(config: RunConfig, protocol: Protocol) -> int:
    """Images sent through the network to evaluate a run, attack by attack, with nothing shared: an upper bound.

    A gradient counts 2, the clean image and the last iterate of each attack 1; all of it once more for the best
    weights where there are validation images, and in each of the passes that are averaged over noise.
    """
    one = 1 + sum(2 * (spec.steps or 1) + 1 for spec in protocol.attacks)
    images = config.data.test_images or TEST_IMAGES.get(config.data.name, 0)
    weights = 2 if config.data.validation_images else 1
    return one * images * weights * (config.model.passes if config.model.noise else 1)


@dataclass(frozen=True)
class Budget:
    """What one table on one data set asks for.

    Attributes:
        table, dataset: which.
        runs: how many it shows.
        new: how many of them no table before it has.
        training: image passes to train those, see `training_passes`.
        evaluation: image passes to evaluate what has not been evaluated so before, see `evaluation_passes`.
    """

    table: str
    dataset: str
    runs: int
    new: int
    training: int
    evaluation: int

    def hours(self, rate: float) -> float:
        """On a device that trains ``rate`` images a second naturally, which is three passes each."""
        return (self.training + self.evaluation) / (3 * rate) / 3600


def budget(preset: Preset) -> list[Budget]:
    """All tables and ablations at ``preset``, each on the data sets that it is for."""
    trained: set[str] = set()
    evaluated: set[tuple[str, str]] = set()
    found = []
    for table in TABLES.values():
        protocol = resolve_protocol(table.protocol)
        for dataset in table.datasets:
            configs = [config for _, config in configurations(table, preset, dataset=dataset)]
            new = [config for config in configs if config.key not in trained]
            fresh = [config for config in configs if (config.key, protocol.name) not in evaluated]
            trained |= {config.key for config in new}
            evaluated |= {(config.key, protocol.name) for config in fresh}
            training = sum(training_passes(config) for config in new)
            evaluation = sum(evaluation_passes(config, protocol) for config in fresh)
            found.append(Budget(table.name, dataset, len(configs), len(new), training, evaluation))
    return found


def plain(preset: Preset, rates: Sequence[float]) -> dict[str, Any]:
    """`budget` as plain data, with the hours at each of ``rates``.

    Raises:
        ValueError: unless all rates are above 0.
    """
    if not rates or not all(rate > 0 for rate in rates):
        raise ValueError(f"rates: got {list(rates)}, expected images a second, above 0")
    rows = budget(preset)
    columns = ("table", "dataset", "runs", "new", "training", "evaluation")
    return {
        "schema": SCHEMA,
        "preset": preset.name,
        "rates": [float(rate) for rate in rates],
        "tables": [
            {**{name: getattr(row, name) for name in columns}, "hours": [row.hours(rate) for rate in rates]}
            for row in rows
        ],
        "hours": [sum(row.hours(rate) for row in rows) for rate in rates],
    }


def page(data: dict[str, Any]) -> str:
    """`plain` as Markdown."""
    rates = data["rates"]
    head = ["table", "data", "runs", "new", "training", "evaluation", *(f"hours at {rate:g}/s" for rate in rates)]
    command = f"odeadv budget --preset {data['preset']} --rates {' '.join(f'{rate:g}' for rate in rates)}"
    lines = [
        f"# What the tables ask for at the preset `{data['preset']}`",
        "",
        f"Made by `{command}`; counted, not measured.",
        "",
        "Training and evaluation are image passes: one image forward, backward to activations, or to weight gradients. "
        "Runs that a table before has are not counted again (new). Evaluations are counted attack by attack with "
        "nothing shared, an upper bound. Hours are those of a device that trains so many images a second naturally "
        "(three passes each); what yours does, the first epoch of the first run shows.",
        "",
        f"| {' | '.join(head)} |",
        f"|{' --- |' * len(head)}",
    ]
    for row in data["tables"]:
        cells = [row["table"], row["dataset"], str(row["runs"]), str(row["new"])]
        cells += [f"{row[key]:.3g}" for key in ("training", "evaluation")] + [f"{hours:.1f}" for hours in row["hours"]]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(f"| all |  |  |  |  |  | {' | '.join(f'{hours:.0f}' for hours in data['hours'])} |")
    return "\n".join(lines) + "\n"


def write_budget(preset: Preset, rates: Sequence[float], out: Path) -> Path:
    """Write `plain` and its page to ``out``; returns the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    data = plain(preset, rates)
    write_json(out / "budget.json", data)
    write_text(out / "budget.md", page(data))
    return out / "budget.md"
