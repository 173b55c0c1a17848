"""Convert the arguments of `solve` to one `Request`, and check them before the solve starts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor

from odeadv.costate import Converge, Recordings
from odeadv.fields import AdversarialField, MovingSpan, Operator, VectorField, as_field
from odeadv.fields.operator import NARROW, VectorFunction, clock_dtype
from odeadv.splitting import DIRK, Adaptive, CostateKind, Exact, Grid, TorchDiffEq, make_grid
from odeadv.splitting.method import AccuracyWarning, Discretisation, SchemeLike, SubSteps, read_discretisation
from odeadv.support.checks import integer, number, shown
from odeadv.support.deferred import all_finite, holds
from odeadv.support.isolation import inside_transform, is_wrapped, read_value

SaveAt = Literal["steps"] | Sequence[float] | Tensor | None
StepSize = float | Sequence[float] | Tensor | Literal["adaptive"] | Adaptive
Nodes = int | Sequence[float] | Tensor

# Numbers of a state, for collocation. Matrices of twice this size times the points of a step are factored.
LARGEST = 256


@dataclass(frozen=True)
class Times:
    """The steps: a fixed grid, or a span and the tolerances of adaptive steps.

    Attributes:
        span: start and end time.
        grid: the steps, if they are fixed; otherwise None.
        adaptive: the tolerances, if the steps are adaptive; otherwise None.
    """

    span: tuple[float, float]
    grid: Grid | None = None
    adaptive: Adaptive | None = None


@dataclass(frozen=True)
class Request:
    """One call of `solve`, with checked arguments.

    Attributes:
        field: the field, for a state of the dtype of ``x0``.
        x0: the initial state; float32 instead of 16 bits, see ``narrow``.
        discretisation: composition, sub-steps and costate evaluation.
        times: the steps.
        recordings: number and kind of the recordings.
        save_at: the times to save; None for the two ends, ``"steps"`` for every step.
        differentiate: True lets gradients pass through the costate.
        checkpoints: number of segments of a recording and of the solve; None keeps the whole autograd graph.
        narrow: the 16-bit dtype of returned states, if steps are added up in float32; otherwise None.
        dense: True keeps the states at all nodes.
        moves: True if t0, t1 or the step size requires a gradient.
    """

    field: VectorField
    x0: Tensor
    discretisation: Discretisation
    times: Times
    recordings: Recordings
    save_at: tuple[float, ...] | Literal["steps"] | None
    differentiate: bool
    checkpoints: int | None
    narrow: torch.dtype | None
    dense: bool = False
    moves: bool = False


def read_request(
    field: VectorField | Operator | VectorFunction,
    x0: Any,
    t_span: tuple[float, float] | None,
    *,
    scheme: SchemeLike | None,
    dt: StepSize | None,
    steps: Nodes | None,
    clip_last: bool,
    rtol: float | Tensor | None,
    atol: float | Tensor | None,
    substep: SubSteps | None,
    costate: CostateKind | None,
    sweeps: int | str | Converge | None,
    ascent: int | None,
    checkpoints: int | None,
    differentiate_costate: bool,
    time_dtype: torch.dtype | None,
    within_span: bool,
    save_at: SaveAt = None,
    dense: bool = False,
) -> Request:
    """Return the checked arguments of `solve` as one object.

    Raises:
        TypeError, ValueError: if an argument does not fit. The message names the argument.

    Warns:
        AccuracyWarning: see `solve`.
    """
    field = as_field(field)
    discretisation = read_discretisation(field, scheme, substep, costate)
    recordings = _read_recordings(field, sweeps, ascent)
    t_span, dt, moving = _read_moving_span(field, t_span, dt)
    _check_own_steps(field, discretisation, dt, steps)
    times = read_times(field, t_span, dt, steps, rtol, atol, clip_last)
    if times.adaptive is not None and costate is None:
        discretisation = _smooth_costate(field, discretisation)
    converge = recordings.converge
    newton = converge is not None and (converge.method == "newton" or discretisation.costate == "collocation")
    segments = _read_checkpoints(checkpoints, differentiate_costate, newton)
    _check_estimate(field, discretisation, times)
    if within_span:
        _check_reach(discretisation)
    x = read_initial_state(field, x0)
    if isinstance(field, AdversarialField):
        _check_eta(field, x)
        _check_total_loss(field, times)
    _check_readable(x, times, converge is not None, newton or (converge is not None and differentiate_costate))
    if discretisation.costate == "collocation":
        _check_collocation(field, x, recordings, times)
    saved = _read_save_times(field, save_at, times.span)
    if time_dtype is not None:
        if not isinstance(time_dtype, torch.dtype) or not time_dtype.is_floating_point:
            raise TypeError(f"time_dtype: got {shown(time_dtype)}, expected a floating dtype such as torch.float64")
        field = field.with_time_dtype(time_dtype)
    if moving is not None:
        field = field.timed(moving)
    if times.grid is not None:
        warn_of_coarse_clock(times.grid, time_dtype or clock_dtype(x.dtype))
    narrow = x.dtype if x.dtype in NARROW and not field.edges else None
    if narrow is not None:
        # In 16 bits, a change of the state by less than a few thousandths would be lost in rounding.
        field, x = field.widened(narrow), x.float()
    return Request(
        field, x, discretisation, times, recordings, saved, differentiate_costate, segments, narrow, dense,
        moves=moving is not None,
    )  # fmt: skip


def _smooth_costate(field: VectorField, discretisation: Discretisation) -> Discretisation:
    """Return the discretisation for adaptive steps, which has a cubic costate if the scheme and the field allow it.

    A linear costate has kinks and is of second order only, which the error control would see. The slopes of a cubic
    costate depend on the slopes of f. It is therefore not used for an f that may be stiff, which is an f that is
    advanced by its exact flow or by an implicit method.
    """
    scheme = discretisation.scheme
    given = scheme is not None and scheme.costate is not None
    if not isinstance(field, AdversarialField) or field.transforms or given:
        return discretisation
    if isinstance(discretisation.substeps["f"], DIRK | Exact):
        return discretisation
    return replace(discretisation, costate="hermite")


def _read_recordings(field: VectorField, sweeps: int | str | Converge | None, ascent: int | None) -> Recordings:
    if sweeps is not None and ascent is not None:
        raise ValueError(f"sweeps, ascent: got {sweeps!r} and {ascent!r}, expected one of the two")
    for name, value in (("sweeps", sweeps), ("ascent", ascent)):
        if value is None:
            continue
        if not isinstance(field, AdversarialField):
            raise ValueError(f"{name}: got {value!r} for a field without a loss, expected an AdversarialField")
        if name == "sweeps" and isinstance(value, str | Converge):
            if isinstance(value, str) and value != "converge":
                raise ValueError(f"sweeps: got {value!r}, expected an integer, 'converge' or odeadv.Converge(...)")
            return Recordings(converge=Converge() if isinstance(value, str) else value)
        return Recordings(integer(name, value), adding=name == "ascent")
    return Recordings()


def _read_moving_span(field: VectorField, t_span: Any, dt: Any) -> tuple[Any, Any, MovingSpan | None]:
    """Return ``t_span`` and ``dt`` without gradients, and a `MovingSpan` if ``t_span`` or ``dt`` has gradients.

    A step size with a gradient moves the end of the span, because the number of steps is fixed.

    Raises:
        ValueError: if the field has pieces or losses at given times, or if both ``t1`` and ``dt`` have gradients.
    """
    given = field.problem.t_span if t_span is None else t_span
    try:
        ends = list(given)  # type: ignore[arg-type]
    except TypeError:
        return t_span, dt, None  # `read_times` raises the error
    span_moves, step_moves = any(map(_has_gradient, ends)), _has_gradient(dt)
    if len(ends) != 2 or not (span_moves or step_moves):
        return t_span, dt, None
    if field.edges or (isinstance(field, AdversarialField) and field.at):
        raise ValueError(
            f"{'t_span' if span_moves else 'dt'}: got a tensor that requires a gradient for a field with pieces or "
            "with losses at given times, whose times are fixed; expected numbers"
        )
    first, last = (number("t_span", t.detach() if isinstance(t, Tensor) else t) for t in ends)
    if step_moves:
        if _has_gradient(ends[1]):
            raise ValueError("t_span, dt: got gradients for the end of the span and for the step size, expected one")
        size = dt
        dt = number("dt", dt.detach())
        ends[1] = ends[0] + round((last - first) / dt) * size if dt else ends[1]
    return (first, last), dt, MovingSpan(first, last, *ends)


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0 and (value.requires_grad or is_wrapped(value))


def read_times(
    field: VectorField,
    t_span: tuple[float, float] | None,
    dt: StepSize | None,
    steps: Nodes | None,
    rtol: float | Tensor | None = None,
    atol: float | Tensor | None = None,
    clip_last: bool = False,
) -> Times:
    """Return the steps, fixed or adaptive. Missing arguments come from the problem of the field.

    Raises:
        TypeError, ValueError: if an argument does not fit. The message names the argument.
    """
    span = _read_span(field.problem.t_span if t_span is None else t_span)
    fixed = [name for name, operator in field.operators.items() if not operator.reversible]
    if fixed and span[1] < span[0]:
        warnings.warn(
            f"t_span: {span} runs backward, but the irreversible operator {fixed[0]!r} cannot; expected an increasing "
            "span",
            AccuracyWarning,
            stacklevel=4,
        )
    if dt is not None and steps is not None:
        raise ValueError(f"dt, steps: got dt={dt!r} and steps={steps!r}, expected one of the two")
    if dt is None and steps is None:
        dt, steps = field.problem.dt, field.problem.steps
        if dt is not None and steps is not None:
            raise ValueError("dt, steps: the field has both, expected one of the two")
        if dt is None and steps is None:
            raise ValueError(
                "dt: neither dt nor steps is given, and the field has neither; give one of the two, or dt='adaptive'"
            )
    if isinstance(dt, Adaptive) or (isinstance(dt, str) and dt == "adaptive"):
        if clip_last:
            raise ValueError("clip_last: got True for adaptive steps, expected a fixed step size dt")
        return _adaptive_times(field, span, dt, rtol, atol)
    if rtol is not None or atol is not None:
        raise ValueError(
            f"rtol, atol: got {shown(rtol)} and {shown(atol)} for fixed steps, expected dt='adaptive' with them"
        )
    sizes, nodes = _read_steps(span, dt, steps, clip_last)
    inside = [(start, stop) for start, stop in field.jumps if start < max(span) and stop > min(span)]
    grid = make_grid(span, sizes, nodes, inside, clip_last=clip_last)
    for term in field.operators.values():
        if term.edges:
            for step in grid:
                term.on(step.t0, step.t1)
    return Times(span, grid)


def _read_steps(
    span: tuple[float, float], dt: StepSize | None, steps: Nodes | None, clip_last: bool
) -> tuple[float | Sequence[float] | None, int | Sequence[float] | None]:
    """Return ``dt`` and ``steps`` as numbers, or as sequences of numbers."""
    if clip_last and (dt is None or _is_sequence(dt)):
        raise ValueError("clip_last: got True without a step size, expected a number as dt")
    if dt is None:
        times = _is_sequence(steps) and len(steps) > 1
        return None, [number("steps", t) for t in steps] if times else integer("steps", steps)  # type: ignore[union-attr]
    if _is_sequence(dt):
        return [number("dt", size) for size in dt], None
    if isinstance(dt, str):
        raise TypeError(f"dt: got {dt!r}, expected a number, or dt='adaptive' with rtol and atol")
    dt = number("dt", dt)
    if dt == 0.0:
        raise ValueError("dt: got 0, expected a step size different from 0")
    if math.copysign(1.0, dt) < 0.0 and span[1] > span[0]:
        raise ValueError(f"dt: got {dt:g} for a span that runs forward, {span[0]:g} to {span[1]:g}; expected > 0")
    return dt, None


def _is_sequence(value: Any) -> TypeGuard[Sequence[float]]:
    """Return True for lists, tuples, and tensors or arrays with one axis."""
    return isinstance(value, list | tuple) or getattr(value, "ndim", 0) == 1


def _adaptive_times(field: VectorField, span: tuple[float, float], dt: Any, rtol: Any, atol: Any) -> Times:
    if field.jumps:
        raise ValueError("dt: adaptive steps need a field without jumps; a network is solved with dt = 1 or 1/k")
    if isinstance(dt, Adaptive):
        if rtol is not None or atol is not None:
            raise ValueError("rtol, atol: given next to dt=odeadv.Adaptive(...), expected them inside it")
        return Times(span, adaptive=dt)
    given = {name: value for name, value in (("rtol", rtol), ("atol", atol)) if value is not None}
    return Times(span, adaptive=Adaptive(**given))


def _check_own_steps(field: VectorField, discretisation: Discretisation, dt: Any, steps: Any) -> None:
    """Check that a method that chooses its own steps is not asked for adaptive steps around them.

    A step and its two halves then differ by the tolerances of the method only, so their difference says nothing.

    Raises:
        ValueError: if the whole field is advanced by an adaptive method, and its steps are adaptive or not given.
    """
    method, *others = discretisation.substeps.values()
    whole = not others or (discretisation.scheme is None and not isinstance(field, AdversarialField))
    if not whole or field.edges or not isinstance(method, TorchDiffEq) or not method.adaptive:
        return
    given = [value for value in (dt, steps, field.problem.dt, field.problem.steps) if value is not None]
    if not given or isinstance(given[0], str | Adaptive):
        got = shown(given[0]) if given else "no steps"
        raise ValueError(
            f"dt: got {got} with {method.name!r}, which chooses its own steps; expected steps=1, and the tolerances in "
            f"substep=odeadv.TorchDiffEq({method.method!r}, rtol=..., atol=...)"
        )


def _check_estimate(field: VectorField, discretisation: Discretisation, times: Times) -> None:
    """Check that the method can be used with the error estimate ``"palindromic"``.

    Raises:
        ValueError: if the order of the scheme is even, or a sub-step does not have a higher order than the scheme.
    """
    idle = isinstance(field, AdversarialField) and field.idle
    scheme = discretisation.scheme
    if times.adaptive is None or times.adaptive.estimate != "palindromic" or scheme is None:
        return
    if len(field.operators) == 1 or idle:
        return
    if scheme.order % 2 == 0 or scheme.mixture:
        raise ValueError(
            "estimate: 'palindromic' needs a scheme of odd order, such as 'lie', 'ruth3' or 'aks3', and "
            f"{discretisation.name!r} has order {scheme.order}; take 'doubling'"
        )
    low = [substep.name for substep in discretisation.substeps.values() if substep.order <= scheme.order]
    if low:
        raise ValueError(
            f"estimate: 'palindromic' does not see the error of sub-steps, so they must be of a higher order than "
            f"{discretisation.name!r}, and {low[0]!r} is not; give substep=, or take 'doubling'"
        )


def _check_reach(discretisation: Discretisation) -> None:
    """Check that the scheme evaluates f within the span only.

    Raises:
        ValueError: if the scheme evaluates f outside the span.
    """
    low, high = (0.0, 1.0) if discretisation.scheme is None else discretisation.scheme.reach
    if low < -1e-12 or high > 1.0 + 1e-12:
        raise ValueError(
            f"within_span: scheme {discretisation.name!r} evaluates f up to {max(-low, high - 1.0):.3g} steps outside "
            "the span; take a scheme without negative weights, such as 'strang' or 'extrapolated-strang4'"
        )


def _check_eta(field: AdversarialField, x0: Tensor) -> None:
    """Check that the axes of a tensor eta broadcast with the leading axes of the state.

    Raises:
        ValueError: if the axes do not fit.
    """
    eta = field.eta
    if isinstance(eta, Tensor) and (
        eta.ndim > x0.ndim or any(a not in (1, b) for a, b in zip(eta.shape, x0.shape, strict=False))
    ):
        raise ValueError(
            f"eta: got shape {tuple(eta.shape)} for a state of shape {tuple(x0.shape)}, expected the sizes of its "
            "leading axes, or ones; (batch,) is one eta per sample"
        )


def _check_total_loss(field: AdversarialField, times: Times) -> None:
    """Check that the losses at given times are at ends of steps, and that a field with a running cost does not jump.

    Raises:
        ValueError: if a time is not the end of a step, or if a field with a running cost jumps.
    """
    if field.running is not None and field.jumps:
        start, stop = field.jumps[0]
        raise ValueError(
            f"running: got one for a field that jumps from {start:g} to {stop:g}, expected a field without jumps"
        )
    grid = times.grid or Grid(times.span)
    for t in field.at:
        n = grid.locate(grid.clamped(t), "at")
        if times.grid is not None and grid.snap(t) not in grid.times:
            raise ValueError(
                f"at: got {t:g}, expected the end of a step; the nearest are {grid.times[n]:g} and "
                f"{grid.times[n + 1]:g}. Choose dt so that steps end there, or dt='adaptive'"
            )


def _check_collocation(field: VectorField, x0: Tensor, recordings: Recordings, times: Times) -> None:
    """Check that the costate can be found by collocation.

    Raises:
        ValueError: without sweeps="converge", and for adaptive steps, fields with jumps or with losses at given times,
            and large states.
    """
    if not isinstance(field, AdversarialField) or recordings.converge is None:
        raise ValueError("costate: got 'collocation' without converging sweeps, expected sweeps='converge' with it")
    if times.grid is None or field.jumps or field.at:
        found = "adaptive steps" if times.grid is None else "a field with jumps" if field.jumps else "losses at times"
        raise ValueError(f"costate: got 'collocation' for {found}, expected 'linear' or 'hermite'")
    size = x0.numel() * (2 if x0.is_complex() else 1)
    if size > LARGEST:
        raise ValueError(
            f"costate: got 'collocation' for a state of {size} numbers, expected at most {LARGEST}; take "
            "costate='hermite'"
        )


def _check_readable(x0: Tensor, times: Times, converges: bool, by_autograd: bool) -> None:
    """Check that tensor values can be read, if adaptive steps or converging sweeps depend on values of states.

    Raises:
        ValueError: inside torch.func.vmap. For converging sweeps by Newton's method or with gradients, also inside all
            other torch.func transforms.
    """
    if times.adaptive is not None:
        read_value(all_finite(x0), "dt: adaptive")
    if converges:
        read_value(all_finite(x0), "sweeps: 'converge'")
    if by_autograd and inside_transform():
        raise ValueError(
            "sweeps: Newton's method, and gradients of 'converge' by differentiate_costate=True, work with "
            "torch.autograd, not inside torch.func transforms"
        )


def warn_of_coarse_clock(grid: Grid, dtype: torch.dtype) -> None:
    """Warn if a step is shorter than 8 units in the last place of times of dtype ``dtype``.

    The rounding errors of the stage times of a Runge-Kutta method can then be more than a tenth of the step.
    """
    latest = max(abs(grid.times[0]), abs(grid.times[-1]))
    h = min((abs(size) for size in ((grid.h,) if grid.h else grid.sizes)), default=math.inf)
    spacing = torch.finfo(dtype).eps * latest
    if h < 8 * spacing:
        remedy = "time_dtype=torch.float64" if dtype != torch.float64 else "a time that is counted from the start"
        warnings.warn(
            f"t_span: got steps of {h:.3g} near t = {latest:.3g}, expected at least 8 units in the last place of "
            f"{dtype}, the dtype of the times; f is evaluated at wrong times: give {remedy} if f depends on time",
            AccuracyWarning,
            stacklevel=4,
        )


def _read_span(t_span: Any) -> tuple[float, float]:
    if t_span is None:
        raise ValueError("t_span: not given, and the field has none; give (t0, t1)")
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


def _read_save_times(
    field: VectorField, save_at: SaveAt, span: tuple[float, float]
) -> tuple[float, ...] | Literal["steps"] | None:
    if save_at is None:
        return None
    if isinstance(save_at, str):
        if save_at != "steps":
            raise ValueError(f"save_at: got {save_at!r}, expected None, 'steps' or a sequence of times")
        return "steps"
    whole = Grid(span)
    try:
        times = tuple(whole.clamped(number("save_at", t)) for t in save_at)
    except TypeError:
        raise TypeError(f"save_at: got {save_at!r}, expected None, 'steps' or a sequence of times") from None
    if not times:
        raise ValueError("save_at: got no times, expected at least one (None keeps the two ends)")
    if any(whole.sign * b < whole.sign * a for a, b in pairwise(times)):
        raise ValueError(f"save_at: the times must be in the order of the solve, {span[0]:g} to {span[1]:g}")
    for t in times:
        whole.locate(t, "save_at")
        for start, stop in field.jumps:
            if start < t < stop:
                raise ValueError(
                    f"save_at: got {t:g}, but the field jumps from {start:g} to {stop:g}, where it is not defined"
                )
    return times


def _read_checkpoints(checkpoints: int | None, differentiate: bool, newton: bool) -> int | None:
    if checkpoints is None:
        return None
    if differentiate:
        raise ValueError(
            "checkpoints, differentiate_costate: a differentiated costate keeps the graph of every step; drop one"
        )
    if newton:
        raise ValueError("checkpoints, sweeps: Newton's method keeps the graph of a recording; drop one of the two")
    return integer("checkpoints", checkpoints)


def read_initial_state(field: VectorField, x0: Any) -> Tensor:
    """Return the initial state. The user's tensor is copied, because a field might write to it.

    Raises:
        TypeError, ValueError: if the state is not a floating or complex tensor, or is not finite.
    """
    given: Tensor | Callable[[], Tensor] | None = field.problem.x0 if x0 is None else x0
    if given is None:
        raise ValueError("x0: not given, and the field has none; give the initial state")
    state = given if isinstance(given, Tensor) else given() if callable(given) else given
    if not isinstance(state, Tensor):
        raise TypeError(f"x0: got {type(state).__name__}, expected a tensor; convert with torch.as_tensor(x0)")
    if not (state.is_floating_point() or state.is_complex()):
        raise TypeError(f"x0: got dtype {state.dtype}, expected a floating or complex dtype; convert with x0.double()")
    try:
        finite = holds(all_finite(state))
    except RuntimeError:  # torch.func.vmap does not allow control flow that depends on values
        finite = True
    if not finite:
        raise ValueError("x0: contains NaN or infinite values, expected finite ones")
    return state.clone() if state is given else state
