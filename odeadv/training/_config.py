"""How a network is trained, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from odeadv.support.checks import choice
from odeadv.support.plain import with_floats
from odeadv.training._defences import Undefended
from odeadv.training._objectives import Natural
from odeadv.training._step import Defence, Objective


@dataclass(frozen=True)
class TrainConfig:
    """One training run; the defaults are the paper's for CIFAR-10 (Appendix B.1), natural and without a defence.

    Attributes:
        objective: what a step minimises: `Natural`, `Pgd`, `Trades`, or one's own.
        defence: how the forward pass is solved: `Undefended`, `Layerwise`, or one's own.
        epochs: passes over the training set.
        batch_size: images a step, over all processes and micro-batches; the last, smaller batch of an epoch is left
            out, for eta belongs to a batch size.
        accumulate: micro-batches a step, one after the other: less memory, the same mean gradient. Batch statistics
            are those of a micro-batch; eta keeps its meaning (the mean over the whole batch).
        lr: initial learning rate of SGD.
        milestones: epochs after which the learning rate is divided by 10.
        momentum: of SGD.
        weight_decay: of SGD, on all parameters.
        augment: how training images are varied: ``"crop-flip"`` is the paper's (pad by 4, crop, mirror), ``"crop"``,
            ``"flip"``, or ``"none"``. Images are only mirrored if the data set allows it.
        precision: ``"fp32"``, or ``"bf16"`` for autocast.
        channels_last: memory layout of images and weights; changes speed, and results by rounding only.
        sync_batchnorm: with several processes, take batch statistics over all of them.
        compile: compile the network that attacks run (``torch.compile``); changes results by rounding only.
        stop_above: a loss above this counts as diverged.
        seed: of the initial weights, of the order of the images, of their augmentation, and of attacks and noise.

    Raises:
        ValueError: naming the first attribute that is out of range.
    """

    objective: Objective = field(default_factory=Natural)
    defence: Defence = field(default_factory=Undefended)
    epochs: int = 160
    batch_size: int = 128
    accumulate: int = 1
    lr: float = 0.1
    milestones: tuple[int, ...] = (80, 120)
    momentum: float = 0.9
    weight_decay: float = 1e-4
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = True
    sync_batchnorm: bool = True
    compile: bool = False
    stop_above: float = 1e3
    seed: int = 0
    augment: Literal["crop-flip", "crop", "flip", "none"] = "crop-flip"

    def __post_init__(self) -> None:
        with_floats(self)
        if not isinstance(self.milestones, (list, tuple)) or not all(_is_epoch(epoch) for epoch in self.milestones):
            raise ValueError(f"milestones: got {self.milestones!r}, expected a list of numbers of epochs")
        object.__setattr__(self, "milestones", tuple(self.milestones))
        for name in ("channels_last", "sync_batchnorm", "compile"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: got {getattr(self, name)!r}, expected True or False")
        for name, base in (("objective", Objective), ("defence", Defence)):
            if not isinstance(getattr(self, name), base):
                raise TypeError(f"{name}: got {getattr(self, name)!r}, expected an instance of {base.__name__}")
        for name in ("epochs", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate: got {self.accumulate}, expected a divisor of batch_size ({self.batch_size})")
        for name in ("lr", "momentum", "weight_decay"):
            if not math.isfinite(getattr(self, name)) or getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a finite number, at least 0")
        if not self.stop_above > 0:
            raise ValueError(f"stop_above: got {self.stop_above}, expected a number above 0")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed: got {self.seed}, expected a number of 64 bits")
        choice("augment", self.augment, ("crop-flip", "crop", "flip", "none"))
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision: got {self.precision!r}, expected 'fp32' or 'bf16'")
        if self.milestones and max(self.milestones) > self.epochs:
            half, late = self.epochs // 2, self.epochs * 3 // 4
            raise ValueError(
                f"milestones: got {self.milestones} for {self.epochs} epochs, expected none beyond them; the paper's "
                f"would be ({half}, {late})"
            )

    def learning_rate(self, epoch: int) -> float:
        """The learning rate of epoch number ``epoch``, counted from 0."""
        passed = sum(milestone <= epoch for milestone in self.milestones)
        return float(self.lr * 0.1**passed)


def _is_epoch(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
