"""From stored images to what a model takes."""

from __future__ import annotations

import torch
from torch import Tensor


def as_model_input(images: Tensor, *, device: torch.device, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """Images in [0, 1] on ``device``: uint8 (n, h, w, channels) becomes ``dtype`` (n, channels, h, w) / 255.

    Floating images keep dtype and shape. 4-D results are channels-last in memory if so asked, all else contiguous.
    """
    images = images.to(device)
    if images.dtype == torch.uint8:
        images = images.permute(0, 3, 1, 2).to(dtype) / 255
    layout = torch.channels_last if channels_last and images.ndim == 4 else torch.contiguous_format
    return images.contiguous(memory_format=layout)
