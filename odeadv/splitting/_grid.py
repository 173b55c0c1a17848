"""The time grid. Each jump of the field is one step."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, repeat
from typing import NamedTuple

MOST_STEPS = 1e8  # a grid is a tuple of floats, and 1e8 floats take 3 GB


class TimeStep(NamedTuple):
    """One step of signed length ``h`` from ``t0`` to ``t1``. ``h`` does not have the rounding error of ``t1 - t0``.

    ``own`` is the start of the operators' own clocks. It differs from ``t0`` in a stage with a frozen clock, and None
    means ``t0``.

    Attributes:
        t0: start of the step.
        t1: end of the step; before ``t0`` if time runs backward.
        h: signed length of the step, without the rounding error of ``t1 - t0``.
        own: start of the step on the operators' own clocks. It differs from ``t0`` in a stage with a frozen clock. None
            means ``t0``.
    """

    t0: float
    t1: float
    h: float
    own: float | None = None

    def time(self, fraction: float) -> float:
        """Return the time at ``fraction`` of the step: exactly ``t0`` for 0, and exactly ``t1`` for 1."""
        if fraction == 0.0:
            return self.t0
        return self.t1 if fraction == 1.0 else self.t0 + fraction * (self.t1 - self.t0)

    def own_time(self, fraction: float) -> float:
        """Return the time at ``fraction`` of the step on the operators' own clocks."""
        return self.time(fraction) if self.own is None else self.own + fraction * self.h


@dataclass(frozen=True)
class Grid:
    """The times ``t_0 ... t_N`` of N steps, increasing or decreasing.

    Attributes:
        times: the nodes ``t_0 ... t_N``.
        h: the signed step size if all steps except jumps are equal; otherwise None.
    """

    times: tuple[float, ...]
    h: float | None = None

    @property
    def sign(self) -> float:
        """The direction of time: 1 for increasing times, -1 for decreasing times."""
        return 1.0 if self.times[-1] >= self.times[0] else -1.0

    def __len__(self) -> int:
        return len(self.times) - 1

    @property
    def sizes(self) -> Iterable[float]:
        """The signed lengths of the steps, in order."""
        if self.h is not None and abs(len(self) * self.h - (self.times[-1] - self.times[0])) < 0.5 * abs(self.h):
            return repeat(self.h, len(self))  # without jumps all steps have the same size
        return (self[index].h for index in range(len(self)))

    def __iter__(self) -> Iterator[TimeStep]:
        return map(TimeStep, self.times, self.times[1:], self.sizes)

    def __getitem__(self, index: int) -> TimeStep:
        t0, t1 = self.times[index], self.times[index + 1]
        equal = self.h is not None and abs(t1 - t0) < 1.5 * abs(self.h)
        return TimeStep(t0, t1, self.h if equal and self.h is not None else t1 - t0)

    def part(self, first: int, last: int) -> Grid:
        """Return the steps from node number ``first`` to node number ``last``."""
        return Grid(self.times[first : last + 1], self.h)

    def parts(self, size: int) -> Iterator[Grid]:
        """Yield consecutive parts of ``size`` steps. The last part may have fewer steps."""
        return (self.part(first, min(first + size, len(self))) for first in range(0, len(self), size))

    def halved(self) -> Grid:
        """Return the grid after division of every step into two steps of equal size."""
        middles = [step.time(0.5) for step in self]
        times = [t for pair in zip(self.times, middles, strict=False) for t in pair]
        return Grid((*times, self.times[-1]), None if self.h is None else 0.5 * self.h)

    def clamped(self, t: float) -> float:
        """Return ``t``, or the end of the grid if ``t`` is outside by at most a rounding error of float32."""
        first, last, sign = self.times[0], self.times[-1], self.sign
        beyond = max(sign * first - sign * t, sign * t - sign * last)
        if 0.0 < beyond <= 2.0**-22 * max(abs(first), abs(last)):
            return first if sign * t < sign * first else last
        return t

    def snap(self, t: float) -> float:
        """Return ``t``, or a node if ``t`` differs from it by at most a rounding error of float32.

        The tolerance is relative to ``t`` itself, and at most a tenth of the step. So a small time in a long span is
        not replaced by the start of the span. Only for times outside the grid is the tolerance relative to the largest
        time of the grid.
        """
        t, sign = self.clamped(t), self.sign
        after = bisect_right(self.times, sign * t, key=lambda time: sign * time)
        n = min(max(after - 1, 0), len(self) - 1)
        step = abs(self.times[n + 1] - self.times[n]) if len(self) else 1.0
        largest = max(abs(self.times[0]), abs(self.times[-1]))
        tolerance = min(2.0**-22 * abs(t) + 2.0**-50 * largest, 0.1 * step)
        near = [node for node in self.times[max(after - 1, 0) : after + 1] if abs(node - t) <= tolerance]
        return min(near, key=lambda node: abs(node - t)) if near else t

    def locate(self, t: float, name: str = "t") -> int:
        """Return the number of the step that contains ``t``. An inner node belongs to the later step.

        Raises:
            ValueError: if ``t`` is outside the grid. The message names the argument ``name``.
        """
        first, last, sign = self.times[0], self.times[-1], self.sign
        if not sign * first <= sign * t <= sign * last:
            raise ValueError(f"{name}: {t:g} is outside the solved span, {first:g} to {last:g}")
        after = bisect_right(self.times, sign * t, key=lambda time: sign * time)
        return min(after - 1, len(self) - 1)


