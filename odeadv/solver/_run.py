"""One call of `solve`: find the steps, record the costate, solve the driven field."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from odeadv.costate import Costate, RecordedCostate, Rule, SummedCostate, TotalLoss, coarser, collocated, record, sweep
from odeadv.fields import AdversarialField, Forcing, VectorField
from odeadv.fields.operator import Cost, clock_dtype, leading
from odeadv.fields.terms import Unrecorded
from odeadv.solver._saving import Dense, Within, solve_path
from odeadv.solver._solution import Solution, SolveError, Stats
from odeadv.solver.request import Request, warn_of_coarse_clock
from odeadv.splitting import DIRK, Exact, Grid, Search, Status, Stepper, choose_grid, doubling, palindromic
from odeadv.splitting.method import AccuracyWarning
from odeadv.support.deferred import all_finite, holds, is_deferring
from odeadv.support.isolation import RandomState, Recompute, inside_transform, without_effects

MOST_ORDER = 16  # of collocation: methods of torchdiffeq, and exact flows, have the order infinity
APART = 0.5  # of the largest state: two steps of order two differ from collocation by a third


class SolveRun:
    """One call of `solve` during its execution.

    Attributes:
        request: the checked arguments.
        stats: the current cost.
        status: ``SUCCESS`` until something fails.
        first_grid: the steps for the field without a costate. The first recording uses them. If the solve does not
            record, the solve uses them.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.stats = Stats(evaluations=dict.fromkeys(request.field.operators, 0))
        self.status = Status.SUCCESS
        self._unsolved = 0  # number of equations of implicit stages for which Newton's iteration failed
        self.first_grid = self._find_grid(request.field, None)

    def solution(self) -> Solution:
        """Record the costate if the field has one, solve, and return the result even if the solve failed."""
        request, field, costate = self.request, self.request.field, None
        later: Callable[[], Costate | None] | None = None
        if isinstance(field, AdversarialField) and field.idle:
            later = partial(self._recorded_later, RandomState(request.x0.device))
        elif isinstance(field, AdversarialField):
            later = self.recorded_costate
            costate = self.recorded_costate()
            field = field if costate is None else field.driven_by(costate)
        grid = self.first_grid if field is request.field else self._find_grid(field, costate)
        stepper = request.discretisation.stepper(field)
        order = request.discretisation.order(field)
        within = Within(stepper, order, field)
        keep = self._keeps_nodes
        segments = self._segments(grid, costate) if torch.is_grad_enabled() else None
        path = solve_path(within, request.x0, grid, request.save_at, keep_nodes=keep, segments=segments)
        final, xs, output, loss = path.nodes[-1], path.states, None, None
        if isinstance(request.field, AdversarialField):
            output, loss = request.field.evaluate(final)
            if request.field.accumulates:
                loss = loss + self._accumulated(grid, stepper, path.nodes, segments)
        self._count(costate, stepper)
        self.stats.steps = len(grid)
        held = len(xs) + (len(path.nodes) if keep else 0)
        self.stats.states_held = max(self.stats.states_held, _held(costate) + held)
        saved = torch.stack(xs) if all(state.shape == xs[0].shape for state in xs) else tuple(xs)
        status = self.outcome(loss, *self._unchecked(final, xs, saved))
        if status is Status.SUCCESS:
            self._warn_if_still(final, grid, field)
            if request.discretisation.costate == "collocation" and isinstance(costate, RecordedCostate):
                _warn_if_apart(final.detach(), costate.states)
        if request.narrow is not None and isinstance(saved, Tensor):
            saved = saved.to(request.narrow)
        return Solution(
            torch.tensor(path.times, dtype=torch.float64, device=request.x0.device),
            saved,
            status=status,
            stats=self.stats,
            scheme=request.discretisation.name,
            order=order,
            output=output,
            loss=loss,
            costate=costate,
            record=later,
            dense=Dense(within, grid, path.nodes, request.narrow) if request.dense and len(grid) else None,
        )

    def _unchecked(self, final: Tensor, xs: list[Tensor], saved: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
        """Return the states that have not been checked to be finite, each state once. The initial state was checked."""
        states = [saved] if isinstance(saved, Tensor) else [x for x in xs if x is not self.request.x0]
        return states if xs[-1] is final else [final, *states]

    @property
    def _keeps_nodes(self) -> bool:
        """True if the states at all nodes are needed, for dense output or for the total loss."""
        field = self.request.field
        return self.request.dense or (isinstance(field, AdversarialField) and field.accumulates)

    def _accumulated(self, grid: Grid, stepper: Stepper, nodes: Sequence[Tensor], segments: Recompute | None) -> Tensor:
        """Return the total loss without the loss of the final state."""
        field = self.request.field
        assert isinstance(field, AdversarialField)
        with without_effects(field.modules, self.request.x0.device):
            return TotalLoss.on(grid, field, self._rule).along(grid, stepper, nodes, segments)

    @property
    def _rule(self) -> Rule:
        """The quadrature rule of a running cost.

        It has the order of the sub-step of f. For exact flows and implicit methods, f may be stiff, so the rule does
        not use slopes of f.
        """
        substep = self.request.discretisation.substeps["f"]
        return "simpson" if substep.order > 2 and not isinstance(substep, DIRK | Exact) else "trapezoid"

    def outcome(self, *values: Tensor | None) -> Status:
        """Return the status of a solve with the results ``values``."""
        status = status_of(self.status, *values)
        return Status.NEWTON_FAILED if status is Status.NON_FINITE and self._unsolved else status

    def driving_costate(self) -> Costate:
        """Make all recordings and return their costate.

        Raises:
            SolveError: if a recording fails. The solution of the error contains the initial state only.
        """
        costate = self.recorded_costate()
        status = self.status if costate is None else self.outcome(*costate.nodes)
        if costate is not None and status in (Status.SUCCESS, Status.UNKNOWN):
            return costate
        request = self.request
        raise SolveError(
            Solution(
                torch.tensor(request.times.span[:1], dtype=torch.float64),
                request.x0[None],
                status=status,
                stats=self.stats,
                scheme=request.discretisation.name,
                order=request.discretisation.order(request.field),
                costate=costate,
            ),
            remedy(request, status),
        )

    def _recorded_later(self, before: RandomState) -> Costate | None:
        """Make the recordings with the random numbers of the solve, such as the masks of dropout, which drew first."""
        after = RandomState(self.request.x0.device)
        before.put_back()
        try:
            return self.recorded_costate()
        finally:
            after.put_back()

    def recorded_costate(self) -> Costate | None:
        """Make all recordings. Return None if the steps of the first recording do not reach the end of the span."""
        if not len(self.first_grid) or self.status is not Status.SUCCESS:
            return None
        request, converge = self.request, self.request.recordings.converge
        if request.discretisation.costate == "collocation":
            return self._collocated()
        coarse: list[Grid] = []
        if converge is not None and request.times.grid is not None and not request.field.edges:
            assert isinstance(request.field, AdversarialField)
            nested = converge.nested
            if nested is None:
                driven = request.field.driven_by(lambda t: request.x0)  # its order does not depend on the costate
                nested = converge.method == "newton" or request.discretisation.order(driven) > 2
            coarse = coarser(request.times.grid, 4) if nested and not request.field.at else []
        swept = sweep(
            self.record, request.recordings, grid=request.times.grid, coarse=coarse, implicit=request.differentiate
        )
        self.stats.residuals += swept.residuals
        self.stats.jvps += swept.products
        if not swept.converged:
            self.status = Status.NOT_CONVERGED
        return swept.costate

    def _collocated(self) -> Costate:
        """Return the converged costate by collocation, of the order of the solve."""
        request = self.request
        field, grid, converge = request.field, request.times.grid, request.recordings.converge
        assert isinstance(field, AdversarialField)
        assert grid is not None
        assert converge is not None
        order = request.discretisation.order(field.driven_by(lambda t: request.x0))
        stages = math.ceil(min(order, MOST_ORDER) / 2)
        found = collocated(field, request.x0, grid, stages, converge, differentiate=request.differentiate)
        self.stats.residuals += found.residuals
        if not found.converged:
            self.status = Status.NOT_CONVERGED
        return found.costate

    def record(
        self, drive: Costate | None, grid: Grid | None = None, differentiate: bool | None = None
    ) -> RecordedCostate:
        """Make one recording along the trajectory that ``drive`` drives.

        Args:
            drive: the costate that drives; None for the trajectory of f alone.
            grid: the steps. By default they are the steps of the request, or adaptive steps for this trajectory.
            differentiate: True keeps the recording in the autograd graph; by default as the request demands.
        """
        field = self.request.field
        assert isinstance(field, AdversarialField)
        if differentiate is None:
            differentiate = self.request.differentiate and self.request.recordings.converge is None
        if isinstance(drive, RecordedCostate):
            drive = replace(drive, differentiate=differentiate)
        along: VectorField = field if drive is None else field.driven_by(drive)
        if grid is not None:
            return self._record_on(grid, along, drive, differentiate)
        grid = self.first_grid if drive is None else self._find_grid(along, drive)
        found = self._record_on(grid, along, drive, differentiate)
        adaptive = self.request.times.adaptive
        while adaptive is not None and self.status is Status.SUCCESS:
            # The steps meet the tolerances for the state only. They are halved until the costate meets them too. The
            # error of the costate between nodes is its difference from the costate on the halved steps.
            if 2 * len(grid) > adaptive.most:
                self.status = Status.TOO_MANY_STEPS
                break
            grid = grid.halved()
            finer = self._record_on(grid, along, drive, differentiate)
            error, largest = found.difference(finer)
            self._count(found)
            found = finer
            if adaptive.error(leading(field.eta, error).abs(), largest, largest) <= 1.0:
                break
        return found

    def _record_on(self, grid: Grid, along: VectorField, drive: Costate | None, differentiate: bool) -> RecordedCostate:
        request = self.request
        assert isinstance(request.field, AdversarialField)
        stepper = request.discretisation.stepper(along)
        found = record(
            request.field,
            request.x0,
            grid,
            stepper,
            kind=request.discretisation.costate,
            differentiate=differentiate,
            segments=self._segments(grid, drive),
            keep_states=request.times.adaptive is not None,
            rule=self._rule,
        )
        self.stats.recordings += 1
        self.stats.states_held = max(self.stats.states_held, _held(drive) + 2 * len(grid.times))
        costs = [stepper.counted[0], *(part.cost for part in _parts(drive))]
        work = sum(cost.evaluations + cost.vjps for cost in costs)
        self._count(drive, stepper)
        return replace(found, work=work)

    def _segments(self, grid: Grid, drive: Costate | None) -> Recompute | None:
        """Return the segments in which ``grid`` is run, or None if the whole autograd graph is kept."""
        count = self.request.checkpoints
        if count is None or not len(grid) or inside_transform():
            return None
        memory = [part.memory for part in _parts(drive)]
        return Recompute(math.ceil(len(grid) / count), self.request.field.modules, memory)

    def _find_grid(self, field: VectorField, drive: Costate | None) -> Grid:
        """Return the fixed steps, or find steps for ``field`` that meet the tolerances. Failures change ``status``."""
        request = self.request
        if request.times.grid is not None:
            return request.times.grid
        search, steppers = self._search(field, drive)
        for stepper in steppers:
            self._count(None, stepper)
        self._unsolved = 0  # failures in trial steps do not count, because these steps were rejected
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
            # A linear costate has a kink at each node. A step across a kink would be rejected until it is tiny.
            edges += [t for part in _parts(drive) for t in part.grid.times]
        with without_effects(field.modules, request.x0.device):
            search = choose_grid(request.x0, request.times.span, settings, trial, order, edges)
        return search, steppers

    def _count(self, costate: Costate | None, stepper: Stepper | None = None) -> None:
        """Add the costs of ``stepper`` and of evaluations of ``costate`` to the statistics, and reset these costs."""
        names = list(self.stats.evaluations)
        counted: list[tuple[str, Cost]] = list(zip(names, stepper.counted if stepper else (), strict=False))
        counted += [(names[0], part.cost) for part in _parts(costate)]
        for name, cost in counted:
            self.stats.evaluations[name] += cost.evaluations
            self.stats.vjps += cost.vjps
            cost.evaluations = cost.vjps = 0
        # An un-split sum has a cost in addition to the costs of its terms. Costs that were already added are 0 now.
        for cost in (*(cost for _, cost in counted), *(stepper.costs if stepper else ())):
            self.stats.jvps += cost.jvps
            self.stats.solves += cost.solves
            self.stats.iterations += cost.iterations
            self._unsolved += cost.unsolved
            cost.jvps = cost.solves = cost.iterations = cost.unsolved = 0

    def _warn_if_still(self, final: Tensor, grid: Grid, driven: VectorField) -> None:
        """Warn if rounding has left the whole state unchanged, although the field is not zero."""
        x = self.request.x0
        if not len(grid) or driven.edges or final.shape != x.shape or not torch.equal(final, x):
            return
        if not all("f" in operator.abilities for operator in driven.operators.values()):
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


def _warn_if_apart(final: Tensor, collocated_states: Sequence[Tensor]) -> None:
    """Warn if the solve ends away from the collocated state, relative to the largest collocated state."""
    largest = max(x.detach().norm().item() for x in collocated_states)
    apart = (final - collocated_states[-1].detach()).norm().item()
    if apart > APART * largest > 0.0:
        warnings.warn(
            f"costate: got a final state that differs from the collocated one by {apart / largest:.3g} of the largest "
            f"state, expected at most {APART:g}: errors grow along the span, or the sub-step is unstable; take shorter "
            "steps or a shorter span, or use the collocated states, sol.costate.states",
            AccuracyWarning,
            stacklevel=4,
        )


def remedy(request: Request, status: Status) -> str | None:
    """Return what to try if a state is not finite: the methods that fit the operators. None for another ``status``."""
    if status is not Status.NON_FINITE:
        return None
    field, substeps = request.field, request.discretisation.substeps
    own = {name: term for name, term in field.operators.items() if not isinstance(term, Forcing | Unrecorded)}
    flows = [name for name, term in own.items() if "flow" in term.abilities and not isinstance(substeps[name], Exact)]
    pushed = isinstance(field, AdversarialField) and not field.idle
    advice = ["take more steps or a smaller eta" if pushed else "take more steps"]
    if flows:
        choice = "'exact'" if len(flows) == len(own) else "{" + ", ".join(f"{name!r}: 'exact'" for name in flows) + "}"
        known = f"operators {' and '.join(map(repr, flows))}" if len(flows) > 1 else f"operator {flows[0]!r}"
        advice.insert(0, f"use the exact flow of {known}: substep={choice}")
    elif not field.edges and not all(isinstance(substeps[name], DIRK | Exact) for name in own):
        advice.append("if the equation is stiff, use an implicit sub-step: substep='sdirk2'")
    return "; ".join([*advice, "throw=False returns the solution as it is"])


def _parts(costate: Costate | None) -> Sequence[RecordedCostate]:
    """Return the recordings that ``costate`` consists of."""
    if isinstance(costate, SummedCostate):
        return costate.parts
    return (costate,) if isinstance(costate, RecordedCostate) else ()


def _held(costate: Costate | None) -> int:
    """Return the number of states and costates that ``costate`` keeps in memory."""
    return sum(len(part.nodes) + len(part.states) for part in _parts(costate))


def status_of(so_far: Status, *values: Tensor | None) -> Status:
    """Return ``NON_FINITE`` if a value is not finite, ``UNKNOWN`` if values cannot be read, else ``so_far``."""
    finite = [all_finite(value) for value in values if value is not None]
    try:
        if not holds(finite[0] if len(finite) == 1 else torch.stack(finite).all()):
            return Status.NON_FINITE
    except RuntimeError:  # torch.func.vmap does not allow control flow that depends on values
        return Status.UNKNOWN if so_far is Status.SUCCESS else so_far
    return Status.UNKNOWN if is_deferring() and so_far is Status.SUCCESS else so_far
