"""Benchmarks: `python -m benchmarks` runs them one after the other and writes docs/results/benchmarks/.

Each module has `run() -> dict`, plain data, and `table(data) -> str`, Markdown made of nothing else. Times are seconds,
medians of interleaved repetitions in one process; run them on an otherwise idle machine.
"""
