"""The contraction factor of sweeps over the costate, eta * I, by power iteration on the linearised sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from odeadv.costate import record
from odeadv.diagnostics._linear import check_iteration, largest, random_like
from odeadv.diagnostics._result import Result, style
from odeadv.diagnostics._trajectory import AnyField, needs_loss, norm, posed, quotient, with_strength
from odeadv.fields import AdversarialField
from odeadv.solver import Solution, SolveError, Stats
from odeadv.solver.request import read_initial_state, read_times
from odeadv.splitting import Scheme
from odeadv.splitting.method import read_discretisation
from odeadv.splitting.status import Status
from odeadv.support.isolation import differentiating
from odeadv.support.linearised import Linearised

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Contraction(Result):
    """The factor by which a sweep changes errors of the costate.

    Attributes:
        factor: |eta| times ``reach``. Below 1, plain sweeps converge at this rate. Above 1, they diverge.
        eigenvalue: ``factor`` with its sign. It is negative if the loss is concave in the direction of the eigenvector.
            The errors of successive sweeps then alternate in sign.
        reach: I, the factor per unit of eta. It is the largest curvature of the loss as a function of the forcing.
        change: ||Phi(u) - u|| / ||Phi(u)||, with Phi as one sweep and u as the recording that drives the two-stage
            method. It is the relative change by a second sweep.
        measured: ||Phi(Phi(u)) - Phi(u)|| / ||Phi(u) - u||, the change by the third sweep over the change by the
            second. For a smooth f it is at most about ``factor``. The Hessian behind ``factor`` does not see jumps in
            the derivative of a ReLU. For networks with ReLU, trust ``measured``.
        eta: strength of the field.
        iterations: number of iterations of the power method.
        converged: True if the last eigenvalue is within the tolerance.
        estimates: estimates of ``factor``, one per iteration.
    """

    factor: float
    eigenvalue: float
    reach: float
    change: float
    measured: float
    eta: float
    iterations: int
    converged: bool
    estimates: list[float]

    heading: ClassVar[str] = "Contraction of the sweeps"
    reading: ClassVar[str] = (
        "Far below 1, two stages are close to the true equation; above 1, plain sweeps diverge. The value of eta I "
        "comes from the Hessian of the loss, which does not see the kinks of a ReLU. If the measured contraction is "
        "larger, trust it."
    )

    def summary(self) -> dict[str, float]:
        """Return the most important numbers of the result, by name."""
        return {
            "eta I": self.factor,
            "with its sign": self.eigenvalue,
            "I": self.reach,
            "a second sweep changes the costate by": self.change,
            "measured: change by the third sweep / by the second": self.measured,
            "iterations": float(self.iterations),
            "converged (1) or not (0)": float(self.converged),
        }

    def _draw(self, axes: Axes, label: str) -> None:
        counts = range(1, len(self.estimates) + 1)
        axes.plot(counts, self.estimates, marker=".", label=label or f"$|\\eta| I$ = {self.factor:.3g}")
        axes.axhline(1.0, color="0.5", linewidth=0.8, linestyle="--")
        style(axes, x="power iteration", y="estimate", title="Contraction of a sweep", log=True)


def contraction(
    field: AnyField,
    x0: Tensor | None = None,
    t_span: tuple[float, float] | None = None,
    *,
    dt: float | None = None,
    steps: int | None = None,
    substep: Any = None,
    scheme: str | Scheme = "strang",
    rtol: float = 1e-2,
    most: int = 100,
    generator: torch.Generator | None = None,
) -> Contraction:
    """Estimate eta * I, the contraction factor of the sweeps, at the recording that drives the two-stage method.

    A sweep Phi maps a costate u to the costate that is recorded on the trajectory driven by eta u. The factor is the
    spectral radius of the derivative of Phi. This derivative is eta times the Hessian of the loss with respect to the
    forcing. It is symmetric, so each iteration of the power method is one vector-Jacobian product, a backward pass
    through the recording. The costate is linear between nodes. For f = lambda x and L = x(T)^2 / 2,
    I = (exp(2 lambda T) - 1) / (2 lambda).

    The derivative does not see kinks such as the kink of a ReLU, but `Contraction.measured` does. The autograd graph of
    a recording and of its derivative takes several times the memory of a training step. Transforms of the costate are
    not applied.

    Args:
        field: an `AdversarialField`. If eta = 0, the factor is 0, and ``reach`` is computed for the unperturbed
            trajectory.
        x0: as for `odeadv.solve`.
        t_span: as for `odeadv.solve`.
        dt: step size, a number; the steps cannot be adaptive.
        steps: as for `odeadv.solve`.
        substep: as for `odeadv.solve`. For a network give ``**net.solve_options``.
        scheme: scheme of the trajectories of the sweeps.
        rtol: relative accuracy of the eigenvalue at which the iteration stops.
        most: largest number of iterations.
        generator: source of the random starting direction; by default a generator with seed 0.

    Raises:
        TypeError, ValueError: if an argument does not fit, before the solve starts. The message names the argument.
        SolveError: if a recording is not finite.
    """
    needs_loss("contraction", field)
    check_iteration(rtol, most)
    whole = posed(field, x0, t_span, dt, steps)
    assert isinstance(whole, AdversarialField)
    return contraction_of(whole, substep, scheme=scheme, rtol=rtol, most=most, generator=generator)


def contraction_of(
    field: AdversarialField,
    substep: Any,
    *,
    scheme: str | Scheme = "strang",
    rtol: float = 1e-2,
    most: int = 100,
    generator: torch.Generator | None = None,
) -> Contraction:
    """Return the contraction of ``field``, which must contain its problem; see `contraction`."""
    eta, unit = field.eta, with_strength(field, 1.0)
    assert not isinstance(eta, Tensor)
    method = read_discretisation(unit, scheme, substep, "linear")
    grid = read_times(unit, None, None, None, None, None).grid
    if grid is None:
        raise ValueError(
            f"dt: got {unit.problem.dt!r}, expected a step size: sweeps that adapt their steps are not differentiable"
        )
    with torch.inference_mode(False), torch.no_grad():
        start = read_initial_state(unit, None).detach().clone()
    estimates: list[float] = []
    with differentiating(unit.modules, start.device):
        first = record(unit, start, grid, method.stepper(unit))
        base, split = _joined(first.nodes)

        def sweep(forcing: Tensor, *, differentiate: bool = True) -> Tensor:
            along = unit.driven_by(replace(first, nodes=split(forcing), differentiate=differentiate))
            return _joined(record(unit, start, grid, method.stepper(along), differentiate=differentiate).nodes)[0]

        linear = Linearised(sweep, eta * base)
        if not bool(linear.value.isfinite().all()):
            times = torch.tensor(grid.times[:1], dtype=torch.float64)
            raise SolveError(
                Solution(
                    times,
                    start[None],
                    status=Status.NON_FINITE,
                    stats=Stats(),
                    scheme=method.name,
                    order=method.order(unit),
                )
            )

        def apply(v: Tensor) -> Tensor:
            image = linear.vjp(v)
            estimates.append(abs(eta) * norm(image))
            return image

        found = largest(apply, random_like(base, generator), rtol=rtol, most=most)
        second = linear.value
        third = sweep(eta * second, differentiate=False) if eta else second
    return Contraction(
        factor=abs(eta) * found.modulus,
        eigenvalue=eta * found.rayleigh,
        reach=found.modulus,
        change=quotient(norm(second - base), norm(second)),
        measured=quotient(norm(third - second), norm(second - base)),
        eta=eta,
        iterations=found.iterations,
        converged=found.converged,
        estimates=estimates,
    )


def _joined(nodes: Sequence[Tensor]) -> tuple[Tensor, Callable[[Tensor], list[Tensor]]]:
    """Return the nodes as one vector, and a function that splits a vector of this size into nodes."""
    shapes, counts = [node.shape for node in nodes], [node.numel() for node in nodes]

    def split(joined: Tensor) -> list[Tensor]:
        return [part.reshape(shape) for part, shape in zip(torch.split(joined, counts), shapes, strict=True)]

    return torch.cat([node.reshape(-1) for node in nodes]), split
