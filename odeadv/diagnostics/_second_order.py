"""The second-order dynamics of Theorem 3.3, term by term."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor

from odeadv.diagnostics._linear import time_derivative
from odeadv.diagnostics._result import Result, median, style
from odeadv.diagnostics._trajectory import AnyField, Layer, Trajectory, needs_loss, norm, posed, quotient, walk
from odeadv.fields import Jump
from odeadv.splitting import Scheme
from odeadv.support.linearised import Linearised

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Terms(NamedTuple):
    """The terms of x'' = J f + f_t + eta (J - J^T) a at one node, as tensors of the shape of the state.

    J = df/dx is the Jacobian, f_t the time derivative of f, and a the costate.

    Attributes:
        velocity: the tensor f.
        drift: the tensor J f.
        time: the tensor f_t.
        antisymmetric: the tensor eta (J - J^T) a.
    """

    velocity: Tensor
    drift: Tensor
    time: Tensor
    antisymmetric: Tensor

    @property
    def acceleration(self) -> Tensor:
        """The second derivative x'' of the perturbed equation (Eq. 10)."""
        return self.drift + self.time + self.antisymmetric


@dataclass(frozen=True)
class SecondOrder(Result):
    """Sizes of the terms of Theorem 3.3, x'' = J f + f_t + eta (J - J^T) a, at each layer that is an ODE step.

    The sizes are 2-norms over the whole batch tensor, at the beginning of the layer.

    Attributes:
        layers: numbers of the layers; jumps are left out, because they do not have a velocity.
        ts: times at the beginnings of the layers.
        velocity: the norms ||f||.
        drift: the norms ||J f||, with the Jacobian J = df/dx.
        time: the norms ||f_t||, with the time derivative f_t of f.
        antisymmetric: the norms ||eta (J - J^T) a||, with the costate a.
        plain: the norms ||J f + f_t||, for x'' without the perturbation.
        acceleration: the norms ||x''|| of the sum of all terms.
        antisymmetric_share: ``antisymmetric`` / ``plain``. The paper calls this share negligible.
        perturbation_share: ||eta a|| / ||f||, the share of the perturbation in the first-order equation.
        initial_velocity: ||f(x0, 0)|| of the plain equation (Eq. 15); NaN if the first layer is a jump.
        perturbed_initial_velocity: ||f(x0, 0) + eta a(0)|| of the perturbed equation (Eq. 11).
        initial_change: the quotient ||eta a(0)|| / ||f(x0, 0)||.
        eta: strength of the field.
    """

    layers: list[int]
    ts: list[float]
    velocity: list[float]
    drift: list[float]
    time: list[float]
    antisymmetric: list[float]
    plain: list[float]
    acceleration: list[float]
    antisymmetric_share: list[float]
    perturbation_share: list[float]
    initial_velocity: float
    perturbed_initial_velocity: float
    initial_change: float
    eta: float

    heading: ClassVar[str] = "Second-order dynamics (Theorem 3.3)"
    reading: ClassVar[str] = (
        "The antisymmetric term relative to J f + f_t. Far below 1, the paper is right to call it negligible."
    )

    def summary(self) -> dict[str, float]:
        """Return the most important numbers of the result, by name."""
        return {
            "median share of eta (J - J^T) a": median(self.antisymmetric_share),
            "largest": max(self.antisymmetric_share, default=float("nan")),
            "median share of eta a in x'": median(self.perturbation_share),
            "initial velocity changed by": self.initial_change,
        }

    def _draw(self, axes: Axes, label: str) -> None:
        axes.plot(self.ts, self.antisymmetric_share, marker=".", label=label or "second order: antisymmetric term")
        if not label:
            axes.plot(self.ts, self.perturbation_share, marker=".", label="first order: $\\eta a$ relative to $f$")
        share = "antisymmetric term, share of $J f + f_t$" if label else "share"  # labelled fields show one term each
        style(axes, x="t (layer)", y=share, title="Terms of Theorem 3.3 relative to the rest", log=True)


def second_order(
    field: AnyField,
    x0: Tensor | None = None,
    t_span: tuple[float, float] | None = None,
    *,
    dt: float | None = None,
    steps: int | None = None,
    substep: Any = None,
    scheme: str | Scheme | None = None,
    sweeps: Any = None,
) -> SecondOrder:
    """Measure the terms of Theorem 3.3 at each layer, by products with the Jacobian J = df/dx.

    By Eq. 9, eta a' is -eta J^T a, with J at the state of the recorded trajectory. By default the terms are evaluated
    on the unperturbed trajectory. With a ``scheme`` and ``sweeps="converge"`` they add up to x'' of the true solution.

    Args:
        field: an `AdversarialField`.
        x0: as for `odeadv.solve`.
        t_span: as for `odeadv.solve`.
        dt: as for `odeadv.solve`.
        steps: as for `odeadv.solve`.
        substep: as for `odeadv.solve`. For a network give ``**net.solve_options``.
        scheme: scheme of the perturbed trajectory; by default the trajectory is unperturbed.
        sweeps: recordings of the perturbed trajectory, see `odeadv.solve`.

    Raises:
        TypeError, ValueError: if an argument does not fit, before the solve starts. The message names the argument.
        SolveError: if a solve fails.
    """
    needs_loss("second_order", field)
    return second_order_of(walk(posed(field, x0, t_span, dt, steps), substep, scheme=scheme, sweeps=sweeps))


def second_order_of(trajectory: Trajectory) -> SecondOrder:
    """Return the result of `second_order` for a trajectory with costates."""
    names = ("velocity", "drift", "time", "antisymmetric", "plain", "acceleration")
    columns: dict[str, list[float]] = {name: [] for name in names}
    layers, ts, pushes = [], [], []
    initial = [float("nan")] * 2
    for layer in trajectory.layers():
        if isinstance(layer.piece, Jump):
            continue
        terms = terms_of(trajectory, layer)
        push = trajectory.eta * trajectory.costates[layer.index]
        if layer.index == 0:
            initial = [norm(terms.velocity), norm(terms.velocity + push)]
        layers.append(layer.index)
        ts.append(layer.step.t0)
        pushes.append(norm(push))
        values = (*terms, terms.drift + terms.time, terms.acceleration)
        for name, value in zip(names, values, strict=True):
            columns[name].append(norm(value))
    return SecondOrder(
        layers=layers,
        ts=ts,
        **columns,
        antisymmetric_share=_shares(columns["antisymmetric"], columns["plain"]),
        perturbation_share=_shares(pushes, columns["velocity"]),
        initial_velocity=initial[0],
        perturbed_initial_velocity=initial[1],
        initial_change=quotient(pushes[0], initial[0]) if layers and layers[0] == 0 else float("nan"),
        eta=trajectory.eta,
    )


def terms_of(trajectory: Trajectory, layer: Layer) -> Terms:
    """Return the terms of Theorem 3.3 at the beginning of a layer that is an ODE step."""
    assert layer.a is not None
    with trajectory.quiet(grad=True):
        f = Linearised(layer.velocity, layer.x)
        antisymmetric = trajectory.eta * (f.jvp(layer.a) - f.vjp(layer.a))
        return Terms(f.value, f.jvp(f.value), time_derivative(layer, layer.x), antisymmetric)


def _shares(tops: list[float], bottoms: list[float]) -> list[float]:
    return [quotient(top, bottom) for top, bottom in zip(tops, bottoms, strict=True)]
