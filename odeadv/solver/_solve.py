"""`solve`: records the costate if there is one, and runs the composition over the steps; `driven`: only records it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from odeadv.costate import Converge, Costate, RecordedCostate, Recordings, SummedCostate, Sweeping
from odeadv.fields import AdversarialField, Operator, VectorField, as_field
from odeadv.fields.operator import VectorFunction, clock_dtype
from odeadv.solver._saving import _last_good, _reached, _run, _status
from odeadv.solver._solution import Solution, SolveError, Stats
from odeadv.solver.request import (
    SaveAt,
    Times,
    check_decisions,
    check_estimate,
    read_checkpoints,
    read_initial_state,
    read_recordings,
    read_save_times,
    read_times,
)
from odeadv.splitting import Adaptive, CostateKind, Grid, Outcome, Scheme, Stepper, choose_grid, embedded, palindromic
from odeadv.splitting.method import Discretisation, SubSteps, read_discretisation
from odeadv.splitting.status import Status
from odeadv.support.isolation import outside_inference_mode, without_effects

_OUTCOMES = {
    Outcome.DONE: Status.SUCCESS,
    Outcome.TOO_SMALL: Status.STEP_TOO_SMALL,
    Outcome.TOO_MANY: Status.TOO_MANY_STEPS,
}


def solve(
    field: VectorField | Operator | VectorFunction,
    x0: Tensor | None = None,
    t_span: tuple[float, float] | None = None,
    *,
    scheme: str | Scheme = "strang",
    dt: float | Literal["adaptive"] | Adaptive | None = None,
    steps: int | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    save_at: SaveAt = None,
    substep: SubSteps | None = None,
    costate: CostateKind | None = None,
    sweeps: int | Literal["converge"] | Converge | None = None,
    ascent: int | None = None,
    checkpoints: int | None = None,
    differentiate_costate: bool = False,
    throw: bool = True,
) -> Solution:
    """Solve dx/dt = field(t, x) by operator splitting.

    The defaults reproduce the paper on an `AdversarialField`: Euler sub-steps, one recording on the unperturbed
    trajectory, linear costate; ``scheme="lie"`` is then Eq. 5 (LAD) and ``scheme="strang"`` Eq. 8 (LAD-SM).
    Gradients reach parameters and ``x0`` through the solve.

    Args:
        field: an `AdversarialField`, a `SplitField`, an `Operator` or a plain callable ``f(t, x)``.
        x0: initial state, any shape, floating or complex, any device; the field's own if not given.
        t_span: ``(t0, t1)``, in either direction; the field's own if not given.
        scheme: a name of `odeadv.schemes` or a `Scheme`; or the name of a sub-step, which then advances the whole
            field without splitting it. A field with one operator is never split.
        dt: step size, which must divide the span; positive, or of the sign of a span that runs backward. Or
            ``"adaptive"`` (or an `Adaptive`): steps are first looked for with step doubling under the tolerances, then
            the solve runs on them, so that gradients and saved times are those of fixed steps.
        steps: number of steps, instead of ``dt``.
        rtol: relative tolerance of an adaptive step, 1e-4 by default.
        atol: absolute tolerance of an adaptive step, 1e-6 by default.
        save_at: None keeps the two ends, ``"steps"`` every step, a sequence of times those: within a step by a cubic
            Hermite polynomial from two more evaluations of the field, for methods of order above four and sub-steps
            other than explicit Runge-Kutta methods by a part of the step; without effect on buffers and random state.
        substep: how each operator is advanced: a name (`odeadv.substep_names`), a sub-step, or a dict of them by
            operator; "euler" for operators not in it, and by default.
        costate: a(t) between recorded nodes, ``"linear"`` (Theorem 3.2), ``"hermite"`` (cubic, slopes from Eq. 9)
            or ``"exact"`` (Eq. 9 integrated back from the next node); the scheme's own choice, else linear.
        sweeps: number of recordings, each on the trajectory driven by the one before alone (Picard iteration); 1 is
            the paper's two-stage method. ``"converge"`` (or a `Converge`) sweeps until the costate is that of the
            trajectory it drives, with Anderson acceleration.
        ascent: number of recordings, each on the trajectory driven by the sum of all before (Eq. 3). Both are for
            fields with a loss.
        checkpoints: keep the graph of one of so many segments of a recording at a time and recompute it when its turn
            comes: less memory, every step of a recording run twice, the same result bit for bit.
        differentiate_costate: let gradients through the costate too, instead of treating it as a constant.
        throw: raise if the solve fails; otherwise see ``status`` of what is returned.

    Returns:
        A `Solution`.

    Raises:
        TypeError, ValueError: for arguments that do not fit, by name, before anything is solved.
        SolveError: if the solve fails (see `Status`) and ``throw`` is set.

    Warns:
        AccuracyWarning: if a sub-step that was chosen has a lower order than the scheme, or a scheme of order above
            two is left with Euler; or if a scheme runs an operator backward that is declared irreversible.
    """
    with outside_inference_mode():
        work = _read(
            as_field(field), x0, t_span, scheme, dt, steps, rtol, atol, substep, costate, sweeps, ascent, checkpoints,
            differentiate_costate,
        )  # fmt: skip
        solution = _solved(work, save_at)
    if throw and solution.status not in (Status.SUCCESS, Status.UNKNOWN):
        raise SolveError(solution)
    return solution


def driven(
    field: AdversarialField,
    x0: Tensor | None = None,
    t_span: tuple[float, float] | None = None,
    *,
    scheme: str | Scheme = "strang",
    dt: float | Literal["adaptive"] | Adaptive | None = None,
    steps: int | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    substep: SubSteps | None = None,
    costate: CostateKind | None = None,
    sweeps: int | Literal["converge"] | Converge | None = None,
    ascent: int | None = None,
    checkpoints: int | None = None,
    differentiate_costate: bool = False,
) -> VectorField:
    """Record the costate of ``field`` on its problem, and return the plain field f + eta * a(t), for any ODE solver.

    ``torchdiffeq.odeint(odeadv.driven(field, x0, (0.0, 1.0), steps=100), x0, ts)``. Nothing but the recordings is
    computed; they belong to this ``x0`` and ``t_span`` and to the weights of this moment.

    Args:
        field: an `AdversarialField`.
        x0: initial state of the recordings' trajectories, which the costate then belongs to.
        t_span: the time span of those; an adaptive solver that oversteps it gets extrapolated values.
        scheme: how trajectories after the first recording are solved, see `solve`; the first is f's alone.
        dt: step size, see `solve`.
        steps: number of steps, instead of ``dt``.
        rtol: see `solve`.
        atol: see `solve`.
        substep: see `solve`; with one recording, only that of f matters.
        costate: a(t) between the recorded nodes, see `solve`.
        sweeps: see `solve`.
        ascent: see `solve`.
        checkpoints: see `solve`.
        differentiate_costate: see `solve`.

    Returns:
        A `VectorField`; f alone with eta = 0.

    Raises:
        TypeError, ValueError: for arguments that do not fit, by name, before anything is solved.
        SolveError: if a recording fails.
    """
    if not isinstance(field, AdversarialField):
        raise TypeError(
            f"field: got {type(field).__name__}, expected an AdversarialField; other fields need no driving"
        )
    with outside_inference_mode():
        work = _read(
            field, x0, t_span, scheme, dt, steps, rtol, atol, substep, costate, sweeps, ascent, checkpoints,
            differentiate_costate,
        )  # fmt: skip
        if field.eta == 0.0:
            return VectorField({"f": field.f}, field.problem)
        a = work.record() if work.reaches_the_end(field) else None
    status = _status(work.status, *(node for part in _parts(a) for node in part.nodes))
    if a is None or status not in (Status.SUCCESS, Status.UNKNOWN):
        start = torch.tensor(work.times.span[:1], dtype=clock_dtype(work.x0.dtype))
        raise SolveError(
            Solution(start, work.x0[None], status=status, stats=work.stats, scheme=work.method.name, costate=a)
        )
    return field.driven_by(a)


AdversarialField._recorder = staticmethod(driven)  # fields know no solver, but one that is called needs a recording


def _solved(work: _Work, save_at: SaveAt) -> Solution:
    """What `solve` gives, failed or not."""
    field, method, x = work.field, work.method, work.x0
    save_times = read_save_times(field, save_at, work.times.span)
    driven: VectorField = field
    a: Costate | None = None
    if isinstance(field, AdversarialField) and field.eta != 0.0 and work.reaches_the_end(field):
        a = work.record()
        driven = field.driven_by(a)
    grid = work.grid(driven)
    stepper = method.stepper(driven)
    if save_at is None and len(grid):
        ts: Sequence[float] = (grid.times[0], grid.times[-1])
        final = stepper.march(x, grid)
        xs = [x, final]
    else:
        ts = grid.times if save_times is None else _reached(save_times, grid, work.status)
        final, xs = _run(stepper, x, grid, ts, driven, method.order(driven))
    output, loss = field.evaluate(final) if isinstance(field, AdversarialField) else (None, None)
    work.count(stepper, a)
    work.stats.steps = len(grid)
    work.stats.states_held = max(work.stats.states_held, _held(a) + len(xs))

    saved = torch.stack(xs) if all(state.shape == xs[0].shape for state in xs) else tuple(xs)
    status = _status(work.status, final, loss, *((saved,) if isinstance(saved, Tensor) else saved))
    start, end = (grid.times[0], x), (grid.times[-1], final)
    return Solution(
        torch.tensor(ts[: len(xs)], dtype=clock_dtype(x.dtype), device=x.device),
        saved,
        status=status,
        stats=work.stats,
        scheme=method.name,
        output=output,
        loss=loss,
        costate=a,
        record=work.record if isinstance(field, AdversarialField) else None,
        last_good=lambda: _last_good(method.stepper(driven), [start, *zip(ts, xs, strict=False), end], grid, driven),
    )


def _read(
    field: VectorField,
    x0: Tensor | None,
    t_span: tuple[float, float] | None,
    scheme: str | Scheme,
    dt: float | str | Adaptive | None,
    steps: int | None,
    rtol: float | None,
    atol: float | None,
    substep: SubSteps | None,
    costate: CostateKind | None,
    sweeps: int | str | Converge | None,
    ascent: int | None,
    checkpoints: int | None,
    differentiate: bool,
) -> _Work:
    """The arguments of `solve`, checked."""
    method = read_discretisation(field, scheme, substep, costate)
    plan = read_recordings(field, sweeps, ascent)
    times = read_times(field, t_span, dt, steps, rtol, atol)
    segments = read_checkpoints(field, checkpoints, differentiate, plan)
    check_estimate(field, method, times)
    x = read_initial_state(field, x0)
    check_decisions(x, plan, times)
    return _Work(
        field, method, times, x, Stats(evaluations=dict.fromkeys(field.operators, 0)), plan, differentiate, segments
    )


@dataclass
class _Work:
    """One call of `solve`: what is solved, how, and what it has cost."""

    field: VectorField
    method: Discretisation
    times: Times
    x0: Tensor
    stats: Stats
    plan: Recordings
    differentiate: bool
    checkpoints: int | None
    status: Status = Status.SUCCESS
    _first: Grid | None = None

    def reaches_the_end(self, field: VectorField) -> bool:
        """Whether there are steps for ``field`` to the end of the span; if not, nothing can be recorded."""
        self.grid(field)
        return self.status is Status.SUCCESS

    def grid(self, field: VectorField) -> Grid:
        """The steps for ``field``: those given, or found so that they meet the tolerances."""
        if self.times.grid is not None:
            return self.times.grid
        if field is self.field and self._first is not None:
            return self._first
        assert self.times.adaptive is not None
        stepper = self.method.stepper(field)
        edges = [edge for operator in field.operators.values() for edge in operator.edges]
        settings = self.times.adaptive
        order, mirror, trial = self.method.order(field), None, None
        if self.method.splits(field) and settings.estimate == "palindromic":
            mirror = self.method.mirror(field)
            trial = palindromic(stepper, mirror)
        elif self.method.splits(field) and settings.estimate == "embedded":
            assert self.method.scheme is not None
            order = min(order, self.method.scheme.embedded_order)
            trial = embedded(stepper, self.method.scheme.embedded)
        with without_effects(field.modules, self.x0.device):
            search = choose_grid(stepper, self.x0, self.times.span, settings, order, edges, trial)
        if mirror is not None:
            self.count(mirror, None)
        if field is self.field:
            self._first = search.grid
        self.count(stepper, None)
        self.stats.rejected += search.rejected
        if search.outcome is not Outcome.DONE:
            self.status = _OUTCOMES[search.outcome]
        return search.grid

    def record(self) -> Costate:
        """The costate, by the recordings of the plan."""
        assert isinstance(self.field, AdversarialField)
        sweeping = Sweeping(
            field=self.field,
            x0=self.x0,
            grid=self.grid,
            stepper=self.method.stepper,
            kind=self.method.costate,
            differentiate=self.differentiate,
            counted=self.count_recording,
            checkpoints=self.checkpoints,
        )
        a = sweeping.run(self.plan)
        self.stats.residuals += sweeping.residuals
        if not sweeping.converged:
            self.status = Status.NOT_CONVERGED
        return a

    def count_recording(self, stepper: Stepper, drive: Costate | None) -> None:
        """Count one recording and what it cost."""
        self.stats.recordings += 1
        nodes = len(self.grid(self.field).times)
        self.stats.states_held = max(self.stats.states_held, _held(drive) + 2 * nodes)
        self.count(stepper, drive)

    def count(self, stepper: Stepper, a: Costate | None) -> None:
        """Move what ``stepper`` and the evaluations of ``a`` between nodes cost into the statistics."""
        names = list(self.stats.evaluations)
        counted = list(zip(names, stepper.counted, strict=False))
        counted += [(names[0], part.cost) for part in _parts(a)]
        for name, cost in counted:
            self.stats.evaluations[name] += cost.evaluations
            self.stats.vjps += cost.vjps
            cost.evaluations = cost.vjps = 0


def _parts(a: Costate | None) -> Sequence[RecordedCostate]:
    """The recordings that ``a`` is made of."""
    return a.parts if isinstance(a, SummedCostate) else (a,) if isinstance(a, RecordedCostate) else ()


def _held(a: Costate | None) -> int:
    """How many states and costates ``a`` keeps."""
    return sum(len(part.nodes) + len(part.states) for part in _parts(a))
