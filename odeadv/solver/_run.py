"""One call of `solve` at work: steps are found, the costate is recorded, the driven field is solved."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from odeadv.costate import Costate, Objective, RecordedCostate, Rule, SummedCostate, record, sweep
from odeadv.fields import AdversarialField, VectorField
from odeadv.fields.operator import Cost, clock_dtype
from odeadv.fields.terms import leading
from odeadv.solver._saving import states_at
from odeadv.solver._solution import Solution, Stats
from odeadv.solver.request import Request, warn_of_coarse_clock
from odeadv.splitting import Exact, Grid, Search, Status, Stepper, choose_grid, doubling, palindromic
from odeadv.splitting.method import AccuracyWarning
from odeadv.support.isolation import Recompute, inside_transform, without_effects


class Run:
    """Does what a request asks for.

    Attributes:
        request: the arguments.
        stats: the cost so far.
        status: ``SUCCESS`` as long as nothing has failed.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.stats = Stats(evaluations=dict.fromkeys(request.field.operators, 0))
        self.status = Status.SUCCESS

    def solution(self) -> Solution:
        """Record the costate if there is one, solve, and return the result, failed or not."""
        request, driven, costate = self.request, self.request.field, None
        if isinstance(driven, AdversarialField) and not driven.idle:
            costate = self.recorded_costate()
            driven = driven if costate is None else driven.driven_by(costate)
        grid = self.first_grid if driven is request.field else self._find_grid(driven, costate)
        stepper = request.discretisation.stepper(driven)
        order = request.discretisation.order(driven)
        final, ts, xs = states_at(stepper, request.x0, grid, self._save_times(grid), order, driven, self._again(grid))
        output = loss = None
        if isinstance(request.field, AdversarialField):
            output, loss = request.field.evaluate(final)
            if request.field.accumulates:
                loss, ts, xs = self._objective(loss, grid, stepper, ts, xs)
        self._count(costate, stepper)
        self.stats.steps = len(grid)
        self.stats.states_held = max(self.stats.states_held, _held(costate) + len(xs))
        saved = torch.stack(xs) if all(state.shape == xs[0].shape for state in xs) else tuple(xs)
        status = status_of(self.status, final, loss, *((saved,) if isinstance(saved, Tensor) else saved))
        if status is Status.SUCCESS:
            self._warn_if_still(final, grid, driven)
        if request.narrow is not None and isinstance(saved, Tensor):
            saved = saved.to(request.narrow)
        return Solution(
            torch.tensor(ts, dtype=torch.float64, device=request.x0.device),
            saved,
            status=status,
            stats=self.stats,
            scheme=request.discretisation.name,
            order=order,
            output=output,
            loss=loss,
            costate=costate,
            record=self.recorded_costate if isinstance(request.field, AdversarialField) else None,
        )

    def _save_times(self, grid: Grid) -> Sequence[float] | Literal["steps"] | None:
        """Return the times to save at: those asked for, and all nodes if the objective needs the states there."""
        request = self.request
        if not isinstance(request.field, AdversarialField) or not request.field.accumulates:
            return request.save_at
        if request.save_at is None or request.save_at == "steps":
            return "steps"
        return sorted({*grid.times, *map(grid.snap, request.save_at)}, reverse=grid.sign < 0)

    def _objective(
        self, loss: Tensor, grid: Grid, stepper: Stepper, ts: list[float], xs: list[Tensor]
    ) -> tuple[Tensor, list[float], list[Tensor]]:
        """Return the whole objective, given the final loss, and the times and states that were asked for."""
        request = self.request
        assert isinstance(request.field, AdversarialField)
        found = dict(zip(ts, xs, strict=True))
        self.stats.states_held = max(self.stats.states_held, len(found))
        objective = Objective.on(grid, request.field, self._rule)
        with without_effects(request.field.modules, request.x0.device):
            loss = loss + objective.along(grid, stepper, [found[t] for t in grid.times])
        if request.save_at is None:
            ts = [ts[0], ts[-1]]
        elif request.save_at != "steps":
            ts = [t for t in map(grid.snap, request.save_at) if t in found]
        return loss, ts, [found[t] for t in ts]

    @property
    def _rule(self) -> Rule:
        """The quadrature of a running cost, of the order of f's sub-step; an exact flow may belong to a stiff f."""
        substep = self.request.discretisation.substeps["f"]
        return "simpson" if substep.order > 2 and not isinstance(substep, Exact) else "trapezoid"

    @cached_property
    def first_grid(self) -> Grid:
        """The steps for the field without a costate, on which a solve or the first recording runs."""
        return self._find_grid(self.request.field, None)

    def recorded_costate(self) -> Costate | None:
        """Make all recordings; return None if the steps of the first one do not reach the end of the span."""
        if not len(self.first_grid) or self.status is not Status.SUCCESS:
            return None
        swept = sweep(self.record, self.request.recordings)
        self.stats.residuals += swept.residuals
        if not swept.converged:
            self.status = Status.NOT_CONVERGED
        return swept.costate

    def record(self, drive: Costate | None, grid: Grid | None = None) -> RecordedCostate:
        """Make one recording along the trajectory that ``drive`` drives, on ``grid`` or on steps found for it."""
        field = self.request.field
        assert isinstance(field, AdversarialField)
        along: VectorField = field if drive is None else field.driven_by(drive)
        if grid is not None:
            return self._record_on(grid, along, drive)
        grid = self.first_grid if drive is None else self._find_grid(along, drive)
        found = self._record_on(grid, along, drive)
        adaptive = self.request.times.adaptive
        while adaptive is not None and self.status is Status.SUCCESS:
            # The steps were found for the state. They are halved until the costate is as accurate as a step of the
            # state: the costate between the nodes is compared with the costate of the halved steps.
            if 2 * len(grid) > adaptive.most:
                self.status = Status.TOO_MANY_STEPS
                break
            grid = grid.halved()
            finer = self._record_on(grid, along, drive)
            error, largest = found.difference(finer)
            self._count(found)
            found = finer
            if adaptive.error(leading(field.eta, error).abs(), largest, largest) <= 1.0:
                break
        return found

    def _record_on(self, grid: Grid, along: VectorField, drive: Costate | None) -> RecordedCostate:
        request = self.request
        assert isinstance(request.field, AdversarialField)
        stepper = request.discretisation.stepper(along)
        found = record(
            request.field,
            request.x0,
            grid,
            stepper,
            kind=request.discretisation.costate,
            differentiate=request.differentiate,
            again=self._again(grid),
            keep_states=request.times.adaptive is not None,
            rule=self._rule,
        )
        self.stats.recordings += 1
        self.stats.states_held = max(self.stats.states_held, _held(drive) + 2 * len(grid.times))
        self._count(drive, stepper)
        return found

    def _again(self, grid: Grid) -> Recompute | None:
        """Return how ``grid`` is run in segments, or None if its whole graph is kept."""
        count = self.request.checkpoints
        if count is None or not len(grid) or inside_transform():
            return None
        return Recompute(math.ceil(len(grid) / count), self.request.field.modules)

    def _find_grid(self, field: VectorField, drive: Costate | None) -> Grid:
        """Return the given steps, or find steps for ``field`` that meet the tolerances; a failure is the status."""
        request = self.request
        if request.times.grid is not None:
            return request.times.grid
        search, steppers = self._search(field, drive)
        for stepper in steppers:
            self._count(None, stepper)
        self.stats.rejected += search.rejected
        if search.status is not Status.SUCCESS:
            self.status = search.status
        elif len(search.grid):
            dtype = next(iter(field.operators.values())).time_dtype or clock_dtype(request.x0.dtype)
            warn_of_coarse_clock(search.grid, dtype)
        return search.grid

    def _search(self, field: VectorField, drive: Costate | None) -> tuple[Search, Sequence[Stepper]]:
        request = self.request
        settings = request.times.adaptive
        assert settings is not None
        stepper = request.discretisation.stepper(field)
        order = request.discretisation.order(field)
        steppers = [stepper]
        if settings.estimate == "palindromic" and request.discretisation.splits(field):
            steppers.append(request.discretisation.mirror(field))
            trial = palindromic(*steppers)
        else:
            trial = doubling(stepper, order)
        edges = [*field.edges, *(request.field.at if isinstance(request.field, AdversarialField) else ())]
        if request.discretisation.costate == "linear":
            # A step across a kink of the costate would be rejected until it is tiny.
            edges += [t for part in _parts(drive) for t in part.grid.times]
        with without_effects(field.modules, request.x0.device):
            search = choose_grid(request.x0, request.times.span, settings, trial, order, edges)
        return search, steppers

    def _count(self, costate: Costate | None, stepper: Stepper | None = None) -> None:
        """Move the costs of ``stepper``, and of evaluations of ``costate`` between nodes, into the statistics."""
        names = list(self.stats.evaluations)
        counted: list[tuple[str, Cost]] = list(zip(names, stepper.counted if stepper else (), strict=False))
        counted += [(names[0], part.cost) for part in _parts(costate)]
        for name, cost in counted:
            self.stats.evaluations[name] += cost.evaluations
            self.stats.vjps += cost.vjps
            cost.evaluations = cost.vjps = 0

    def _warn_if_still(self, final: Tensor, grid: Grid, driven: VectorField) -> None:
        """Warn if rounding has kept the whole state where it was, although the field is not zero."""
        x = self.request.x0
        if not len(grid) or driven.edges or final.shape != x.shape or not torch.equal(final, x):
            return
        stepper, step = self.request.discretisation.stepper(driven), grid[0]
        with without_effects(driven.modules, x.device), torch.no_grad():
            moved = (step.h * stepper.velocity(x, step.t0, step)).abs()
        spacing = torch.finfo(x.dtype).eps * x.abs()
        if bool((moved > 0).any()) and bool((moved <= 0.5 * spacing).all()):
            warnings.warn(
                f"dt: the state does not move, since a step of {step.h:.3g} changes it by less than half a unit in the "
                f"last place of {x.dtype}; take larger steps or x0.double()",
                AccuracyWarning,
                stacklevel=4,
            )


def _parts(costate: Costate | None) -> Sequence[RecordedCostate]:
    """Return the recordings that ``costate`` is made of."""
    if isinstance(costate, SummedCostate):
        return costate.parts
    return (costate,) if isinstance(costate, RecordedCostate) else ()


def _held(costate: Costate | None) -> int:
    """Return the number of states and costates that ``costate`` keeps."""
    return sum(len(part.nodes) + len(part.states) for part in _parts(costate))


def status_of(so_far: Status, *values: Tensor | None) -> Status:
    """Return ``so_far``, unless a value is not finite, or cannot be read."""
    finite = [(value.detach() * 0).sum() == 0 for value in values if value is not None]  # cheaper than isfinite().all()
    try:
        if not bool(torch.stack(finite).all()):
            return Status.NON_FINITE
    except RuntimeError:  # data-dependent control flow, which torch.func.vmap refuses
        return Status.UNKNOWN if so_far is Status.SUCCESS else so_far
    return so_far
