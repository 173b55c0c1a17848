"""Benchmarks: `python -m benchmarks` runs them one after the other and writes docs/results/benchmarks/.

A benchmark is a module named in `__main__.NAMES`, with

- `run(quick: bool = False) -> dict`: plain data for JSON; `quick` runs everything at the smallest size;
- `render(data: dict) -> str`: Markdown made only from the data;
- `limits(data: dict) -> list[limits.Limit]`, if it has figures for the page "how close to the limit";
- `plot(data: dict, path: Path) -> None`, if it has a picture: a PNG made only from the data (`_plots.save`).

Figures are of two kinds. A measurement with its spread is the dict `{"median": m, "low": q, "high": r}` from
`_timing.spread` (q and r are quartiles). Any other number (an order, an error, a count) does not depend on the machine.
Two runs are compared according to the kind. Times come from interleaved repetitions in one process
(`_timing.interleaved`). Run benchmarks on an idle machine. docs/benchmarks.md explains how to read and compare them.
"""
