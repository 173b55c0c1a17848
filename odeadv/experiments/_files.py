"""Files that are either the old ones or the new ones, never half of them."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
from torch import nn


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which replaces ``path`` when the body ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Where a file of another format ends up is told by its name, which savefig goes by: keep the suffix.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".tmp-{path.stem}-", suffix=path.suffix)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text``, atomically."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_weights(path: Path, module: nn.Module) -> None:
    """Write the state dict of ``module`` as an .npz archive (no pickle), atomically."""
    with replacing(path) as partial, partial.open("wb") as file:
        numpy.savez(file, **{name: value.detach().cpu().numpy() for name, value in module.state_dict().items()})
