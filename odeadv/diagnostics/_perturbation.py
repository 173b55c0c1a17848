"""The ratio of Eq. 16 at every layer, which shows how strong the perturbation is relative to the state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from odeadv.diagnostics._result import Result, style
from odeadv.diagnostics._trajectory import AnyField, Layer, Trajectory, needs_loss, norm, posed, quotient, walk
from odeadv.fields import Jump
from odeadv.splitting import get_substep

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Perturbation(Result):
    """The sizes of states x_n and costates a_n along the unperturbed trajectory.

    All norms are 2-norms over the whole batch tensor.

    Attributes:
        ratio: Eq. 16, ||x(0) + f(x(0), 0)|| / ||a(0)||. If the first layer is a jump, its map replaces x + f.
        ts: times of the N + 1 nodes.
        state_norms: ||x_n||, one per node.
        costate_norms: ||a_n||, one per node.
        ratios: Eq. 16 at each of the N layers, ||x_n + f(x_n, t_n)|| / ||a_n||; the first is ``ratio``.
        relative: |eta| ||a_n|| / ||x_n||, one per node. It is the relative size of the perturbation per unit of time.
        moves: ||x_{n+1} - x_n|| / ||x_n|| at each of the N layers; NaN if the layer changes the shape. If all moves are
            small, the network is close to linear, and the costate is nearly the same at every layer.
        eta: strength of the field.
        loss: loss of the final state.
    """

    ratio: float
    ts: list[float]
    state_norms: list[float]
    costate_norms: list[float]
    ratios: list[float]
    relative: list[float]
    moves: list[float]
    eta: float
    loss: float

    heading: ClassVar[str] = "Strength of the perturbation (Eq. 16)"
    reading: ClassVar[str] = (
        "The size of the state relative to its costate: the higher, the weaker the perturbation of a given eta."
    )

    def summary(self) -> dict[str, float]:
        """Return the most important numbers of the result, by name."""
        return {
            "Eq. 16 at t = 0": self.ratio,
            "Eq. 16, lowest of the layers": min(self.ratios),
            "largest |eta| |a| / |x|": max(self.relative),
            "largest change of the state by a layer / |x|": max((m for m in self.moves if m == m), default=math.nan),
            "loss": self.loss,
        }

    def _draw(self, axes: Axes, label: str) -> None:
        axes.plot(self.ts[:-1], self.ratios, marker=".", label=label or "Eq. 16")
        style(axes, x="t (layer)", y="$\\|x_n + f_n\\| / \\|a_n\\|$", title="Eq. 16 at each layer", log=True)


def perturbation(
    field: AnyField,
    x0: Tensor | None = None,
    t_span: tuple[float, float] | None = None,
    *,
    dt: float | None = None,
    steps: int | None = None,
    substep: Any = None,
) -> Perturbation:
    """Measure Eq. 16 at t = 0 and at each layer, from one recording on the unperturbed trajectory.

    Modules (modes, buffers, gradients) and the global random state are not changed. The costate is proportional to the
    loss: if the loss is a mean over n examples, the costate is n times smaller than for the sum.

    Args:
        field: an `AdversarialField`. Its eta may be 0.
        x0: as for `odeadv.solve`.
        t_span: as for `odeadv.solve`.
        dt: as for `odeadv.solve`.
        steps: as for `odeadv.solve`.
        substep: as for `odeadv.solve`. For a network give ``**net.solve_options``.

    Raises:
        TypeError, ValueError: if an argument does not fit, before the solve starts. The message names the argument.
        SolveError: if a state, costate or the loss is not finite.
    """
    needs_loss("perturbation", field)
    return perturbation_of(walk(posed(field, x0, t_span, dt, steps), substep), substep)


def perturbation_of(trajectory: Trajectory, substep: Any = None) -> Perturbation:
    """Return the result of `perturbation` for an unperturbed trajectory with costates, solved with ``substep``."""
    method = substep.get("f", "euler") if isinstance(substep, Mapping) else substep
    euler = method is None or get_substep(method).name == "euler"
    state_norms, costate_norms = [norm(x) for x in trajectory.states], [norm(a) for a in trajectory.costates]
    with trajectory.quiet():
        after = [norm(_after_one(layer, euler)) for layer in trajectory.layers()]
    ratios = [quotient(image, a) for image, a in zip(after, costate_norms, strict=False)]
    return Perturbation(
        ratio=ratios[0],
        ts=trajectory.ts,
        state_norms=state_norms,
        costate_norms=costate_norms,
        ratios=ratios,
        relative=[quotient(abs(trajectory.eta) * a, x) for a, x in zip(costate_norms, state_norms, strict=True)],
        moves=[_move(x, end) for x, end in pairwise(trajectory.states)],
        eta=trajectory.eta,
        loss=trajectory.loss(),
    )


def _move(x: Tensor, end: Tensor) -> float:
    return quotient(norm(end - x), norm(x)) if end.shape == x.shape else math.nan


def _after_one(layer: Layer, euler: bool) -> Tensor:
    """Return x_n + f(x_n, t_n), or the map of x_n for a jump. Both are the end of the layer if h is 1 with Euler."""
    if isinstance(layer.piece, Jump) or (euler and layer.step.h == 1.0):
        return layer.end
    return layer.x + layer.velocity()
