"""CIFAR as torchvision keeps it: reading its unpacked folder, and downloading that folder."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from odeadv.data._splits import Splits
from odeadv.data.checks import require

FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
_TIMEOUT = 10.0  # seconds a connection may be silent; torchvision sets no limit of its own


def read_torchvision(name: str, root: Path) -> Splits:
    """Read ``root/cifar-10-batches-py`` or ``root/cifar-100-python``.

    Raises:
        ImportError: torchvision is missing.
        RuntimeError: a file is missing or its checksum is wrong.
    """
    cifar = _cifar(name)
    train, test = (cifar(str(root), train=train, download=False) for train in (True, False))
    train_images, test_images = (torch.from_numpy(np.ascontiguousarray(split.data)) for split in (train, test))
    train_labels, test_labels = (torch.tensor(split.targets, dtype=torch.int64) for split in (train, test))
    return Splits(train_images, train_labels, test_images, test_labels, num_classes=len(train.classes))


def download_torchvision(name: str, root: Path) -> None:
    """Download the folder that `read_torchvision` reads.

    Everything is fetched, unpacked and checked in a scratch folder inside ``root`` and moved only then, so a failure
    leaves ``root`` as it was.

    Raises:
        Exception: whatever torchvision, the network or the file system raised.
    """
    cifar = _cifar(name)
    existed = root.is_dir()
    root.mkdir(parents=True, exist_ok=True)
    timeout = socket.getdefaulttimeout()
    try:
        if timeout is None:
            socket.setdefaulttimeout(_TIMEOUT)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root) as scratch:
            cifar(scratch, download=True)
            target = root / FOLDERS[name]
            target.mkdir(exist_ok=True)
            for file in sorted(Path(scratch, FOLDERS[name]).iterdir()):
                os.replace(file, target / file.name)
    finally:
        socket.setdefaulttimeout(timeout)
        if not existed:
            with contextlib.suppress(OSError):  # not empty: the download is in it
                root.rmdir()


def _cifar(name: str) -> Any:
    datasets = require("torchvision.datasets", "torchvision", f"{name} in torchvision's format")
    return {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
