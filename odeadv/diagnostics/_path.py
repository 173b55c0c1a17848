"""A trajectory layer by layer: the one way in which every diagnostic comes by states, costates and pieces of f."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from odeadv.costate import RecordedCostate
from odeadv.fields import AdversarialField, Forcing, Jump, Operator, VectorField, as_field
from odeadv.fields.operator import Cost, VectorFunction, as_time
from odeadv.fields.terms import Sum
from odeadv.solver import Solution, driven, solve
from odeadv.splitting import Grid, Scheme, TimeStep
from odeadv.support.isolation import Replay, differentiating, without_effects

AnyField = VectorField | Operator | VectorFunction


@dataclass(frozen=True)
class Layer:
    """One step of a trajectory.

    Attributes:
        index: n.
        step: from t_n to t_{n+1}.
        piece: f on that step, or the jump that takes its place.
        x, end: the states x_n and x_{n+1}.
        a, a_end: the costates a_n and a_{n+1}; None for a field without a loss.
        replay: makes all evaluations of the piece draw the same noise, so that they are of one function.
    """

    index: int
    step: TimeStep
    piece: Operator | Jump
    x: Tensor
    end: Tensor
    a: Tensor | None
    a_end: Tensor | None
    replay: Replay

    def velocity(self, x: Tensor | None = None, t: float | Tensor | None = None) -> Tensor:
        """Evaluate f at ``x`` and ``t``, the beginning of the step if not given; not defined on a jump."""
        assert isinstance(self.piece, Operator)
        state = self.x if x is None else x
        with self.replay():
            return self.piece(as_time(self.step.t0 if t is None else t, state), state)

    def map(self, x: Tensor) -> Tensor:
        """Take ``x`` to x + h f(t_n, x), the layer as a residual network has it; the map of a jump."""
        if isinstance(self.piece, Jump):
            with self.replay():
                return self.piece.across(x, Cost())
        return torch.add(x, self.velocity(x), alpha=self.step.h)


@dataclass(frozen=True)
class Path:
    """States, and costates if there is a loss, at the nodes of a solve.

    Attributes:
        field: what was solved.
        grid: the nodes t_n.
        states: x_n, detached.
        costates: a_n, detached; empty for a field without a loss.
        perturbed: whether the costate drove the states.
    """

    field: VectorField
    grid: Grid
    states: Sequence[Tensor]
    costates: Sequence[Tensor] = ()
    perturbed: bool = False

    @property
    def ts(self) -> list[float]:
        """The times of the nodes."""
        return list(self.grid.times)

    @property
    def operator(self) -> Operator:
        """f: all operators but a costate."""
        if isinstance(self.field, AdversarialField):
            return self.field.f
        terms = list(self.field.operators.values())
        return terms[0] if len(terms) == 1 else Sum(terms)

    @property
    def eta(self) -> float:
        """Strength of the costate; 0 for a field without one."""
        return self.field.eta if isinstance(self.field, AdversarialField) else 0.0

    def layers(self) -> Iterator[Layer]:
        """The steps in turn."""
        costates: list[Any] = list(self.costates) or [None] * len(self.states)
        ends = zip(pairwise(self.states), pairwise(costates), strict=True)
        for n, (step, ((x, end), (a, a_end))) in enumerate(zip(self.grid, ends, strict=True)):
            piece = self.operator.on(step.t0, step.t1)
            yield Layer(n, step, piece, x, end, a, a_end, Replay(piece.modules, x.device))

    @contextlib.contextmanager
    def quiet(self, grad: bool = False) -> Iterator[None]:
        """Evaluate the field inside without effect on buffers and random state; with autograd if ``grad``."""
        device = self.states[0].device
        with (
            differentiating(self.field.modules, device) if grad else without_effects(self.field.modules, device),
            torch.set_grad_enabled(grad),
        ):
            yield

    def loss(self, x: Tensor | None = None) -> float:
        """The loss of the final state, or of ``x`` in its place."""
        assert isinstance(self.field, AdversarialField)
        with self.quiet():
            return float(self.field.evaluate(self.states[-1] if x is None else x)[1])


def walk(
    field: AnyField,
    x0: Tensor | None = None,
    t_span: tuple[float, float] | None = None,
    *,
    dt: float | None = None,
    steps: int | None = None,
    substep: Any = None,
    scheme: str | Scheme | None = None,
    sweeps: Any = None,
) -> Path:
    """Solve ``field`` and keep what is at the nodes, without effect on its modules.

    An `AdversarialField` is followed without its perturbation, by one recording pass, unless a ``scheme`` is given:
    then along the trajectory that its costate drives. Transforms of the costate do not act on a plain recording.

    Args:
        field: what to solve.
        x0: as in `odeadv.solve`, like those below.
        t_span: start and end time.
        dt: step size.
        steps: number of steps.
        substep: how f is advanced.
        scheme: of the perturbed trajectory.
        sweeps: recordings of its costate.

    Raises:
        TypeError, ValueError: for arguments that do not fit, by name, before anything is solved.
        SolveError: if the solve fails.
    """
    whole = as_field(field)
    with torch.inference_mode(False), torch.no_grad(), without_effects(whole.modules, _device(whole, x0)):
        if isinstance(whole, AdversarialField) and scheme is None:
            return _recorded(whole, x0, t_span, dt, steps, substep)
        solution = solve(
            whole,
            x0,
            t_span,
            scheme="strang" if scheme is None else scheme,
            dt=dt,
            steps=steps,
            substep=substep,
            sweeps=sweeps,
            save_at="steps",
        )
        return path_of(solution, whole)


def _device(field: VectorField, x0: Tensor | None) -> torch.device:
    """Where the field will be evaluated, as far as can be told before its initial state is computed."""
    given = field.problem.x0 if x0 is None else x0
    if isinstance(given, Tensor):
        return given.device
    weights = (weight for module in field.modules for weight in module.parameters())
    first = next(weights, None)
    return torch.device("cpu") if first is None else first.device


def path_of(solution: Solution, field: VectorField) -> Path:
    """The nodes of a solution that was saved with ``save_at="steps"``."""
    times = tuple(solution.ts.double().tolist())
    states = [x.detach() for x in solution.xs]
    if not isinstance(field, AdversarialField):
        return Path(field, Grid(times), states)
    costate: Any = solution.costate
    grid: Grid = getattr(costate, "parts", (costate,))[0].grid
    if len(grid.times) == len(times):
        times = grid.times  # those saved went through a tensor of the clock's dtype
    return Path(field, Grid(times, grid.h), states, [costate(t).detach() for t in times], perturbed=field.eta != 0.0)


def _recorded(
    field: AdversarialField,
    x0: Tensor | None,
    t_span: tuple[float, float] | None,
    dt: float | None,
    steps: int | None,
    substep: Any,
) -> Path:
    """The one recording that a solve would make first; unlike that of a linear costate it keeps its states."""
    bare = with_strength(field, 1.0)
    whole = driven(bare, x0, t_span, scheme="lie", dt=dt, steps=steps, substep=substep, costate="hermite")
    forcing = whole.operators["costate"]
    assert isinstance(forcing, Forcing)
    costate: RecordedCostate = forcing.value.__self__  # type: ignore[attr-defined]  # `driven` gives it bound
    return Path(field, costate.grid, costate.states, costate.nodes)


def with_strength(field: AdversarialField, eta: float) -> AdversarialField:
    """``field`` with another eta, and without transforms of its costate."""
    other = AdversarialField(field.f, field.loss, eta, readout=field.readout, modules=field.modules)
    other.problem = field.problem
    return other


def needs_loss(name: str, field: AnyField) -> AdversarialField:
    """``field``, which must have a loss for the diagnostic ``name``.

    Raises:
        TypeError: if it is no `AdversarialField`.
    """
    if not isinstance(field, AdversarialField):
        raise TypeError(
            f"field: got {type(field).__name__}, expected an AdversarialField: {name} needs a loss (eta may be 0); "
            "for a network, net.field(images, labels, eta)"
        )
    return field


def norm(x: Tensor) -> float:
    """The 2-norm of the whole tensor, added up in float64 where the device has it."""
    wide = torch.complex128 if x.is_complex() else torch.float64
    return float(torch.linalg.vector_norm(x.detach(), dtype=None if x.device.type == "mps" else wide))


def quotient(top: float, bottom: float) -> float:
    """Divide: infinite where only the latter is 0, and 0 where both are."""
    if bottom == 0.0:
        return 0.0 if top == 0.0 else float("inf")
    return top / bottom


def inner(a: Tensor, b: Tensor) -> float:
    """The real inner product of two tensors, added up as `norm` does."""
    if a.is_complex():
        a, b = torch.view_as_real(a.detach()), torch.view_as_real(b.detach())
    wide = a.dtype if a.device.type == "mps" else torch.float64
    return float(torch.dot(a.detach().reshape(-1).to(wide), b.detach().reshape(-1).to(wide)))
