"""Layers of the image networks: the stem, the convolution, and how both are initialised."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)

CIFAR10_STD = (0.2470, 0.2435, 0.2616)


class Stem(nn.Module):
    """Normalisation and the first convolution: images in [0, 1] to the state x_0.

    Args:
        width: channels of the state.
        mean, std: per-channel constants in [0, 1], part of the model so that attacks work on pixels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))
        self.conv = conv(len(mean), width, 3, 1)

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c h w"]:
        """x_0 of ``images``."""
        channels = self.conv.in_channels
        # A single channel would be repeated by the constants. What torch.fx traces with is no tensor.
        if isinstance(images, Tensor) and images.shape[1] != channels:
            raise ValueError(f"images: got shape {tuple(images.shape)}, expected (n, {channels}, height, width)")
        x: Tensor = self.conv((images - self.mean) / self.std)
        return x


class _Strided1x1(nn.Conv2d):
    """A strided 1x1 convolution, as one without a stride on the pixels that it looks at.

    The same numbers; but oneDNN's own writes beyond its memory in the weight gradient of a channels_last image of
    fewer than 8 channels, on a CPU with AVX2 alone (seen in torch 2.14.1).
    """

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        """The convolution of ``x``."""
        # Pooling windows of one pixel choose pixels as slices do, but their backward pass keeps the memory format.
        return F.conv2d(F.avg_pool2d(x, 1, self.stride), self.weight)


def conv(channels_in: int, channels_out: int, size: int, stride: int) -> nn.Conv2d:
    """A convolution without bias that keeps the size of an image but for ``stride``."""
    kind = _Strided1x1 if size == 1 and stride > 1 else nn.Conv2d
    return kind(channels_in, channels_out, size, stride=stride, padding=size // 2, bias=False)


def initialise(net: nn.Module, generator: torch.Generator | None) -> None:
    """Draw convolutions from N(0, 2 / (k k out)) and linear layers from U(+-1 / sqrt(in)), biases 0."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out), generator=generator)
        elif isinstance(module, nn.Linear):
            bound = 1.0 / math.sqrt(module.in_features)
            nn.init.uniform_(module.weight, -bound, bound, generator=generator)
            nn.init.zeros_(module.bias)
