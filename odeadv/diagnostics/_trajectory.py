"""Trajectories, layer by layer: the states, costates and pieces of f that all diagnostics use."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from odeadv.costate import RecordedCostate
from odeadv.fields import AdversarialField, Forcing, Jump, Operator, Problem, VectorField, as_field
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
        index: number n of the step.
        step: the step from t_n to t_{n+1}.
        piece: the operator f on this step, or the jump that replaces it.
        x, end: the states x_n and x_{n+1}.
        a, a_end: the costates a_n and a_{n+1}; None for a field without a loss.
        replay: gives all evaluations of the piece the same random numbers, so that they are values of one function.
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
        """Return f at ``x`` and ``t``, by default at the beginning of the step. The piece must not be a jump."""
        assert isinstance(self.piece, Operator)
        state = self.x if x is None else x
        with self.replay():
            return self.piece(as_time(self.step.t0 if t is None else t, state), state)

    def map(self, x: Tensor) -> Tensor:
        """Return x + h f(t_n, x), the layer of a residual network with the step size h. For a jump, return its map."""
        if isinstance(self.piece, Jump):
            with self.replay():
                return self.piece.across(x, Cost())
        return torch.add(x, self.velocity(x), alpha=self.step.h)


@dataclass(frozen=True)
class Trajectory:
    """The states at the nodes of a solve, and the costates if the field has a loss.

    Attributes:
        field: the field that was solved.
        grid: the nodes t_n.
        states: the states x_n, detached.
        costates: the costates a_n, detached; empty for a field without a loss.
        perturbed: True if the costate drove the states.
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
        """The operator f: the sum of all operators except the costate."""
        if isinstance(self.field, AdversarialField):
            return self.field.f
        terms = list(self.field.operators.values())
        return terms[0] if len(terms) == 1 else Sum(terms)

    @property
    def eta(self) -> float:
        """The strength of the costate. It is 0 for a field without costate."""
        eta = self.field.eta if isinstance(self.field, AdversarialField) else 0.0
        assert not isinstance(eta, Tensor)
        return eta

    def layers(self) -> Iterator[Layer]:
        """Yield the layers in the order of time."""
        costates: list[Any] = list(self.costates) or [None] * len(self.states)
        ends = zip(pairwise(self.states), pairwise(costates), strict=True)
        for n, (step, ((x, end), (a, a_end))) in enumerate(zip(self.grid, ends, strict=True)):
            piece = self.operator.on(step.t0, step.t1)
            yield Layer(n, step, piece, x, end, a, a_end, Replay(piece.modules, x.device))

    @contextlib.contextmanager
    def quiet(self, grad: bool = False) -> Iterator[None]:
        """Run the body, then restore buffers and random state. Autograd is on inside if ``grad`` is True."""
        device = self.states[0].device
        with (
            differentiating(self.field.modules, device) if grad else without_effects(self.field.modules, device),
            torch.set_grad_enabled(grad),
        ):
            yield

    def loss(self, x: Tensor | None = None) -> float:
        """Return the loss of the state ``x``, by default of the final state."""
        assert isinstance(self.field, AdversarialField)
        with self.quiet():
            return float(self.field.evaluate(self.states[-1] if x is None else x)[1])


def posed(
    field: AnyField,
    x0: Tensor | None = None,
    t_span: tuple[float, float] | None = None,
    dt: float | None = None,
    steps: int | None = None,
) -> VectorField:
    """Return a copy of ``field`` that contains this problem. For arguments that are None its own problem is used.

    Raises:
        TypeError, ValueError: if an argument does not fit. The message names the argument.
    """
    whole = copy.copy(as_field(field))
    if isinstance(whole, AdversarialField):
        whole = _with_number(whole)
    if dt is not None and steps is not None:
        raise ValueError(f"dt, steps: got dt={dt!r} and steps={steps!r}, expected one of the two")
    own = whole.problem
    given = dt is not None or steps is not None
    whole.problem = Problem(
        own.x0 if x0 is None else x0,
        own.t_span if t_span is None else t_span,
        dt if given else own.dt,
        steps if given else own.steps,
    )
    return whole


