"""Read records of runs, and report exactly why a file is not a record."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from odeadv.support.plain import read_json

SCHEMA = "odeadv.run/2"

Record = Mapping[str, Any]

_NUMBER = (int, float)
_NUMBER_OR_NONE = (int, float, type(None))

# The parts of a record that the readers below need. A type or a tuple of types is the type of a value. A dict gives the
# shape of each key ("*" means any other key; a "?" marks a key that old records lack). A list gives the shape of all
# its entries.
_EVALUATION: dict[str, Any] = {
    "n?": int,
    "seconds": _NUMBER,
    "clean_accuracy": _NUMBER,
    "average?": _NUMBER_OR_NONE,
    "attacks": [{
        "name": str, "eps?": _NUMBER, "eps_255": _NUMBER_OR_NONE, "steps": (int, type(None)),
        "robust_accuracy": _NUMBER_OR_NONE, "worst_so_far_accuracy": _NUMBER_OR_NONE,
    }],
}  # fmt: skip
_EPOCH: dict[str, Any] = {
    "epoch": int, "loss": _NUMBER, "accuracy": _NUMBER, "lr": _NUMBER, "seconds": _NUMBER, "ratio": _NUMBER_OR_NONE,
    "relative?": list, "validation?": (dict, type(None)), "strength?": _NUMBER_OR_NONE,
    "strength_first_order?": _NUMBER_OR_NONE, "strength_nodes?": list, "eta?": _NUMBER,
}  # fmt: skip
_RECORD: dict[str, Any] = {
    "schema": str,
    "key": str,
    "method": str,
    "config": {"data": {"name": str, "*": object}, "model": dict, "training": {"seed": int, "*": object}, "init?": str},
    "data": {"fingerprint": str, "source": str, "train_images": int, "test_images": int},
    "versions": {"*": str},
    "machine": {"threads": int, "*": object},
    "seconds": {"training": _NUMBER},
    "epochs": [_EPOCH],
    "best_epoch": (int, type(None)),
    "evaluations": {"*": {"*": {**_EVALUATION, "*": object}}},
}
_EVALUATION["attacks"][0]["*"] = object

_NAMES = {
    int: "an integer", float: "a number", str: "a string", dict: "a mapping", list: "a list", type(None): "null",
}  # fmt: skip


class RecordWarning(UserWarning):
    """Warns that a file in a folder of records was left out, or that a record has unknown fields."""


def load_record(path: Path) -> Record:
    """Read the record in ``path``.

    Args:
        path: a JSON file, the ``record.json`` of a finished run or a copy of it.

    Raises:
        ValueError: if the file is not a record of a run. The message names the file and the missing or wrong part.
        OSError: if the file cannot be read.

    Warns:
        RecordWarning: if the record has fields that this version of odeadv does not know; they are ignored.
    """
    record = read_json(path)
    schema = record.get("schema") if isinstance(record, dict) else type(record).__name__
    if schema != SCHEMA:
        raise ValueError(f"{path}: schema is {schema!r}, expected {SCHEMA!r}")
    missing = [name for name in _RECORD if name not in record]
    if missing:
        raise ValueError(f"{path}: not a whole record of a run, expected {', '.join(missing)} in it")
    unknown: list[str] = []
    try:
        _check(record, _RECORD, "", unknown)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not record["epochs"]:
        raise ValueError(f"{path}: epochs: got none, expected at least one")
    if unknown:
        warnings.warn(f"{path}: unknown fields are ignored: {', '.join(unknown)}", RecordWarning, stacklevel=2)
    return dict(record)


def load_records(folder: Path) -> list[Record]:
    """Read the records in ``folder``: ``*.json`` and ``*/record.json``, in the order of their paths.

    Args:
        folder: the folder of all runs, or a folder of copied records.

    Raises:
        NotADirectoryError: if the folder does not exist.
        OSError: if the folder cannot be read.

    Warns:
        RecordWarning: for each file that is left out because it is not a record of a run; the message names the file.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"records: {folder} is not a folder, expected one with records in it")
    next(folder.iterdir(), None)  # raises if reading is not allowed; glob would find nothing
    found = []
    for path in sorted([*folder.glob("*.json"), *folder.glob("*/record.json")]):
        if not path.name.startswith("."):
            try:
                found.append(load_record(path))
            except (ValueError, OSError) as error:
                warnings.warn(f"left out, not a readable record: {error}", RecordWarning, stacklevel=2)
    return found


def _check(value: Any, shape: Any, path: str, unknown: list[str]) -> None:
    """Raise ValueError, naming the path in the record, if ``value`` does not have ``shape``; collect unknown keys."""
    if isinstance(shape, dict):
        _expect(value, (dict,), path)
        dot = f"{path}." if path else ""
        for name, part in shape.items():
            optional = name.endswith("?")
            name = name.removesuffix("?")
            if name in value:
                _check(value[name], part, dot + name, unknown)
            elif name != "*" and not optional:
                raise ValueError(f"{dot}{name}: is missing")
        for name in value:
            if name not in shape and f"{name}?" not in shape:
                if "*" in shape:
                    _check(value[name], shape["*"], dot + name, unknown)
                else:
                    unknown.append(dot + name)
    elif isinstance(shape, list):
        _expect(value, (list,), path)
        for number, part in enumerate(value):
            _check(part, shape[0], f"{path}[{number}]", unknown)
    elif shape is not object:
        _expect(value, shape if isinstance(shape, tuple) else (shape,), path)


def _expect(value: Any, kinds: tuple[type, ...], path: str) -> None:
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = [_NAMES[kind] for kind in kinds if kind is not int or float not in kinds]
        raise ValueError(f"{path}: got {_shown(value)}, expected {' or '.join(names)}")
    if isinstance(value, int | float) and not (math.isfinite(value) and abs(value) < 2**63):
        raise ValueError(f"{path}: got {_shown(value)}, expected a finite number of at most 64 bits")


def _shown(value: Any) -> str:
    if isinstance(value, Mapping | list):
        return "a mapping" if isinstance(value, Mapping) else "a list"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
