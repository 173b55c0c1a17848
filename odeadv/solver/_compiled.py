"""`compile_solver`: a solve whose step is one compiled graph."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from odeadv.fields import AdversarialField, Newton, Operator, VectorField, as_field
from odeadv.fields.operator import VectorFunction, clock_dtype
from odeadv.solver._run import status_of
from odeadv.solver._solution import Solution, SolveError, Stats
from odeadv.solver.request import read_initial_state, read_times
from odeadv.splitting import DIRK, Scheme, TimeStep, TorchDiffEq
from odeadv.splitting.method import SubSteps, read_discretisation
from odeadv.splitting.status import Status
from odeadv.support.checks import number
from odeadv.support.isolation import inside_transform, outside_inference_mode, without_effects


def compile_solver(
    field: VectorField | Operator | VectorFunction,
    *,
    dt: float,
    scheme: str | Scheme | None = None,
    substep: SubSteps | None = None,
    **options: Any,
) -> CompiledSolver:
    """Return a solver for ``field`` with fixed steps of size ``dt``. Its step is compiled once, as one graph.

    The steps are a Python loop over that graph, so the time to compile does not grow with their number. Make the solver
    once and call it often: ``solver(x0, (0.0, 1.0))`` returns the same `Solution` as `odeadv.solve` up to rounding,
    with gradients.

    Args:
        field: a plain or split field that is the same on every step, of functions that torch.compile understands.
        dt: step size.
        scheme: see `odeadv.solve`.
        substep: see `odeadv.solve`.
        options: passed on to `torch.compile`; the default is ``fullgraph=True``.

    Raises:
        TypeError, ValueError: for arguments that do not fit, by name.
    """
    field = as_field(field)
    if isinstance(field, AdversarialField):
        raise ValueError(
            "field: an AdversarialField cannot be compiled step by step; compile the functions it is made of"
        )
    if not all(operator.constant for operator in field.operators.values()):
        raise ValueError(
            "field: a piecewise field, or one driven by a recorded costate, differs from step to step and cannot be "
            "compiled as one graph"
        )
    return CompiledSolver(field, number("dt", dt), scheme, substep, options)


class CompiledSolver:
    """Made by `compile_solver`."""

    def __init__(
        self,
        field: VectorField,
        dt: float,
        scheme: str | Scheme | None,
        substep: SubSteps | None,
        options: dict[str, Any],
    ) -> None:
        if dt == 0.0:
            raise ValueError("dt: got 0, expected a step size different from 0")
        self.field, self.dt = field, dt
        self.discretisation = read_discretisation(field, scheme, substep, None)
        self._options = {"fullgraph": True, **options}
        for name, method in self.discretisation.substeps.items():
            if isinstance(method, DIRK) and isinstance(field.operators[name].solver, Newton):
                raise ValueError(
                    f"substep: {method.name!r} solves operator {name!r} by Newton's iteration, which cannot be "
                    "compiled as one graph; give odeadv.Operator(f, solve=...) a direct solver"
                )
        if any(isinstance(method, TorchDiffEq) for method in self.discretisation.substeps.values()):
            raise ValueError("substep: torchdiffeq's methods cannot be compiled as one graph; take one of ours")
        self._steps: dict[tuple[object, ...], Callable[[Tensor, Tensor], Tensor]] = {}

    def __call__(self, x0: Tensor, t_span: tuple[float, float], *, throw: bool = True) -> Solution:
        """Solve from ``x0`` over ``t_span``, which ``dt`` must divide; see `odeadv.solve`.

        Evaluations are not counted.
        """
        grid = read_times(self.field, t_span, self.dt, None).grid
        x = read_initial_state(self.field, x0)
        assert grid is not None
        assert grid.h is not None
        signed = math.copysign(self.dt, grid.h)
        # The size of a step is a constant of its graph; how the ends of a span round must not ask for another one.
        step = self._step(signed if math.isclose(grid.h, signed, rel_tol=1e-12) else grid.h, x, grid[0])
        start = x
        for t in torch.tensor(grid.times[:-1], dtype=clock_dtype(x.dtype), device=x.device).unbind():
            x = step(x, t)
        solution = Solution(
            torch.tensor([grid.times[0], grid.times[-1]], dtype=torch.float64, device=x.device),
            torch.stack([start, x]),
            status=status_of(Status.SUCCESS, x),
            stats=Stats(steps=len(grid)),
            scheme=self.discretisation.name,
            order=self.discretisation.order(self.field),
        )
        if throw and solution.status not in (Status.SUCCESS, Status.UNKNOWN):
            raise SolveError(solution)
        return solution

    def _step(self, h: float, x: Tensor, first: TimeStep) -> Callable[[Tensor, Tensor], Tensor]:
        key = (
            h,
            x.dtype,
            x.ndim,
            x.device,
            x.requires_grad,
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        )
        if key not in self._steps:
            stepper = self.discretisation.stepper(self.field)
            self._check(x, first)

            def step(x: Tensor, t: Tensor) -> Tensor:
                # Times are tensors here, so that one graph serves every step.
                return stepper.advance(x, TimeStep(t, t + h, h))  # type: ignore[arg-type]

            # torch.compile allows only a few graphs for one code object, which all solvers would share.
            step.__code__ = step.__code__.replace(co_name=f"step_{len(self._steps)}")
            self._steps[key] = torch.compile(step, **self._options)
        return self._steps[key]

    def _check(self, x: Tensor, step: TimeStep) -> None:
        """One step as `solve` takes it, without effect: graphs cannot see a field that writes to its state, say.

        Raises:
            TypeError, ValueError: as from `solve`, by name.
        """
        with outside_inference_mode(), without_effects(self.field.modules, x.device):
            start = x.detach().clone()
            if x.requires_grad and torch.is_grad_enabled() and not inside_transform():
                start.requires_grad_()
            self.discretisation.stepper(self.field).advance(start, step)
