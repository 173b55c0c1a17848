"""Training in several processes: the rows that each process computes, and batch statistics over all processes."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from odeadv.support.checks import choice
from odeadv.support.extras import extra

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def make_fabric(
    *,
    precision: str = "fp32",
    accelerator: str = "auto",
    devices: int = 1,
    nodes: int = 1,
) -> Fabric:
    """Return the engine: device, precision and processes. ``torchrun`` overrides ``devices`` and ``nodes``.

    Args:
        precision: ``"fp32"``, or ``"bf16"`` or ``"fp16"`` (autocast).
        accelerator: accelerator of lightning-fabric: ``"auto"``, ``"cpu"``, ``"cuda"``, ...
        devices: number of processes on this machine.
        nodes: number of machines.

    Raises:
        ValueError: if the device does not support the precision.
    """
    with extra("train"):
        from lightning_fabric import Fabric

    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun has started this process and sets the numbers
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    names = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
    choice("precision", precision, names)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*AMP with fp16 is not supported on CPU")  # an error follows
        fabric = Fabric(
            accelerator=accelerator,
            devices=devices,
            num_nodes=nodes,
            strategy="ddp" if devices * nodes > 1 else "auto",
            precision=names[precision],  # type: ignore[arg-type]
        )
    check_precision(precision, fabric)
    return fabric


def check_precision(precision: str, fabric: Fabric) -> None:
    """Raise ValueError if ``precision`` is fp16 and the engine does not scale gradients."""
    if precision == "fp16" and not fabric.strategy.precision.state_dict():
        raise ValueError(
            f'precision: got "fp16" on {fabric.device.type}, which does not scale gradients; set "bf16" or "fp32", or '
            'train on a GPU with an engine of make_fabric(precision="fp16")'
        )


def rows_of(rank: int, world: int, part: int, parts: int, batch: int) -> slice:
    """Return the rows of a global batch for process ``rank`` of ``world``, and micro-batch ``part`` of ``parts``."""
    size = batch // (world * parts)
    first = (rank * parts + part) * size
    return slice(first, first + size)


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is summed over all processes as well."""

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with the statistics of the batch over all processes, on any device.

    `torch.nn.SyncBatchNorm` does the same, but only on GPUs. Every process must hold the same number of images. The
    variance is computed in two passes. The running variance is unbiased over the global batch, as in
    `torch.nn.BatchNorm2d`.
    """

    plain_in_evaluation = True  # folding needs this mark

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input``, (n, channels, height, width)."""
        if not self.training or not dist.is_initialized():
            return super().forward(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean = _sum_over_processes(x.sum((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance = _sum_over_processes((centred * centred).sum((0, 2, 3))) / count
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                assert self.num_batches_tracked is not None
                self.num_batches_tracked.add_(1)
                factor = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
                self.running_var.lerp_((variance * (count / (count - 1))).to(self.running_var.dtype), factor)
        scaled = centred * torch.rsqrt(variance + self.eps)[:, None, None]
        if self.affine:
            scaled = torch.addcmul(self.bias[:, None, None], scaled, self.weight[:, None, None])
        return scaled.to(input.dtype)


def _sum_over_processes(value: Tensor) -> Tensor:
    total: Tensor = _SumOverProcesses.apply(value)
    return total


def synchronise_batch_norm(module: nn.Module) -> None:
    """Let every ``BatchNorm2d`` in ``module`` use statistics over all processes, in place; parameters do not change."""
    for part in module.modules():
        if type(part) is nn.BatchNorm2d:
            part.__class__ = SyncBatchNorm2d
