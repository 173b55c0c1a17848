"""Compare two runs of a benchmark, figure by figure."""

from collections.abc import Iterator, Mapping
from typing import Any

Figure = float | Mapping[str, float]
APART = ("machine", "took", "quick")
ROUNDING = 1e-6


def figures(data: Any, name: str = "") -> Iterator[tuple[str, Figure]]:
    """Yield every number in ``data`` with its place, except numbers that describe the run itself."""
    if isinstance(data, Mapping) and set(data) == {"median", "low", "high"}:
        yield name, data
    elif isinstance(data, Mapping | list):
        items = data.items() if isinstance(data, Mapping) else enumerate(data)
        for key, value in items:
            if name or key not in APART:
                yield from figures(value, f"{name} / {key}" if name else str(key))
    elif isinstance(data, int | float) and not isinstance(data, bool):
        yield name, data


def _range(figure: Figure) -> tuple[float, float, float]:
    if isinstance(figure, Mapping):
        return figure["low"], figure["median"], figure["high"]
    margin = ROUNDING * abs(figure)
    return figure - margin, figure, figure + margin


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row per figure that both runs have: the ratio of new to old, and True if it changed.

    A measurement has changed if the ranges between its quartiles do not overlap. Any other number has changed if it
    differs by more than rounding.
    """
    before = dict(figures(old))
    rows = []
    for name, figure in figures(new):
        if name in before:
            (low, was, high), (bottom, now, top) = _range(before[name]), _range(figure)
            ratio = now / was if was else (1.0 if now == was else float("inf"))
            rows.append({"figure": name, "old": was, "new": now, "ratio": ratio, "changed": low > top or bottom > high})
    return rows


def report(name: str, old: dict[str, Any], new: dict[str, Any]) -> str:
    """Return the differences between two runs of benchmark ``name``, as Markdown."""
    rows = compare(old, new)
    changed = [row for row in rows if row["changed"]]
    gone = len(list(figures(old))) - len(rows)
    lines = [f"## {name}", "", f"{len(rows)} figures in both runs, {len(changed)} changed beyond the spread."]
    if gone:
        lines[-1] += f" {gone} of the old run's are not in the new one."
    if bool(old.get("quick")) != bool(new.get("quick")):
        lines[-1] += " One of the runs is quick, at other sizes."
    was, now = old.get("machine", {}), new.get("machine", {})
    other = [f"{key} {was.get(key)} → {now.get(key)}" for key in {**was, **now} if was.get(key) != now.get(key)]
    if other:
        lines += ["", f"Not the same machine: {', '.join(other)}."]
    if changed:
        lines += ["", "| figure | old | new | new / old |", "| --- | --- | --- | --- |"]
        lines += [f"| {row['figure']} | {row['old']:.4g} | {row['new']:.4g} | {row['ratio']:.3f} |" for row in changed]
    return "\n".join(lines)
