"""Checks that the readers, the data set and the batches share."""

from __future__ import annotations

import torch
from torch import Tensor


def check_pixels(argument: str, images: Tensor) -> None:
    """Raise an error if ``images`` is not a ``uint8`` tensor of shape (n, height, width, 3), the form in data sets.

    Attacks take floating images of any shape instead; see `odeadv.attacks.checks.check_images`.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"{argument}: got {type(images).__name__}, expected a uint8 tensor (n, height, width, 3)")
    if images.dtype != torch.uint8:
        raise TypeError(
            f"{argument}: got dtype {images.dtype}, expected torch.uint8 pixels from 0 to 255, (n, height, width, 3), "
            "such as the test_images of a data set"
        )
    if images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"{argument}: got shape {tuple(images.shape)}, expected (n, height, width, 3)")


def check_range(argument: str, labels: Tensor, num_classes: int) -> None:
    """Raise ValueError if ``labels`` is empty or has a value outside 0..num_classes-1."""
    if labels.numel() == 0:
        raise ValueError(f"{argument}: got no samples, expected at least one")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"{argument}: got labels from {low} to {high}, expected 0 to {num_classes - 1}")
