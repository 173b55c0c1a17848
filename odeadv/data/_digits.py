"""Scikit-learn's handwritten digits, which come with the package: a dataset that needs no download."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from odeadv.data._splits import Splits
from odeadv.data.checks import require


def read_digits() -> Splits:
    """1,797 digits of 8x8 pixels and 17 grey levels, enlarged to 32x32 RGB; a fifth of each class is the test set.

    Raises:
        ImportError: scikit-learn is missing.
    """
    bunch = require("sklearn.datasets", "scikit-learn", 'the "digits" dataset').load_digits()
    labels = torch.from_numpy(np.asarray(bunch.target, dtype=np.int64))
    images = _enlarged(torch.from_numpy(np.asarray(bunch.images, dtype=np.float32)))
    # RandomState's stream is frozen by numpy's compatibility policy, so the split is the same everywhere.
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(labels)))
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        members = order[labels[order] == label]
        test[members[: round(len(members) / 5)]] = True
    train_order, test_order = order[~test[order]], order[test[order]]
    return Splits(images[train_order], labels[train_order], images[test_order], labels[test_order], num_classes=10)


def _enlarged(levels: Tensor) -> Tensor:
    # Levels are integers up to 16 and the interpolation weights multiples of 1/64, so every float here is exact and
    # the rounded pixel does not depend on the machine.
    grey = interpolate(levels[:, None], size=(32, 32), mode="bilinear", align_corners=False)
    return (grey * 255 / 16).round().to(torch.uint8).permute(0, 2, 3, 1).repeat(1, 1, 1, 3)
