"""Progress on one line, with the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO


class ProgressLine:
    """A ``progress`` callback that keeps one line up to date: ``12/79 batches, 31 s, about 3 min left``.

    The time left supposes the rate since the first call, so work found in a journal does not count as fast.

    Args:
        stream: where to print; the standard error by default.
        every: seconds between two updates, but for the last.
        clock: seconds, increasing.
    """

    def __init__(
        self, stream: TextIO | None = None, *, every: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream, self._every, self._clock = stream, every, clock
        self._made = clock()
        self._first: tuple[float, int] | None = None
        self._printed = float("-inf")

    def __call__(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` batches are done."""
        now = self._clock()
        if self._first is None:
            self._first = (now, done)
        if now - self._printed < self._every and done < total:
            return
        self._printed = now
        spent, worked = now - self._first[0], done - self._first[1]
        left = f", about {duration(spent / worked * (total - done))} left" if worked > 0 and done < total else ""
        line = f"{done}/{total} batches, {duration(now - self._made)}{left}"
        stream = self._stream or sys.stderr
        stream.write(f"\r{line:<60}" + ("\n" if done == total else ""))
        stream.flush()


def duration(seconds: float) -> str:
    """A time in one or two units: ``42 s``, ``7 min``, ``3 h 20 min``."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
