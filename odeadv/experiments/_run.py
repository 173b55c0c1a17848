"""Train and evaluate one run. The result is a folder with weights, metrics and one JSON record."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from odeadv._version import __version__
from odeadv.data import ImageDataset
from odeadv.evaluation import evaluate
from odeadv.evaluation.protocols import Protocol, require_packages, resolve_protocol
from odeadv.experiments._config import RunConfig
from odeadv.experiments._folder import WEIGHTS_SCHEMA, load_model, locked
from odeadv.experiments._progress import Metrics, Progress
from odeadv.experiments._records import SCHEMA, Record, load_record
from odeadv.models import FieldNetwork
from odeadv.support.checks import integer
from odeadv.support.files import DamagedFileError, read_tensors, replacing, write_json, write_tensors
from odeadv.support.machine import processor
from odeadv.support.plain import identity as essential
from odeadv.training import EpochResult, Logger, TrainResult, make_fabric, train, weights_digest

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Measurement:
    """Protocol and number of images of one evaluation of a run.

    Attributes:
        protocol: a protocol of `odeadv.evaluate`, or its name.
        images: number of test images. The first images are taken; they are balanced over the classes. None for all.
        best: True to evaluate the weights of the best epoch in addition to the last weights.

    Raises:
        ValueError, TypeError: if the protocol is unknown, or if ``images`` is not a positive integer.
    """

    protocol: str | Protocol
    images: int | None = None
    best: bool = True

    def __post_init__(self) -> None:
        resolve_protocol(self.protocol)
        if self.images is not None:
            integer("images", self.images)

    @property
    def key(self) -> str:
        """Name of the measurement in records: ``"table2"``, ``"autoattack@200"``."""
        # Records use the requested name, such as "table5", not the name of the protocol that it resolves to.
        name = self.protocol if isinstance(self.protocol, str) else self.protocol.name
        return name if self.images is None else f"{name}@{self.images}"

    def made(self, record: Record) -> bool:
        """Return True if ``record`` has it, also for the weights of the best epoch if they are asked for and exist."""
        evaluations = record["evaluations"]
        also = ["best"] if self.best and record["best_epoch"] else []
        return all(self.key in evaluations.get(which, {}) for which in ("last", *also))


def measurements(protocols: Sequence[str | Measurement]) -> list[Measurement]:
    """Return ``protocols`` with a `Measurement` for every name of a protocol."""
    return [each if isinstance(each, Measurement) else Measurement(each) for each in protocols]


def run(
    config: RunConfig,
    data: ImageDataset,
    runs: Path,
    *,
    protocols: Sequence[str | Measurement] = (),
    label: str = "",
    log: TextIO | None = None,
    tensorboard: bool = False,
    logger: Logger | None = None,
    init: str | os.PathLike[str] | None = None,
    extend: Path | None = None,
    checkpoint_every: float = 120.0,
    keep_checkpoint: bool = False,
    fabric: Fabric | None = None,
) -> Record:
    """Train the run of ``config``, evaluate it by ``protocols``, and write its record.

    The folder ``runs / config.name`` gets ``config.json``, ``metrics.jsonl`` (one line per epoch),
    ``last.safetensors`` (and ``best.safetensors`` if there are validation images), and ``record.json``. It also holds
    checkpoints during training. If a run is stopped, the same call resumes it. If a run is finished, only the missing
    evaluations are made.

    Args:
        config: configuration of the run.
        data: the whole data set that ``config`` names. The run takes its subset.
        runs: folder of all runs.
        protocols: names of protocols of `odeadv.evaluate`, or `Measurement` objects.
        label: text shown with the progress.
        log: stream for the progress; standard error if not given.
        tensorboard: True to also write event files for TensorBoard (needs the package tensorboard).
        logger: gets the numbers of every epoch, see `odeadv.training.train`.
        init: weights to start from, see `odeadv.training.train`. Their digest becomes ``config.init``, so such a run
            has a separate folder.
        extend: folder of a run with the same configuration but fewer epochs. Training continues from its checkpoint,
            and the result is bit-identical to a run with all epochs.
        checkpoint_every: seconds between checkpoints within an epoch.
        keep_checkpoint: True to keep the last checkpoint of a finished run, so that the run can be extended.
        fabric: the engine, see `odeadv.training.train`.

    Returns:
        The record, as in ``record.json``.

    Raises:
        RunLockedError: if another process is writing this run.
        ValueError: if the folder holds a run of another configuration or on other data, or the record is damaged. Also
            if ``init`` holds other weights than ``config.init`` names. Also if ``extend`` lacks a checkpoint, or has a
            checkpoint of another run.
        ImportError: if a protocol has AutoAttack and pyautoattack is not installed; raised before any work.
    """
    config = _starting_from(config, init)
    folder = runs / config.name
    wanted = measurements(protocols)
    for measurement in wanted:
        require_packages(resolve_protocol(measurement.protocol))
    if data.name != config.data.name:
        raise ValueError(f"data: got {data.name!r}, expected {config.data.name!r}, which the configuration names")
    subset, aside = config.data.take(data)
    if fabric is None:
        fabric = make_fabric(precision=config.training.precision)
        fabric.launch()
    log = (log or sys.stderr) if fabric.is_global_zero else _nowhere()
    with locked(folder) if fabric.is_global_zero else contextlib.nullcontext():
        record = _record(folder, config, subset)
        missing = [measurement for measurement in wanted if record is None or not measurement.made(record)]
        if record is not None and fabric.is_global_zero:  # a killed process may have left checkpoints
            _drop_checkpoints(folder, keep_checkpoint)
        if record is not None and not missing:
            print(f"{label} already there: {folder / 'record.json'}", file=log, flush=True)
            return record
        if record is None:
            if extend is not None and fabric.is_global_zero:
                _take_checkpoint(extend, folder)
            fabric.barrier()
            options = {"init": init, "checkpoint_every": checkpoint_every, "logger": logger}
            record = _trained(config, subset, aside, folder, fabric, Progress(label, config, log), tensorboard, options)
            if fabric.is_global_zero:
                _drop_checkpoints(folder, keep_checkpoint)
        if fabric.is_global_zero:
            for measurement in missing:
                _evaluate(record, config, subset, folder, measurement, fabric.device, Progress(label, config, log))
        return record


def _trained(
    config: RunConfig,
    data: ImageDataset,
    aside: tuple[torch.Tensor, torch.Tensor] | None,
    folder: Path,
    fabric: Fabric,
    progress: Progress,
    tensorboard: bool,
    options: dict[str, Any],
) -> Record:
    """Train the network, then write its weights and a record without evaluations; `train` gets ``options``."""
    if config.init and options["init"] is None:
        raise ValueError(f"init: got none, expected the weights {config.init}, from which this run starts")
    seed = config.training.seed
    net = config.model.build(data, torch.Generator().manual_seed(seed)).to(fabric.device)
    if fabric.is_global_zero:
        write_json(folder / "config.json", config.to_dict())
    metrics = Metrics(folder, tensorboard) if fabric.is_global_zero else None

    def on_epoch(result: EpochResult) -> None:
        progress.epoch(result)
        if metrics is not None:
            metrics.add(result)

    result = train(
        net,
        data,
        config.training,
        validation=aside,
        checkpoints=folder / "checkpoints",
        identity=essential(config),
        fabric=fabric,
        progress=False,
        on_step=progress.step,
        on_epoch=on_epoch,
        **options,
    )
    record = {
        "schema": SCHEMA,
        "key": config.key,
        "method": config.method,
        "config": config.to_dict(),
        "data": _described(data),
        "versions": versions(),
        "machine": {
            "device": torch.cuda.get_device_name() if fabric.device.type == "cuda" else platform.machine(),
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "processes": fabric.world_size,
        },
        "seconds": {"training": sum(epoch.seconds for epoch in result.epochs)},
        "epochs": [asdict(epoch) for epoch in result.epochs],
        "best_epoch": result.best_epoch,
        "evaluations": {},
    }
    if fabric.is_global_zero:
        _write_weights(folder, net, config, data, result)
        write_json(folder / "record.json", record)
    fabric.barrier()
    return record


def _starting_from(config: RunConfig, init: str | os.PathLike[str] | None) -> RunConfig:
    """Return ``config`` with the digest of the weights ``init``; raise ValueError if it names other weights."""
    if init is None:
        return config
    digest = weights_digest(init)
    if config.init not in ("", digest):
        raise ValueError(f"init: {init} holds the weights {digest}, expected {config.init} of the configuration")
    return replace(config, init=digest)


def _take_checkpoint(extend: Path, folder: Path) -> None:
    """Copy the newest checkpoint of the run ``extend`` to ``folder``, unless ``folder`` has checkpoints."""
    found = sorted((extend / "checkpoints").glob("step-*.safetensors"))
    if not found:
        raise ValueError(
            f"extend: {extend} lacks a checkpoint, expected the folder of a run that kept its last one "
            "(keep_checkpoint, which `odeadv train` sets); init starts from its weights alone"
        )
    own = folder / "checkpoints"
    if not any(own.glob("step-*.safetensors")):
        with replacing(own / found[-1].name) as partial:
            shutil.copyfile(found[-1], partial)


def _drop_checkpoints(folder: Path, keep: bool) -> None:
    """Remove the checkpoints of a finished run; if ``keep``, keep the newest."""
    if not keep:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    for path in sorted((folder / "checkpoints").glob("step-*.safetensors"))[:-1]:
        path.unlink(missing_ok=True)


def _described(data: ImageDataset) -> dict[str, Any]:
    return {
        "source": data.source,
        "train_images": len(data.train_images),
        "test_images": len(data.test_images),
        "fingerprint": data.fingerprint(),
    }


def _write_weights(folder: Path, net: FieldNetwork, config: RunConfig, data: ImageDataset, result: TrainResult) -> None:
    info = {
        "schema": WEIGHTS_SCHEMA,
        "run": config.to_dict(),
        "num_classes": data.num_classes,
        "mean": list(data.mean),
        "std": list(data.std),
    }
    write_tensors(folder / "last.safetensors", net.state_dict(), {**info, "epoch": len(result.epochs)})
    if result.best is not None:
        write_tensors(folder / "best.safetensors", result.best, {**info, "epoch": result.best_epoch})


def _evaluate(
    record: Record,
    config: RunConfig,
    data: ImageDataset,
    folder: Path,
    measurement: Measurement,
    device: torch.device,
    progress: Progress,
) -> None:
    """Evaluate the weights in ``folder`` and write the result into the record."""
    key = measurement.key
    for which in ("last", "best"):
        file = folder / f"{which}.safetensors"
        if key in record["evaluations"].get(which, {}):
            continue
        if which == "best" and not (file.exists() and measurement.best):
            continue
        net, _ = load_model(file)
        net.to(device)
        progress.begin(f"evaluating {key}, {which} weights")
        began = time.perf_counter()
        journal = folder / f"{which}-{key}.journal"
        evaluation = evaluate(
            net,
            (data.test_images[: measurement.images], data.test_labels[: measurement.images]),
            measurement.protocol,
            batch_size=128,
            progress=progress.evaluated,
            resume=journal,
        ).to_dict()
        evaluation["seconds"] = time.perf_counter() - began
        record["evaluations"].setdefault(which, {})[key] = evaluation
    write_json(folder / "record.json", record)
    for which in ("last", "best"):
        (folder / f"{which}-{key}.journal").unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """Return the versions of the packages that the results depend on, by package name."""
    return {
        "odeadv": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": version("numpy"),
    }


def _record(folder: Path, config: RunConfig, data: ImageDataset) -> Record | None:
    """Return the record of the run, or None if the run has not been trained."""
    path = folder / "record.json"
    if not path.exists():
        return None
    try:
        record = load_record(path)
    except ValueError as error:
        raise ValueError(f"{error}; remove it to run it again") from None
    if (record["key"], record["data"]["fingerprint"]) != (config.key, data.fingerprint()):
        raise ValueError(
            f"runs: {path} is of another configuration or other data (key {record['key']}, data "
            f"{record['data']['fingerprint']}; these are {config.key}, {data.fingerprint()}); give another folder, or "
            "remove it"
        )
    for which in ("last", *(["best"] if record["best_epoch"] else [])):
        try:
            read_tensors(folder / f"{which}.safetensors")
        except (FileNotFoundError, DamagedFileError) as error:
            warnings.warn(f"{error}; this run can be reported, but not evaluated further", stacklevel=3)
    return record


def _nowhere() -> TextIO:
    import io

    return io.StringIO()
