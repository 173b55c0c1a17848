"""Residual multi-layer perceptrons: the cheapest networks that are fields."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odeadv.fields import Operator, Piecewise
from odeadv.support.checks import TO_FLOAT, integer

from ._layers import CIFAR10_MEAN, CIFAR10_STD, initialise
from ._network import FieldNetwork

if TYPE_CHECKING:
    from jaxtyping import Float


class FlatStem(nn.Module):
    """Normalise images in [0, 1], flatten them and map them to the state x_0.

    Args:
        image_size: height and width of the images, in pixels.
        width: number of features of the state.
        mean, std: mean and standard deviation per channel, for pixels in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, image_size: int, width: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std):
            raise ValueError(f"mean, std: got {len(mean)} and {len(std)} values, expected one per image channel each")
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))
        self.image_size = image_size
        self.linear = nn.Linear(len(mean) * image_size**2, width)

    def check(self, images: object) -> None:
        """Raise an error unless ``images`` is a batch of floating-point images of the right size.

        Raises:
            TypeError, ValueError: if ``images`` does not fit.
        """
        if not isinstance(images, Tensor):
            raise TypeError(f"images: got {type(images).__name__}, expected a tensor")
        if not images.is_floating_point():
            raise TypeError(f"images: got {images.dtype}, expected floating-point images in [0, 1]; {TO_FLOAT}")
        shape = (self.mean.shape[1], self.image_size, self.image_size)
        if tuple(images.shape[1:]) != shape:
            expected = f"(n, {', '.join(map(str, shape))})"
            raise ValueError(f"images: got shape {tuple(images.shape)}, expected {expected}")

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """Return the first state x_0 of ``images``."""
        x: Tensor = self.linear(((images - self.mean) / self.std).flatten(1))
        return x


class MlpBlock(nn.Module):
    """The block x -> x + f(x) with f = linear, ReLU, linear.

    Args:
        width: number of features of the state and of the hidden layer.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(width, width), nn.Linear(width, width)

    def residual(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Return f(x), the velocity of the state ``x``."""
        y: Tensor = self.linear2(F.relu(self.linear1(x)))
        return y

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Return the next state ``x + f(x)``."""
        return x + self.residual(x)


class ResidualMlp(FieldNetwork):
    """A residual network without convolutions: a linear stem, equal blocks x + f(x), and a linear head.

    ``net(images)`` equals ``head(blocks(stem(images)))`` exactly. Block k is the step from t = k to t = k + 1. The
    network does not use batch statistics, so training and evaluation mode are the same.

    Args:
        blocks: number of blocks.
        width: number of features of the state.
        num_classes: number of logits.
        image_size: height and width of the images, in pixels.
        mean, std: mean and standard deviation per channel, for pixels in [0, 1].
        generator: source of the initial weights; by default the global random state.

    Raises:
        TypeError, ValueError: if an argument does not fit. The message names the argument.
    """

    stem: FlatStem

    def __init__(
        self,
        blocks: int = 6,
        width: int = 128,
        num_classes: int = 10,
        *,
        image_size: int = 32,
        mean: Sequence[float] = CIFAR10_MEAN,
        std: Sequence[float] = CIFAR10_STD,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = {"blocks": blocks, "width": width, "num_classes": num_classes, "image_size": image_size}
        sizes = {name: integer(name, value, least=1) for name, value in sizes.items()}
        self.num_classes = sizes["num_classes"]
        self._config = {
            "name": "residual_mlp",
            **sizes,
            "mean": [float(value) for value in mean],
            "std": [float(value) for value in std],
        }
        with contextlib.nullcontext() if generator is None else torch.random.fork_rng(devices=[]):
            self.stem = FlatStem(sizes["image_size"], sizes["width"], mean, std)
            self.blocks = nn.ModuleList(MlpBlock(sizes["width"]) for _ in range(sizes["blocks"]))
            self.head = nn.Linear(sizes["width"], sizes["num_classes"])
        self.t_span, self.dt = (0.0, float(sizes["blocks"])), 1.0
        initialise(self, generator)

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n classes"]:
        """Return the logits of ``images`` with pixels in [0, 1]."""
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits

    def check_inputs(self, inputs: Any) -> None:
        """Raise an error unless ``inputs`` is a batch of images of the right size. The message names ``images``."""
        self.stem.check(inputs)

    def dynamics(self, dt: float, inputs: Any = None) -> Operator:
        """Return an operator with block k on the times [k, k + 1]. ``dt`` and ``inputs`` are ignored."""
        return Piecewise([_piece(block) for block in self.blocks], range(len(self.blocks) + 1))

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of the network as plain values. `odeadv.models.build` makes the same network architecture."""
        return copy.deepcopy(self._config)

    def extra_repr(self) -> str:
        """Return the arguments as text."""
        return ", ".join(f"{name}={self._config[name]}" for name in ("blocks", "width", "num_classes", "image_size"))


def _piece(block: nn.Module) -> Operator:
    assert isinstance(block, MlpBlock)
    return Operator(lambda t, x: block.residual(x), modules=(block,))


def residual_mlp(
    blocks: int = 6,
    width: int = 128,
    num_classes: int = 10,
    *,
    image_size: int = 32,
    mean: Sequence[float] = CIFAR10_MEAN,
    std: Sequence[float] = CIFAR10_STD,
    generator: torch.Generator | None = None,
) -> ResidualMlp:
    """Return a `ResidualMlp`. The arguments are described in `ResidualMlp`."""
    return ResidualMlp(blocks, width, num_classes, image_size=image_size, mean=mean, std=std, generator=generator)
