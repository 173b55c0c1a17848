"""The residual of Eq. 9 for recorded costates, and the errors of values at midpoints (Theorem 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from odeadv.diagnostics._result import Result, median, style
from odeadv.diagnostics._trajectory import AnyField, Layer, Trajectory, needs_loss, norm, posed, quotient, walk
from odeadv.fields import Jump
from odeadv.support.linearised import Linearised

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PARTS = 4  # steps of RK4 over half a step, so that the error of the reference is far below all measured errors


@dataclass(frozen=True)
class CostateResidual(Result):
    """The residual of Eq. 9 for a recorded costate a, and errors of its values in the middle of each layer.

    A recording is exact for the discrete network, so the residual is the distance of its layers from the differential
    equation. All errors are 2-norms of differences over the whole batch tensor, relative to the norm of the reference.
    Layers that are jumps are left out.

    Attributes:
        layers: numbers n of the layers, which have the step size h and the costates a_n and a_{n+1} at their ends.
        ts: times at the beginnings of the layers.
        residual: ||(a_{n+1} - a_n) / h + J^T a|| / ||J^T a||, with the Jacobian J = df/dx and a at the mean of the two
            nodes.
        arithmetic: error of (a_n + a_{n+1}) / 2 (Theorem 3.2, ``costate="linear"``).
        geometric: error of the element-wise geometric mean with its sign (Eq. 23), or 0 for elements of unequal signs.
        exact: error of ``costate="exact"``, one step of the midpoint rule back from a_{n+1}
            (``scheme="strang-midpoint"``).
        arithmetic_length: ||(a_n + a_{n+1}) / 2|| over the norm of the reference. By the paper's bound it is above 1.
        geometric_length: norm of the geometric mean over the norm of the reference.
        undefined: share of elements with a sign that changes over the layer. For these, Eq. 23 lacks a real solution.
    """

    layers: list[int]
    ts: list[float]
    residual: list[float]
    arithmetic: list[float]
    geometric: list[float]
    exact: list[float]
    arithmetic_length: list[float]
    geometric_length: list[float]
    undefined: list[float]

    heading: ClassVar[str] = "Costate and its midpoints (Eq. 9, Theorem 3.2)"
    reading: ClassVar[str] = (
        "The distance of the layers from the differential equation, and the error of taking the mean of two costates."
    )

    def summary(self) -> dict[str, float]:
        """Return the most important numbers of the result, by name."""
        return {
            "median residual of Eq. 9": median(self.residual),
            "median error, arithmetic": median(self.arithmetic),
            "geometric": median(self.geometric),
            "exact": median(self.exact),
            "share of signs that change": median(self.undefined),
        }

    def _draw(self, axes: Axes, label: str) -> None:
        for name in ("arithmetic", "geometric", "exact"):
            axes.plot(self.ts, getattr(self, name), marker=".", label=f"{label} {name}".strip())
        style(axes, x="t (layer)", y="relative error", title="a(t + h/2) against Eq. 9 integrated back", log=True)


def costate_residual(
    field: AnyField,
    x0: Tensor | None = None,
    t_span: tuple[float, float] | None = None,
    *,
    dt: float | None = None,
    steps: int | None = None,
    substep: Any = None,
) -> CostateResidual:
    """Measure the residual of Eq. 9, da/dt = -J^T a, and three values at midpoints, on the unperturbed trajectory.

    The reference at a midpoint is Eq. 9 integrated back from a_{n+1} over half a step, by four steps of RK4. The states
    are on the straight line between the recorded states, which is the trajectory of an Euler step.

    Args:
        field: an `AdversarialField`. Its eta is not used.
        x0: as for `odeadv.solve`.
        t_span: as for `odeadv.solve`.
        dt: as for `odeadv.solve`.
        steps: as for `odeadv.solve`.
        substep: as for `odeadv.solve`. For a network give ``**net.solve_options``.

    Raises:
        TypeError, ValueError: if an argument does not fit, before the solve starts. The message names the argument.
        SolveError: if the recording fails.
    """
    needs_loss("costate_residual", field)
    return costate_residual_of(walk(posed(field, x0, t_span, dt, steps), substep))


def costate_residual_of(trajectory: Trajectory) -> CostateResidual:
    """Return the result of `costate_residual` for an unperturbed trajectory with costates."""
    names = ("residual", "arithmetic", "geometric", "exact", "arithmetic_length", "geometric_length", "undefined")
    columns: dict[str, list[float]] = {name: [] for name in names}
    layers, ts = [], []
    for layer in trajectory.layers():
        if isinstance(layer.piece, Jump):
            continue
        with trajectory.quiet(grad=True):
            values = _at(layer)
        layers.append(layer.index)
        ts.append(layer.step.t0)
        for name in names:
            columns[name].append(values[name])
    return CostateResidual(layers=layers, ts=ts, **columns)


def _at(layer: Layer) -> dict[str, float]:
    a, a_end, h = layer.a, layer.a_end, layer.step.h
    assert a is not None
    assert a_end is not None
    mean = 0.5 * (a + a_end)
    geometric, undefined = _geometric(a, a_end)
    slope = _slope(layer, 0.5, mean)
    reference = _half_back(layer)
    exact = a_end - 0.5 * h * _slope(layer, 0.75, torch.lerp(a, a_end, 0.75))
    size = norm(reference)
    return {
        "residual": quotient(norm((a_end - a) / h - slope), norm(slope)),
        "arithmetic": quotient(norm(mean - reference), size),
        "geometric": quotient(norm(geometric - reference), size),
        "exact": quotient(norm(exact - reference), size),
        "arithmetic_length": quotient(norm(mean), size),
        "geometric_length": quotient(norm(geometric), size),
        "undefined": undefined,
    }


def _slope(layer: Layer, s: float, a: Tensor) -> Tensor:
    """Return -J^T a (Eq. 9) at the fraction ``s`` of the layer."""
    x = torch.lerp(layer.x, layer.end, s)
    return -Linearised(lambda y: layer.velocity(y, layer.step.time(s)), x).vjp(a)


def _half_back(layer: Layer) -> Tensor:
    """Return the costate in the middle of the layer, by Eq. 9 integrated back from the end of the layer."""
    a = layer.a_end
    assert a is not None
    for part in range(PARTS):
        a = _rk4(layer, 1.0 - 0.5 * part / PARTS, -0.5 / PARTS, a)
    return a


def _rk4(layer: Layer, s: float, ds: float, a: Tensor) -> Tensor:
    """Return the result of one RK4 step for Eq. 9, from the fraction ``s`` of the layer to ``s + ds``."""
    h = layer.step.h * ds
    k1 = _slope(layer, s, a)
    k2 = _slope(layer, s + 0.5 * ds, a + 0.5 * h * k1)
    k3 = _slope(layer, s + 0.5 * ds, a + 0.5 * h * k2)
    k4 = _slope(layer, s + ds, a + h * k3)
    return a + h / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)


def _geometric(a: Tensor, b: Tensor) -> tuple[Tensor, float]:
    """Return the element-wise geometric mean (0 for elements of unequal signs), and the share of unequal signs."""
    if a.is_complex():
        mean, undefined = _geometric(torch.view_as_real(a), torch.view_as_real(b))
        return torch.view_as_complex(mean.contiguous()), undefined
    differ = a.sign() * b.sign() < 0
    mean = torch.where(differ, 0.0, a.sign() * a.abs().sqrt() * b.abs().sqrt())
    return mean, float(differ.double().mean() if differ.device.type != "mps" else differ.float().mean())
