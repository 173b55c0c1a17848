"""What `solve` was asked for, checked and made into objects before any work is done."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from torch import Tensor

from odeadv.costate import Converge, Recordings
from odeadv.fields import AdversarialField, VectorField
from odeadv.splitting import (
    Adaptive,
    Grid,
    make_grid,
)
from odeadv.splitting.method import AccuracyWarning, Discretisation, _jumps
from odeadv.support.checks import integer, number
from odeadv.support.isolation import read_value

SaveAt = Literal["steps"] | Sequence[float] | Tensor | None


def read_recordings(field: VectorField, sweeps: int | str | Converge | None, ascent: int | None) -> Recordings:
    """How often to record.

    Raises:
        TypeError, ValueError: naming ``sweeps`` or ``ascent``.
    """
    if sweeps is not None and ascent is not None:
        raise ValueError(f"sweeps, ascent: got {sweeps!r} and {ascent!r}, expected one of the two")
    for name, value in (("sweeps", sweeps), ("ascent", ascent)):
        if value is None:
            continue
        if not isinstance(field, AdversarialField):
            raise ValueError(f"{name}: got {value!r} for a field without a loss, expected an AdversarialField")
        if name == "sweeps" and isinstance(value, str | Converge):
            if isinstance(value, str) and value != "converge":
                raise ValueError(f"sweeps: got {value!r}, expected a number, 'converge' or odeadv.Converge(...)")
            return Recordings(converge=Converge() if isinstance(value, str) else value)
        return Recordings(integer(name, value), adding=name == "ascent")
    return Recordings()


@dataclass(frozen=True)
class Times:
    """When to step: a grid, or a span and the tolerances by which to find one.

    Attributes:
        span: start and end.
        grid: the steps, if they are fixed.
        adaptive: how to find them, if not.
    """

    span: tuple[float, float]
    grid: Grid | None = None
    adaptive: Adaptive | None = None


def read_times(
    field: VectorField,
    t_span: tuple[float, float] | None,
    dt: float | str | Adaptive | None,
    steps: int | None,
    rtol: float | None,
    atol: float | None,
) -> Times:
    """The steps to take.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    span = _span(field.problem.t_span if t_span is None else t_span)
    fixed = [name for name, operator in field.operators.items() if not operator.reversible]
    if fixed and span[1] < span[0]:
        warnings.warn(
            f"t_span: {span} runs backward, and with it the irreversible operator {fixed[0]!r}; expected an increasing "
            "span",
            AccuracyWarning,
            stacklevel=4,
        )
    if dt is not None and steps is not None:
        raise ValueError(f"dt, steps: got dt={dt!r} and steps={steps!r}, expected one of the two")
    if dt is None and steps is None:
        dt, steps = field.problem.dt, field.problem.steps
        if dt is not None and steps is not None:
            raise ValueError("dt, steps: the field carries both, expected one of the two")
        if dt is None and steps is None:
            raise ValueError("dt: neither dt nor steps is given, and the field carries none; give one of the two")
    if isinstance(dt, Adaptive) or (isinstance(dt, str) and dt == "adaptive"):
        return _adaptive_times(field, span, dt, rtol, atol)
    if rtol is not None or atol is not None:
        raise ValueError(f"rtol, atol: got {rtol!r} and {atol!r} for fixed steps, expected dt='adaptive' with them")
    if dt is not None:
        dt = number("dt", dt)
        if dt == 0.0:
            raise ValueError("dt: got 0, expected a step size different from 0")
        if math.copysign(1.0, dt) < 0.0 and span[1] > span[0]:
            raise ValueError(f"dt: got {dt:g} for a span that runs forward, {span[0]:g} to {span[1]:g}; expected > 0")
    else:
        steps = integer("steps", steps)
    inside = [(start, stop) for start, stop in _jumps(field) if start < max(span) and stop > min(span)]
    grid = make_grid(span, dt, steps, inside)
    for term in field.operators.values():
        if term.edges:
            for step in grid:
                term.on(step.t0, step.t1)
    return Times(span, grid)


def _adaptive_times(
    field: VectorField, span: tuple[float, float], dt: str | Adaptive, rtol: float | None, atol: float | None
) -> Times:
    if _jumps(field):
        raise ValueError("dt: adaptive steps need a field without jumps; a network is solved with dt = 1 or 1/k")
    if isinstance(dt, Adaptive):
        if rtol is not None or atol is not None:
            raise ValueError("rtol, atol: given beside dt=odeadv.Adaptive(...), expected them within it")
        return Times(span, adaptive=dt)
    default = Adaptive()
    return Times(
        span,
        adaptive=Adaptive(
            rtol=default.rtol if rtol is None else number("rtol", rtol),
            atol=default.atol if atol is None else number("atol", atol),
        ),
    )


