"""Layers of the image networks: the stem, the convolution, and their initialisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odeadv.support.checks import TO_FLOAT

if TYPE_CHECKING:
    from jaxtyping import Float

# Mean and standard deviation of the pixels of the training set of CIFAR-10, per channel, for pixels in [0, 1].
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


class Stem(nn.Module):
    """Normalises images in [0, 1] and maps them by the first convolution to the state x_0.

    Args:
        width: number of channels of the state.
        mean, std: mean and standard deviation per channel. They are part of the model, so attacks work on pixels.

    Raises:
        ValueError: if ``mean`` and ``std`` have different lengths.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std):
            raise ValueError(f"mean, std: got {len(mean)} and {len(std)} values, expected one per image channel each")
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))
        self.conv = conv(len(mean), width, 3, 1)

    def check(self, images: object) -> None:
        """Raise an error unless ``images`` is a batch of floating-point images with the right number of channels.

        Raises:
            TypeError, ValueError: if ``images`` does not fit.
        """
        if not isinstance(images, Tensor):
            raise TypeError(f"images: got {type(images).__name__}, expected a tensor")
        if not images.is_floating_point():
            raise TypeError(f"images: got {images.dtype}, expected floating-point images in [0, 1]; {TO_FLOAT}")
        if images.ndim != 4 or images.shape[1] != self.conv.in_channels:
            raise ValueError(f"images: got shape {tuple(images.shape)}, expected {self._expected}")

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c h w"]:
        """Return the first state x_0 of ``images``."""
        # Without this check a single channel would be broadcast to all channels. Proxies of torch.fx are not tensors.
        if isinstance(images, Tensor) and images.shape[1] != self.conv.in_channels:
            raise ValueError(f"images: got shape {tuple(images.shape)}, expected {self._expected}")
        x: Tensor = self.conv((images - self.mean) / self.std)
        return x

    @property
    def _expected(self) -> str:
        return f"(n, {self.conv.in_channels}, height, width)"


class _Strided1x1(nn.Conv2d):
    """A strided 1x1 convolution, computed without a stride on the pixels that it uses.

    The values are the same. The reason is an error of oneDNN (seen in torch 2.14.1): on a CPU with AVX2 only, its
    strided kernel writes outside its memory in the weight gradient of a channels_last image with fewer than 8 channels.
    """

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        """Return the convolution of ``x``."""
        # Pooling with windows of one pixel selects pixels, like slicing, but its backward pass keeps the memory layout.
        return F.conv2d(F.avg_pool2d(x, 1, self.stride), self.weight)


def conv(channels_in: int, channels_out: int, size: int, stride: int) -> nn.Conv2d:
    """Return a convolution without bias that divides height and width by ``stride``."""
    kind = _Strided1x1 if size == 1 and stride > 1 else nn.Conv2d
    return kind(channels_in, channels_out, size, stride=stride, padding=size // 2, bias=False)


def initialise(net: nn.Module, generator: torch.Generator | None) -> None:
    """Draw the weights of convolutions and linear layers, and set biases to 0.

    Convolutions with kernels of k x k pixels are drawn from N(0, 2 / (k k channels_out)). Linear layers are drawn from
    the uniform distribution on (-1 / sqrt(features_in), 1 / sqrt(features_in)).
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out), generator=generator)
        elif isinstance(module, nn.Linear):
            bound = 1.0 / math.sqrt(module.in_features)
            nn.init.uniform_(module.weight, -bound, bound, generator=generator)
            nn.init.zeros_(module.bias)