def walk(
    field: VectorField, substep: Any = None, *, scheme: str | Scheme | None = None, sweeps: Any = None
) -> Trajectory:
    """Solve ``field``, which must contain its problem, and keep states and costates at the nodes.

    Without ``scheme`` an `AdversarialField` is solved without its perturbation, by one recording pass, and transforms
    of the costate are not applied. With ``scheme`` the costate drives the trajectory. Modules and the random state are
    not changed.

    Args:
        field: the field, see `posed`.
        substep: as for `odeadv.solve`.
        scheme: scheme of the perturbed trajectory; None for the unperturbed trajectory.
        sweeps: recordings for the perturbed trajectory, see `odeadv.solve`.

    Raises:
        TypeError, ValueError: if an argument does not fit, before the solve starts. The message names the argument.
        SolveError: if the solve fails.
    """
    with torch.inference_mode(False), torch.no_grad(), without_effects(field.modules, _device(field)):
        if isinstance(field, AdversarialField) and scheme is None:
            return _recorded(field, substep)
        return trajectory_of(solve(field, scheme=scheme, substep=substep, sweeps=sweeps, save_at="steps"), field)


def _device(field: VectorField) -> torch.device:
    """Return the device of the initial state, or the device of the weights if the state has not been computed yet."""
    given = field.problem.x0
    if isinstance(given, Tensor):
        return given.device
    weights = (weight for module in field.modules for weight in module.parameters())
    first = next(weights, None)
    return torch.device("cpu") if first is None else first.device


def trajectory_of(solution: Solution, field: VectorField) -> Trajectory:
    """Return the trajectory of a solution that was saved with ``save_at="steps"``."""
    times = tuple(solution.ts.double().tolist())
    states = [x.detach() for x in solution.xs]
    if not isinstance(field, AdversarialField):
        return Trajectory(field, Grid(times), states)
    costate: Any = solution.costate
    grid: Grid = getattr(costate, "parts", (costate,))[0].grid
    if len(grid.times) == len(times):
        times = grid.times  # the times of the recording are preferred to the saved times, which may be rounded
    return Trajectory(
        field, Grid(times, grid.h), states, [costate(t).detach() for t in times], perturbed=not field.idle
    )


def _recorded(field: AdversarialField, substep: Any) -> Trajectory:
    """Return the trajectory of the first recording that a solve would make."""
    # eta is 1, because a field with eta = 0 is not recorded. Hermite, because a linear costate does not keep states.
    whole = driven(with_strength(field, 1.0), scheme="lie", substep=substep, costate="hermite")
    forcing = whole.operators["costate"]
    assert isinstance(forcing, Forcing)
    assert isinstance(forcing.source, RecordedCostate)
    return Trajectory(field, forcing.source.grid, forcing.source.states, forcing.source.nodes)


def with_strength(field: AdversarialField, eta: float) -> AdversarialField:
    """Return a copy of ``field`` with another eta and without transforms of its costate."""
    other = copy.copy(field)
    other.eta, other.transforms = eta, ()
    return other


def needs_loss(name: str, field: AnyField) -> AdversarialField:
    """Return ``field`` after a check that it has a loss, which the diagnostic ``name`` needs.

    Raises:
        TypeError: if ``field`` is not an `AdversarialField`.
        ValueError: if it has a running cost or losses at given times, or its eta has dimensions.
    """
    if not isinstance(field, AdversarialField):
        raise TypeError(
            f"field: got {type(field).__name__}, expected an AdversarialField: {name} needs a loss (eta may be 0); "
            "for a network, net.field(images, labels, eta)"
        )
    if field.accumulates:
        raise ValueError(f"field: got running= or at=, expected a loss of the final state alone, which {name} measures")
    return _with_number(field)


def _with_number(field: AdversarialField) -> AdversarialField:
    """Return ``field`` with eta as a number if eta is a 0-d tensor.

    Raises:
        ValueError: if eta has dimensions.
    """
    if not isinstance(field.eta, Tensor):
        return field
    if field.eta.ndim:
        raise ValueError(f"eta: got a tensor of shape {tuple(field.eta.shape)}, expected one number for diagnostics")
    numbered = copy.copy(field)
    numbered.eta = float(field.eta.detach())
    return numbered


def norm(x: Tensor) -> float:
    """Return the 2-norm of the whole tensor, summed in float64 if the device has it."""
    wide = torch.complex128 if x.is_complex() else torch.float64
    return float(torch.linalg.vector_norm(x.detach(), dtype=None if x.device.type == "mps" else wide))


def quotient(top: float, bottom: float) -> float:
    """Return top / bottom. Return infinity if only ``bottom`` is 0, and 0 if both are 0."""
    if bottom == 0.0:
        return 0.0 if top == 0.0 else float("inf")
    return top / bottom


def inner(a: Tensor, b: Tensor) -> float:
    """Return the real inner product of two tensors, summed in float64 if the device has it."""
    if a.is_complex():
        a, b = torch.view_as_real(a.detach()), torch.view_as_real(b.detach())
    wide = a.dtype if a.device.type == "mps" else torch.float64
    return float(torch.dot(a.detach().reshape(-1).to(wide), b.detach().reshape(-1).to(wide)))
