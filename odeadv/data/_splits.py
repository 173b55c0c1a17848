"""What a reader hands to `load`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Splits(NamedTuple):
    """Images ``uint8`` (n, height, width, 3) and labels ``int64`` (n,) of both sets, with the number of classes."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
