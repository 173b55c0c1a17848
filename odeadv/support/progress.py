"""Progress with the time left: a bar on a terminal or in a notebook, otherwise one line per minute."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from odeadv.support.extras import extra

# Seconds between two updates. A bar flickers if it is updated more often, and a log file should have few lines.
_EVERY_LIVE, _EVERY_PIPED = 0.5, 60.0


class ProgressLine:
    """A ``progress`` callback that shows how much is done and how long the rest will take.

    On a terminal or in a notebook it is a bar of tqdm. Otherwise it prints one line per minute. The rate is measured
    from the first call on, so work that an earlier run finished does not raise the rate.

    Args:
        label: text at the start of the line.
        unit: name of one counted item.
        stream: the stream to print to; by default the standard error.
        every: seconds between two lines if the stream is not a terminal.
    """

    def __init__(
        self, label: str = "", *, unit: str = "batch", stream: TextIO | None = None, every: float = _EVERY_PIPED
    ) -> None:
        self._label, self._unit, self._stream, self._every = label, unit, stream, every
        self._bar: Any = None
        self._first: tuple[float, int] | None = None
        self._printed = 0.0
        self._note = ""

    def note(self, text: str) -> None:
        """Show ``text`` at the end of the line from now on."""
        self._note = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def __call__(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` items are done."""
        with extra("evaluate"):
            from tqdm.auto import tqdm  # imported here, because the import takes a tenth of a second

        stream = self._stream or sys.stderr
        now = time.monotonic()
        if self._first is None:
            self._first, self._printed = (now, done), now
            if stream.isatty() or (self._stream is None and "ipykernel" in sys.modules):
                self._bar = tqdm(
                    total=total, initial=done, desc=self._label or None, unit=self._unit, file=self._stream,
                    mininterval=_EVERY_LIVE, dynamic_ncols=True,
                )  # fmt: skip
        if self._bar is not None:
            self._bar.total = total
            self._bar.update(done - self._bar.n)
            if done >= total:
                self._bar.close()
        elif now - self._printed >= self._every:
            self._printed = now
            began, earlier = self._first
            line = tqdm.format_meter(
                done, total, now - began, ncols=0, prefix=self._label, unit=self._unit, initial=earlier
            )
            print(f"{line} {self._note}".rstrip(), file=stream, flush=True)

    def write(self, text: str) -> None:
        """Print ``text`` on a separate line, above the bar if the stream shows a bar."""
        stream = self._stream or sys.stderr
        if self._bar is not None:
            self._bar.write(text, file=stream)
        else:
            print(text, file=stream, flush=True)
