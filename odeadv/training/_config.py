"""How a network is trained, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from odeadv.splitting import schemes


@dataclass(frozen=True)
class TrainConfig:
    """One training run; the defaults are the paper's for CIFAR-10 (Appendix B.1), without a defence.

    Attributes:
        epochs: passes over the training set.
        batch_size: images a step; the last, smaller batch of an epoch is left out, for eta belongs to a batch size.
        scheme: splitting scheme of the forward pass: ``"lie"`` is LAD, ``"strang"`` LAD-SM; None trains the network
            as it is.
        eta: strength of the costate, in the convention of a loss averaged over the batch.
        lr: initial learning rate of SGD.
        milestones: epochs after which the learning rate is divided by 10.
        momentum: of SGD.
        weight_decay: of SGD, on all parameters.
        precision: ``"fp32"``, or ``"bf16"`` for autocast.
        channels_last: memory layout of images and weights; changes speed, and results by rounding only.
        seed: of the initial weights, of the order of the images and of their augmentation.

    Raises:
        ValueError: naming the first attribute that is out of range.
    """

    epochs: int = 160
    batch_size: int = 128
    scheme: str | None = None
    eta: float = 0.0
    lr: float = 0.1
    milestones: tuple[int, ...] = (80, 120)
    momentum: float = 0.9
    weight_decay: float = 1e-4
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        for name in ("lr", "momentum", "weight_decay", "eta"):
            if not math.isfinite(getattr(self, name)) or getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a finite number, at least 0")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision: got {self.precision!r}, expected 'fp32' or 'bf16'")
        if self.scheme is not None:
            schemes.get(self.scheme)
        elif self.eta:
            raise ValueError(f"eta: got {self.eta} without a scheme, which would have no effect; give scheme='lie'")

    def learning_rate(self, epoch: int) -> float:
        """The learning rate of epoch number ``epoch``, counted from 0."""
        passed = sum(milestone <= epoch for milestone in self.milestones)
        return float(self.lr * 0.1**passed)
