"""Report a run during its work: lines for people, JSON lines and TensorBoard events for programs."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from odeadv.experiments._config import RunConfig
from odeadv.support.extras import extra
from odeadv.support.files import write_text
from odeadv.support.progress import ProgressLine
from odeadv.training import EpochResult

_EVERY = 2.0  # seconds between two lines


class Metrics:
    """The results of all epochs as JSON lines, and optionally as TensorBoard events."""

    def __init__(self, folder: Path, tensorboard: bool) -> None:
        self._path = folder / "metrics.jsonl"
        self._lines: list[str] = []
        # A resumed run reports its earlier epochs again, but the event files already contain these epochs.
        self._there = len(self._path.read_text(encoding="utf-8").splitlines()) if self._path.exists() else 0
        self._board = None
        if tensorboard:
            with extra("tensorboard"):
                from torch.utils.tensorboard import SummaryWriter
            self._board = SummaryWriter(str(folder / "tensorboard"))

    def add(self, result: EpochResult) -> None:
        """Add an epoch. The file contains exactly the epochs of this run, also after an interruption."""
        again = result.epoch <= self._there
        self._lines.append(json.dumps(asdict(result), allow_nan=False))
        write_text(self._path, "\n".join(self._lines) + "\n")
        if self._board is not None and not again:
            for name, value in result.scalars().items():
                self._board.add_scalar(name, value, result.epoch)
            self._board.flush()


class Progress:
    """Lines about a run: its epochs and evaluations, and a `ProgressLine` during each of them.

    Short epochs share a line: the first and the last epoch have one, and others at most one in `_EVERY` seconds.
    """

    def __init__(self, label: str, config: RunConfig, log: TextIO) -> None:
        self.label, self.log = label, log
        self.epochs, self.batch_size = config.training.epochs, config.training.batch_size
        self.started = False
        self.told = -math.inf
        self.begin("training", unit="image")

    def begin(self, what: str, unit: str = "batch") -> None:
        """Start the progress line and the clock of a new task."""
        self.what, self.began = what, time.perf_counter()
        self.line = ProgressLine(f"{self.label} {what}", unit=unit, stream=self.log)

    def step(self, epoch: int, step: int, steps: int) -> None:
        """Record a finished step."""
        if not self.started and (epoch, step) != (1, 1):
            self._tell(f"resumes at epoch {epoch}/{self.epochs}, step {step}/{steps}")
        self.started = True
        self.line(((epoch - 1) * steps + step) * self.batch_size, self.epochs * steps * self.batch_size)

    def epoch(self, result: EpochResult) -> None:
        """Record a finished epoch."""
        now = time.perf_counter()
        if result.epoch < self.epochs and now - self.told < _EVERY:
            return
        self.told = now
        ratio = "" if result.ratio is None else f"  Eq. 16 ratio {result.ratio:.2g}"
        valid = "".join(f"  {name} {100 * value:.1f} %" for name, value in (result.validation or {}).items())
        self._tell(
            f"epoch {result.epoch}/{self.epochs}  loss {result.loss:.4f}  accuracy {100 * result.accuracy:.1f} %"
            f"{valid}{ratio}  lr {result.lr:g}  {result.seconds:.0f} s"
        )

    def evaluated(self, done: int, total: int) -> None:
        """Record an evaluated batch."""
        self.line(done, total)
        if done == total:
            self._tell(f"{self.what}: {time.perf_counter() - self.began:.0f} s")

    def _tell(self, text: str) -> None:
        self.line.write(f"{self.label} {text}")
