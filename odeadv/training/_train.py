"""The training loop: the same for every objective, defence, network and number of processes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from odeadv.data import ImageDataset
from odeadv.data.checks import check_images, check_labels, check_range
from odeadv.models import FieldNetwork, Network
from odeadv.support.precision import warn_of_imitated_bf16
from odeadv.training._config import TrainConfig
from odeadv.training._distributed import make_fabric
from odeadv.training._loop import EpochResult, TrainResult, _Run

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def train(
    net: Network,
    data: ImageDataset,
    config: TrainConfig,
    *,
    validation: tuple[Tensor, Tensor] | None = None,
    checkpoints: str | os.PathLike[str] | None = None,
    checkpoint_every: float = 120.0,
    identity: Any = None,
    fabric: Fabric | None = None,
    on_step: Callable[[int, int, int], object] | None = None,
    on_epoch: Callable[[EpochResult], object] | None = None,
) -> TrainResult:
    """Train ``net`` in place on the training images of ``data``.

    Images are padded by 4, cropped and (where the data set allows it) flipped. All randomness comes from
    ``config.seed``, so that runs that differ in their objective or defence only see the same batches; torch's global
    random state, which noise in a network draws from, is seeded inside and put back afterwards.

    With ``checkpoints``, a run that was stopped at any moment goes on where its newest checkpoint was written, and
    ends with bit for bit the weights of a run that was not stopped (on as many threads and processes).

    Args:
        net: the network, left in training mode on the device of the engine.
        data: its training split is used.
        config: how.
        validation: images ``uint8`` (n, height, width, 3) and labels, for the choice of the best epoch.
        checkpoints: folder for them; none are written without.
        checkpoint_every: seconds between checkpoints within an epoch; one is written after every epoch.
        identity: plain data that says what is trained, beside ``config``; a checkpoint of another is refused.
        fabric: the engine (lightning-fabric), launched; one process on the best device, if not given.
        on_step: called after every step with (epoch, step, steps in an epoch), counted from 1, in the first process.
        on_epoch: called after every epoch, in the first process; also, when a run goes on, for the epochs before.

    Returns:
        One result an epoch, and the best weights.

    Raises:
        TypeError: if an argument is of another type, or the network of another dtype than float32 or float64.
        ValueError: if the training set is smaller than a batch, the batch cannot be shared equally between the
            processes, the network has nothing to train, the validation images or labels do not fit, or the checkpoints
            are those of another run.
        TrainingDiverged: if a loss or state is NaN or infinite or the loss above ``config.stop_above``, with the
            epoch, the step, the layer with the largest perturbation, and what to try.
        OSError: if a checkpoint cannot be written.

    Warns:
        RuntimeWarning: if bf16 is asked for on a CPU that only imitates it.
    """
    module = _module(net)
    _check(data, config, fabric, validation)
    checkpoints = None if checkpoints is None else Path(checkpoints)
    if fabric is None:
        fabric = make_fabric(precision=config.precision)
    if config.precision == "bf16":
        warn_of_imitated_bf16("precision", fabric.device, "fp32")
    if config.channels_last:
        module.to(memory_format=torch.channels_last)
    with _random_state(f"odeadv noise {config.seed} {fabric.global_rank}", fabric.device):
        run = _Run(module, data, config, fabric, validation, checkpoints, checkpoint_every, identity)
        return run.go(on_step, on_epoch)


def _module(net: Network) -> FieldNetwork:
    if not isinstance(net, nn.Module) or not callable(getattr(net, "field", None)):
        raise TypeError(
            f"net: got {type(net).__name__}, expected a torch.nn.Module with field(images, labels, eta), see "
            "odeadv.models.Network"
        )
    dtypes = {parameter.dtype for parameter in net.parameters() if parameter.requires_grad}
    if not dtypes:
        raise ValueError("net: has no parameter with requires_grad, expected some to train")
    if not dtypes <= {torch.float32, torch.float64}:
        raise TypeError(
            f"net: has parameters of {', '.join(map(str, dtypes))}, expected torch.float32 (or float64); the "
            'precision "bf16" of the configuration computes in bfloat16 and keeps them so'
        )
    found: Any = net
    return found  # type: ignore[no-any-return]


def _check(
    data: ImageDataset, config: TrainConfig, fabric: Fabric | None, validation: tuple[Tensor, Tensor] | None
) -> None:
    for name, value, kind in (("data", data, ImageDataset), ("config", config, TrainConfig)):
        if not isinstance(value, kind):
            raise TypeError(f"{name}: got {type(value).__name__}, expected an instance of {kind.__name__}")
    if validation is not None:
        if not isinstance(validation, (tuple, list)) or len(validation) != 2:
            raise TypeError(f"validation: got {type(validation).__name__}, expected a pair (images, labels)")
        check_images("validation images", validation[0])
        check_labels("validation labels", validation[1], validation[0])
        check_range("validation labels", validation[1], data.num_classes)
    if len(data.train_images) < config.batch_size:
        raise ValueError(
            f"batch_size: got {config.batch_size} for {len(data.train_images)} training images, expected at most that"
        )
    parts = config.accumulate * (1 if fabric is None else fabric.world_size)
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size: got {config.batch_size} for {parts} equal parts (processes times micro-batches), expected a "
            "multiple of that; eta belongs to the whole batch"
        )
    eta = config.defence.eta
    if eta and config.defence.strength is None and config.batch_size != 128:
        warnings.warn(
            f"eta: {eta:g} is for the mean over batches of {config.batch_size}; the paper's values belong to "
            f"batches of 128, where the same perturbation has eta = {eta * 128 / config.batch_size:g}",
            stacklevel=3,
        )


@contextlib.contextmanager
def _random_state(seed: str, device: torch.device) -> Iterator[None]:
    """Torch's global random state seeded inside from a text, and put back afterwards."""
    cuda: Sequence[torch.device] = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little") >> 1)
        yield
