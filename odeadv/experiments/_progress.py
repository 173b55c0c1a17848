"""What a run tells while it goes: lines for a reader, JSON lines and TensorBoard events for a machine."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from odeadv.experiments._config import RunConfig
from odeadv.support.files import write_text
from odeadv.training import EpochResult


class Metrics:
    """What became of every epoch, as JSON lines and, if asked for, for TensorBoard."""

    def __init__(self, folder: Path, tensorboard: bool) -> None:
        self._path = folder / "metrics.jsonl"
        self._lines: list[str] = []
        # Epochs of an earlier start are told again when a run goes on; the event files have them already.
        self._there = len(self._path.read_text(encoding="utf-8").splitlines()) if self._path.exists() else 0
        self._board = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError("tensorboard: is not installed; pip install tensorboard, or leave it out") from None
            self._board = SummaryWriter(str(folder / "tensorboard"))

    def add(self, result: EpochResult) -> None:
        """One more epoch; the file holds exactly the epochs of this run, also after it was interrupted."""
        again = result.epoch <= self._there
        self._lines.append(json.dumps(asdict(result), allow_nan=False))
        write_text(self._path, "\n".join(self._lines) + "\n")
        if self._board is not None and not again:
            for name, value in _scalars(asdict(result)).items():
                self._board.add_scalar(name, value, result.epoch)
            self._board.flush()


def _scalars(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, tuple | list):
            found |= {f"{prefix}{name}/{n}": float(item) for n, item in enumerate(value)}
        elif isinstance(value, int | float):
            found[f"{prefix}{name}"] = float(value)
    return found


class Progress:
    """Lines about a run: one per epoch, and within it one that is overwritten (on a terminal) or one per minute."""

    def __init__(self, label: str, config: RunConfig, log: TextIO) -> None:
        self.label, self.log = label, log
        self.epochs, self.batch_size = config.training.epochs, config.training.batch_size
        self.live = log.isatty()
        self.what = ""
        self.began = self.shown = time.perf_counter()
        self.first: float | None = None  # share of the training that was done before
        self.steps = 0

    def begin(self, what: str) -> None:
        """Begin a new piece of work."""
        self.what, self.began = what, time.perf_counter()

    def step(self, epoch: int, step: int, steps: int) -> None:
        """Record that a step was made."""
        share = (epoch - 1 + step / steps) / self.epochs
        if self.first is None:
            self.first = share
            if (epoch, step) != (1, 1):
                self._line(f"goes on with epoch {epoch}/{self.epochs}, step {step}/{steps}; what was before is kept")
            return
        self.steps += 1
        rate = self.steps * self.batch_size / (time.perf_counter() - self.began)
        self._now_and_then(f"epoch {epoch}/{self.epochs}, step {step}/{steps}, {rate:.0f} images/s", share, self.first)

    def epoch(self, result: EpochResult) -> None:
        """Record that an epoch has ended."""
        share = result.epoch / self.epochs
        left = "" if self.first is None or share <= self.first else f"  {self._left(share, self.first)}"
        ratio = "" if result.ratio is None else f"  Eq. 16 ratio {result.ratio:.2g}"
        valid = "".join(f"  {name} {100 * value:.1f} %" for name, value in (result.validation or {}).items())
        self._line(
            f"epoch {result.epoch}/{self.epochs}  loss {result.loss:.4f}  accuracy {100 * result.accuracy:.1f} %"
            f"{valid}{ratio}  lr {result.lr:g}  {result.seconds:.0f} s{left}"
        )

    def evaluated(self, done: int, total: int) -> None:
        """Record that a batch was evaluated."""
        if done == total:
            self._line(f"{self.what}: {time.perf_counter() - self.began:.0f} s")
        else:
            self._now_and_then(f"{self.what}, batch {done}/{total}", done / total, 0.0)

    def _now_and_then(self, text: str, share: float, first: float) -> None:
        now = time.perf_counter()
        if now - self.shown > (0.5 if self.live else 60.0):
            self.shown = now
            (self._overwrite if self.live else self._line)(f"{text}, {self._left(share, first)}")

    def _left(self, share: float, first: float) -> str:
        seconds = (time.perf_counter() - self.began) * (1.0 - share) / max(share - first, 1e-9)
        return f"{seconds:.0f} s left" if seconds < 120 else f"{seconds / 60:.0f} min left"

    def _line(self, text: str) -> None:
        print(f"{chr(13) + chr(27) + '[K' if self.live else ''}{self.label} {text}", file=self.log, flush=True)

    def _overwrite(self, text: str) -> None:
        print(f"\r\x1b[K{self.label} {text}", end="", file=self.log, flush=True)
