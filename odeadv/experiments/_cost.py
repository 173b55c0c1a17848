"""Estimate the cost of tables before they are run: count image passes, or time the first steps."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from odeadv import data as datasets
from odeadv.data import ImageDataset
from odeadv.evaluation import Protocol
from odeadv.evaluation.protocols import resolve_protocol
from odeadv.experiments._config import RunConfig, passes
from odeadv.experiments._presets import Preset, configurations
from odeadv.experiments._tables import TABLES
from odeadv.support.checks import integer
from odeadv.support.pages import markdown_table
from odeadv.training import TrainingDiverged, make_fabric, train

if TYPE_CHECKING:
    from lightning_fabric import Fabric

TRAIN_IMAGES, TEST_IMAGES = {"cifar10": 50_000, "cifar100": 50_000}, {"cifar10": 10_000, "cifar100": 10_000}


def training_passes(config: RunConfig) -> int:
    """Return the number of image passes in training; 0 if the size of the data set is unknown.

    One image forward, backward to activations, or to weight gradients counts 1 each. `hours` converts image passes
    into time: in natural training a machine makes three passes per image.

    Args:
        config: configuration of the run.
    """
    training = config.training
    images = config.data.train_images or TRAIN_IMAGES.get(config.data.name, 0)
    return passes(config) * (images // training.batch_size) * training.batch_size * training.epochs


def evaluation_passes(config: RunConfig, protocol: Protocol) -> int:
    """Return an upper bound on the image passes to evaluate a run.

    The bound counts each attack separately; nothing is shared between attacks. A gradient counts 2. The clean image
    and the last iterate of each attack count 1 each. The count doubles if there are validation images, because the
    best weights are evaluated too. With noise it is multiplied by the number of averaged passes.
    """
    one = 1 + sum(2 * (spec.steps or 1) + 1 for spec in protocol.attacks)
    images = config.data.test_images or TEST_IMAGES.get(config.data.name, 0)
    weights = 2 if config.data.validation_images else 1
    return one * images * weights * (config.model.passes if config.model.noise else 1)


def hours(passes: float, rate: float) -> float:
    """Return the hours that ``passes`` take on a device with ``rate`` images per second in natural training.

    Natural training makes three passes per image.

    Args:
        passes: number of image passes, from `training_passes` or `evaluation_passes`.
        rate: speed of the device, in images per second of natural training.
    """
    return passes / (3 * rate) / 3600


@dataclass(frozen=True)
class TableCost:
    """The cost of one table on one data set.

    Attributes:
        table, dataset: names of the table and the data set.
        runs: number of runs in the table.
        new: number of runs that earlier tables do not have.
        training: image passes to train the new runs, see `training_passes`.
        evaluation: image passes of the evaluations that earlier tables do not make, see `evaluation_passes`.
    """

    table: str
    dataset: str
    runs: int
    new: int
    training: int
    evaluation: int

    def hours(self, rate: float) -> float:
        """Return the hours on a device with ``rate`` images per second in natural training, see `hours`."""
        return hours(self.training + self.evaluation, rate)


def table_costs(preset: Preset) -> list[TableCost]:
    """Return the cost of all tables and ablations at ``preset``, for each data set of each table.

    Args:
        preset: size of the runs.
    """
    trained: set[str] = set()
    evaluated: set[tuple[str, str]] = set()
    found = []
    for name, listed in TABLES.items():
        for dataset in listed.datasets:
            table = preset.table(name, dataset)
            protocol = resolve_protocol(table.protocol)
            configs = [config for _, config in configurations(table, preset, dataset=dataset)]
            new = [config for config in configs if config.key not in trained]
            fresh = [config for config in configs if (config.key, protocol.name) not in evaluated]
            trained |= {config.key for config in new}
            evaluated |= {(config.key, protocol.name) for config in fresh}
            training = sum(training_passes(config) for config in new)
            evaluation = sum(evaluation_passes(config, protocol) for config in fresh)
            found.append(TableCost(table.name, dataset, len(configs), len(new), training, evaluation))
    return found


def cost_page(preset: Preset, rates: Sequence[float]) -> str:
    """Return the cost of the tables at ``preset`` as Markdown, with the hours at each of ``rates``.

    Args:
        preset: size of the runs.
        rates: images per second in natural training.

    Raises:
        ValueError: if ``rates`` is empty, or if a rate is not above 0.
    """
    if not rates or not all(rate > 0 for rate in rates):
        raise ValueError(f"rates: got {list(rates)}, expected images per second, above 0")
    costs = table_costs(preset)
    rows = [
        [cost.table, cost.dataset, str(cost.runs), str(cost.new), f"{cost.training:.3g}", f"{cost.evaluation:.3g}"]
        + [f"{cost.hours(rate):.1f}" for rate in rates]
        for cost in costs
    ]
    rows.append(["all", "", "", "", "", "", *(f"{sum(cost.hours(rate) for cost in costs):.0f}" for rate in rates)])
    head = ["table", "data", "runs", "new", "training", "evaluation", *(f"hours at {rate:g}/s" for rate in rates)]
    lines = [
        f"# What the tables cost at the preset `{preset.name}`",
        "",
        "Training and evaluation are image passes: one image forward, backward to activations, or to weight gradients. "
        "Runs of a table above are not counted again (new). Evaluations are counted attack by attack with nothing "
        "shared, an upper bound. Hours are those of a device that trains this many images per second naturally, with "
        "three passes each.",
        "",
        *markdown_table(head, rows, numbers=4 + len(rates)),
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class Rehearsal:
    """Time, loss and memory of the first steps of a run.

    Attributes:
        config: configuration of the run.
        taken: number of steps taken.
        steps: number of steps of the whole training.
        loss: mean training loss of the steps taken.
        seconds: median time per step, without the first step.
        memory: peak memory of tensors on a CUDA device in bytes; None on other devices.
    """

    config: RunConfig
    taken: int
    steps: int
    loss: float
    seconds: float
    memory: int | None

    @property
    def hours(self) -> float:
        """Estimated hours of the whole training, without the measurements after each epoch."""
        return self.steps * self.seconds / 3600

    def __str__(self) -> str:
        memory = "" if self.memory is None else f", {self.memory / 2**30:.2f} GiB"
        return (
            f"{self.taken} of {self.steps} steps, loss {self.loss:.3f}, {self.seconds:.3g} s a step{memory}: "
            f"{self.hours:.3g} h to train"
        )


def rehearse(config: RunConfig, data: ImageDataset, steps: int = 10, *, fabric: Fabric | None = None) -> Rehearsal:
    """Train ``config`` for ``steps`` steps on the first images, and return time, loss and memory.

    After the steps the measurements of an epoch are made. Files are not written.

    Args:
        config: configuration of the run.
        data: the whole data set that ``config`` names. The run takes its subset.
        steps: number of steps, at least 2. If an epoch has fewer steps, one epoch is trained. The first step is not
            timed.
        fabric: the engine, see `odeadv.training.train`.

    Raises:
        ValueError: if ``steps`` is below 2, if the data set is another one, and as `odeadv.training.train`.
        TypeError: if ``steps`` is not an integer.
        TrainingDiverged: as `odeadv.training.train`.
    """
    training = config.training
    if integer("steps", steps) < 2:
        raise ValueError(f"steps: got {steps}, expected 2 or more, as the first one is not timed")
    if data.name != config.data.name:
        raise ValueError(f"data: got {data.name!r}, expected {config.data.name!r}, which the configuration names")
    if fabric is None:
        fabric = make_fabric(precision=training.precision)
        fabric.launch()
    subset, _ = config.data.take(data)
    few = slice(0, steps * training.batch_size)
    part = replace(subset, train_images=subset.train_images[few], train_labels=subset.train_labels[few])
    net = config.model.build(subset, torch.Generator().manual_seed(training.seed)).to(fabric.device)
    on_cuda = fabric.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(fabric.device)
    times: list[float] = []
    result = train(
        net,
        part,
        replace(training, epochs=1, milestones=()),
        fabric=fabric,
        on_step=lambda *_: times.append(time.perf_counter()),  # the loss has been read, so the device is done
    )
    between = [b - a for a, b in pairwise(times)]
    return Rehearsal(
        config,
        taken=len(part.train_images) // training.batch_size,
        steps=len(subset.train_images) // training.batch_size * training.epochs,
        loss=result.epochs[0].loss,
        seconds=statistics.median(between) if between else math.nan,
        memory=torch.cuda.max_memory_allocated(fabric.device) if on_cuda else None,
    )


def rehearse_all(
    configs: Sequence[RunConfig], steps: int, folder: Path | None
) -> Iterator[tuple[RunConfig, Rehearsal | Exception]]:
    """Rehearse runs on one data set, one after the other. If a run fails, its error is yielded.

    Args:
        configs: configurations, all with the data set of the first one.
        steps: number of training steps per run. The first step is not timed.
        folder: folder of the data set, see `odeadv.data.load`; None means the default folder.

    Raises:
        ValueError: if ``steps`` is below 2.
    """
    if steps < 2:
        raise ValueError(f"rehearse: got {steps}, expected 2 steps or more, as the first one is not timed")
    images = datasets.load(configs[0].data.name, folder)
    for config in configs:
        fabric = make_fabric(precision=config.training.precision)
        fabric.launch()
        try:
            yield config, rehearse(config, images, steps, fabric=fabric)
        except (ValueError, TrainingDiverged, RuntimeError) as error:  # RuntimeError includes out-of-memory errors
            yield config, error