def check_estimate(field: VectorField, method: Discretisation, times: Times) -> None:
    """Refuse an estimate of errors that the method does not allow, before a recording is made under it.

    Raises:
        ValueError: naming ``estimate``.
    """
    idle = isinstance(field, AdversarialField) and field.eta == 0.0
    scheme = method.scheme
    if times.adaptive is None or scheme is None or len(field.operators) == 1 or idle:
        return
    if times.adaptive.estimate == "embedded" and not scheme.embedded:
        raise ValueError(
            "estimate: 'embedded' needs a scheme with an embedded one, such as 'averaged-lie' or "
            f"'extrapolated-strang4', and {method.name!r} has none; take 'doubling'"
        )
    if times.adaptive.estimate == "palindromic":
        if scheme.order % 2 == 0 or scheme.mixture:
            raise ValueError(
                "estimate: 'palindromic' needs a scheme of odd order, such as 'lie', 'ruth3' or 'aks3', and "
                f"{method.name!r} has order {scheme.order}; take 'doubling'"
            )
        low = [substep.name for substep in method.substeps.values() if substep.order <= scheme.order]
        if low:
            raise ValueError(
                f"estimate: 'palindromic' does not see the error of sub-steps, so they must be of a higher order than "
                f"{method.name!r}, and {low[0]!r} is not; give substep=, or take 'doubling'"
            )


def check_decisions(x0: Tensor, plan: Recordings, times: Times) -> None:
    """Refuse what goes on as the values of states decide, where they cannot be looked at.

    Raises:
        ValueError: naming ``dt`` or ``sweeps``, inside torch.func.vmap.
    """
    if times.adaptive is not None:
        read_value(x0.isfinite().all(), "dt: adaptive")
    if plan.converge is not None:
        read_value(x0.isfinite().all(), "sweeps: 'converge'")


def _span(t_span: Any) -> tuple[float, float]:
    if t_span is None:
        raise ValueError("t_span: not given, and the field carries none; give (t0, t1)")
    try:
        ends = () if isinstance(t_span, str) else tuple(t_span)
    except TypeError:
        raise TypeError(f"t_span: got {type(t_span).__name__}, expected two times (t0, t1)") from None
    if len(ends) != 2:
        raise ValueError(f"t_span: got {len(ends)} values, expected two times (t0, t1); use save_at for times between")
    t0, t1 = number("t_span", ends[0]), number("t_span", ends[1])
    if t0 == t1:
        raise ValueError(f"t_span: got ({t0:g}, {t1:g}), expected two different times")
    return t0, t1


def read_save_times(field: VectorField, save_at: SaveAt, span: tuple[float, float]) -> tuple[float, ...] | None:
    """The times to save at; None for the two ends or every step.

    Raises:
        TypeError, ValueError: naming ``save_at``.
    """
    if save_at is None:
        return None
    if isinstance(save_at, str):
        if save_at != "steps":
            raise ValueError(f"save_at: got {save_at!r}, expected None, 'steps' or a sequence of times")
        return None
    whole = Grid(span)
    try:
        times = tuple(whole.snap(number("save_at", t)) for t in save_at)
    except TypeError:
        raise TypeError(f"save_at: got {save_at!r}, expected None, 'steps' or a sequence of times") from None
    if not times:
        raise ValueError("save_at: got no times, expected at least one (None keeps the two ends)")
    if any(whole.sign * b < whole.sign * a for a, b in pairwise(times)):
        raise ValueError(f"save_at: the times must be in the order of the solve, {span[0]:g} to {span[1]:g}")
    for t in times:
        whole.locate(t, "save_at")
        for start, stop in _jumps(field):
            if start < t < stop:
                raise ValueError(
                    f"save_at: got {t:g}, but the field jumps from {start:g} to {stop:g} and has no state in between"
                )
    return times


def read_checkpoints(field: VectorField, checkpoints: int | None, differentiate: bool, plan: Recordings) -> int | None:
    """The number of segments of a recording.

    Raises:
        TypeError, ValueError: naming ``checkpoints`` or ``differentiate_costate``.
    """
    if differentiate and plan.converge is not None:
        raise ValueError(
            "differentiate_costate: cannot be combined with sweeps='converge', whose iterations are not in the graph; "
            "give a number of sweeps"
        )
    if checkpoints is None:
        return None
    if differentiate:
        raise ValueError(
            "checkpoints, differentiate_costate: the costate's graph is not kept with checkpoints; drop one"
        )
    if not isinstance(field, AdversarialField):
        raise ValueError(f"checkpoints: got {checkpoints!r} for a field without a loss, expected an AdversarialField")
    return integer("checkpoints", checkpoints)


def read_initial_state(field: VectorField, x0: Any) -> Tensor:
    """The initial state; a copy, if it is a tensor of the user's, which a field might write to.

    Raises:
        TypeError, ValueError: naming ``x0``.
    """
    given: Tensor | Callable[[], Tensor] | None = field.problem.x0 if x0 is None else x0
    if given is None:
        raise ValueError("x0: not given, and the field carries none; give the initial state")
    state = given if isinstance(given, Tensor) else given() if callable(given) else given
    if not isinstance(state, Tensor):
        raise TypeError(f"x0: got {type(state).__name__}, expected a tensor")
    if not (state.is_floating_point() or state.is_complex()):
        raise TypeError(f"x0: got dtype {state.dtype}, expected a floating or complex dtype; convert with x0.double()")
    try:
        finite = bool(state.isfinite().all())
    except RuntimeError:  # data-dependent control flow, which torch.func.vmap refuses
        finite = True
    if not finite:
        raise ValueError("x0: contains NaN or infinite values, expected finite ones")
    return state.clone() if state is given else state
