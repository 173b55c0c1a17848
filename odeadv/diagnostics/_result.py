"""The base class of all results, which are plain data that can be converted to a dict and drawn."""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import TYPE_CHECKING, Any, ClassVar

from odeadv.support.extras import extra
from odeadv.support.pages import finite, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Result:
    """Base of the frozen dataclasses that the diagnostics return.

    Attributes:
        heading: title of the result on a page.
        reading: one sentence that explains how to read the result.
    """

    heading: ClassVar[str] = ""
    reading: ClassVar[str] = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as plain data that JSON can hold. NaN and infinity become None."""
        return {field.name: finite(getattr(self, field.name)) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    def summary(self) -> dict[str, float]:
        """Return the most important numbers of the result, by name."""
        return {}

    def plot(self, axes: Axes | None = None, *, label: str = "") -> Figure:
        """Draw the result.

        Args:
            axes: matplotlib axes to draw in; by default the axes of a new figure.
            label: name of this result in the legend, if several results share the axes.

        Returns:
            The figure. pyplot does not show it; save it with ``figure.savefig("picture.png")``.
        """
        axes = new_figure(6.0, 3.6).subplots() if axes is None else axes
        self._draw(axes, label)
        names = [name for name in axes.get_legend_handles_labels()[1] if not str(name).startswith("_")]
        if len(names) > 3:  # below the panel, because a long legend covers the curves
            axes.legend(fontsize="small", frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
        elif names:
            axes.legend(fontsize="small", frameon=False)
        figure = axes.get_figure()
        assert figure is not None
        return figure  # type: ignore[return-value]  # for axes in a sub-figure it is the sub-figure

    def _draw(self, axes: Axes, label: str) -> None:
        raise NotImplementedError


def median(values: list[float]) -> float:
    """Return the median of ``values``, or NaN for an empty list."""
    return statistics.median(values) if values else math.nan


def style(axes: Axes, *, x: str, y: str, title: str = "", log: bool = False) -> None:
    """Set the labels and scales that all pictures share."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if title:
        axes.set_title(title)
    drawn = [float(value) for line in axes.get_lines() for value in line.get_ydata()]  # type: ignore[union-attr, arg-type]
    positive = [value for value in drawn if 0.0 < value < math.inf]
    if log and positive:  # ticks of a logarithmic axis are unreadable if all values are alike
        axes.set_yscale("log" if max(positive) > 3.0 * min(positive) else "linear")
    if x == "t (layer)":
        places = [float(value) for line in axes.get_lines() for value in line.get_xdata()]  # type: ignore[union-attr, arg-type]
        if all(math.isnan(place) or place.is_integer() for place in places):
            with extra("plot"):
                from matplotlib.ticker import MaxNLocator
            # A second result may be drawn in the same axes, and then the ticks of the first one are replaced.
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if len({*places}) == 1:
                axes.set_xticks(places[:1])
