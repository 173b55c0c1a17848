"""Small trained networks that come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from odeadv.models._network import FieldNetwork
from odeadv.models._registry import build
from odeadv.support.checks import choice
from odeadv.support.files import read_tensors

SCHEMA = "odeadv.pretrained/1"
_SUFFIX = ".safetensors"
_FILES = Path(__file__).parent / "weights"


def pretrained(name: str) -> FieldNetwork:
    """Return a small trained network that comes with the package, in evaluation mode.

    The networks are examples for attacks, audits and diagnostics. They are far too small to be good classifiers.
    ``examples/pretrained.py`` trained them. The digest in the file is checked.

    Args:
        name: one of `pretrained_names`. It consists of data set and method, for example ``"digits-pgd-lad-sm"``.

    Returns:
        The network. It maps images in [0, 1] of shape (n, 3, h, w) to logits (n, 10). It was trained on images with
        ``pretrained_record(name)["image_size"]`` pixels per side; ``odeadv.data.load(...).resized(...)`` makes them.

    Raises:
        ValueError: if the name is unknown, or the file is damaged.
        TypeError: if ``name`` is not a string.
        ModuleNotFoundError: if safetensors is missing; the extra ``train`` installs it.

    Example:
        >>> import torch
        >>> from odeadv import models
        >>> net = models.pretrained("digits-natural")
        >>> net(torch.rand(2, 3, 16, 16)).shape
        torch.Size([2, 10])
    """
    tensors, record = _read(name)
    net = build(**record["model"])
    net.load_state_dict(tensors)
    return net.eval()


def pretrained_names() -> tuple[str, ...]:
    """Return the names of all networks of `pretrained`.

    Example:
        >>> from odeadv import models
        >>> "cifar10-pgd" in models.pretrained_names()
        True
    """
    return tuple(sorted(file.stem for file in _FILES.glob(f"*{_SUFFIX}")))


def pretrained_record(name: str) -> dict[str, Any]:
    """Return the configuration and the accuracy of a network of `pretrained`, as plain data.

    Args:
        name: one of `pretrained_names`.

    Returns:
        A dict with ``"model"`` (arguments of `build`), ``"image_size"``, ``"run"`` (the configuration of the run, see
        `odeadv.experiments.RunConfig`), ``"clean_accuracy"``, ``"robust_accuracy"`` (by attack and radius), and
        ``"versions"``.

    Raises:
        ValueError, TypeError, ModuleNotFoundError: see `pretrained`.
    """
    return _read(name)[1]


def _read(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    choice("name", name, pretrained_names())
    path = _FILES / f"{name}{_SUFFIX}"
    tensors, record = read_tensors(path)
    if record.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema is {record.get('schema')!r}, expected {SCHEMA!r}")
    return tensors, record
