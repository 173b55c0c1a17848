"""Files that are written atomically: a reader sees the old file or the new file, never an incomplete file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from odeadv.support.extras import extra

_INFO = "odeadv"


class DamagedFileError(ValueError):
    """Raised if a file is truncated or altered, or was not written by odeadv."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to. It replaces ``path`` if the body ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The temporary file keeps the suffix, because matplotlib chooses the file format by the suffix.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".tmp-{path.stem}-", suffix=path.suffix)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        _sync(partial)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_file(argument: str, path: Path | None) -> None:
    """Raise OSError if a file could not be written to ``path``. The message names ``argument``. Create nothing."""
    if path is None:
        return
    if path.is_dir():
        raise IsADirectoryError(f"{argument}: {path} is a folder, expected the path of a file")
    check_folder(argument, path.parent)


def check_folder(argument: str, path: Path | None) -> None:
    """Raise OSError if the folder ``path`` could not be written to. The message names ``argument``. Create nothing."""
    if path is None:
        return
    there = next(place for place in (path, *path.absolute().parents) if place.exists() or place.is_symlink())
    if not there.is_dir():
        raise NotADirectoryError(f"{argument}: {there} is not a folder, so {path} cannot be written; give another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{argument}: {there} cannot be written in; give another folder, or change its rights")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, atomically."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON to ``path``, atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Write tensors and plain data to one .safetensors file, atomically, without pickle, and with a checksum of both.

    Args:
        path: the file to write.
        tensors: tensors by name.
        info: plain data, which the header of the file holds as JSON.
    """
    with extra("train"):
        from safetensors.torch import save_file

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(info, sort_keys=True)
    with replacing(path) as partial:
        save_file(whole, partial, metadata={_INFO: text, "sha256": _digest(whole, text)})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of `write_tensors` and return its tensors and its plain data.

    Raises:
        DamagedFileError: if the file is truncated or altered, or was not written by odeadv.
        FileNotFoundError: if the file does not exist.
    """
    with extra("train"):
        from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, ValueError, OSError) as error:
        raise DamagedFileError(f"{path}: is truncated or damaged ({error})") from None
    text = metadata.get(_INFO)
    if text is None:
        raise DamagedFileError(f"{path}: was not written by odeadv")
    if metadata.get("sha256") != _digest(tensors, text):
        raise DamagedFileError(f"{path}: checksum does not match, the file has been altered or damaged")
    return tensors, json.loads(text)


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Flush ``path`` to the disk, so that the rename never comes before the content."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
