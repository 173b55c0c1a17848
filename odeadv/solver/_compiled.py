"""`compile_solver`: a solve with fixed steps as one compiled call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from odeadv.costate import RecordedCostate
from odeadv.fields import AdversarialField, Forcing, Newton, Operator, VectorField, as_field
from odeadv.fields.operator import Cost, VectorFunction
from odeadv.solver._loop import Steps, Tensors, time_step
from odeadv.solver._run import remedy, status_of
from odeadv.solver._solution import Solution, SolveError, Stats
from odeadv.solver._solve import solve
from odeadv.solver.request import Request, SaveAt, read_initial_state, read_request
from odeadv.splitting import DIRK, CostateKind, Grid, TorchDiffEq
from odeadv.splitting.method import SchemeLike, SubSteps, read_discretisation
from odeadv.splitting.status import Status
from odeadv.support.checks import integer
from odeadv.support.isolation import differentiating, inside_transform, outside_inference_mode, without_effects

# Arguments of a request that a compiled solver does not have.
_FIXED: dict[str, Any] = {
    "rtol": None,
    "atol": None,
    "ascent": None,
    "checkpoints": None,
    "differentiate_costate": False,
    "time_dtype": None,
    "within_span": False,
    "clip_last": False,
}


def compile_solver(
    field: VectorField | Operator | VectorFunction,
    *,
    dt: float | None = None,
    scheme: SchemeLike | None = None,
    substep: SubSteps | None = None,
    costate: CostateKind | None = None,
    sweeps: int | None = None,
    static: bool = False,
    **options: Any,
) -> CompiledSolver:
    """Return a solver for ``field`` with fixed steps, whose whole solve is one compiled call.

    The first call compiles, which takes about a second for states of up to 16 elements and some ten seconds for
    others. Make the solver once and call it often. The steps are a loop in C++, so the time to compile does not grow
    with their number. Another ``t_span``, ``dt`` or number of steps uses the same code. Another shape or dtype is
    compiled anew, and, for states of more than 16 elements, so are solves that save states between the ends. The
    result is that of `odeadv.solve` up to rounding. Gradients of ``x0``, and of parameters and other tensors that the
    field closes over, come from the discrete adjoint equation, a second compiled loop. Second derivatives are computed
    without compilation.

    An `AdversarialField` is recorded by a compiled loop forward and one in reverse, and is then solved by a third one.

    Args:
        field: a field that is the same on every step, of functions that torch.compile understands. Numbers and other
            Python values that it uses are constants of the code; if they change, it is compiled again.
        dt: step size, if it is not given in each call.
        scheme: as for `odeadv.solve`.
        substep: how each operator is advanced: a sub-step or its name for all operators, or a dict by operator; see
            `odeadv.solve`. Methods of torchdiffeq cannot be compiled.
        costate: the costate between recorded times: ``"linear"``, ``"hermite"`` or ``"exact"``, see `odeadv.solve`.
        sweeps: number of recordings, each on the trajectory that the last one drives.
        static: promise that the field uses the same tensors and Python values in every call, as `jax.jit` assumes. Each
            call then skips the search for changes, which takes most of the time of a short solve. New values that are
            written into these tensors, as optimisers do, are seen. The solver does not see that a tensor or a Python
            value is replaced, or that a module changes its mode. It then continues with the old one.
        options: for `torch.compile`, such as ``backend="aot_eager"``; it then compiles small states too.

    Returns:
        A `CompiledSolver`.

    Raises:
        TypeError, ValueError: for arguments that do not fit, by name.

    Warns:
        CompileWarning: in the first call, if there is no C++ compiler, or the state is not on the CPU. The steps are
            then a loop in Python.

    Example:
        >>> solver = odeadv.compile_solver(lambda t, x: -x, scheme="rk4")
        >>> solver(torch.ones(3), (0.0, 1.0), dt=0.1).xs[-1]
        tensor([0.3679, 0.3679, 0.3679])
    """
    field = as_field(field)
    if not all(operator.constant for operator in field.operators.values()):
        raise ValueError(
            "field: a piecewise field, or one driven by a recorded costate, differs from step to step and cannot be "
            "compiled as one graph"
        )
    if isinstance(field, AdversarialField) and (field.transforms or field.accumulates):
        raise ValueError(
            "field: got an AdversarialField with a transform, a running cost or losses at given times, expected one "
            "with a final loss alone; use odeadv.solve"
        )
    if sweeps is not None:
        integer("sweeps", sweeps)
    if isinstance(dt, str):
        raise ValueError(f"dt: got {dt!r}, expected a number: a compiled solve has fixed steps")
    method = read_discretisation(field, scheme, substep, costate)
    if method.costate == "collocation":
        raise ValueError("costate: got 'collocation', which needs converging sweeps; use odeadv.solve")
    for name, chosen in method.substeps.items():
        if isinstance(chosen, DIRK) and isinstance(field.operators[name].solver, Newton):
            raise ValueError(
                f"substep: {chosen.name!r} solves operator {name!r} by Newton's iteration, which cannot be compiled as "
                "one graph; give odeadv.Operator(f, solve=...) a direct solver"
            )
    if any(isinstance(chosen, TorchDiffEq) for chosen in method.substeps.values()):
        raise ValueError("substep: torchdiffeq's methods cannot be compiled as one graph; take one of ours")
    choices = {"scheme": scheme, "substep": substep, "costate": costate, "sweeps": sweeps}
    return CompiledSolver(field, choices, dt, static, options)


class CompiledSolver:
    """Made by `compile_solver`.

    Args:
        field: the field to solve.
        choices: the arguments ``scheme``, ``substep``, ``costate`` and ``sweeps`` of `odeadv.solve`, by name.
        dt: step size of calls that give neither ``dt`` nor ``steps``; None if every call gives one.
        static: as for `compile_solver`.
        options: as for `compile_solver`.
    """

    def __init__(
        self, field: VectorField, choices: dict[str, Any], dt: float | None, static: bool, options: dict[str, Any]
    ) -> None:
        self.field = field
        self._choices, self._dt, self._static, self._options = choices, dt, static, options
        self._compiled: dict[tuple[object, ...], Steps] = {}
        self._checked: set[tuple[object, ...]] = set()
        self._latest: tuple[tuple[object, ...], _Plan] | None = None

    def __call__(
        self,
        x0: Tensor | None = None,
        t_span: tuple[float, float] | None = None,
        *,
        dt: float | None = None,
        steps: int | None = None,
        save_at: SaveAt = None,
        throw: bool = True,
    ) -> Solution:
        """Solve from ``x0`` over ``t_span``; see `odeadv.solve`. Evaluations are not counted.

        Inside torch.func transforms this is `odeadv.solve`.

        Args:
            x0: initial state.
            t_span: ``(t0, t1)``.
            dt: step size, which must divide the span.
            steps: number of steps, instead of ``dt``.
            save_at: None, ``"steps"``, or times that are ends of steps.
            throw: raise if the solve fails.

        Raises:
            TypeError, ValueError: for arguments that do not fit, by name; for a torch older than 2.13.
            SolveError: if the result is not finite and ``throw`` is set.
        """
        size = {"dt": self._dt if dt is None and steps is None else dt, "steps": steps}
        if inside_transform():
            return solve(self.field, x0, t_span, save_at=save_at, throw=throw, **size, **self._choices)  # type: ignore[arg-type]
        with outside_inference_mode():
            plan, x = self._plan(x0, t_span, save_at, size)
            self._check(plan, x)
            solution = plan.solution(x)
            if solution.status is not Status.SUCCESS:
                read_initial_state(self.field, x)  # the state of a repeated call is looked at only now
        if throw and solution.status is not Status.SUCCESS:
            raise SolveError(solution, remedy(plan.request, solution.status))
        return solution

    def _plan(self, x0: Tensor | None, t_span: Any, save_at: SaveAt, size: dict[str, Any]) -> tuple[_Plan, Tensor]:
        """Return what is to be done, read anew unless the latest call had the same arguments, and the initial state.

        Raises:
            TypeError, ValueError: for arguments that do not fit, by name.
        """
        key = None if x0 is None else _signature(x0, t_span, save_at, size)
        if key is not None and self._latest is not None and self._latest[0] == key:
            plan = self._latest[1]
            if x0 is not None and plan.looks_at_start and not x0.requires_grad:
                return plan, x0
            return plan, read_initial_state(self.field, x0)
        request = read_request(self.field, x0, t_span, save_at=save_at, **size, **self._choices, **_FIXED)
        x = request.x0
        if x.is_complex():
            raise TypeError(
                f"x0: got {x.dtype}, expected a real dtype, since torch cannot compile a loop that writes to a complex "
                "buffer (torch 2.14.1); use odeadv.solve"
            )
        if request.moves:
            raise ValueError(
                "t_span: got times that require gradients, expected numbers for a compiled solve; use odeadv.solve"
            )
        if request.times.grid is None or request.times.grid.h is None:
            raise ValueError("dt: got adaptive or uneven steps, expected a number: a compiled solve has equal steps")
        plan = _Plan(self._steps, replace(request, x0=x.new_empty(0)), request.times.grid, x.device)
        if key is not None and request.narrow is None:
            self._latest = key, plan
        return plan, x

    def _steps(self, make: Callable[[Request], Callable[..., Tensor]], request: Request) -> Steps:
        key = (make, request.narrow)
        if key not in self._compiled:
            self._compiled[key] = Steps(make(request), self._options, self._static)
        return self._compiled[key]

    def _check(self, plan: _Plan, x: Tensor) -> None:
        """Take one step as `solve` does, without effect. A graph cannot see a field that writes to its state.

        Raises:
            TypeError, ValueError: as from `solve`, by name; or if the field draws random numbers or writes to buffers.
        """
        asked = x.requires_grad and torch.is_grad_enabled()
        key = (x.shape, x.dtype, x.device, asked)
        if key in self._checked:
            return
        request = plan.request
        with without_effects(request.field.modules, x.device):
            buffers = [buffer for module in request.field.modules for buffer in module.buffers()]
            before = torch.get_rng_state(), [buffer._version for buffer in buffers]
            start = x.detach().clone().requires_grad_(asked)
            request.discretisation.stepper(request.field).advance(start, plan.grid[0])
            if not torch.equal(before[0], torch.get_rng_state()) or before[1] != [b._version for b in buffers]:
                raise ValueError(
                    "field: draws random numbers or writes to a buffer of a module, which a compiled solve cannot; "
                    "put modules into evaluation mode, or use odeadv.solve"
                )
        self._checked.add(key)


def _signature(x0: Tensor, t_span: Any, save_at: SaveAt, size: dict[str, Any]) -> tuple[object, ...] | None:
    """Return a key of the arguments of a call, apart from the values of the state; None if they have to be read."""
    dt, steps = size["dt"], size["steps"]
    plain = type(t_span) is tuple and all(type(t) is float for t in t_span) and isinstance(save_at, str | None)
    if not (plain and type(dt) in (float, NoneType) and type(steps) in (int, NoneType) and isinstance(x0, Tensor)):
        return None
    return x0.shape, x0.dtype, x0.device, t_span, save_at, dt, steps


@dataclass
class _Plan:
    """What the calls of a compiled solver with the same arguments do: recordings, and the solve.

    Attributes:
        steps: returns the compiled steps of a kind.
        request: the arguments, without the state.
        grid: the steps.
        device: of the state.
    """

    steps: Callable[[Callable[[Request], Callable[..., Tensor]], Request], Steps]
    request: Request
    grid: Grid
    device: torch.device

    @cached_property
    def clock(self) -> Tensor:
        """The clock of all steps, see `time_step`."""
        return _clock(self.grid, self.device)

    @cached_property
    def order(self) -> float:
        return self.request.discretisation.order(self.request.field)

    @cached_property
    def merges(self) -> bool:
        """True if only the final state is saved, so that exact flows of consecutive steps are merged."""
        stepper = self.request.discretisation.stepper(self.request.field)
        return self.request.save_at is None and stepper.merges and len(self.grid) > 1

    @cached_property
    def looks_at_start(self) -> bool:
        """True if the status tells whether the initial state is finite, and nothing can write to it."""
        rows = self.saved[1]
        first = rows is None or isinstance(rows, slice) or 0 in rows
        return first and not self.merges and not isinstance(self.request.field, AdversarialField)

    @cached_property
    def saved(self) -> tuple[Tensor, list[int] | slice | None]:
        """The saved times, and the rows of their states; None for the two ends."""
        times, at = self.grid.times, self.request.save_at
        if at is None:
            return _times((times[0], times[-1]), self.device), None
        if isinstance(at, str):
            return _times(times, self.device), slice(None)
        rows = [_number(self.grid, t) for t in at]
        return _times([times[n] for n in rows], self.device), rows

    def solution(self, x: Tensor) -> Solution:
        """Record the costate if there is one, solve from ``x``, and return the result."""
        request, costate, bound = self.request, None, None
        field, (ts, rows), stats = request.field, self.saved, Stats(steps=len(self.grid))
        finite: bool | None = None
        if isinstance(field, AdversarialField) and not field.idle:
            costate, tables = self.recorded(x)
            stats.recordings = request.recordings.passes
            bound = self.steps(_driven_step, request).on(x, self.clock, tables)
        if bound is None and self.merges:
            stepper = request.discretisation.stepper(field)
            xs = torch.stack([x, stepper.march(x, self.grid, _Merged(self))])  # type: ignore[arg-type]
        else:
            bound = bound or self.steps(_plain_step, request).on(x, self.clock)
            if rows is None:
                xs, finite = bound.ends(x)
            else:
                states = bound.states(x)
                xs = states[rows]
        output = loss = None
        if isinstance(field, AdversarialField):
            output, loss = field.evaluate(xs[-1] if rows is None else states[-1])
            finite = None
        return Solution(
            ts.clone(),
            xs if request.narrow is None else xs.to(request.narrow),
            status=Status.SUCCESS if finite else status_of(Status.SUCCESS, loss, xs),
            stats=stats,
            scheme=request.discretisation.name,
            order=self.order,
            output=output,
            loss=loss,
            costate=costate,
            record=(lambda: self.recorded(x)[0]) if isinstance(field, AdversarialField) else None,
        )

    def recorded(self, x: Tensor) -> tuple[RecordedCostate, Tensors]:
        """Make all recordings from ``x``; return the last one, and its nodes and states as tables."""
        request = self.request
        assert isinstance(request.field, AdversarialField)
        kind = request.discretisation.costate
        tables: Tensors = ()
        for number in range(request.recordings.passes):
            make = _driven_step if number else _plain_step
            bound = self.steps(make, request).on(x, self.clock, tables)
            states = bound.forward(x)
            given = torch.zeros_like(states)
            given[-1] = _loss_gradient(request.field, states[-1])
            nodes, _ = bound.costates(states, given)
            tables = (nodes,) if kind == "linear" else (nodes, states)
        kept = () if kind == "linear" else states.unbind()
        return RecordedCostate(self.grid, nodes.unbind(), kept, request.field.f, kind), tables


@dataclass
class _Merged:
    """Runs the merged steps of `Stepper.march`, in the place of a recomputation."""

    plan: _Plan

    @property
    def every(self) -> int:
        """All steps at once."""
        return len(self.plan.grid)

    def __call__(self, merged: object, x: Tensor, part: Grid) -> Tensor:
        """Return the state after all steps of ``part`` but the last one."""
        grid = Grid(part.times[:-1], part.h)
        bound = self.plan.steps(_merged_step, self.plan.request).on(x, _clock(grid, x.device))
        return bound.ends(x)[0][-1]


def _plain_step(request: Request) -> Callable[..., Tensor]:
    """Return a step of the field, without its costate."""
    stepper = request.discretisation.stepper(request.field)
    return lambda number, x, clock: stepper.advance(x, time_step(number, clock))


def _merged_step(request: Request) -> Callable[..., Tensor]:
    """Return a step from after the first exact flow of a step to after that of the next one."""
    stepper = request.discretisation.stepper(request.field)
    return lambda number, x, clock: stepper.merged(x, [time_step(number, clock)] * 2)


def _driven_step(request: Request) -> Callable[..., Tensor]:
    """Return a step of an adversarial field with a recorded costate, whose nodes are the rows that it is given."""
    field = request.field
    assert isinstance(field, AdversarialField)
    drive = _Drive(field.f, request.discretisation.costate)
    driven = VectorField({"f": field.f, "costate": Forcing(drive, scale=field.eta)})
    stepper = request.discretisation.stepper(driven)

    def step(number: Tensor, x: Tensor, clock: Tensor, *rows: Tensor) -> Tensor:
        drive.step, drive.rows = time_step(number, clock), rows
        end = stepper.advance(x, drive.step)
        drive.step, drive.rows = None, ()  # no tensor of the graph may stay behind
        return end

    return step


class _Drive:
    """a(t) on one step as part of a graph, by the formulas of `RecordedCostate`.

    Args:
        f: the operator whose Jacobian Eq. 9 needs.
        kind: the evaluation between nodes.
    """

    def __init__(self, f: Operator, kind: CostateKind) -> None:
        self._f, self._kind = f, kind
        self.step: Any = None  # a `TimeStep` of tensors
        self.rows: Tensors = ()

    def __call__(self, t: Any) -> Any:
        """Return a(t) on ``step``, from the nodes at its ends, and the states there, in ``rows``."""
        (before, after, *states), step = self.rows, self.step
        t0, t1, h = step.t0, step.t1, step.h
        if t is t0 or t is t1:
            return before if t is t0 else after
        real = before.real.dtype if before.is_complex() else before.dtype
        s, size = ((t - t0) / h).to(real), h.to(real)
        if self._kind == "linear":
            return before + s * (after - before)
        if self._kind == "exact":
            middle = 0.5 * (1.0 + s)
            x, a = (start + middle * (end - start) for start, end in (states, (before, after)))
            return after + (1.0 - s) * size * self._vjp(t0 + 0.5 * (t - t0 + h), x, a)
        left, right = self._vjp(t0, states[0], before), self._vjp(t1, states[1], after)
        ends = before + s * s * (3.0 - 2.0 * s) * (after - before)
        return ends - size * (s * (1.0 - s) ** 2 * left - s * s * (1.0 - s) * right)

    def _vjp(self, t: Any, x: Tensor, a: Tensor) -> Tensor:
        """Return (df/dx)^T a at (t, x), a constant."""
        product: Tensor = torch.func.vjp(lambda y: self._f.velocity(t, y, Cost()), x)[1](a)[0]
        return _constant(product)


def _constant(x: Tensor) -> Tensor:
    """Return ``x`` without a gradient: as integers and back, since `detach` is lost in graphs of plain operations."""
    if x.is_complex():
        return torch.view_as_complex(_constant(torch.view_as_real(x)))
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()]
    return x.view(integers).view(x.dtype)


def _clock(grid: Grid, device: torch.device) -> Tensor:
    """Return what `time_step` needs."""
    return torch.tensor([grid.times[0], grid.times[-1], grid.h, len(grid)], dtype=torch.float64, device=device)


def _times(times: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(times, dtype=torch.float64, device=device)


def _loss_gradient(field: AdversarialField, x: Tensor) -> Tensor:
    """Return dL/dx of the final loss.

    Raises:
        ValueError: if the loss does not depend on the state by differentiable operations.
    """
    with differentiating(field.modules, x.device):
        leaf = x.detach().clone().requires_grad_()
        _, loss = field.evaluate(leaf)
        if not loss.requires_grad:
            raise ValueError(
                "loss: does not depend on the state by differentiable operations; expected a function of x"
            )
        (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True, materialize_grads=True)
    return gradient


def _number(grid: Grid, t: float) -> int:
    """Return the number of the node at ``t``.

    Raises:
        ValueError: if ``t`` is not a node.
    """
    time = grid.snap(t)
    n = grid.locate(time, "save_at")
    n += grid.times[n] != time
    if grid.times[n] != time:
        raise ValueError(
            f"save_at: got {t:g}, which is not the end of a step; a compiled solve does not interpolate; choose dt "
            "such that it is, or use odeadv.solve"
        )
    return n
