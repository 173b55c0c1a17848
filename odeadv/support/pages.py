"""Pages of results: Markdown tables, figures that are made without pyplot, and data that JSON can hold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from odeadv.support.extras import extra
from odeadv.support.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: int = 0) -> list[str]:
    """Return the lines of a Markdown table. Vertical bars and line breaks within cells are escaped, see `cell`.

    Args:
        head: titles of the columns.
        rows: cells as text, one sequence per row.
        numbers: how many of the last columns are aligned to the right.
    """
    rules = ["---"] * (len(head) - numbers) + ["---:"] * numbers
    lines = [_line(map(cell, head)), _line(rules)]
    return lines + [_line(map(cell, row)) for row in rows]


def cell(text: str) -> str:
    """Return ``text`` for one cell of a Markdown table: vertical bars escaped, line breaks replaced by spaces."""
    return text.replace("|", "\\|").replace("\n", " ")


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of ``width`` times ``height`` inches.

    pyplot is not used, because it would keep every figure in memory and may open windows.
    """
    with extra("plot"):
        from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(path: Path, figure: Figure, *, dpi: int = 120) -> None:
    """Write ``figure`` to ``path``, atomically, in the format of the suffix.

    A .png file contains neither a date nor the version of matplotlib, so equal data give an equal file.
    """
    with extra("plot"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=dpi, metadata={"Software": None} if path.suffix == ".png" else None)


def finite(value: Any) -> Any:
    """Return ``value`` as data that JSON can hold: dataclasses as dictionaries, NaN and infinity as None.

    If an object has a method ``to_dict``, the result of that method is converted.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, type):
        return value
    if callable(own := getattr(value, "to_dict", None)):
        return finite(own())
    if dataclasses.is_dataclass(value):
        return {field.name: finite(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value
