"""One run: a configuration in, one JSON file out."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy
import torch

import odeadv
from odeadv.data import ImageDataset
from odeadv.evaluation import evaluate
from odeadv.experiments._files import write_json, write_weights
from odeadv.models import preact_resnet
from odeadv.training import EpochResult, TrainConfig, train

SCHEMA = "odeadv.run/1"


@dataclass(frozen=True)
class RunConfig:
    """Everything a run's result depends on.

    Attributes:
        table: the table it belongs to.
        preset: the preset it was made from.
        method: the row of the table.
        dataset: name of the data set.
        train_images, test_images: how many of them, balanced over the classes; None for all.
        depth, width: of the network.
        protocol: of the evaluation.
        training: see `odeadv.training.TrainConfig`.
    """

    table: str
    preset: str
    method: str
    dataset: str
    train_images: int | None
    test_images: int | None
    depth: int
    width: int
    protocol: str
    training: TrainConfig

    @property
    def key(self) -> str:
        """A short hash of the configuration: equal for equal runs."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def file_name(self) -> str:
        """The name of its JSON file."""
        return f"{self.dataset}-{self.method}-seed{self.training.seed}.json"


def run(
    config: RunConfig, data: ImageDataset, out: Path, *, label: str = "", log: TextIO | None = None
) -> dict[str, Any]:
    """Train and evaluate what ``config`` says and write ``out / config.file_name``; a finished run is not run again.

    The trained weights go to ``out / "weights"``.

    Args:
        config: the run.
        data: the data set named in it, whole; the run takes its subset.
        out: folder for the JSON.
        label: shown with the progress.
        log: where progress goes; standard error if not given.

    Returns:
        The record, as in the file.
    """
    log = log or sys.stderr
    path = out / config.file_name
    data = data.subset(config.train_images, config.test_images)
    fingerprint = data.fingerprint()
    done = _finished(path, config, fingerprint)
    if done is not None:
        print(f"{label} already there: {path}", file=log, flush=True)
        return done
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = preact_resnet(
        config.depth,
        config.width,
        data.num_classes,
        mean=data.mean,
        std=data.std,
        generator=torch.Generator().manual_seed(config.training.seed),
    ).to(device)
    began = time.perf_counter()
    progress = _Progress(label, config.training.epochs, log)
    epochs = train(net, data, config.training, on_step=progress.step, on_epoch=progress.epoch)
    trained = time.perf_counter()
    write_weights(out / "weights" / path.with_suffix(".npz").name, net)
    evaluation = evaluate(
        net, (data.test_images, data.test_labels), config.protocol, batch_size=128, progress=progress.evaluated
    )
    record = {
        "schema": SCHEMA,
        "key": config.key,
        "config": asdict(config),
        "data": {
            "source": data.source,
            "train_images": len(data.train_images),
            "test_images": len(data.test_images),
            "fingerprint": fingerprint,
        },
        "versions": {
            "odeadv": odeadv.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
        },
        "machine": {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
            "threads": torch.get_num_threads(),
        },
        "seconds": {"training": trained - began, "evaluation": time.perf_counter() - trained},
        "epochs": [asdict(epoch) for epoch in epochs],
        "evaluation": evaluation.to_dict(),
    }
    write_json(path, record)
    return record


def load_records(folder: Path) -> list[dict[str, Any]]:
    """The records of the finished runs in ``folder``, in the order of their file names.

    Raises:
        ValueError: for a JSON file that is not a record of a run.
    """
    return [_read(path) for path in sorted(folder.glob("*-seed*.json")) if not path.name.startswith(".")]


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error}); remove it to run it again") from None
    schema = record.get("schema") if isinstance(record, dict) else type(record).__name__
    if schema != SCHEMA:
        raise ValueError(f"{path}: schema is {schema!r}, expected {SCHEMA!r}")
    return dict(record)


def _finished(path: Path, config: RunConfig, fingerprint: str) -> dict[str, Any] | None:
    if not path.exists():
        return None
    record = _read(path)
    if (record["key"], record["data"]["fingerprint"]) != (config.key, fingerprint):
        raise FileExistsError(
            f"out: {path} holds a run of another configuration or on other data (key {record['key']}, data "
            f"{record['data']['fingerprint']}; these are {config.key}, {fingerprint}); give another folder, or remove "
            "the file"
        )
    return record


class _Progress:
    """Lines about a run: one an epoch, and within it one that is overwritten (on a terminal) or one a minute."""

    def __init__(self, label: str, epochs: int, log: TextIO) -> None:
        self.label, self.epochs, self.log = label, epochs, log
        self.began = time.perf_counter()
        self.live = log.isatty()
        self.shown = self.began

    def step(self, epoch: int, step: int, steps: int) -> None:
        share = (epoch - 1 + step / steps) / self.epochs
        self._now_and_then(f"epoch {epoch}/{self.epochs}, step {step}/{steps}", share)

    def epoch(self, result: EpochResult) -> None:
        self._line(
            f"epoch {result.epoch}/{self.epochs}  loss {result.loss:.4f}  accuracy {100 * result.accuracy:.1f} %  "
            f"lr {result.lr:g}  {result.seconds:.0f} s  {self._left(result.epoch / self.epochs)}"
        )
        if result.epoch == self.epochs:
            self.began = time.perf_counter()

    def evaluated(self, done: int, total: int) -> None:
        if done == total:
            self._line(f"evaluated in {time.perf_counter() - self.began:.0f} s")
        else:
            self._now_and_then(f"evaluating, batch {done}/{total}", done / total)

    def _now_and_then(self, text: str, share: float) -> None:
        now = time.perf_counter()
        if now - self.shown > (0.5 if self.live else 60.0):
            self.shown = now
            (self._overwrite if self.live else self._line)(f"{text}, {self._left(share)}")

    def _left(self, share: float) -> str:
        seconds = (time.perf_counter() - self.began) * (1.0 - share) / share
        return f"{seconds:.0f} s left" if seconds < 120 else f"{seconds / 60:.0f} min left"

    def _line(self, text: str) -> None:
        print(f"{chr(13) + chr(27) + '[K' if self.live else ''}{self.label} {text}", file=self.log, flush=True)

    def _overwrite(self, text: str) -> None:
        print(f"\r\x1b[K{self.label} {text}", end="", file=self.log, flush=True)
