"""Read and lock the folder of a run, and list all runs: records, weights, locks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from odeadv.experiments._config import ModelConfig, load_config
from odeadv.experiments._records import load_record
from odeadv.models import averaged
from odeadv.support import plain as configuration
from odeadv.support.files import read_tensors, replacing
from odeadv.support.plain import read_json_lines
from odeadv.training import EpochResult, TrainResult

WEIGHTS_SCHEMA = "odeadv.weights/1"


class RunLockedError(RuntimeError):
    """Raised if another process is writing the run."""


def list_runs(folder: Path) -> list[dict[str, Any]]:
    """Return the runs in ``folder`` as plain data, in the order of their names.

    Each entry has ``"name"``, ``"method"``, ``"state"``, ``"epoch"``, ``"epochs"`` and ``"evaluations"``. The state is
    ``"finished"``, ``"training"`` (a process holds the lock of the run) or ``"stopped"``. ``"evaluations"`` holds the
    clean and the average robust accuracy per protocol. If a run cannot be read, its entry has ``"name"``, ``"state"``
    (``"unreadable"``) and ``"error"``.

    Args:
        folder: the folder that contains one folder per run.

    Raises:
        NotADirectoryError: if the folder does not exist.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"folder: {folder} does not exist, expected the folder of all runs")
    found = []
    for path in sorted(folder.iterdir()):
        try:
            if any(os.path.lexists(path / name) for name in ("config.json", "record.json")):
                found.append(_listed(path))
            elif path.is_dir():
                next(path.iterdir(), None)  # raises PermissionError if reading is not allowed
        except (ValueError, TypeError, OSError, ImportError) as error:
            found.append({"name": path.name, "state": "unreadable", "error": " ".join(str(error).split())})
    return found


def _listed(folder: Path) -> dict[str, Any]:
    # A listing must not run code, so the modules that a configuration names are not imported.
    config = load_config(folder / "config.json", imports=False)
    entry: dict[str, Any] = {"name": folder.name, "method": config.method, "state": "finished"}
    entry |= {"epoch": config.training.epochs, "epochs": config.training.epochs, "evaluations": {}}
    if os.path.lexists(folder / "record.json"):
        record = load_record(folder / "record.json")
        entry["epoch"] = len(record["epochs"])
        for protocol, evaluation in record["evaluations"].get("last", {}).items():
            values = {"clean": evaluation["clean_accuracy"], "average": evaluation.get("average")}
            entry["evaluations"][protocol] = values
        return entry
    metrics = folder / "metrics.jsonl"
    entry["epoch"] = len(metrics.read_text(encoding="utf-8").splitlines()) if metrics.exists() else 0
    entry["state"] = "training" if _is_locked(folder) else "stopped"
    return entry


def plot_run(folder: Path) -> Path:
    """Draw the training of a run, finished or not, as ``training.png`` in its folder; see `TrainResult.plot`.

    Args:
        folder: the folder of the run, with ``record.json`` or ``metrics.jsonl``.

    Returns:
        The path of the picture.

    Raises:
        ValueError: if the folder is not the folder of a run, or the run has not finished an epoch.
        OSError: if a file cannot be read or written.
    """
    record, metrics = folder / "record.json", folder / "metrics.jsonl"
    best = None
    if record.exists():
        found = load_record(record)
        file, lines, best = record, found["epochs"], found["best_epoch"]
    elif metrics.exists():
        file, lines = metrics, read_json_lines(metrics)
    else:
        raise ValueError(f"folder: {folder} has neither record.json nor metrics.jsonl, expected the folder of a run")
    result = TrainResult([EpochResult.from_dict(line, file) for line in lines], best)
    out = folder / "training.png"
    with replacing(out) as path:
        # The file does not contain a date or a version, so equal runs give equal files.
        result.plot().savefig(path, dpi=120, metadata={"Software": None})
    return out


def _is_locked(folder: Path) -> bool:
    """Return True if a process holds the lock. A run that starts during this check waits for it, see `locked`."""
    try:
        with locked(folder, wait=0.0):
            return False
    except (RunLockedError, OSError):
        return True


def load_model(file: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, Any]]:
    """Load the network of a ``last.safetensors`` or ``best.safetensors``, in evaluation mode, and its metadata.

    Args:
        file: the file, or the folder of a run. A folder means its last weights.

    Returns:
        The network and a dict. A network with noise is averaged over the configured number of passes. The dict has
        ``"run"`` (the configuration of the run), ``"num_classes"``, ``"mean"``, ``"std"`` and ``"epoch"``.

    Raises:
        FileNotFoundError: if the weights do not exist.
        ValueError: if the file is damaged, or if odeadv did not write it.
    """
    file = Path(file)
    if file.is_dir():
        file = file / "last.safetensors"
    if file.exists() and file.suffix != ".safetensors":
        raise ValueError(
            f"checkpoint: {file} holds no weights, expected the folder of a run, or its last.safetensors or "
            "best.safetensors"
        )
    tensors, info = read_tensors(file)
    if info.get("schema") != WEIGHTS_SCHEMA:
        raise ValueError(f"{file}: schema is {info.get('schema')!r}, expected {WEIGHTS_SCHEMA!r}; is it a checkpoint?")
    missing = [name for name in ("run", "num_classes", "mean", "std", "epoch") if name not in info]
    if missing or "model" not in info["run"]:
        raise ValueError(f"{file}: lacks {', '.join(missing) or 'run.model'}, expected weights that odeadv wrote")
    # Read only the model's part: the objective of the training may not be importable here.
    config = configuration.from_dict(ModelConfig, info["run"]["model"])
    net = config.build(_Shape(info["num_classes"], info["mean"], info["std"]))  # type: ignore[arg-type]
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{file}: the weights do not fit the network of the run: {error}") from None
    net.to(memory_format=torch.channels_last)
    net.eval()
    return (averaged(net, passes=config.passes) if config.noise else net), info


@contextlib.contextmanager
def locked(folder: Path, wait: float = 1.0) -> Iterator[None]:
    """Keep other processes from writing ``folder``. The lock ends with the process, even if the process is killed.

    Args:
        folder: folder of the run.
        wait: seconds to try. A short wait is needed because `list_runs` holds the lock for a moment.

    Raises:
        RunLockedError: if another process holds the lock.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=wait, poll_interval=0.05)
    except Timeout:
        raise RunLockedError(
            f"runs: another process is writing {folder}; wait for it, or give another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


class _Shape:
    """The attributes of a data set that a model needs."""

    def __init__(self, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self.num_classes, self.mean, self.std = num_classes, tuple(mean), tuple(std)
