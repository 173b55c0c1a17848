"""Benchmarks: `python -m benchmarks` runs them one after the other and writes docs/results/benchmarks/.

A benchmark is a module named in `__main__.NAMES`, with

- `run(quick: bool = False) -> dict`: plain data for JSON; `quick` is the smallest size that runs everything;
- `render(data: dict) -> str`: Markdown made from the data alone;
- `limits(data: dict) -> list[limits.Limit]`, if it has figures for the page "how close to the limit";
- `plot(data: dict, path: Path) -> None`, if it has a picture: a PNG made from the data alone (`_plots.save`).

Figures are of two kinds, and two runs are compared accordingly: a measurement with its spread is the dict `{"median":
m, "low": q, "high": r}` that `_timing.spread` makes (quartiles); any other number does not depend on the machine (an
order, an error, a count). Times come from interleaved repetitions in one process (`_timing.interleaved`). Run them on
an idle machine. docs/benchmarks.md says how to read and compare them.
"""
