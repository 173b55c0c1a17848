"""Pictures without pyplot, and without anything in the file that depends on when or with what it was written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def panels(rows: int, columns: int, width: float = 5.0, height: float = 3.6) -> tuple[Figure, Any]:
    """A figure and its array of axes, ``(rows, columns)``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure: Figure, path: Path) -> None:
    """Write the PNG by way of a file beside it."""
    partial = path.with_suffix(".part")
    figure.savefig(partial, format="png", dpi=110, metadata={"Software": None})
    partial.replace(path)
