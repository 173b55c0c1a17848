"""The residual of Eq. 9 on recorded costates, and the error of the midpoint of Theorem 3.2."""

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

PARTS = 4  # steps of RK4 for the reference over half a step: its error is far below that of every midpoint here


@dataclass(frozen=True)
class CostateResidual(Result):
    """Eq. 9 on a recorded costate, and its values half-way through each layer that is an ODE step.

    A recording is exact for the discrete network, so the residual is the distance of its layers from the differential
    equation. All errors are 2-norms of differences over the whole batch tensor, relative to the reference.

    Attributes:
        layers: numbers of the layers; jumps are left out.
        ts: times of their beginnings.
        residual: ||(a_{n+1} - a_n) / h + J^T a|| / ||J^T a||, J and a at the means of the two nodes.
        arithmetic: error of (a_n + a_{n+1}) / 2 (Theorem 3.2, ``costate="linear"``).
        geometric: error of the element-wise geometric mean with its sign (Eq. 23), 0 where signs differ.
        exact: error of ``costate="exact"``: one midpoint rule back from a_{n+1} (``scheme="strang-midpoint"``).
        arithmetic_length: ||(a_n + a_{n+1}) / 2|| over the reference's norm; the paper's bound says above 1.
        geometric_length: the same of the geometric mean.
        undefined: share of elements whose sign changes over the layer; Eq. 23 lacks a real solution for them.
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
        """Return the few numbers that tell most."""
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
    """Measure the residual of Eq. 9, da/dt = -J^T a, and three midpoints of a, along the unperturbed trajectory.

    The reference is Eq. 9 integrated back from a_{n+1} over half a step by four steps of RK4, along the straight line
    between the recorded states, which is the trajectory of a step of Euler.

    Args:
        field: an `AdversarialField`; its eta is not used.
        x0: see `odeadv.solve`.
        t_span: see `odeadv.solve`.
        dt: see `odeadv.solve`.
        steps: see `odeadv.solve`.
        substep: see `odeadv.solve`; for a network give ``**net.solve_options``.

    Raises:
        TypeError, ValueError: naming the argument that does not fit, before anything is solved.
        SolveError: if the recording fails.
    """
    needs_loss("costate_residual", field)
    return costate_residual_of(walk(posed(field, x0, t_span, dt, steps), substep))


def costate_residual_of(trajectory: Trajectory) -> CostateResidual:
    """Measure Eq. 9 along an unperturbed trajectory with costates."""
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
    """Return the solution of Eq. 9 from the end of the layer back to its middle."""
    a = layer.a_end
    assert a is not None
    for part in range(PARTS):
        a = _rk4(layer, 1.0 - 0.5 * part / PARTS, -0.5 / PARTS, a)
    return a


def _rk4(layer: Layer, s: float, ds: float, a: Tensor) -> Tensor:
    """Return one step of RK4 on Eq. 9, from the fraction ``s`` of the layer to ``s`` + ``ds``."""
    h = layer.step.h * ds
    k1 = _slope(layer, s, a)
    k2 = _slope(layer, s + 0.5 * ds, a + 0.5 * h * k1)
    k3 = _slope(layer, s + 0.5 * ds, a + 0.5 * h * k2)
    k4 = _slope(layer, s + ds, a + h * k3)
    return a + h / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)


def _geometric(a: Tensor, b: Tensor) -> tuple[Tensor, float]:
    """Return the element-wise geometric mean, 0 for elements of different signs, and the share of these."""
    if a.is_complex():
        mean, undefined = _geometric(torch.view_as_real(a), torch.view_as_real(b))
        return torch.view_as_complex(mean.contiguous()), undefined
    differ = a.sign() * b.sign() < 0
    mean = torch.where(differ, 0.0, a.sign() * a.abs().sqrt() * b.abs().sqrt())
    return mean, float(differ.double().mean() if differ.device.type != "mps" else differ.float().mean())
