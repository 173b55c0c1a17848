"""How close the figures are to their floors: one table of what the benchmarks say of themselves.

Nothing is measured here. A benchmark with a function `limits(data) -> list[Limit]` has its rows in it.
"""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

from ._timing import middle, shown

Figure = float | Mapping[str, float]


class Limit(NamedTuple):
    """One line of the page.

    Attributes:
        figure: what is measured.
        measured: it, with its spread if it has one.
        floor: what the arithmetic alone comes to, if that is known, and implementations do not go below (or above,
            where more is better) but for rounding and luck: a number, or the measurement of something that does
            nothing else.
        most, least: what is aimed at.
        form: how numbers are written.
    """

    figure: str
    measured: Figure
    floor: Figure | None = None
    most: float | None = None
    least: float | None = None
    form: str = ".2f"

    @property
    def met(self) -> bool | None:
        """Whether the median is where it is to be; None if nothing is aimed at."""
        if self.most is not None:
            return middle(self.measured) <= self.most
        return None if self.least is None else middle(self.measured) >= self.least


def line(limit: Limit) -> str:
    """One row of Markdown."""
    aim = "" if limit.most is None else f"≤ {limit.most:g}"
    if limit.least is not None:
        aim = f"≥ {limit.least:g}"
    floor = "" if limit.floor is None else f"{middle(limit.floor):{limit.form}}"
    met = {True: "yes", False: "**no**", None: ""}[limit.met]
    return f"| {limit.figure} | {shown(limit.measured, limit.form)} | {floor} | {aim} | {met} |"


def render(results: Mapping[str, Mapping[str, Any]], module: Callable[[str], ModuleType | None]) -> str:
    """The page, of the ``results`` by name; ``module`` gives a benchmark."""
    parts = [
        "# How close to the limit",
        "",
        "Made by `python -m benchmarks` from the JSON files beside it, nothing else.",
    ]
    parts += [
        "Medians with quartiles where a figure was measured more than once. The floor is what the arithmetic alone",
        "comes to, counted or measured (additions, flows, convolutions); where more is better it is a ceiling.",
    ]
    for name, data in results.items():
        benchmark = module(name)
        if hasattr(benchmark, "limits"):
            parts += ["", f"## {name}", "", "| figure | measured | floor | aimed at | met |", f"|{' --- |' * 5}"]
            parts += [line(limit) for limit in benchmark.limits(data)]
            if data.get("quick"):
                parts += ["", "**A quick run, at sizes that measure nothing.**"]
    return "\n".join(parts) + "\n"
