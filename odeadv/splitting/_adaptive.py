"""Adaptive steps: a grid on which the estimated local errors meet a tolerance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import torch
from torch import Tensor

from odeadv.splitting._grid import Grid, Step
from odeadv.splitting._integrate import Stepper

SAFETY, SHRINK, GROW = 0.9, 0.2, 5.0


@dataclass(frozen=True)
class Adaptive:
    """Tolerances of adaptive steps, in the weighted root-mean-square norm of Hairer, Norsett & Wanner (II.4).

    By ``"doubling"``, a trial step of size h is compared with two of size h/2; the two are kept, so the error that is
    controlled is theirs. By ``"palindromic"`` pairs, a step of a scheme of odd order is compared with one of its
    adjoint, whose leading error has the opposite sign (Auzinger, Hofstaetter, Ketcheson & Koch 2017, BIT 57): two steps
    a trial instead of three, blind to the errors of sub-steps, which must therefore be of higher order. A PI
    controller chooses the next h. Errors are controlled step by step, not over the span.

    Attributes:
        rtol: relative tolerance of a step.
        atol: absolute tolerance of a step.
        first: size of the first trial; by default a hundredth of the span.
        smallest: give up below this; by default 1e-13 of the largest time.
        most: trial steps at the most, rejected ones included.
        estimate: how the error of a step is estimated.

    Raises:
        ValueError: naming the attribute that is out of range.
    """

    rtol: float = 1e-4
    atol: float = 1e-6
    first: float | None = None
    smallest: float | None = None
    most: int = 100_000
    estimate: Literal["doubling", "palindromic"] = "doubling"

    def __post_init__(self) -> None:
        if self.estimate not in ("doubling", "palindromic"):
            raise ValueError(f"estimate: got {self.estimate!r}, expected 'doubling' or 'palindromic'")
        for name in ("rtol", "atol"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected a number, at least 0")
        if self.rtol == 0 and self.atol == 0:
            raise ValueError("rtol, atol: got 0 and 0, expected one of them above 0")
        for name in ("first", "smallest"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}: got {value!r}, expected a number above 0, or None")
        if self.first and self.smallest and self.first < self.smallest:
            raise ValueError(f"first: got {self.first!r}, expected at least smallest, {self.smallest!r}")
        if not isinstance(self.most, int) or self.most < 1:
            raise ValueError(f"most: got {self.most!r}, expected a whole number, at least 1")


class Outcome(Enum):
    """How a search for steps ended."""

    DONE = "done"
    TOO_SMALL = "too small"
    TOO_MANY = "too many"


@dataclass(frozen=True)
class Search:
    """A grid, and how it was found."""

    grid: Grid
    outcome: Outcome
    rejected: int


def choose_grid(
    stepper: Stepper,
    x0: Tensor,
    t_span: tuple[float, float],
    settings: Adaptive,
    order: float,
    edges: Sequence[float] = (),
    mirror: Stepper | None = None,
) -> Search:
    """Find steps over ``t_span`` with which ``stepper`` meets the tolerances; they end on ``edges``.

    Args:
        stepper: advances the state; its tallies count the trials.
        x0: initial state.
        t_span: start and end, in either direction.
        settings: tolerances.
        order: of the method, so that the error of a step goes as h to the power order + 1; infinite for exact flows.
        edges: times inside the span where a step must end.
        mirror: advances by the adjoint scheme, for estimates by palindromic pairs; step doubling without it.

    Returns:
        The grid, which ends early if the search failed.
    """
    t, end = t_span
    sign = 1.0 if end > t else -1.0
    stops = [*sorted((e for e in edges if sign * t < sign * e < sign * end), key=lambda e: sign * e), end]
    smallest = settings.smallest or 1e-13 * max(abs(t), abs(end))
    size = settings.first or abs(end - t) / 100
    times, x, rejected, previous = [t], x0, 0, 1.0
    order = min(order, 20.0)
    power = 1.0 / (order + 1.0)
    with torch.no_grad():
        for _ in range(settings.most):
            left = abs(stops[0] - t)
            # A step that nearly reaches the stop takes it; one that would leave less than itself takes half.
            trial = left if size >= left * (1.0 - 1e-9) else min(size, 0.5 * left)
            target = stops[0] if trial == left else t + sign * trial
            ends, y, difference = _trial(stepper, mirror, x, t, target, order)
            error = _norm(difference, x, y, settings)
            if error <= 1.0:
                times += ends
                t, x = target, y
                factor = SAFETY * max(error, 1e-10) ** (-0.7 * power) * previous ** (0.4 * power)
                grown = trial * min(GROW, max(SHRINK, factor))
                size = max(size, grown) if trial == left else grown
                previous = max(error, 1e-4)
                if trial == left:
                    stops.pop(0)
                if not stops:
                    return Search(Grid(tuple(times)), Outcome.DONE, rejected)
            else:
                rejected += 1
                factor = SAFETY * error**-power if error < float("inf") else SHRINK
                size = trial * min(1.0, max(SHRINK, factor))
            if size < smallest:
                return Search(Grid(tuple(times)), Outcome.TOO_SMALL, rejected)
    return Search(Grid(tuple(times)), Outcome.TOO_MANY, rejected)


def _trial(
    stepper: Stepper, mirror: Stepper | None, x: Tensor, t: float, target: float, order: float
) -> tuple[list[float], Tensor, Tensor]:
    """The ends of the steps tried from ``t`` to ``target``, the state they lead to, and the estimate of its error."""
    whole = stepper.advance(x, _step(t, target))
    if mirror is not None:
        return [target], whole, 0.5 * (whole - mirror.advance(x, _step(t, target)))
    middle = t + 0.5 * (target - t)
    halves = stepper.advance(stepper.advance(x, _step(t, middle)), _step(middle, target))
    return [middle, target], halves, (halves - whole) / (2.0**order - 1.0)


def _norm(error: Tensor, x: Tensor, y: Tensor, settings: Adaptive) -> float:
    scale = settings.atol + settings.rtol * torch.maximum(x.abs(), y.abs())
    ratio = torch.where(error == 0, torch.zeros_like(scale), error.abs() / scale)
    value = float(ratio.square().mean().sqrt()) if ratio.numel() else 0.0
    return value if value == value else float("inf")


def _step(t0: float, t1: float) -> Step:
    return Step(t0, t1, t1 - t0)
