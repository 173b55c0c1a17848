"""The configuration of a training, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import nn
from torch.optim import Optimizer

from odeadv.data import make_transform
from odeadv.support.checks import choice, integer, number, shown
from odeadv.support.plain import with_floats
from odeadv.training._defences import Undefended
from odeadv.training._objectives import Natural
from odeadv.training._recipe import OPTIMIZERS, learning_rates, make_optimizer, paper_rate, scaled_milestones
from odeadv.training._step import Defence, Objective

PAPER_MILESTONES = (80, 120)

Augment = Literal["crop-flip", "crop", "flip", "none"]


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The defaults are the paper's for CIFAR-10 (Appendix B.1): natural training, no defence.

    Attributes:
        objective: the loss of a step: `Natural`, `Pgd`, `Trades`, `Mart`, `Awp`, or your own class.
        defence: solves the forward pass that is trained: `Undefended`, `Layerwise`, `Penalty`, or your own class.
        epochs: number of passes over the training set.
        batch_size: images per step, over all processes and micro-batches. The last batch of an epoch is left out if it
            is smaller, because the strength of eta depends on the batch size.
        accumulate: number of micro-batches per step. They run one after the other, which saves memory and gives the
            same mean gradient. Batch statistics are computed per micro-batch. eta keeps its meaning: it belongs to the
            mean loss over the whole batch.
        lr: initial learning rate.
        milestones: epochs after which the learning rate is divided by 10. If ``epochs`` is too small for the default,
            the milestones become one half and three quarters of ``epochs``.
        momentum: momentum of SGD and RMSprop.
        weight_decay: weight decay of the optimiser.
        precision: ``"fp32"``; ``"bf16"`` for autocast; ``"fp16"`` for autocast with scaled gradients, if the device
            supports it. Costates and the gradients of attacks are not scaled, and fp16 loses numbers below 6e-8. So
            prefer bf16 if the device supports both.
        channels_last: store images and weights channels-last. This changes the speed, and results only by rounding.
        sync_batchnorm: compute batch statistics over all processes.
        compile: compile the network that attacks run (``torch.compile``). This changes results only by rounding.
        fold: run the attacks on a copy of the network whose batch norms are folded into convolutions; see `Folded`. The
            copy follows the weights in every step, and changes results only by rounding. Attacks need evaluation mode.
        stop_above: a loss above this value counts as diverged.
        check_every: read the results of the checks of steps after this number of steps. Reading waits for the device,
            so between two readings a GPU need not wait. If a check has failed, the steps since the last reading are
            redone, and the failing step raises its error. This needs a copy of weights and optimiser state; 1 reads
            after every step and needs no copy.
        draws: where the random numbers of attacks, ablations and augmentation are drawn. ``"cpu"`` gives the same
            numbers on every device; ``"device"`` avoids copies to the device. Both follow from ``seed``.
        cudnn_benchmark: set ``torch.backends.cudnn.benchmark`` during the run: cuDNN then tries its algorithms for
            every shape. Its choice may differ from run to run, which changes results by rounding.
        seed: seed of the initial weights, the order of the images, augmentation, attacks and noise.
        augment: ``"crop-flip"`` (the paper's: pad by 4, crop, mirror), ``"crop"``, ``"flip"`` or ``"none"``. Images
            are mirrored only if the data set allows it. Or transforms of torchvision.transforms.v2 by name and
            arguments: ``{"name": "RandAugment", "num_ops": 2}`` or a list of such mappings. Each image gets its own
            random numbers. Transforms receive uint8 pixels if the data set stores uint8.
        optimizer: ``{"name": "adamw", "lr": 1e-3, ...}``: the lower-case name of a class of torch.optim, and its
            arguments. Arguments that are missing here are taken from ``lr``, ``momentum`` and ``weight_decay``. The
            default is SGD.
        schedule: ``{"name": "cosine", "warmup": 5, ...}`` replaces ``milestones``. The names are ``"constant"``,
            ``"steps"``, ``"step"``, ``"cosine"``, ``"cosine-restarts"``, ``"one-cycle"``, ``"linear"``,
            ``"exponential"``, ``"polynomial"`` and ``"cyclic"``. The arguments are the arguments of the class in
            torch.optim.lr_scheduler. The rate first rises linearly for ``warmup`` epochs.
        decay: ``"all"`` applies weight decay to all parameters; ``"weights"`` only to parameters with two or more
            dimensions, which leaves out biases and norms.
        clip: largest norm of the gradient of a step; None sets no limit.
        label_smoothing: smoothing of the labels in the training loss, in [0, 1]. Attacks use unsmoothed labels.
        ema: decay of an exponential moving average of the weights; 0 switches it off. The averaged weights are
            validated, and the network has them after training.
        patience: stop if the validation accuracy (robust accuracy for adversarial objectives) has not risen for this
            number of epochs; None trains all epochs.

    Raises:
        TypeError, ValueError: if an attribute is out of range; the message names the first such attribute.
    """

    objective: Objective = field(default_factory=Natural)
    defence: Defence = field(default_factory=Undefended)
    epochs: int = 160
    batch_size: int = 128
    accumulate: int = 1
    lr: float = 0.1
    milestones: tuple[int, ...] = PAPER_MILESTONES
    momentum: float = 0.9
    weight_decay: float = 1e-4
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = True
    sync_batchnorm: bool = True
    compile: bool = False
    fold: bool = False
    stop_above: float = 1e3
    check_every: int = 50
    draws: Literal["cpu", "device"] = "cpu"
    cudnn_benchmark: bool = False
    seed: int = 0
    augment: tuple[Mapping[str, Any], ...] | Mapping[str, Any] | Augment = "crop-flip"
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    schedule: Mapping[str, Any] | None = None
    decay: Literal["all", "weights"] = "all"
    clip: float | None = None
    label_smoothing: float = 0.0
    ema: float = 0.0
    patience: int | None = None

    def __post_init__(self) -> None:
        with_floats(self)
        for name in ("channels_last", "sync_batchnorm", "compile", "fold", "cudnn_benchmark"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: got {getattr(self, name)!r}, expected True or False")
        for name, base, example in (("objective", Objective, "Pgd"), ("defence", Defence, "Layerwise")):
            if not isinstance(getattr(self, name), base):
                raise TypeError(
                    f"{name}: got {getattr(self, name)!r}, expected an instance of {base.__name__}, such as {example}()"
                )
        for name in ("epochs", "batch_size", "accumulate", "check_every"):
            integer(name, getattr(self, name))
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate: got {self.accumulate}, expected a divisor of batch_size ({self.batch_size})")
        for name in ("lr", "momentum", "weight_decay"):
            number(name, getattr(self, name), least=0)
        if not self.stop_above > 0:  # infinity is allowed and never stops
            raise ValueError(f"stop_above: got {self.stop_above}, expected a number above 0")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed: got {self.seed}, expected a number of 64 bits")
        self._check_augment()
        choice("precision", self.precision, ("fp32", "bf16", "fp16"))
        choice("draws", self.draws, ("cpu", "device"))
        choice("decay", self.decay, ("all", "weights"))
        number("label_smoothing", self.label_smoothing, least=0, most=1)
        number("ema", self.ema, least=0, most=1)
        if self.clip is not None:
            object.__setattr__(self, "clip", number("clip", self.clip, above=0))
        if self.patience is not None:
            integer("patience", self.patience)
        self._check_schedule()

    def _check_augment(self) -> None:
        if isinstance(self.augment, str):
            choice("augment", self.augment, get_args(Augment))
            return
        specs = [self.augment] if isinstance(self.augment, Mapping) else self.augment
        if not isinstance(specs, list | tuple) or not specs:
            raise TypeError(f"augment: got {shown(self.augment)}, expected a name, a transform or a list of them")
        make_transform(specs)
        object.__setattr__(self, "augment", tuple(specs))

    def _check_schedule(self) -> None:
        for name, example in (("optimizer", "{'name': 'adam'}"), ("schedule", "{'name': 'cosine', 'warmup': 1}")):
            value = getattr(self, name)
            if value is not None:
                if not isinstance(value, Mapping):
                    raise TypeError(
                        f"{name}: got {shown(value)}, expected a mapping with a name and its arguments, such as "
                        f"{example}"
                    )
                object.__setattr__(self, name, dict(value))
        if not isinstance(self.milestones, (list, tuple)) or not all(_is_epoch(epoch) for epoch in self.milestones):
            raise ValueError(f"milestones: got {self.milestones!r}, expected a list of numbers of epochs")
        object.__setattr__(self, "milestones", tuple(self.milestones))
        if self.optimizer:
            # Make an optimiser here, so that a wrong argument raises before training. This draws no random numbers.
            self.make_optimizer(nn.utils.skip_init(nn.Linear, 2, 2))  # type: ignore[no-untyped-call]
        if self.schedule is not None:
            learning_rates(self.schedule, self.base_lr, self.epochs, 2)
        elif self.milestones and max(self.milestones) > self.epochs:
            scaled = scaled_milestones(self.epochs)
            if self.milestones != PAPER_MILESTONES:
                raise ValueError(
                    f"milestones: got {self.milestones} for {self.epochs} epochs, expected none beyond them; the "
                    f"paper's would be {scaled}"
                )
            object.__setattr__(self, "milestones", scaled)

    @property
    def base_lr(self) -> float:
        """The learning rate at which a schedule starts."""
        return number("optimizer: lr", self.optimizer.get("lr", self.lr), least=0)

    def make_optimizer(self, net: nn.Module) -> Optimizer:
        """Return an optimiser of the parameters of ``net``.

        Args:
            net: the network, on the device on which it is trained. Its parameters are divided into those with and
                without weight decay according to ``decay``.
        """
        name = choice("optimizer: name", self.optimizer.get("name", "sgd"), OPTIMIZERS)
        shared = {"lr": self.lr, "weight_decay": self.weight_decay}
        if name in ("sgd", "rmsprop"):
            shared["momentum"] = self.momentum
        if name == "rprop":
            del shared["weight_decay"]
        return make_optimizer(net.named_parameters(), {"name": name, **shared, **self.optimizer}, decay=self.decay)

    def learning_rate(self, epoch: int) -> float:
        """Return the learning rate of epoch number ``epoch``, counted from 0, according to ``milestones``."""
        return paper_rate(self.base_lr, self.milestones, epoch)

    def learning_rates(self, steps: int) -> list[float]:
        """Return the learning rate of every step of the run.

        Args:
            steps: number of steps per epoch.
        """
        if self.schedule is not None:
            return learning_rates(self.schedule, self.base_lr, self.epochs, steps)
        return [self.learning_rate(epoch) for epoch in range(self.epochs) for _ in range(steps)]


def _is_epoch(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
