"""The ratio of Eq. 16 during training, as in Figure 2 of the paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as _field
from typing import TYPE_CHECKING, Any

from odeadv.diagnostics._perturbation import Perturbation
from odeadv.diagnostics._result import Result, style
from odeadv.support.checks import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BAND = (1e5, 2e6)  # range of the curve in Figure 2 of the paper


@dataclass(frozen=True)
class Trace(Result):
    """The ratio of Eq. 16 over epochs (or steps), with the losses and the ratios of all layers.

    Call ``trace.add(epoch, perturbation(net.field(images, labels, eta)))`` during training. `plot` draws Figure 2.

    Attributes:
        at: epochs or steps, increasing.
        ratios: the ratio of Eq. 16 at t = 0, one per entry of ``at``.
        losses: the unperturbed loss, one per entry of ``at``; NaN if only a ratio was given.
        layers: the ratios of all layers, one list per entry of ``at``; an empty list if only a ratio was given.
        unit: name of the unit of ``at`` in the picture.
    """

    at: list[float] = _field(default_factory=list)
    ratios: list[float] = _field(default_factory=list)
    losses: list[float] = _field(default_factory=list)
    layers: list[list[float]] = _field(default_factory=list)
    unit: str = "epoch"

    def add(self, at: float, value: Perturbation | float) -> None:
        """Append one measurement.

        Args:
            at: epoch or step, not smaller than the previous entry.
            value: a `Perturbation`, or only its ratio.

        Raises:
            TypeError: if ``at`` or the ratio is not a number.
            ValueError: if ``at`` is smaller than the previous entry.
        """
        at = number("at", at)
        if self.at and at < self.at[-1]:
            raise ValueError(f"at: got {at:g} after {self.at[-1]:g}, expected an increasing {self.unit}")
        if isinstance(value, Perturbation):
            ratio, loss, layers = value.ratio, value.loss, list(value.ratios)
        else:
            ratio, loss, layers = float(value), float("nan"), []
        self.at.append(at)
        self.ratios.append(ratio)
        self.losses.append(loss)
        self.layers.append(layers)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Trace:
        """Return the trace for ``values``, a result of `to_dict`. None becomes infinity in ratios, and NaN in losses.

        Raises:
            ValueError: if a list is missing or the lengths differ.
        """
        names = ("at", "ratios", "losses", "layers")
        missing = [name for name in names if not isinstance(values.get(name), list)]
        if missing or len({len(values[name]) for name in names}) != 1:
            got = {name: len(values[name]) for name in names if name not in missing}
            raise ValueError(f"values: got lists of lengths {got}, expected {', '.join(names)} of one length")
        inf = float("inf")
        return cls(
            at=[float(value) for value in values["at"]],
            ratios=[inf if value is None else float(value) for value in values["ratios"]],
            losses=[float("nan") if value is None else float(value) for value in values["losses"]],
            layers=[[inf if value is None else float(value) for value in row] for row in values["layers"]],
            unit=str(values.get("unit", "epoch")),
        )

    def __len__(self) -> int:
        return len(self.at)

    def _draw(self, axes: Axes, label: str) -> None:
        axes.axhspan(*BAND, color="0.9", zorder=0)
        axes.plot(self.at, self.ratios, marker="." if len(self.at) < 100 else "", label=label)
        y = "$\\|x(0) + f(x(0), 0)\\| / \\|a(0)\\|$"
        style(axes, x=self.unit, y=y, title="Eq. 16 while training (grey: range in the paper's Figure 2)", log=True)
