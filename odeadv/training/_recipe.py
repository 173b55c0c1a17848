"""Optimisers, the learning rate of every step, and averaged weights."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from odeadv.support.checks import choice, did_you_mean, number

#: Optimisers by name: the classes of torch.optim that need neither a closure nor sparse gradients.
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    if name not in ("LBFGS", "SparseAdam")
}

#: Schedules by name: the classes of torch.optim.lr_scheduler whose rates depend only on the number of steps.
SCHEDULES: dict[str, str] = {
    "constant": "ConstantLR",
    "steps": "MultiStepLR",
    "step": "StepLR",
    "cosine": "CosineAnnealingLR",
    "cosine-restarts": "CosineAnnealingWarmRestarts",
    "one-cycle": "OneCycleLR",
    "linear": "LinearLR",
    "exponential": "ExponentialLR",
    "polynomial": "PolynomialLR",
    "cyclic": "CyclicLR",
}


def make_optimizer(
    parameters: Iterator[tuple[str, nn.Parameter]], arguments: Mapping[str, Any], *, decay: str
) -> torch.optim.Optimizer:
    """Return an optimiser of named parameters.

    Args:
        parameters: pairs of name and parameter.
        arguments: ``name``, a key of `OPTIMIZERS`, and the arguments of the class.
        decay: ``"all"`` applies weight decay to all parameters; ``"weights"`` only to parameters with two or more
            dimensions, which leaves out biases and the scales of norms.

    Raises:
        TypeError, ValueError: if the class does not accept the arguments; the message names ``optimizer``.
    """
    arguments = dict(arguments)
    kind = OPTIMIZERS[choice("optimizer: name", arguments.pop("name", "sgd"), OPTIMIZERS)]
    known = list(inspect.signature(kind).parameters)[1:]
    for name in arguments:
        if name not in known:
            raise ValueError(
                f"optimizer: got {name!r} for {kind.__name__}{did_you_mean(name, known)}; it takes {known}"
            )
    values = [value for _, value in parameters]
    groups: list[dict[str, Any]] = [{"params": values}]
    if decay == "weights":
        groups = [
            {"params": [value for value in values if value.ndim > 1]},
            {"params": [value for value in values if value.ndim <= 1], "weight_decay": 0.0},
        ]
    try:
        return kind([group for group in groups if group["params"]], **arguments)
    except (TypeError, ValueError, RuntimeError) as error:  # fused=True raises RuntimeError on some devices
        raised = TypeError if isinstance(error, TypeError) else ValueError
        raise raised(f"optimizer: {kind.__name__}: {error}") from None


def learning_rates(schedule: Mapping[str, Any], lr: float, epochs: int, steps: int) -> list[float]:
    """Return the learning rate of every step of a run.

    The list depends only on the arguments, so a resumed run needs no saved state of the schedule.

    Args:
        schedule: ``name``, a key of `SCHEDULES`; ``warmup``, the number of epochs in which the rate first rises
            linearly; ``each``, ``"step"`` or ``"epoch"``, the unit of the torch class; and the arguments of this class.
        lr: the base learning rate.
        epochs: number of epochs of the run.
        steps: number of steps per epoch.

    Raises:
        TypeError, ValueError: if ``schedule`` is wrong; the message names it.
    """
    arguments = dict(schedule)
    name = choice("schedule: name", arguments.pop("name", None), SCHEDULES)
    warmup = number("schedule: warmup", arguments.pop("warmup", 0), least=0, most=epochs)
    by_epoch = name in ("steps", "step", "exponential", "cosine-restarts")
    each = choice("schedule: each", arguments.pop("each", "epoch" if by_epoch else "step"), ("epoch", "step"))
    rising = round(warmup * steps)
    # The schedule begins after the warm-up and ends with the run.
    count = epochs if each == "epoch" else max(1, epochs * steps - rising)
    kind = getattr(torch.optim.lr_scheduler, SCHEDULES[name])
    if name == "one-cycle" and arguments.get("cycle_momentum"):
        raise ValueError("schedule: got cycle_momentum=True, expected False; the momentum stays as it is")
    defaults: dict[str, dict[str, Any]] = {
        "constant": {"factor": 1.0},
        "steps": {"milestones": [count // 2, count * 3 // 4]},
        "cosine": {"T_max": count},
        "one-cycle": {"max_lr": lr, "total_steps": count, "cycle_momentum": False},
        "linear": {"start_factor": 1.0, "end_factor": 0.0, "total_iters": count},
        "polynomial": {"total_iters": count},
        "cyclic": {"cycle_momentum": False},
    }
    parameter = torch.zeros(1, requires_grad=True)
    try:
        scheduler = kind(torch.optim.SGD([parameter], lr=lr), **{**defaults.get(name, {}), **arguments})
    except (TypeError, ValueError) as error:
        raise type(error)(f"schedule: {kind.__name__}: {error}") from None
    values = []
    with warnings.catch_warnings():
        # torch warns because the optimiser makes no steps here.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for _ in range(count):
            values.append(float(scheduler.get_last_lr()[0]))
            if len(values) < count:
                scheduler.step()
    if each == "epoch":
        rates = [values[number // steps] for number in range(epochs * steps)]
        return [rate * min(1.0, (number + 1) / rising) if rising else rate for number, rate in enumerate(rates)]
    first = [values[0] * (number + 1) / rising for number in range(min(rising, epochs * steps))]
    return (first + values)[: epochs * steps]


class MovingAverage:
    """The exponential moving average of a network's state: parameters and floating-point buffers.

    Args:
        net: the network before training.
        decay: weight of the old average in each step. Step n (from 0) uses (1 + n) / (10 + n) if this is smaller, so
            that the random initial weights are forgotten soon.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.tensors = {name: value.detach().clone() for name, value in net.state_dict().items()}
        self._decay = decay

    def update(self, net: nn.Module, number: int) -> None:
        """Update the average with the state of ``net`` after step ``number`` of the run, counted from 0."""
        decay = min(self._decay, (1 + number) / (10 + number))
        with torch.no_grad():
            for name, value in net.state_dict().items():
                kept = self.tensors[name]
                if value.is_floating_point():
                    kept.lerp_(value.to(kept), 1.0 - decay)
                else:
                    kept.copy_(value)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the average by ``tensors``, the average in a checkpoint."""
        for name, value in self.tensors.items():
            value.copy_(tensors[name])


def paper_rate(lr: float, milestones: tuple[int, ...], epoch: int) -> float:
    """Return ``lr`` divided by 10 for every milestone that epoch number ``epoch``, counted from 0, has reached."""
    return float(lr * 0.1 ** sum(milestone <= epoch for milestone in milestones))


def scaled_milestones(epochs: int) -> tuple[int, ...]:
    """Return milestones at one half and three quarters of ``epochs``, as in the paper; an epoch 0 is left out."""
    return tuple(sorted({at for at in (epochs // 2, math.floor(epochs * 0.75)) if at > 0}))
