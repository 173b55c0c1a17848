"""What every diagnostic returns: plain data, a dictionary of it, and a picture."""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import TYPE_CHECKING, Any, ClassVar

from odeadv.support.extras import extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Result:
    """Base of the frozen dataclasses that the diagnostics return.

    Attributes:
        heading: what it is called on a page.
        reading: how to read it, in a sentence.
    """

    heading: ClassVar[str] = ""
    reading: ClassVar[str] = ""

    def to_dict(self) -> dict[str, Any]:
        """The attributes as plain data that JSON can hold: numbers that are not finite become None."""
        return {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    def summary(self) -> dict[str, float]:
        """The few numbers that tell most."""
        return {}

    def plot(self, axes: Axes | None = None, *, label: str = "") -> Figure:
        """Draw it.

        Args:
            axes: matplotlib axes to draw in, over what is there; those of a new figure if not given.
            label: name of this result in the legend, to tell several in the same axes apart.

        Returns:
            The figure, not shown and not known to pyplot: ``figure.savefig("picture.png")``.
        """
        axes = new_axes() if axes is None else axes
        self._draw(axes, label)
        if any(not str(name).startswith("_") for name in axes.get_legend_handles_labels()[1]):
            axes.legend(fontsize="small", frameon=False)
        figure = axes.get_figure()
        assert figure is not None
        return figure  # type: ignore[return-value]  # axes of a sub-figure belong to that

    def _draw(self, axes: Axes, label: str) -> None:
        raise NotImplementedError


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Result):
        return value.to_dict()
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def median(values: list[float]) -> float:
    """The median; NaN of nothing."""
    return statistics.median(values) if values else math.nan


def new_axes() -> Axes:
    """Axes of a figure of their own."""
    with extra("plot"):
        from matplotlib.figure import Figure

    axes: Axes = Figure(figsize=(6.0, 3.6), layout="constrained").subplots()
    return axes


def style(axes: Axes, *, x: str, y: str, title: str = "", log: bool = False) -> None:
    """Labels and scales that all pictures share."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if title:
        axes.set_title(title)
    drawn = [float(value) for line in axes.get_lines() for value in line.get_ydata()]  # type: ignore[union-attr, arg-type]
    if log and any(value > 0.0 for value in drawn):
        axes.set_yscale("log")
