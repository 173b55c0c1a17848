"""A few steps of a run: whether it works here, and how long all of them would take."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from odeadv.data import ImageDataset
from odeadv.experiments._config import RunConfig
from odeadv.support.checks import integer
from odeadv.training import make_fabric, train

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Rehearsal:
    """What the first steps of a run showed.

    Attributes:
        config: the run.
        taken: how many steps were taken.
        steps: how many the whole training has.
        loss: mean training loss of those taken.
        seconds: of a step, the median of all but the first.
        memory: most bytes that tensors took on a CUDA device; None elsewhere.
    """

    config: RunConfig
    taken: int
    steps: int
    loss: float
    seconds: float
    memory: int | None

    @property
    def hours(self) -> float:
        """How long the training would take at this rate, without the measurements after each epoch."""
        return self.steps * self.seconds / 3600

    def __str__(self) -> str:
        memory = "" if self.memory is None else f", {self.memory / 2**30:.2f} GiB"
        return (
            f"{self.taken} of {self.steps} steps, loss {self.loss:.3f}, {self.seconds:.3g} s a step{memory}: "
            f"{self.hours:.3g} h to train"
        )


def rehearse(config: RunConfig, data: ImageDataset, steps: int = 10, *, fabric: Fabric | None = None) -> Rehearsal:
    """Train for ``steps`` steps as ``config`` says, on the first images, measure as after an epoch, write no file.

    Args:
        config: the run.
        data: the data set named in it, whole; the run takes its subset.
        steps: how many, 2 or more, or as many as an epoch has if that is less; the first one is not timed.
        fabric: the engine, see `odeadv.training.train`.

    Raises:
        ValueError: for fewer than two steps, or another data set, and as `odeadv.training.train`.
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
        on_step=lambda *_: times.append(time.perf_counter()),  # after the loss was read, so the device is done
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
