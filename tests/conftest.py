"""What several test modules use."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)


def measured_order(error: Callable[[int], float], steps: Sequence[int] = (16, 32, 64, 128)) -> float:
    """Slope of log(error) against log(1 / steps), by least squares."""
    logs = [(math.log(1.0 / n), math.log(error(n))) for n in steps]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)
