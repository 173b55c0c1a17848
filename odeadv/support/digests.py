"""Fingerprints of data and models."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import torch
from torch import Tensor


def data_digest(images: Tensor, labels: Tensor) -> str:
    """16 hex digits of a SHA-256 over images and labels: dtypes, shapes and values."""
    digest = hashlib.sha256()
    add_tensor(digest, images)
    add_tensor(digest, labels)
    return digest.hexdigest()[:16]


_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def without_addresses(value: object) -> str:
    """``repr`` of ``value`` without what changes from process to process."""
    return _ADDRESS.sub("", repr(value))


def add_tensor(digest: Any, tensor: Tensor) -> None:
    """Feed dtype, shape and values of ``tensor`` to a hash of hashlib."""
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