def make_grid(
    t_span: tuple[float, float],
    dt: float | Sequence[float] | None,
    steps: int | Sequence[float] | None,
    jumps: Sequence[tuple[float, float]] = (),
    *,
    clip_last: bool = False,
) -> Grid:
    """Return the steps over ``t_span``. Exactly one of ``dt`` and ``steps`` is given.

    Args:
        t_span: start and end; the end may be before the start.
        dt: size of a step, which is positive for both directions of time; or the sizes of all steps.
        steps: number of steps; or the times of all nodes, including both ends.
        jumps: intervals that are one step each, for any ``dt``.
        clip_last: True makes the last step shorter if ``dt`` does not divide the span.

    Raises:
        ValueError: if the steps do not end at the end of the span and ``clip_last`` is False, or if an end of a jump is
            not a node.
    """
    t0, t1 = t_span
    times: list[float]
    h: float | None = None
    if isinstance(dt, Sequence):
        times = _nodes_of_sizes(t0, t1, dt)
    elif isinstance(steps, Sequence):
        times = _nodes_of_times(t0, t1, steps)
    else:
        times, h = _equal_nodes(t0, t1, dt, steps, clip_last)
    for start, stop in jumps:
        ends = [min(times, key=lambda time, end=end: abs(time - end)) for end in (start, stop)]  # type: ignore[misc]
        if t1 < t0 or any(abs(a - b) > 1e-9 * max(1.0, abs(b)) for a, b in zip(ends, (start, stop), strict=True)):
            raise ValueError(
                f"dt: the field jumps from {start:g} to {stop:g}, and the steps from {t0:g} to {t1:g} do not end "
                "there; choose t_span and dt so that they do (dt = 1/k for a network)"
            )
        times = [time for time in times if not ends[0] < time < ends[1]]
    return Grid(tuple(times), h)


def _equal_nodes(
    t0: float, t1: float, dt: float | None, steps: int | None, clip_last: bool
) -> tuple[list[float], float | None]:
    """Return the nodes of equal steps and the signed step size. The size is None if the last step is shorter."""
    span = t1 - t0
    if steps is None:
        assert dt is not None
        count = abs(span) / max(abs(dt), 1e-300)
        if count > MOST_STEPS:
            raise ValueError(f"dt: {dt:g} would take {count:.3g} steps from {t0:g} to {t1:g}, expected a larger one")
        steps = round(count)
        if steps < 1 or not math.isclose(count, steps, rel_tol=1e-6):
            if clip_last:
                h = math.copysign(dt, span)
                return [*(t0 + n * h for n in range(math.ceil(count))), t1], None
            fewer, more = max(1, math.floor(count)), max(1, math.floor(count)) + 1
            raise ValueError(
                f"dt: {dt:g} does not divide the span from {t0:g} to {t1:g}; the nearest that do are "
                f"{abs(span) / fewer:.6g} (steps={fewer}) and {abs(span) / more:.6g} (steps={more}); "
                "clip_last=True makes the last step shorter"
            )
    h = span / steps
    return [t0 + n * h for n in range(steps)] + [t1], h


def _nodes_of_sizes(t0: float, t1: float, sizes: Sequence[float]) -> list[float]:
    """Return the nodes for the step sizes ``sizes``. The sizes are positive or have the sign of the span."""
    sign = math.copysign(1.0, t1 - t0)
    signed = [sign * abs(size) for size in sizes]
    if any(size == 0.0 or (size < 0.0 < sign) for size in sizes):
        raise ValueError(f"dt: got a step of size {min(sizes, key=lambda size: sign * size):g}, expected sizes above 0")
    if not math.isclose(math.fsum(signed), t1 - t0, rel_tol=1e-6):
        raise ValueError(
            f"dt: got {len(signed)} step sizes with the sum {math.fsum(map(abs, signed)):.6g}, expected the length of "
            f"the span from {t0:g} to {t1:g}, {abs(t1 - t0):.6g}"
        )
    return [*accumulate(signed[:-1], initial=t0), t1]


def _nodes_of_times(t0: float, t1: float, times: Sequence[float]) -> list[float]:
    """Return the nodes ``times`` after a check that the first and last equal the ends of the span up to rounding."""
    whole = Grid((t0, t1))
    nodes = [whole.clamped(t) for t in times]
    if whole.snap(nodes[0]) != t0 or whole.snap(nodes[-1]) != t1:
        raise ValueError(
            f"steps: got {nodes[0]:g} to {nodes[-1]:g}, expected times from {t0:g} to {t1:g}, both ends included"
        )
    if any(whole.sign * b <= whole.sign * a for a, b in pairwise(nodes)):
        raise ValueError(f"steps: the times must be in the order of the solve, {t0:g} to {t1:g}, each once")
    return [t0, *nodes[1:-1], t1]
