"""Timing things side by side."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleaved(functions: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every function in each round, the functions taken in turn within a round."""
    for _ in range(warmup):
        for function in functions.values():
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, to: str) -> dict[str, float]:
    """Median and quartiles of the round-by-round ratios of two functions."""
    ratios = [a / b for a, b in zip(seconds[name], seconds[to], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"median": middle, "low": low, "high": high}


def machine() -> dict[str, object]:
    """What the times were taken on."""
    return {
        "processor": platform.machine(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
