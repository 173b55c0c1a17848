"""Checkpoints: all data that a run needs to continue as if it had not been stopped."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from odeadv.support.files import DamagedFileError, read_tensors, write_tensors

SCHEMA = "odeadv-checkpoint/1"
#: Fields of a configuration that may change when a run continues: more epochs extend the run.
EXTENDS = ("config.epochs", "run.training.epochs")


#: End of a message about a file whose parts differ from the parts that this version writes.
_ELSEWHERE = "it was not written by a known version of odeadv; remove it, or give another folder"


class CheckpointWarning(UserWarning):
    """A checkpoint was rejected, and an older one is used."""


class Checkpoints:
    """The newest checkpoints of one run in a folder: ``step-00001234.safetensors``.

    A file holds tensors, and JSON in its header. It has a checksum. It is written under another name and then renamed,
    so that a kill cannot leave a part of it.

    Args:
        folder: the folder of the checkpoints; it is made if it does not exist.
        identity: plain data that identify the run; a checkpoint of another run is rejected. If only the number of
            epochs differs, the run is extended.
        keep: number of checkpoints to keep.
    """

    def __init__(self, folder: Path, identity: Any, keep: int = 2) -> None:
        self.folder, self._identity, self._keep = folder, identity, keep

    def save(self, step: int, tensors: dict[str, Tensor], info: dict[str, Any]) -> Path:
        """Write the checkpoint of ``step`` and remove all except the newest ``keep`` checkpoints.

        Raises:
            OSError: if the checkpoint cannot be written; older checkpoints are kept.
        """
        path = self.folder / f"step-{step:08d}.safetensors"
        try:
            write_tensors(path, tensors, {"schema": SCHEMA, "identity": self._identity, **info})
        except Exception as error:  # safetensors raises its own error for a full disk
            raise OSError(
                f"checkpoint: {path} cannot be written ({error}); the ones before it are kept: free some space and "
                "start the run again to go on"
            ) from error
        for old in self.paths()[: -self._keep]:
            old.unlink(missing_ok=True)
        return path

    def paths(self) -> list[Path]:
        """Return the checkpoint files, oldest first."""
        return sorted(self.folder.glob("step-*.safetensors"))

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return tensors and plain data of the newest undamaged checkpoint, or None; remove leftovers of killed writes.

        The plain data contain the name of the file under ``"file"``.

        Raises:
            ValueError: if the checkpoint belongs to another run, or lacks parts that this version writes.

        Warns:
            CheckpointWarning: names each damaged file that was skipped.
        """
        for partial in self.folder.glob(".tmp-step-*"):
            partial.unlink(missing_ok=True)
        for path in reversed(self.paths()):
            try:
                tensors, info = read_tensors(path)
            except DamagedFileError as error:
                rest = "the one before is taken" if path != self.paths()[0] else "none is left, training starts anew"
                warnings.warn(f"checkpoint refused: {error}; {rest}", CheckpointWarning, 2)
                continue
            if info.get("schema") != SCHEMA:
                raise ValueError(f"{path}: schema is {info.get('schema')!r}, expected {SCHEMA!r}")
            missing = [name for name in ("identity", "epochs", "best_epoch", "done", "seconds") if name not in info]
            missing += [
                name
                for name in ("order", "process0.torch", "process0.loss_sum", "process0.correct")
                if name not in tensors
            ]
            if missing:
                raise ValueError(f"{path}: lacks {', '.join(missing)}; {_ELSEWHERE}")
            parts = [part for part in _differing(info["identity"], self._identity) if part not in EXTENDS]
            if parts:
                raise ValueError(
                    f"{path}: is the checkpoint of another run, which differs in {', '.join(parts)}; "
                    "give another folder"
                )
            return tensors, {**info, "file": str(path)}
        return None


def _differing(a: Any, b: Any, name: str = "") -> list[str]:
    """Return the dotted names of the entries in which two identities differ."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return [] if a == b else [name or "its identity"]
    keys = sorted(a.keys() | b.keys())
    return [part for key in keys for part in _differing(a.get(key), b.get(key), f"{name}.{key}" if name else key)]


def architecture(net: nn.Module) -> dict[str, Any]:
    """Return data that distinguish untrained networks: ``config`` (if the network has it), dtypes and shapes."""
    config = json.dumps(getattr(net, "config", None), default=lambda value: type(value).__name__)
    shapes = {name: [str(value.dtype), *value.shape] for name, value in model_tensors(net).items()}
    return {"config": json.loads(config), "tensors": shapes}


def model_tensors(net: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name."""
    return dict(net.state_dict())


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's state by parameter number and name, ``"0.momentum_buffer"``; numbers as 0-d tensors."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": torch.as_tensor(value)
        for number, values in state.items()
        for name, value in values.items()
        if isinstance(value, Tensor | int | float)
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Load tensors from `optimizer_tensors` into the optimiser, in the memory format of the parameters."""
    groups = optimizer.param_groups
    parameters = [parameter for group in groups for parameter in group["params"]]
    on_device = any(group.get("fused") or group.get("capturable") for group in groups)
    for name, value in tensors.items():
        number, _, entry = name.partition(".")
        parameter = parameters[int(number)]
        if entry == "step":  # torch keeps step counts on the CPU, unless fused or capturable is set
            value = value.to(parameter.device) if on_device else value
        elif value.shape == parameter.shape:
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        optimizer.state[parameter][entry] = value.clone()


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return ``tensors`` with ``prefix.`` before their names."""
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def without(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with ``prefix.``, and remove this prefix from their names."""
    return {name[len(prefix) + 1 :]: value for name, value in tensors.items() if name.startswith(f"{prefix}.")}
