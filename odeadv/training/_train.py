"""`train`: check the arguments; prepare the data, the engine and the checkpoints; run the loop."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from odeadv.data import Batches, ImageDataset, Stream, make_transform
from odeadv.data.checks import check_pixels, check_range
from odeadv.data.stream import as_inputs, count_samples, stacked
from odeadv.models import FieldNetwork, Network
from odeadv.support.checks import class_indices, number
from odeadv.support.digests import data_digest, model_digest, tensors_digest
from odeadv.support.files import read_tensors
from odeadv.support.plain import identity as essential
from odeadv.support.precision import warn_of_imitated_bf16
from odeadv.support.progress import ProgressLine
from odeadv.training._checkpoint import SCHEMA as CHECKPOINT_SCHEMA
from odeadv.training._checkpoint import Checkpoints, architecture, without
from odeadv.training._config import TrainConfig
from odeadv.training._defences import without_field
from odeadv.training._distributed import check_precision, make_fabric
from odeadv.training._loop import Source, TrainingPlan, TrainingRun
from odeadv.training._results import EpochResult, TrainResult

if TYPE_CHECKING:
    from lightning_fabric import Fabric

#: Training data: in memory, or read as it is needed.
TrainingData = ImageDataset | Dataset[Any] | DataLoader[Any]

#: Called after every epoch with numbers by name and the epoch, counted from 1.
Logger = Callable[[Mapping[str, float], int], object]
OnStep = Callable[[int, int, int], object]
OnEpoch = Callable[[EpochResult], object]


def train(
    net: Network,
    data: TrainingData,
    config: TrainConfig,
    *,
    validation: tuple[Tensor, Tensor] | Dataset[Any] | None = None,
    checkpoints: str | os.PathLike[str] | None = None,
    checkpoint_every: float = 120.0,
    identity: Any = None,
    init: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
    fabric: Fabric | None = None,
    progress: bool = True,
    logger: Logger | None = None,
    on_step: Callable[[int, int, int], object] | None = None,
    on_epoch: Callable[[EpochResult], object] | None = None,
) -> TrainResult:
    """Train ``net`` in place.

    All randomness comes from ``config.seed``, so runs that differ only in objective or defence see the same batches.
    Noise in a network draws from torch's global random state. This state is seeded inside and restored afterwards.

    With ``checkpoints``, a stopped run continues from its newest checkpoint. Its final weights are bitwise equal to the
    weights of an uninterrupted run (with the same numbers of threads and processes). SIGTERM and Ctrl-C save a
    checkpoint after the current step. A finished run continues if ``epochs`` is increased and the learning rates of its
    finished epochs are the same.

    Args:
        net: the network; afterwards it is in training mode on the device of the engine.
        data: an `ImageDataset` (its training split); or a `torch.utils.data.Dataset` or ``DataLoader`` of pairs
            (input, class number), whose samples are read when they are needed. A loader shuffles and transforms by
            itself, and its batch size must equal ``config.batch_size``. Every process reads the whole batch. A
            resumed run is bit-identical if randomness in the data comes from torch's global generator.
        config: the configuration.
        validation: images and labels on which the best epoch is chosen. Images are uint8 (n, height, width, 3) or in
            the form that ``net`` takes; labels are (n,), int64. Or a `Dataset`, which is read once.
        checkpoints: folder for checkpoints; None writes no checkpoints.
        checkpoint_every: seconds between checkpoints within an epoch; a checkpoint is also written after every epoch.
        identity: plain data that identify the run in addition to ``config``; other checkpoints are rejected.
        init: weights to start from: a checkpoint, ``last.safetensors`` or ``best.safetensors`` of a run, or a mapping
            from names to tensors. Only weights and buffers are loaded.
        fabric: the launched engine (lightning-fabric); the default is one process on the best device.
        progress: on a terminal or in a notebook, show a bar with loss and accuracy of the last epoch. Elsewhere print
            one line per minute to the standard error.
        logger: called after every epoch with numbers by name (`EpochResult.scalars`) and the epoch: ``wandb_run.log``,
            ``mlflow.log_metrics``, or any function. A resumed run also calls it for the earlier epochs.
        on_step: called in the first process after every step with (epoch, step, steps per epoch), counted from 1.
        on_epoch: called in the first process after every epoch. A resumed run also calls it for the earlier epochs.

    Returns:
        One result per epoch, and the best weights.

    Raises:
        TypeError: if an argument has the wrong type, or the dtype of the network is not float32 or float64.
        ValueError: if the training set is smaller than a batch, or a batch cannot be divided equally among the
            processes. Also if the network lacks trainable parameters, or if validation data, the weights of ``init`` or
            the checkpoints do not fit.
        TrainingDiverged: if a loss or state is NaN or infinite, or the loss is above ``config.stop_above``. The message
            has the epoch, the step, the layer with the largest perturbation, and advice.
        TrainingStopped: after SIGTERM; it is a SystemExit with code 143.
        KeyboardInterrupt: after Ctrl-C; the message names the checkpoint.
        OSError: if a checkpoint cannot be written.

    Warns:
        RuntimeWarning: if bf16 is requested on a CPU that only emulates it.

    Example:
        >>> digits = odeadv.data.load("digits").resized(8).subset(200, 50)
        >>> net = odeadv.models.residual_mlp(4, 16, image_size=8, mean=digits.mean, std=digits.std)
        >>> config = odeadv.training.TrainConfig(epochs=1, milestones=(), augment="none")
        >>> len(odeadv.training.train(net, digits, config).epochs)
        1
    """
    module = _module(net)
    checkpoint_every = number("checkpoint_every", checkpoint_every, least=0)
    if isinstance(validation, Dataset):
        images, labels = stacked([validation[index] for index in range(count_samples(validation))])
        validation = as_inputs(images), labels
    _check(module, data, config, fabric, validation)
    if fabric is None:
        fabric = make_fabric(precision=config.precision)
    check_precision(config.precision, fabric)
    if config.precision == "bf16":
        warn_of_imitated_bf16("precision", fabric.device, "fp32")
    if init is not None:
        load_weights(module, init)
    if config.channels_last:
        module.to(memory_format=torch.channels_last)
    kept = None
    if checkpoints is not None:
        # Leave out fields with default values, as the name of a run does, because fields may be added later.
        whole: dict[str, Any] = {"config": essential(config), "run": identity, "data": _fingerprint(data)}
        whole["processes"] = fabric.world_size
        whole["net"] = architecture(module)
        whole["validation"] = None if validation is None else data_digest(*validation)
        if init is not None:
            whole["init"] = model_digest(module)
        kept = Checkpoints(Path(checkpoints), whole)
    on_step, on_epoch = _watched(config, progress, logger, on_step, on_epoch)
    generator = torch.Generator().manual_seed(config.seed)
    noise = f"odeadv noise {config.seed} {fabric.global_rank}"
    with _random_state(noise, fabric.device), _searching(config.cudnn_benchmark):
        batches = _batches(data, config, generator, fabric.device)
        plan = TrainingPlan(module, batches, generator, config, fabric, validation, kept, checkpoint_every)
        return TrainingRun(plan).go(on_step, on_epoch)


def _watched(
    config: TrainConfig, progress: bool, logger: Logger | None, on_step: OnStep | None, on_epoch: OnEpoch | None
) -> tuple[OnStep | None, OnEpoch | None]:
    """Return the callbacks of the loop: the progress line and the logger first, then the callbacks of the caller."""
    epochs: list[OnEpoch] = [] if on_epoch is None else [on_epoch]
    steps: list[OnStep] = [] if on_step is None else [on_step]
    if logger is not None:
        epochs.insert(0, lambda result: logger(result.scalars(), result.epoch))
    if progress and importlib.util.find_spec("tqdm") is not None:
        line = ProgressLine("training", unit="step")
        steps.insert(0, lambda epoch, step, count: line((epoch - 1) * count + step, config.epochs * count))
        epochs.insert(0, lambda result: line.note(f"loss {result.loss:.4g}, accuracy {100 * result.accuracy:.1f} %"))

    def every_step(epoch: int, step: int, count: int) -> None:
        for call in steps:
            call(epoch, step, count)

    def every_epoch(result: EpochResult) -> None:
        for call in epochs:
            call(result)

    return every_step if steps else None, every_epoch if epochs else None


def load_weights(net: nn.Module, source: str | os.PathLike[str] | Mapping[str, Tensor]) -> None:
    """Load weights and buffers into ``net`` from a file of odeadv, the folder of a run, or a mapping of tensors.

    Args:
        net: the network.
        source: ``last.safetensors``, ``best.safetensors``, a checkpoint of `train`, the folder of a run (its last
            weights are loaded), or a mapping such as a ``state_dict``.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the tensors do not fit the network; the message names ``init``.
    """
    tensors = _read_weights(source)
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"init: the weights do not fit the network: {error}") from None


def weights_digest(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> str:
    """Return 16 hex digits that identify weights and buffers; for ``source`` see `load_weights`.

    Args:
        source: as for `load_weights`.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is damaged.
    """
    return tensors_digest(_read_weights(source))


def _read_weights(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source)
    tensors, info = read_tensors(path / "last.safetensors" if path.is_dir() else path)
    if info.get("schema") == CHECKPOINT_SCHEMA:
        tensors = without("averaged", tensors) or without("model", tensors)
    return tensors


def _batches(data: TrainingData, config: TrainConfig, generator: torch.Generator, device: torch.device) -> Source:
    named = config.augment if isinstance(config.augment, str) else ""
    pad, flip = 4 if "crop" in named else 0, "flip" in named
    transform = make_transform(config.augment) if isinstance(config.augment, tuple) else None
    if not isinstance(data, ImageDataset):
        return Stream(
            data, batch_size=config.batch_size, pad=pad, flip=flip, transform=transform, generator=generator,
            device=device, draws=config.draws,
        )  # fmt: skip
    return Batches(
        data.train_images,
        data.train_labels,
        batch_size=config.batch_size,
        shuffle=True,
        augment=bool(pad or flip),
        flip=data.flip and flip,
        pad=pad,
        transform=transform,
        drop_last=True,
        generator=generator,
        device=device,
        draws=config.draws,
    )


def _fingerprint(data: TrainingData) -> str:
    """Return a text that identifies the data; for data that are read on demand only by type and length."""
    if isinstance(data, ImageDataset):
        return data.fingerprint()
    dataset = data.dataset if isinstance(data, DataLoader) else data
    return f"{type(dataset).__module__}.{type(dataset).__qualname__} {count_samples(data)}"


def _module(net: Network) -> FieldNetwork:
    if not isinstance(net, nn.Module) or not callable(getattr(net, "field", None)):
        raise TypeError(without_field(net))
    dtypes = {parameter.dtype for parameter in net.parameters() if parameter.requires_grad}
    if not dtypes:
        raise ValueError("net: lacks a parameter with requires_grad, expected some to train")
    if not dtypes <= {torch.float32, torch.float64}:
        raise TypeError(
            f"net: has parameters of {', '.join(map(str, dtypes))}, expected torch.float32 (or float64); the "
            'precision "bf16" of the configuration computes in bfloat16 and keeps them so'
        )
    found: Any = net
    return found  # type: ignore[no-any-return]


def _check(
    net: FieldNetwork,
    data: TrainingData,
    config: TrainConfig,
    fabric: Fabric | None,
    validation: tuple[Tensor, Tensor] | None,
) -> None:
    if not isinstance(data, ImageDataset | Dataset | DataLoader):
        raise TypeError(
            f"data: got {type(data).__name__}, expected an instance of ImageDataset, torch.utils.data.Dataset or "
            "DataLoader; TensorDataset(images, labels) of torch.utils.data makes one of tensors"
        )
    if not isinstance(config, TrainConfig):
        raise TypeError(f"config: got {type(config).__name__}, expected an instance of TrainConfig")
    if validation is not None:
        if not isinstance(validation, (tuple, list)) or len(validation) != 2:
            raise TypeError(f"validation: got {type(validation).__name__}, expected a pair (images, labels)")
        if isinstance(data, ImageDataset):  # its validation images must also be pixels
            check_pixels("validation images", validation[0])
        class_indices("validation labels", validation[1], len(validation[0]))
        check_range("validation labels", validation[1], net.num_classes)
    if config.patience is not None and validation is None:
        raise ValueError(f"patience: got {config.patience} without validation, expected validation images to judge by")
    if isinstance(data, ImageDataset) and len(data.train_images) < config.batch_size:
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
    """Seed torch's global random state from the text ``seed`` in the body, and restore it afterwards."""
    cuda: Sequence[torch.device] = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little") >> 1)
        yield


@contextlib.contextmanager
def _searching(on: bool) -> Iterator[None]:
    """If ``on``, let cuDNN choose its algorithms by trial in the body; restore the caller's setting afterwards."""
    before = torch.backends.cudnn.benchmark
    try:
        torch.backends.cudnn.benchmark = before or on
        yield
    finally:
        torch.backends.cudnn.benchmark = before
