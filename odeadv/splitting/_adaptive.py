"""Adaptive steps: a grid on which the estimated local errors meet a tolerance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from odeadv.splitting._grid import Grid, TimeStep
from odeadv.splitting._stepper import Stepper
from odeadv.splitting.status import Outcome
from odeadv.support.checks import integer
from odeadv.support.isolation import read_value

SAFETY, SHRINK, GROW = 0.9, 0.2, 5.0

# The ends of the steps that a trial consists of, the state they lead to, and the estimate of its error.
Tried = tuple[list[float], Tensor, Tensor]
Trial = Callable[[Tensor, float, float], Tried]


@dataclass(frozen=True)
class Adaptive:
    """Tolerances of adaptive steps, in the weighted root-mean-square norm of Hairer, Norsett & Wanner (II.4).

    By ``"doubling"``, a trial step of size h is compared with two of size h/2; the two are kept, so the error that is
    controlled is theirs. By ``"palindromic"`` pairs, a step of a scheme of odd order is compared with one of its
    adjoint, whose leading error has the opposite sign (Auzinger, Hofstaetter, Ketcheson & Koch 2017, BIT 57): two steps
    a trial instead of three, blind to the errors of sub-steps, which must therefore be of higher order. By
    ``"embedded"`` pairs, the result of an averaged or extrapolated scheme is compared with that of lower order which
    the same tables make with other factors (Hairer, Norsett & Wanner II.9): one step a trial, and the error that is
    controlled is that of the lower order. A PI controller chooses the next h. Errors are controlled step by step, not
    over the span.

    Attributes:
        rtol: relative tolerance of a step.
        atol: absolute tolerance of a step.
        first: size of the first trial; by default a hundredth of the span, or ``smallest`` if that is more.
        smallest: give up where a step of this size is rejected; by default 1e-13 of the largest time. A step that is
            cut short by the end of the span may be smaller.
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
    estimate: Literal["doubling", "palindromic", "embedded"] = "doubling"

    def __post_init__(self) -> None:
        if self.estimate not in ("doubling", "palindromic", "embedded"):
            raise ValueError(f"estimate: got {self.estimate!r}, expected 'doubling', 'palindromic' or 'embedded'")
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
        integer("most", self.most)


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
    trial: Trial | None = None,
) -> Search:
    """Find steps over ``t_span`` with which ``stepper`` meets the tolerances; they end on ``edges``.

    Args:
        stepper: advances the state; its costs count the trials.
        x0: initial state.
        t_span: start and end, in either direction.
        settings: tolerances.
        order: of what is estimated, so that it goes as h to the power order + 1; infinite for exact flows.
        edges: times inside the span where a step must end.
        trial: how a step is tried, `doubling` if not given.

    Returns:
        The grid, which ends early if the search failed.
    """
    t, end = t_span
    sign = 1.0 if end > t else -1.0
    stops = [*sorted((e for e in edges if sign * t < sign * e < sign * end), key=lambda e: sign * e), end]
    smallest = settings.smallest or 1e-13 * max(abs(t), abs(end))
    size = max(settings.first or abs(end - t) / 100, smallest)
    times, x, rejected, previous = [t], x0, 0, 1.0
    order = min(order, 20.0)
    attempt = trial or doubling(stepper, order)
    power = 1.0 / (order + 1.0)
    with torch.no_grad():
        for _ in range(settings.most):
            left = abs(stops[0] - t)
            # A step that nearly reaches the stop takes it; one that would leave less than itself takes half.
            tried = left if size >= left * (1.0 - 1e-9) else min(size, 0.5 * left)
            target = stops[0] if tried == left else t + sign * tried
            ends, y, difference = attempt(x, t, target)
            error = _norm(difference, x, y, settings)
            if error <= 1.0:
                times += ends
                t, x = target, y
                factor = SAFETY * max(error, 1e-10) ** (-0.7 * power) * previous ** (0.4 * power)
                grown = tried * min(GROW, max(SHRINK, factor))
                size = max(size if tried == left else smallest, grown)
                previous = max(error, 1e-4)
                if tried == left:
                    stops.pop(0)
                if not stops:
                    return Search(Grid(tuple(times)), Outcome.DONE, rejected)
            else:
                rejected += 1
                factor = SAFETY * error**-power if error < float("inf") else SHRINK
                size = tried * min(1.0, max(SHRINK, factor))
            if size < smallest:
                return Search(Grid(tuple(times)), Outcome.TOO_SMALL, rejected)
    return Search(Grid(tuple(times)), Outcome.TOO_MANY, rejected)


def doubling(stepper: Stepper, order: float) -> Trial:
    """One step compared with two of half the size, which are kept."""

    def trial(x: Tensor, t: float, target: float) -> Tried:
        whole = stepper.advance(x, _step(t, target))
        middle = t + 0.5 * (target - t)
        halves = stepper.advance(stepper.advance(x, _step(t, middle)), _step(middle, target))
        return [middle, target], halves, (halves - whole) / (2.0**order - 1.0)

    return trial


def palindromic(stepper: Stepper, mirror: Stepper) -> Trial:
    """A step compared with one by the adjoint scheme, ``mirror``."""

    def trial(x: Tensor, t: float, target: float) -> Tried:
        whole = stepper.advance(x, _step(t, target))
        return [target], whole, 0.5 * (whole - mirror.advance(x, _step(t, target)))

    return trial


def embedded(stepper: Stepper, others: Sequence[float]) -> Trial:
    """A step compared with what the same tables make with the factors ``others``."""

    def trial(x: Tensor, t: float, target: float) -> Tried:
        return [target], *stepper.advance_with(others, x, _step(t, target))

    return trial


def _norm(error: Tensor, x: Tensor, y: Tensor, settings: Adaptive) -> float:
    scale = settings.atol + settings.rtol * torch.maximum(x.abs(), y.abs())
    ratio = torch.where(error == 0, torch.zeros_like(scale), error.abs() / scale)
    value = read_value(ratio.square().mean().sqrt(), "dt: adaptive") if ratio.numel() else 0.0
    return value if value == value else float("inf")


def _step(t0: float, t1: float) -> TimeStep:
    return TimeStep(t0, t1, t1 - t0)
