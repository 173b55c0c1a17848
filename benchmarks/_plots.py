"""Pictures without pyplot. The files do not depend on the date or on the version of matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def panels(rows: int, columns: int, width: float = 5.0, height: float = 3.6) -> tuple[Figure, Any]:
    """Return a figure and its array of axes, ``(rows, columns)``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure: Figure, path: Path) -> None:
    """Write the PNG atomically, through a temporary file in the same folder."""
    partial = path.with_suffix(".part")
    figure.savefig(partial, format="png", dpi=110, metadata={"Software": None})
    partial.replace(path)
