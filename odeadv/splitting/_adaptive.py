"""Adaptive steps: choose a grid so that the estimated local errors meet a tolerance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from odeadv.splitting._grid import Grid, TimeStep
from odeadv.splitting._stepper import Stepper
from odeadv.splitting.status import Status
from odeadv.support.checks import choice, integer, number, shown
from odeadv.support.isolation import read_value

# Hairer, Norsett & Wanner (1993), Solving ODEs I, II.4: a step is a little smaller than the estimate allows. It never
# shrinks or grows by more than a factor of 5 from one trial to the next.
SAFETY, SHRINK, GROW = 0.9, 0.2, 5.0
_HIGHEST = 20.0  # exact flows have infinite order, but above 20 the order has hardly any effect on the step size

# The end times of the steps of a trial, the state at the last end, and the estimated error of this state.
Tried = tuple[list[float], Tensor, Tensor]
Trial = Callable[[Tensor, float, float], Tried]
ErrorNorm = Literal["batch", "rms", "max"] | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Adaptive:
    """Settings of adaptive steps (Hairer, Norsett & Wanner 1993, II.4).

    A step is accepted if ``norm(error / (atol + rtol * |x|))`` is at most 1. There are two estimates of the error of a
    trial step of size h. ``"doubling"`` compares it with two steps of size h/2, and keeps the two steps.
    ``"palindromic"`` compares a step of a scheme of odd order with a step of its adjoint. The leading errors of the two
    have opposite signs (Auzinger, Hofstaetter, Ketcheson & Koch 2017, BIT 57). This pair costs two steps per trial
    instead of three. It does not see the errors of sub-steps, so the sub-steps must have a higher order than the
    scheme. A PI controller chooses the next h. The error is controlled per step, not over the span.

    Attributes:
        rtol: relative tolerance of a step: a number, or a tensor that broadcasts with the state.
        atol: absolute tolerance of a step: a number, or a tensor that broadcasts with the state.
        norm: ``"batch"`` takes the root mean square within each sample, then the largest over the samples (the leading
            axis). So slow samples do not hide a fast sample. For states with fewer than two axes it is ``"rms"``.
            ``"rms"`` is the root mean square over the whole state, and ``"max"`` is the largest entry. Or give a
            function from a real, nonnegative tensor of the shape of the state to a 0-d tensor.
        first: size of the first trial step; by default a hundredth of the span.
        smallest: smallest size of a step; by default 1e-13 times the largest time. The solve ends if the next step
            would be smaller. Only a step that ends at a stop or at the end of the span may be smaller.
        largest: largest size of a step. If the field has a short pulse, give its duration: longer steps would miss it.
        stops: times at which a step must end, such as discontinuities of a forcing.
        most: largest number of trial steps, including the rejected steps.
        estimate: estimate of the error, ``"doubling"`` or ``"palindromic"``.

    Raises:
        TypeError, ValueError: if an attribute has a wrong type or value. The message names the attribute.

    Example:
        >>> steps = odeadv.Adaptive(rtol=1e-6, atol=1e-8, largest=0.1)
        >>> odeadv.solve(lambda t, x: -x, torch.ones(2), (0.0, 1.0), dt=steps, substep="rk4").xs[-1]
        tensor([0.3679, 0.3679])
    """

    rtol: float | Tensor = 1e-4
    atol: float | Tensor = 1e-6
    norm: ErrorNorm = "batch"
    first: float | None = None
    smallest: float | None = None
    largest: float | None = None
    stops: Sequence[float] = ()
    most: int = 100_000
    estimate: Literal["doubling", "palindromic"] = "doubling"

    def __post_init__(self) -> None:
        choice("estimate", self.estimate, ("doubling", "palindromic"))
        if not callable(self.norm):
            choice("norm", self.norm, ("batch", "rms", "max"))
        smallest_tolerances = [_checked_tolerance(name, getattr(self, name)) for name in ("rtol", "atol")]
        if max(smallest_tolerances) == 0:
            raise ValueError("rtol, atol: got 0 and 0, expected one of them above 0")
        sizes = {name: getattr(self, name) for name in ("first", "smallest", "largest")}
        for name, value in sizes.items():
            if value is not None:
                object.__setattr__(self, name, number(name, value, above=0))
        for name in ("first", "largest"):
            value, bound = sizes[name], self.smallest
            if value is not None and bound is not None and value < bound:
                raise ValueError(f"{name}: got {value!r}, expected at least smallest, {bound!r}")
        object.__setattr__(self, "stops", tuple(number("stops", stop) for stop in self.stops))
        integer("most", self.most)

    def error(self, difference: Tensor, x: Tensor, y: Tensor) -> float:
        """Return the norm of ``difference`` divided by the tolerances of a step from ``x`` to ``y``; inf for NaN."""
        if not difference.numel():
            return 0.0
        atol, rtol = (_on(value, x) for value in (self.atol, self.rtol))
        scale = atol + rtol * torch.maximum(x.abs(), y.abs())
        ratio = torch.where(difference == 0, torch.zeros_like(scale), difference.abs() / scale)
        found = read_value(self.size(ratio), "dt: adaptive")
        return found if found == found else float("inf")

    def size(self, ratio: Tensor) -> Tensor:
        """Return the norm of ``ratio``, a real, nonnegative tensor of the shape of the state."""
        if callable(self.norm):
            return self.norm(ratio)
        if self.norm == "max":
            return ratio.max()
        if self.norm == "rms" or ratio.ndim < 2:
            return ratio.square().mean().sqrt()
        return ratio.square().flatten(1).mean(dim=1).max().sqrt()


def _checked_tolerance(name: str, value: float | Tensor) -> float:
    """Return the largest entry of the tolerance ``value`` after a check of its type and range."""
    if isinstance(value, Tensor) and value.ndim:
        if not (value.is_floating_point() and bool(value.isfinite().all()) and bool((value >= 0).all())):
            raise ValueError(f"{name}: got {shown(value)}, expected finite floating entries of at least 0")
        return float(value.max())
    return number(name, value, least=0)


def _on(value: float | Tensor, x: Tensor) -> float | Tensor:
    return value.to(x.device) if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class Search:
    """The result of a search for adaptive steps.

    Attributes:
        grid: the accepted steps. They end before the end of the span if the search failed.
        status: ``SUCCESS``, ``STEP_TOO_SMALL`` or ``TOO_MANY_STEPS``.
        rejected: number of rejected trial steps.
    """

    grid: Grid
    status: Status
    rejected: int


def choose_grid(
    x0: Tensor, t_span: tuple[float, float], settings: Adaptive, trial: Trial, order: float, edges: Sequence[float] = ()
) -> Search:
    """Find steps over ``t_span`` that meet the tolerances.

    Args:
        x0: initial state.
        t_span: start and end; the end may be before the start.
        settings: the tolerances and the other settings.
        trial: function that tries one step, see `doubling` and `palindromic`.
        order: order p of the method. The estimated error is proportional to h^(p + 1). It is infinite for exact flows.
        edges: times inside the span at which a step must end, in addition to ``settings.stops``.
    """
    t, end = t_span
    sign = 1.0 if end > t else -1.0
    inside = {stop for stop in (*edges, *settings.stops) if sign * t < sign * stop < sign * end}
    stops = [*sorted(inside, key=lambda stop: sign * stop), end]
    smallest = settings.smallest or 1e-13 * max(abs(t), abs(end))
    largest = settings.largest or float("inf")
    size = min(max(settings.first or abs(end - t) / 100, smallest), largest)
    times, x, rejected, previous = [t], x0.detach(), 0, 1.0
    power = 1.0 / (min(order, _HIGHEST) + 1.0)
    for _ in range(settings.most):
        left = abs(stops[0] - t)
        # A step that nearly reaches the stop ends at the stop. If less than a full step would be left afterwards, the
        # rest is divided into two equal steps.
        tried = left if size >= left * (1.0 - 1e-9) else min(size, 0.5 * left)
        target = stops[0] if tried == left else t + sign * tried
        ends, y, difference = trial(x, t, target)
        error = settings.error(difference, x, y)
        if error <= 1.0:
            times += ends
            t, x = target, y
            factor = SAFETY * max(error, 1e-10) ** (-0.7 * power) * previous ** (0.4 * power)
            grown = tried * min(GROW, max(SHRINK, factor))
            size = min(max(size if tried == left else smallest, grown), largest)
            previous = max(error, 1e-4)
            if tried == left:
                stops.pop(0)
            if not stops:
                return Search(Grid(tuple(times)), Status.SUCCESS, rejected)
        else:
            rejected += 1
            factor = SAFETY * error**-power if error < float("inf") else SHRINK
            size = tried * min(1.0, max(SHRINK, factor))
        if size < smallest:
            return Search(Grid(tuple(times)), Status.STEP_TOO_SMALL, rejected)
    return Search(Grid(tuple(times)), Status.TOO_MANY_STEPS, rejected)


def doubling(stepper: Stepper, order: float) -> Trial:
    """Return the trial that compares one step with two steps of half the size, and keeps the two steps.

    Args:
        stepper: advances the state by one step.
        order: order of ``stepper``. The error estimate is the difference divided by 2^order - 1.
    """
    scale = 2.0 ** min(order, _HIGHEST) - 1.0

    def trial(x: Tensor, t: float, target: float) -> Tried:
        middle = t + 0.5 * (target - t)
        # The states are detached instead of computed under no_grad, because f may call torch.autograd.grad.
        whole = stepper.advance(x, _step(t, target)).detach()
        half = stepper.advance(x, _step(t, middle)).detach()
        halves = stepper.advance(half, _step(middle, target)).detach()
        return [middle, target], halves, (halves - whole) / scale

    return trial


def palindromic(stepper: Stepper, mirror: Stepper) -> Trial:
    """Return the trial that compares a step of ``stepper`` with a step of ``mirror``, its adjoint scheme.

    Args:
        stepper: advances the state by one step of the scheme, whose result is kept.
        mirror: advances the state by one step of the adjoint scheme. Half the difference is the error estimate.
    """

    def trial(x: Tensor, t: float, target: float) -> Tried:
        whole = stepper.advance(x, _step(t, target)).detach()
        return [target], whole, 0.5 * (whole - mirror.advance(x, _step(t, target)).detach())

    return trial


def _step(t0: float, t1: float) -> TimeStep:
    return TimeStep(t0, t1, t1 - t0)
