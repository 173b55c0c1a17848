"""How close the figures are to their floors: one table for all benchmarks.

This module does not measure. A benchmark with a function `limits(data) -> list[Limit]` has rows in the table.
"""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

from ._timing import middle, shown

Figure = float | Mapping[str, float]


class Limit(NamedTuple):
    """One line of the page: a figure with its floor and its target.

    Attributes:
        figure: the name of the measured quantity.
        measured: the value, with its spread if it was measured more than once.
        floor: the value if only the arithmetic took time; None if it is unknown. Except for rounding and luck, an
            implementation cannot be lower (or higher, if more is better). It is a number or a measurement.
        most, least: the target: the measured value should be at most ``most``, or at least ``least``.
        form: format specification of the numbers.
    """

    figure: str
    measured: Figure
    floor: Figure | None = None
    most: float | None = None
    least: float | None = None
    form: str = ".2f"

    @property
    def met(self) -> bool | None:
        """True if the median meets the target; None without a target."""
        if self.most is not None:
            return middle(self.measured) <= self.most
        return None if self.least is None else middle(self.measured) >= self.least


def line(limit: Limit) -> str:
    """Return one row of Markdown."""
    aim = "" if limit.most is None else f"≤ {limit.most:g}"
    if limit.least is not None:
        aim = f"≥ {limit.least:g}"
    floor = "" if limit.floor is None else f"{middle(limit.floor):{limit.form}}"
    met = {True: "yes", False: "**no**", None: ""}[limit.met]
    return f"| {limit.figure} | {shown(limit.measured, limit.form)} | {floor} | {aim} | {met} |"


def render(
    results: Mapping[str, Mapping[str, Any]], module: Callable[[str], ModuleType | None], titles: Mapping[str, str]
) -> str:
    """Return the page for ``results``; ``module`` returns the benchmark with a name, ``titles`` has its heading."""
    parts = [
        "# How close to the limit",
        "",
        "Measured figures next to their floors and their targets. The floor is what the arithmetic alone takes,",
        "counted or measured (additions, flows, convolutions); if more is better it is a ceiling.",
        "Medians with quartiles if a figure was measured more than once. Made by `python -m benchmarks` from the",
        "JSON files in this folder and nothing else.",
    ]
    for name, data in results.items():
        benchmark = module(name)
        if hasattr(benchmark, "limits"):
            parts += [
                "",
                f"## {titles[name]}",
                "",
                "| figure | measured | floor | aimed at | met |",
                f"|{' --- |' * 5}",
            ]
            parts += [line(limit) for limit in benchmark.limits(data)]
            if data.get("quick"):
                parts += ["", "**A quick run, at sizes that measure nothing.**"]
    return "\n".join(parts) + "\n"
