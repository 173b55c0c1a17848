"""The journal: a file with the finished work of a running evaluation. It survives a kill at any moment."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from odeadv.evaluation.trust import beyond
from odeadv.support.checks import shown
from odeadv.support.files import check_file

SCHEMA = "odeadv.evaluation.journal/3"
Line = dict[str, Any]
_START = b'{"schema": "odeadv.evaluation.journal/'


class Journal:
    """A file with one JSON object per line, each with its checksum. Lines are appended whole and synced to the disk.

    The first line identifies the evaluation. If a kill or a full disk has cut off the last line, that line is dropped.
    Any other damaged line is an error.

    Args:
        path: the file; it is made, with its folder, if it does not exist.
        header: identifies the evaluation; a journal with another header is rejected.

    Attributes:
        records: the lines of the file, without the header.

    Raises:
        OSError: if the path is a folder, or cannot be written.
        ValueError: if the file belongs to another evaluation, is not a journal, or is damaged before its last line.
    """

    def __init__(self, path: str | os.PathLike[str], header: Mapping[str, Any]) -> None:
        self.path = Path(path)
        check_file("resume", self.path)
        self.records: list[Line] = []
        own: Line = json.loads(json.dumps({"schema": SCHEMA, **header}))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        found = _read(self.path) if self.path.exists() else []
        if not found:
            self.append(own)
            return
        _check_header(self.path, found[0], own)
        self.records = found[1:]

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one line and wait until it is on the disk."""
        line = (json.dumps({**record, "checksum": _checksum(record)}) + "\n").encode()
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            # Use one write, so that a kill leaves the whole line or its beginning.
            if os.write(handle, line) != len(line):
                raise OSError(f"{self.path}: could not be written whole; is the disk full?")
            os.fsync(handle)
        finally:
            os.close(handle)


def _checksum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def _parse(line: bytes) -> Line | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    checksum = record.pop("checksum", None)
    return record if checksum == _checksum(record) else None


def _read(path: Path) -> list[Line]:
    """Return the undamaged lines of the file; remove a last line that is incomplete."""
    raw = path.read_bytes()
    # Reject a file of another kind before anything is written to it.
    if raw and not (raw.startswith(_START) or _START.startswith(raw)):
        raise ValueError(f"resume: {path} is not a journal of an evaluation; give another path")
    records: list[Line] = []
    good = 0
    while good < len(raw):
        end = raw.find(b"\n", good)
        record = _parse(raw[good:end]) if end >= 0 else None
        if record is None:
            if 0 <= end < len(raw) - 1:
                raise ValueError(f"resume: line {len(records) + 1} of {path} is damaged; remove the file to start over")
            os.truncate(path, good)
            break
        records.append(record)
        good = end + 1
    return records


def _check_header(path: Path, found: Line, expected: Line) -> None:
    names = {"model": "another model", "data": "other data", "schema": "another version"}
    for key, value in expected.items():
        if key == "probe":
            if not _close(found.get(key), value):
                raise ValueError(
                    f"resume: {path} is the journal of another model (its logits of the first images differ); give "
                    "another path or remove the file"
                )
        elif found.get(key) != value:
            what = names.get(key, f"another {key}")
            raise ValueError(
                f"resume: {path} is the journal of {what} (its {key} is {shown(found.get(key))}, expected "
                f"{shown(value)}); give another path or remove the file"
            )


def probe_logits(logits: Tensor) -> list[list[float]]:
    """Return logits (n, classes) as plain data for a header."""
    rows: list[list[float]] = logits.double().tolist()
    return rows


def _close(found: object, expected: object) -> bool:
    """Return True if probed logits differ by at most a thousandth of their scale, the rounding of another machine."""
    if found is None or expected is None:
        return found is expected
    try:
        a, b = torch.tensor(found, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)
    except (TypeError, ValueError):
        return False
    return not beyond(b, a, 1e-3)
