"""`solve`: checks what it was given, records the costate if there is one, and runs the composition."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import index
from typing import Any, Literal

import torch
from torch import Tensor

from odeadv._solution import Solution, SolveError, Stats, Status
from odeadv._state import aside
from odeadv.costate import Costate, RecordedCostate, SummedCostate, record
from odeadv.fields import AdversarialField, Forcing, Jump, Operator, Piecewise, VectorField, as_field
from odeadv.fields._field import number
from odeadv.fields._operator import Sum, Unrecorded, VectorFunction, clock_dtype
from odeadv.splitting import (
    Exact,
    Grid,
    Scheme,
    Step,
    Stepper,
    SubStep,
    get_substep,
    make_grid,
    schemes,
    substep_names,
)
from odeadv.splitting._scheme import CostateKind

SubSteps = str | SubStep | Mapping[str, str | SubStep]
SaveAt = Literal["steps"] | Sequence[float] | Tensor | None


class AccuracyWarning(UserWarning):
    """A choice of `solve` keeps the scheme from its order, or may not be stable."""


def solve(
    field: VectorField | Operator | VectorFunction,
    x0: Tensor | None = None,
    t_span: tuple[float, float] | None = None,
    *,
    scheme: str | Scheme = "strang",
    dt: float | None = None,
    steps: int | None = None,
    save_at: SaveAt = None,
    substep: SubSteps | None = None,
    costate: CostateKind | None = None,
    sweeps: int | None = None,
    ascent: int | None = None,
    differentiate_costate: bool = False,
    throw: bool = True,
) -> Solution:
    """Solve dx/dt = field(t, x) by operator splitting with fixed steps.

    The defaults reproduce the paper on an `AdversarialField`: Euler sub-steps, one recording on the unperturbed
    trajectory, linear costate; ``scheme="lie"`` is then Eq. 5 (LAD) and ``scheme="strang"`` Eq. 8 (LAD-SM).
    Gradients reach parameters and ``x0`` through the solve.

    Args:
        field: an `AdversarialField`, a `SplitField`, an `Operator` or a plain callable ``f(t, x)``.
        x0: initial state, any shape, floating or complex, any device; the field's own if not given.
        t_span: ``(t0, t1)``, in either direction; the field's own if not given.
        scheme: a name of `odeadv.schemes` or a `Scheme`; or the name of a sub-step, which then advances the whole
            field without splitting it. A field with one operator is never split.
        dt: step size, which must divide the span; positive, or of the sign of a span that runs backward.
        steps: number of steps, instead of ``dt``.
        save_at: None keeps the two ends, ``"steps"`` every step, a sequence of times those (cubic Hermite within
            the step, from two more evaluations of the field, without effect on buffers and random state).
        substep: how each operator is advanced: a name (`odeadv.substep_names`), a sub-step, or a dict of them by
            operator; "euler" for operators not in it, and by default.
        costate: a(t) between recorded nodes, ``"linear"`` (Theorem 3.2), ``"hermite"`` (cubic, slopes from Eq. 9)
            or ``"exact"`` (Eq. 9 integrated back from the next node); the scheme's own choice, else linear.
        sweeps: number of recordings, each on the trajectory driven by the one before alone (Picard iteration); 1 is
            the paper's two-stage method.
        ascent: number of recordings, each on the trajectory driven by the sum of all before (Eq. 3). Both are for
            fields with a loss.
        differentiate_costate: let gradients through the costate too, instead of treating it as a constant.
        throw: raise if the solve fails; otherwise see ``status`` of what is returned.

    Returns:
        A `Solution`.

    Raises:
        TypeError, ValueError: for arguments that do not fit, by name, before anything is solved.
        SolveError: if the state or loss becomes NaN or infinite and ``throw`` is set.

    Warns:
        AccuracyWarning: if a sub-step that was chosen has a lower order than the scheme, or a scheme of order above
            two is left with Euler; or if a scheme runs an operator backward that is declared irreversible.
    """
    field = as_field(field)
    method = _method(field, scheme, substep, costate)
    passes, adding = _recordings(field, sweeps, ascent)
    grid = _grid(field, t_span, dt, steps)
    times = _save_times(field, save_at, grid)
    x = _initial_state(field, x0)

    stats = Stats(steps=len(grid), evaluations=dict.fromkeys(field.operators, 0))

    def recorded() -> Costate:
        return _record(field, method, grid, x, passes, adding, differentiate_costate, stats)

    driven: VectorField = field
    a: Costate | None = None
    if isinstance(field, AdversarialField) and field.eta != 0.0:
        a = recorded()
        driven = field.driven_by(a)
    stepper = method.stepper(driven)
    if save_at is None:
        final = stepper.march(x, grid)
        xs = [x, final]
    else:
        final, xs = _run(stepper, x, grid, times, field)
    output, loss = field.evaluate(final) if isinstance(field, AdversarialField) else (None, None)
    _count(stats, stepper, a)

    solution = Solution(
        torch.tensor(times, dtype=clock_dtype(x.dtype), device=x.device),
        torch.stack(xs) if all(state.shape == xs[0].shape for state in xs) else tuple(xs),
        status=_status(final, loss, *xs),
        stats=stats,
        scheme=method.name,
        output=output,
        loss=loss,
        costate=a,
        record=recorded if isinstance(field, AdversarialField) else None,
    )
    if throw and solution.status is not Status.SUCCESS:
        raise SolveError(solution)
    return solution


@dataclass(frozen=True)
class _Method:
    """The three orthogonal choices, checked against the field: composition, sub-steps, costate evaluation."""

    name: str
    scheme: Scheme | None
    substeps: Mapping[str, SubStep]
    costate: CostateKind

    def stepper(self, field: VectorField) -> Stepper:
        """What advances those operators of ``field`` that act; one that is left alone acts in a single stage."""
        active = [i for i, term in enumerate(field.operators.values()) if term.acts]
        names = [list(field.operators)[i] for i in active]
        operators = [field.operators[name] for name in names]
        substeps = [self.substeps[name] for name in names]
        if len(active) == 1:
            return Stepper(operators, substeps)
        if self.scheme is None:
            return Stepper([Sum(operators)], substeps[:1])
        return Stepper(operators, substeps, self.scheme.compositions)


def _record(
    field: VectorField,
    method: _Method,
    grid: Grid,
    x: Tensor,
    passes: int,
    adding: bool,
    differentiate: bool,
    stats: Stats,
) -> Costate:
    """``passes`` recordings, each on the trajectory driven by the last one, or by the sum of all before."""
    assert isinstance(field, AdversarialField)
    parts: list[RecordedCostate] = []
    drive: Costate | None = None
    for _ in range(passes):
        stepper = method.stepper(field if drive is None else field.driven_by(drive))
        parts.append(record(field, x, grid, stepper, kind=method.costate, differentiate=differentiate))
        _count(stats, stepper, drive)
        stats.recordings += 1
        drive = SummedCostate(tuple(parts)) if adding and len(parts) > 1 else parts[-1]
    assert drive is not None
    return drive


def _count(stats: Stats, stepper: Stepper, a: Costate | None) -> None:
    """Move what ``stepper`` and the evaluations of ``a`` between nodes cost into ``stats``."""
    names = list(stats.evaluations)
    counted = list(zip(names, stepper.counted, strict=False))
    parts = a.parts if isinstance(a, SummedCostate) else (a,) if isinstance(a, RecordedCostate) else ()
    counted += [(names[0], part.tally) for part in parts]
    for name, tally in counted:
        stats.evaluations[name] += tally.evaluations
        stats.vjps += tally.vjps
        tally.evaluations = tally.vjps = 0


def _run(
    stepper: Stepper, x0: Tensor, grid: Grid, times: Sequence[float], field: VectorField
) -> tuple[Tensor, list[Tensor]]:
    """The final state, and the states at ``times``, which are in the order of the solve."""
    x = x0
    saved: list[Tensor] = []
    sign = 1.0 if grid.h > 0 else -1.0
    for step in grid:
        before, x = x, stepper.advance(x, step)
        while len(saved) < len(times) and sign * times[len(saved)] <= sign * step.t1:
            saved.append(_within(stepper, step, before, x, times[len(saved)], field))
    return x, saved


def _within(stepper: Stepper, step: Step, before: Tensor, after: Tensor, t: float, field: VectorField) -> Tensor:
    """Dense output: the ends themselves, a cubic Hermite polynomial between them."""
    if t == step.t0:
        return before
    if t == step.t1:
        return after
    s = (t - step.t0) / step.h
    with aside(field.modules, before.device):
        left, right = stepper.velocity(before, step.t0, step), stepper.velocity(after, step.t1, step)
    value = torch.lerp(before, after, s * s * (3.0 - 2.0 * s))
    return torch.add(value, s * (1.0 - s) ** 2 * left - s * s * (1.0 - s) * right, alpha=step.h)


def _status(*values: Tensor | None) -> Status:
    finite = [value.isfinite().all() for value in values if value is not None]
    return Status.SUCCESS if bool(torch.stack(finite).all()) else Status.NON_FINITE


def _method(field: VectorField, scheme: str | Scheme, substep: SubSteps | None, costate: CostateKind | None) -> _Method:
    count = len(field.operators)
    table: Scheme | None
    if isinstance(scheme, Scheme):
        scheme.check()
        if count > 1 and scheme.operators != count:
            raise ValueError(
                f"scheme: {scheme.name!r} splits {scheme.operators} operators, the field has {count} "
                f"({', '.join(field.operators)})"
            )
        name, table = scheme.name, scheme
    elif isinstance(scheme, str) and (scheme in substep_names() or scheme.startswith("torchdiffeq:")):
        if substep not in (None, scheme):
            raise ValueError(
                f"scheme: {scheme!r} is itself a sub-step and does not split; give it as substep, or leave substep out"
            )
        name, table, substep = scheme, None, scheme
    else:
        table = schemes.get(scheme, max(2, count))
        name = table.name
    acting = 1 if isinstance(field, AdversarialField) and field.eta == 0.0 else count
    if table is None and acting > 1:
        if name == "exact":
            raise ValueError("scheme: 'exact' needs a field with one operator; choose a splitting scheme")
        if _jumps(field):
            raise ValueError(
                f"scheme: {name!r} does not split, but the field jumps from {_jumps(field)[0][0]:g} to "
                f"{_jumps(field)[0][1]:g}; use a splitting scheme such as 'lie' or 'strang'"
            )
    kind = costate if costate is not None else (table.costate if table else None) or "linear"
    if kind not in ("linear", "hermite", "exact"):
        raise ValueError(f"costate: got {kind!r}, expected 'linear', 'hermite' or 'exact'")
    substeps = _substeps(field, "euler" if substep is None else substep)
    if table is not None and count > 1:
        _warn(field, table, substeps, chosen=substep is not None)
    return _Method(name, table, substeps, kind)


def _warn(field: VectorField, scheme: Scheme, substeps: Mapping[str, SubStep], *, chosen: bool) -> None:
    """Say where the sub-steps or the operators do not allow what the scheme promises."""
    low = [f"{name!r} by {method.name!r}" for name, method in substeps.items() if method.order < scheme.order]
    if low and (chosen or scheme.order > 2):
        warnings.warn(
            f"scheme: {scheme.name!r} has order {scheme.order}, but a sub-step has less ({', '.join(low)}), and lowers "
            "the order of the whole; give substep=",
            AccuracyWarning,
            stacklevel=4,
        )
    names = list(field.operators)
    back = [names[i] for i in scheme.goes_back if not field.operators[names[i]].reversible]
    if back:
        warnings.warn(
            f"scheme: {scheme.name!r} runs the irreversible operator {back[0]!r} backward; take one without negative "
            "weights, such as 'strang' or 'extrapolated-strang4'",
            AccuracyWarning,
            stacklevel=4,
        )


def _substeps(field: VectorField, substep: SubSteps) -> dict[str, SubStep]:
    if isinstance(substep, Mapping):
        unknown = [name for name in substep if name not in field.operators]
        if unknown:
            raise ValueError(
                f"substep: no operator is called {unknown[0]!r}; the field has {', '.join(map(repr, field.operators))}"
            )
        chosen = {name: get_substep(substep.get(name, "euler")) for name in field.operators}
    else:
        chosen = dict.fromkeys(field.operators, get_substep(substep))
    for name, method in chosen.items():
        operator = field.operators[name]
        known = isinstance(operator, Forcing | Unrecorded) or all(
            isinstance(part, Jump) or part.flow is not None for part in operator.pieces or (operator,)
        )
        if isinstance(method, Exact) and not known:
            raise ValueError(
                f"substep: 'exact' is asked for operator {name!r}, which has no flow; give "
                f"odeadv.Operator(f, flow=...) or another sub-step ({', '.join(substep_names())})"
            )
    return chosen


def _recordings(field: VectorField, sweeps: int | None, ascent: int | None) -> tuple[int, bool]:
    if sweeps is not None and ascent is not None:
        raise ValueError(f"sweeps, ascent: got {sweeps!r} and {ascent!r}, expected one of the two")
    for name, value in (("sweeps", sweeps), ("ascent", ascent)):
        if value is not None:
            if not isinstance(field, AdversarialField):
                raise ValueError(f"{name}: got {value!r} for a field without a loss, expected an AdversarialField")
            return _count_of(name, value, "recordings"), name == "ascent"
    return 1, False


def _count_of(name: str, value: Any, what: str) -> int:
    try:
        count = math.nan if isinstance(value, bool) else index(value)
    except TypeError:
        count = math.nan
    if not isinstance(count, int):
        raise TypeError(f"{name}: got {value!r}, expected a whole number of {what}, at least 1")
    if count < 1:
        raise ValueError(f"{name}: got {count}, expected at least 1")
    return count


def _grid(field: VectorField, t_span: tuple[float, float] | None, dt: float | None, steps: int | None) -> Grid:
    span = _span(field.problem.t_span if t_span is None else t_span)
    if dt is not None and steps is not None:
        raise ValueError(f"dt, steps: got dt={dt!r} and steps={steps!r}, expected one of the two")
    if dt is None and steps is None:
        dt, steps = field.problem.dt, field.problem.steps
        if dt is not None and steps is not None:
            raise ValueError("dt, steps: the field carries both, expected one of the two")
        if dt is None and steps is None:
            raise ValueError("dt: neither dt nor steps is given, and the field carries none; give one of the two")
    if dt is not None:
        dt = number("dt", dt)
        if dt == 0.0:
            raise ValueError("dt: got 0, expected a step size different from 0")
        if math.copysign(1.0, dt) < 0.0 and span[1] > span[0]:
            raise ValueError(f"dt: got {dt:g} for a span that runs forward, {span[0]:g} to {span[1]:g}; expected > 0")
    else:
        steps = _count_of("steps", steps, "steps")
    jumps = _jumps(field)
    inside = [(start, stop) for start, stop in jumps if start < max(span) and stop > min(span)]
    grid = make_grid(span, dt, steps, inside)
    for term in field.operators.values():
        if isinstance(term, Piecewise):
            for step in grid:
                term.on(step.t0, step.t1)
    return grid


def _jumps(field: VectorField) -> list[tuple[float, float]]:
    return [jump for term in field.operators.values() if isinstance(term, Piecewise) for jump in term.jumps]


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


def _save_times(field: VectorField, save_at: SaveAt, grid: Grid) -> tuple[float, ...]:
    if save_at is None:
        return grid.times[0], grid.times[-1]
    if isinstance(save_at, str):
        if save_at != "steps":
            raise ValueError(f"save_at: got {save_at!r}, expected None, 'steps' or a sequence of times")
        return grid.times
    try:
        times = tuple(grid.snap(number("save_at", t)) for t in save_at)
    except TypeError:
        raise TypeError(f"save_at: got {save_at!r}, expected None, 'steps' or a sequence of times") from None
    if not times:
        raise ValueError("save_at: got no times, expected at least one (None keeps the two ends)")
    sign = 1.0 if grid.h > 0 else -1.0
    if any(sign * b < sign * a for a, b in pairwise(times)):
        raise ValueError(
            f"save_at: the times must be in the order of the solve, {grid.times[0]:g} to {grid.times[-1]:g}"
        )
    for t in times:
        grid.locate(t, "save_at")
        for start, stop in _jumps(field):
            if start < t < stop:
                raise ValueError(
                    f"save_at: got {t:g}, but the field jumps from {start:g} to {stop:g} and has no state in between"
                )
    return times


def _initial_state(field: VectorField, x0: Any) -> Tensor:
    given: Tensor | Callable[[], Tensor] | None = field.problem.x0 if x0 is None else x0
    if given is None:
        raise ValueError("x0: not given, and the field carries none; give the initial state")
    state = given if isinstance(given, Tensor) else given() if callable(given) else given
    if not isinstance(state, Tensor):
        raise TypeError(f"x0: got {type(state).__name__}, expected a tensor")
    if not (state.is_floating_point() or state.is_complex()):
        raise TypeError(f"x0: got dtype {state.dtype}, expected a floating or complex dtype; convert with x0.double()")
    if not bool(state.isfinite().all()):
        raise ValueError("x0: contains NaN or infinite values, expected finite ones")
    return state
