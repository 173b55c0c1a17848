"""The tables as data: rows, the paper's figures, and the presets that say at what size they are run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from odeadv.experiments._run import RunConfig
from odeadv.training import TrainConfig


@dataclass(frozen=True)
class Row:
    """One method of a table.

    Attributes:
        method: its name on the command line and in file names.
        label: its name in the paper.
        paper_key: its name in ``paper_tables.json``.
        scheme: of the forward pass; None for none.
    """

    method: str
    label: str
    paper_key: str
    scheme: str | None


@dataclass(frozen=True)
class Table:
    """A table of the paper: which runs make it, and how they are evaluated.

    Attributes:
        name: such as ``"table1"``, also the key of the paper's figures.
        title: a heading.
        protocol: of `odeadv.evaluate`.
        rows: its methods; the first is the baseline of the paired differences.
    """

    name: str
    title: str
    protocol: str
    rows: tuple[Row, ...]

    def row(self, method: str) -> Row:
        """The row called ``method``.

        Raises:
            ValueError: listing the rows, if there is none.
        """
        for row in self.rows:
            if row.method == method:
                return row
        raise ValueError(f"methods: {method!r} is not a row of {self.name}; it has {', '.join(self.methods)}")

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of the rows."""
        return tuple(row.method for row in self.rows)

    def paper(self, dataset: str) -> Mapping[str, Mapping[str, float]]:
        """The paper's figures for ``dataset``, by ``paper_key``; empty where it has none."""
        text = files("odeadv.experiments").joinpath("paper_tables.json").read_text(encoding="utf-8")
        figures: dict[str, Any] = json.loads(text)[self.name]
        found: Mapping[str, Mapping[str, float]] = figures.get(dataset, {})
        return found


TABLE1 = Table(
    "table1",
    "Table 1: natural training",
    "table1",
    (
        Row("natural", "natural", "natural", None),
        Row("lad", "natural + LAD", "natural+lad", "lie"),
        Row("lad-sm", "natural + LAD-SM", "natural+lad-sm", "strang"),
    ),
)


@dataclass(frozen=True)
class Preset:
    """At what size a table is run.

    Attributes:
        name: of the preset.
        dataset: the data set unless another is asked for.
        depth, width: of the network.
        train_images, test_images: how many of them; None for all.
        epochs: a number, or one for each data set.
        eta: a number, or one for each data set; it belongs to batches of 128 and a loss averaged over them.
        precision: of training.
        seeds: unless others are asked for.
        says: what it is, in a line.
    """

    name: str
    dataset: str
    depth: int
    width: int
    train_images: int | None
    test_images: int | None
    epochs: int | Mapping[str, int]
    eta: float | Mapping[str, float]
    precision: Literal["fp32", "bf16"]
    seeds: tuple[int, ...]
    says: str


ETA = {"cifar10": 50.0, "cifar100": 1000.0, "digits": 50.0, "folder": 50.0}

PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "smoke", "digits", 8, 8, None, None, 12, ETA, "fp32", (0,),
            "shows that everything works: ResNet-8 of width 8, 12 epochs on small images, one seed; under two minutes",
        ),
        Preset(
            "cpu", "cifar10", 8, 16, None, None, 8, ETA, "bf16", (0, 1, 2),
            "the whole data set on two cores: ResNet-8, 8 epochs, three seeds; one to two hours",
        ),
        Preset(
            "paper", "cifar10", 56, 16, None, None, {"cifar10": 160, "cifar100": 300, "digits": 160, "folder": 160},
            ETA, "fp32", (0, 1, 2),
            "Appendix B to the letter: ResNet-56, 160 epochs (300 for CIFAR-100), three seeds; for a GPU",
        ),
    )
}  # fmt: skip


def configurations(
    table: Table,
    preset: Preset,
    *,
    dataset: str | None = None,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[RunConfig]:
    """The runs of ``table`` at ``preset``: all methods of the first seed, then of the next.

    The learning rate is divided by 10 at a half and at three quarters of the epochs, as in the paper.

    Args:
        table: rows and protocol.
        preset: size.
        dataset: instead of the preset's.
        methods: some of the rows.
        seeds: instead of the preset's.

    Raises:
        ValueError: for a method that is not a row.
    """
    dataset = dataset or preset.dataset
    if dataset not in ETA:
        raise ValueError(f"dataset: got {dataset!r}, expected one of {', '.join(ETA)}")
    rows = [table.row(method) for method in methods or table.methods]
    epochs = preset.epochs if isinstance(preset.epochs, int) else preset.epochs[dataset]
    eta = preset.eta[dataset] if isinstance(preset.eta, Mapping) else float(preset.eta)
    return [
        RunConfig(
            table=table.name,
            preset=preset.name,
            method=row.method,
            dataset=dataset,
            train_images=preset.train_images,
            test_images=preset.test_images,
            depth=preset.depth,
            width=preset.width,
            protocol=table.protocol,
            training=TrainConfig(
                epochs=epochs,
                scheme=row.scheme,
                eta=eta if row.scheme else 0.0,
                milestones=(epochs // 2, epochs * 3 // 4),
                precision=preset.precision,
                seed=seed,
            ),
        )
        for seed in (preset.seeds if seeds is None else seeds)
        for row in rows
    ]
