"""Times of functions in interleaved rounds, and a description of the machine."""

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping

import torch

from odeadv.support.machine import processor

PEERS = ("torchdiffeq", "torchode", "diffrax", "jax", "numpy", "scipy")


def interleaved(
    functions: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1, settle: float = 0.0
) -> dict[str, list[float]]:
    """Return the seconds of every function in each round; within a round, the functions run in turn.

    A function that has taken less than ``settle`` seconds runs once more just before it is timed. Otherwise its time
    would depend on the caches that the function before it left.
    """
    for _ in range(warmup):
        for function in functions.values():
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            if seconds[name] and min(seconds[name]) < settle:
                function()
            began = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def spread(values: Iterable[float]) -> dict[str, float]:
    """Return median and quartiles of repeated measurements."""
    values = list(values)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * values
    return {"median": middle, "low": low, "high": high}


def ratio(seconds: Mapping[str, list[float]], name: str, to: str) -> dict[str, float]:
    """Return median and quartiles of the round-by-round ratios of two functions."""
    return spread(a / b for a, b in zip(seconds[name], seconds[to], strict=True))


def middle(figure: float | Mapping[str, float]) -> float:
    """Return the median of a measurement, or a plain number unchanged."""
    return figure["median"] if isinstance(figure, Mapping) else figure


def shown(figure: float | Mapping[str, float], form: str = ".2f", scale: float = 1.0) -> str:
    """Return a measurement as text, with its quartiles in brackets if there is more than one value."""
    if not isinstance(figure, Mapping) or figure["low"] == figure["high"]:
        return f"{scale * middle(figure):{form}}"
    low, median, high = (f"{scale * figure[key]:{form}}" for key in ("low", "median", "high"))
    return f"{median} ({low} to {high})"


def machine() -> dict[str, object]:
    """Describe the machine on which the times are measured."""
    versions = {}
    for name in PEERS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **versions,
    }
