"""The training loop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from odeadv._solution import SolveError
from odeadv._solve import solve
from odeadv.data import Batches, ImageDataset
from odeadv.models import PreActResNet
from odeadv.training._config import TrainConfig


@dataclass(frozen=True)
class EpochResult:
    """What one epoch came to.

    Attributes:
        epoch: its number, counted from 1.
        loss: mean training loss, L_LAD where there is a defence.
        accuracy: accuracy of the same forward passes, in [0, 1].
        lr: learning rate.
        seconds: wall time.
    """

    epoch: int
    loss: float
    accuracy: float
    lr: float
    seconds: float


class TrainingDiverged(RuntimeError):
    """The loss or a state became NaN or infinite."""


def train(
    net: PreActResNet,
    data: ImageDataset,
    config: TrainConfig,
    *,
    on_step: Callable[[int, int, int], object] | None = None,
    on_epoch: Callable[[EpochResult], object] | None = None,
) -> list[EpochResult]:
    """Train ``net`` in place on the training images of ``data``, on the device it is on.

    Images are padded by 4, cropped and (where the data set allows it) flipped; all randomness comes from
    ``config.seed``, so two runs that differ in their defence only see the same batches.

    Args:
        net: the network, left in training mode.
        data: its training split is used.
        config: how.
        on_step: called after every step with (epoch, step, steps in an epoch), counted from 1.
        on_epoch: called after every epoch.

    Returns:
        One result an epoch.

    Raises:
        ValueError: if the training set is smaller than a batch.
        TrainingDiverged: if a loss or state is NaN or infinite, with the epoch, the step and what to try.
    """
    if len(data.train_images) < config.batch_size:
        raise ValueError(
            f"batch_size: got {config.batch_size} for {len(data.train_images)} training images, expected at most that"
        )
    device = next(net.parameters()).device
    batches = Batches(
        data.train_images,
        data.train_labels,
        batch_size=config.batch_size,
        shuffle=True,
        augment=True,
        flip=data.flip,
        drop_last=True,
        generator=torch.Generator().manual_seed(config.seed),
        device=device,
    )
    if config.channels_last:
        net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        net.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    net.train()
    results = []
    for epoch in range(config.epochs):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate(epoch)
        began = time.perf_counter()
        loss_sum, correct = torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device)
        for step, (images, labels) in enumerate(batches):
            try:
                loss, logits = _forward(net, images, labels, config)
            except SolveError as error:
                raise TrainingDiverged(
                    f"training: epoch {epoch + 1}, step {step + 1}: {error.solution.status.message}; lower lr "
                    f"({config.lr:g}) or eta ({config.eta:g} at batch size {config.batch_size})"
                ) from error
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            loss_sum += loss.detach()
            correct += (logits.detach().argmax(1) == labels).sum()
            if on_step is not None:
                on_step(epoch + 1, step + 1, len(batches))
        seen = len(batches) * config.batch_size
        result = EpochResult(
            epoch=epoch + 1,
            loss=float(loss_sum) / len(batches),
            accuracy=int(correct) / seen,
            lr=config.learning_rate(epoch),
            seconds=time.perf_counter() - began,
        )
        results.append(result)
        if on_epoch is not None:
            on_epoch(result)
    return results


def _forward(net: PreActResNet, images: Tensor, labels: Tensor, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Loss and logits of the solve the defence asks for."""
    device = images.device.type
    autocast = torch.autocast(device, dtype=torch.bfloat16) if config.precision == "bf16" else contextlib.nullcontext()
    with autocast:
        solution = solve(net.field(images, labels, config.eta), scheme=config.scheme or "lie")
    assert solution.loss is not None
    assert solution.output is not None
    return solution.loss, solution.output
