"""The folder of a run: records, weights, locks and lists."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from odeadv.experiments._config import ModelConfig, RunConfig, load_config
from odeadv.models import averaged
from odeadv.support import plain as configuration
from odeadv.support.files import read_tensors

SCHEMA = "odeadv.run/2"

WEIGHTS_SCHEMA = "odeadv.weights/1"

Record = dict[str, Any]


class RunLockedError(RuntimeError):
    """Another process is writing the run."""


def load_record(path: Path) -> Record:
    """Read the record in ``path``.

    Raises:
        ValueError: if it is not a record of a run.
        OSError: if it cannot be read.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error})") from None
    schema = record.get("schema") if isinstance(record, dict) else type(record).__name__
    if schema != SCHEMA:
        raise ValueError(f"{path}: schema is {schema!r}, expected {SCHEMA!r}")
    lacking = [name for name, kind in _PARTS.items() if not isinstance(record.get(name), kind)]
    if lacking:
        raise ValueError(f"{path}: not a whole record of a run, expected {', '.join(lacking)} in it")
    return dict(record)


#: What everything that reads a record goes by.
_PARTS: dict[str, type] = {
    "key": str, "method": str, "config": dict, "data": dict, "epochs": list, "evaluations": dict, "versions": dict,
}  # fmt: skip


def load_records(folder: Path) -> list[Record]:
    """Read the records in ``folder``: ``*.json`` in it, or ``*/record.json`` below it; in the order of their names.

    Raises:
        ValueError: for a JSON file that is not a record of a run.
        NotADirectoryError: if the folder does not exist.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"records: {folder} is not a folder, expected one with records in it")
    paths = [*folder.glob("*.json"), *folder.glob("*/record.json")]
    return [load_record(path) for path in sorted(paths) if not path.name.startswith(".")]


def list_runs(folder: Path) -> list[dict[str, Any]]:
    """List a folder of runs, in the order of their names, as plain data.

    Each has ``"name"``, ``"method"``, ``"state"`` (``"finished"``, ``"training"`` while a process has it, else
    ``"stopped"``), ``"epoch"`` of ``"epochs"``, and ``"evaluations"``: clean and average robust accuracy by protocol.

    Raises:
        NotADirectoryError: if the folder does not exist.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"folder: {folder} is not there, expected the folder of all runs")
    found = []
    for path in sorted(folder.glob("*/config.json")):
        try:
            found.append(_listed(path.parent, load_config(path)))
        except (ValueError, TypeError, OSError) as error:
            found.append({"name": path.parent.name, "state": "unreadable", "error": str(error)})
    return found


def _listed(folder: Path, config: RunConfig) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": folder.name, "method": config.method, "state": "finished"}
    entry |= {"epoch": config.training.epochs, "epochs": config.training.epochs, "evaluations": {}}
    if (folder / "record.json").exists():
        for protocol, evaluation in load_record(folder / "record.json")["evaluations"].get("last", {}).items():
            values = {"clean": evaluation["clean_accuracy"], "average": evaluation["average"]}
            entry["evaluations"][protocol] = values
        return entry
    metrics = folder / "metrics.jsonl"
    entry["epoch"] = len(metrics.read_text(encoding="utf-8").splitlines()) if metrics.exists() else 0
    entry["state"] = "training" if _is_locked(folder) else "stopped"
    return entry


def _is_locked(folder: Path) -> bool:
    """Return whether a process has the run; a run that starts at this moment waits for us, see `locked`."""
    try:
        with locked(folder, wait=0.0):
            return False
    except (RunLockedError, OSError):
        return True


def load_model(file: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, Any]]:
    """Load the network of a ``last.safetensors`` or ``best.safetensors``, in evaluation mode, with the file's data.

    Args:
        file: the file, or the folder of a run (then the last weights).

    Returns:
        The network (with noise, the average over the configured number of passes), and a dict with ``"run"``: the
        run's configuration, ``"num_classes"``, ``"mean"``, ``"std"`` and ``"epoch"``.

    Raises:
        FileNotFoundError: if the weights do not exist.
        ValueError: if the file is damaged or not odeadv's.
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
    # The model's part only: weights can be used where the objective they were trained with cannot be imported.
    config = configuration.from_dict(ModelConfig, info["run"]["model"])
    net = config.build(_Shape(info["num_classes"], info["mean"], info["std"]))  # type: ignore[arg-type]
    net.load_state_dict(tensors)
    net.to(memory_format=torch.channels_last)
    net.eval()
    return (averaged(net, passes=config.passes) if config.noise else net), info


@contextlib.contextmanager
def locked(folder: Path, wait: float = 1.0) -> Iterator[None]:
    """Keep other processes from writing ``folder``; the lock ends with the process, however it ends.

    Args:
        folder: of the run.
        wait: seconds to try for, so that a listing that looks at the lock for a moment does no harm.

    Raises:
        RunLockedError: if another process has it.
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
    """What a model takes from a data set."""

    def __init__(self, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self.num_classes, self.mean, self.std = num_classes, tuple(mean), tuple(std)
