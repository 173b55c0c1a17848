"""Figures of a solution: curves of a few components, a profile over time, or images at a few times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from odeadv.support.pages import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEAST = 8  # smallest number of points of an axis that counts as an axis in space
SHOWN = 4  # largest number of images in a row


def draw(times: Sequence[float], rows: Sequence[tuple[str, Tensor]], most: int, title: str) -> Figure:
    """Return a figure of states over time.

    Args:
        times: K times.
        rows: pairs of a label and real values (K, *state), one pair per row of the figure.
        most: largest number of curves.
        title: title of the figure.
    """
    shape = rows[0][1].shape[1:]
    if len(shape) >= 2 and min(shape[-2:]) >= LEAST:
        return _images(times, rows, title)
    profile = len(shape) >= 1 and shape[-1] > max(most, LEAST) and len(times) > 1
    figure = new_figure(6.0, 2.6 * len(rows))
    for axes, (label, values) in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        flat = values.reshape(len(times), -1)
        if profile:
            _profile(figure, axes, times, flat[:, : shape[-1]], label)
        else:
            axes.plot(times, flat[:, :most].numpy(), marker="." if len(times) < 50 else None)
            axes.set_ylabel(label)
    axes.set_xlabel("t")
    figure.suptitle(title)
    return figure


def _profile(figure: Figure, axes: Axes, times: Sequence[float], values: Tensor, label: str) -> None:
    """Draw values (K, n) as an image, with time on the horizontal axis and the index of the point on the vertical."""
    mesh = axes.pcolormesh(times, torch.arange(values.shape[1]).numpy(), values.T.numpy(), shading="nearest")
    figure.colorbar(mesh, ax=axes, label=label)
    axes.set_ylabel("point")


def _images(times: Sequence[float], rows: Sequence[tuple[str, Tensor]], title: str) -> Figure:
    """Draw the last two axes of the state as images at a few times. Of all other axes take the first entry."""
    count = min(SHOWN, len(times))
    chosen = [round(k * (len(times) - 1) / max(count - 1, 1)) for k in range(count)]
    figure = new_figure(2.4 * count + 1.0, 2.4 * len(rows) + 0.4)
    for panels, (label, values) in zip(figure.subplots(len(rows), count, squeeze=False), rows, strict=True):
        plane = values.reshape(len(times), -1, *values.shape[-2:])[chosen, 0]
        low, high = plane.min().item(), plane.max().item()
        for axes, k, picture in zip(panels, chosen, plane, strict=True):
            image = axes.imshow(picture.numpy(), vmin=low, vmax=high)
            axes.set(title=f"t = {times[k]:.3g}", xticks=[], yticks=[])
        figure.colorbar(image, ax=list(panels), label=label)
    figure.suptitle(title)
    return figure
