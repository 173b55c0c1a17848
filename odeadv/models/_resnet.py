"""Pre-activated residual networks of depth 6n + 2 for small images (He et al. 2016, arXiv:1603.05027)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from odeadv.fields import AdversarialField, Jump, Operator, Piecewise

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
        self.conv = _conv(len(mean), width, 3, 1)

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c h w"]:
        """x_0 of ``images``."""
        x: Tensor = self.conv((images - self.mean) / self.std)
        return x


class PreActBlock(nn.Module):
    """x -> x + f(x), f = BN-ReLU-conv3x3-BN-ReLU-conv3x3; with stride or new channels, a projection of x + f(x).

    The projection shortcut is BN-ReLU-conv1x1. Such a block is a jump between two ODE segments, not an ODE step.

    Args:
        channels_in, channels_out: channels before and after.
        stride: of the first convolution and the projection.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = _conv(channels_in, channels_out, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.conv2 = _conv(channels_out, channels_out, 3, 1)
        self.shortcut: nn.Module | None = None
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.BatchNorm2d(channels_in), nn.ReLU(inplace=True), _conv(channels_in, channels_out, 1, stride)
            )

    def residual(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """f(x), the velocity of the state where the block is an ODE step."""
        y = self.conv1(F.relu(self.bn1(x), inplace=True))
        z: Tensor = self.conv2(F.relu(self.bn2(y), inplace=True))
        return z

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The next state."""
        y: Tensor = x if self.shortcut is None else self.shortcut(x)
        return y + self.residual(x)


class PreActResNet(nn.Module):
    """Pre-activated ResNet: a stem, three stages of n blocks, and a head; images in [0, 1] to logits.

    ``head(blocks(stem(images)))`` is ``net(images)`` exactly; block ``k`` is the step from t = k to k + 1.

    Args:
        depth: 6n + 2, counting the stem, two convolutions a block and the linear layer.
        width: channels of the first stage; the later ones have 2 and 4 times as many.
        num_classes: number of logits.
        mean, std: normalisation constants per image channel.
        generator: source of the initial weights; the global random state if not given.

    Raises:
        ValueError: if ``depth`` is not 6n + 2, or ``width`` or ``num_classes`` is below 1.
    """

    def __init__(
        self,
        depth: int,
        width: int = 16,
        num_classes: int = 10,
        *,
        mean: Sequence[float] = CIFAR10_MEAN,
        std: Sequence[float] = CIFAR10_STD,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not all(isinstance(value, int) for value in (depth, width, num_classes)):
            raise TypeError(f"depth, width, num_classes: got {depth!r}, {width!r}, {num_classes!r}, expected integers")
        if len(mean) != len(std):
            raise ValueError(f"mean, std: got {len(mean)} and {len(std)} values, expected one an image channel each")
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth: got {depth}, expected 6n + 2 with n >= 1: 8, 14, 20, 26, ..., 56, ...")
        if width < 1 or num_classes < 1:
            raise ValueError(f"width, num_classes: got {width} and {num_classes}, expected at least 1 each")
        self.depth, self.width, self.num_classes = depth, width, num_classes
        with contextlib.nullcontext() if generator is None else torch.random.fork_rng(devices=[]):
            self.stem = Stem(width, mean, std)
            widths = [width, 2 * width, 4 * width]
            per_stage = (depth - 2) // 6
            blocks: list[PreActBlock] = []
            channels = width
            for stage, wide in enumerate(widths):
                for i in range(per_stage):
                    blocks.append(PreActBlock(channels, wide, stride=2 if stage and not i else 1))
                    channels = wide
            self.blocks = nn.ModuleList(blocks)
            self.head = nn.Sequential(
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(channels, num_classes),
            )
        self._initialise(generator)

    def _initialise(self, generator: torch.Generator | None) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out), generator=generator)
            elif isinstance(module, nn.Linear):
                bound = 1.0 / math.sqrt(module.in_features)
                nn.init.uniform_(module.weight, -bound, bound, generator=generator)
                nn.init.zeros_(module.bias)

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n classes"]:
        """Logits of ``images``, which lie in [0, 1]."""
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits

    def field(self, images: Float[Tensor, "n 3 h w"], labels: Int[Tensor, " n"], eta: float = 0.0) -> AdversarialField:
        """The network as the field of Eq. 7, carrying its problem: x0 = stem(images), t from 0 to N, dt = 1.

        The loss is the cross-entropy of the head's logits, averaged over the batch. eta scales the gradient of that
        mean, so eta / batch_size is what is invariant: the paper's eta = 50 (CIFAR-10) and 1000 (CIFAR-100) belong
        to batches of 128. ``odeadv.solve(net.field(images, labels, eta), scheme="lie")`` is Eq. 5.

        Args:
            images: in [0, 1].
            labels: class numbers.
            eta: strength of the costate.

        Raises:
            TypeError: if images are not floating-point, or labels not int64.
            ValueError: if the images' channels or the labels do not fit.
        """
        channels = self.stem.conv.in_channels
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(f"images: got shape {tuple(images.shape)}, expected (n, {channels}, height, width)")
        if not images.is_floating_point():
            raise TypeError(f"images: got {images.dtype}, expected floating-point images in [0, 1]; divide by 255")
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
            got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(f"labels: got {got}, expected a tensor of int64 class numbers")
        if not len(images):
            raise ValueError("images: got none, expected at least one")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"labels: got shape {tuple(labels.shape)}, expected ({len(images)},), one an image")
        if (
            labels.device.type == "cpu"
            and len(labels)
            and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes
        ):
            raise ValueError(
                f"labels: got classes {int(labels.min())} to {int(labels.max())}, expected 0 to {self.num_classes - 1}"
            )
        return AdversarialField(
            Piecewise([_piece(block) for block in self.blocks], range(len(self.blocks) + 1)),
            lambda logits: F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels),
            eta,
            readout=self.head,
            x0=lambda: self.stem(images),
            t_span=(0.0, float(len(self.blocks))),
            dt=1.0,
        )

    def extra_repr(self) -> str:
        """The arguments that made it."""
        return f"depth={self.depth}, width={self.width}, num_classes={self.num_classes}"


def _piece(block: nn.Module) -> Operator | Jump:
    assert isinstance(block, PreActBlock)
    if block.shortcut is not None:
        return Jump(block)
    return Operator(lambda t, x: block.residual(x), modules=(block,))


def _conv(channels_in: int, channels_out: int, size: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, size, stride=stride, padding=size // 2, bias=False)


def preact_resnet(
    depth: int = 20,
    width: int = 16,
    num_classes: int = 10,
    *,
    mean: Sequence[float] = CIFAR10_MEAN,
    std: Sequence[float] = CIFAR10_STD,
    generator: torch.Generator | None = None,
) -> PreActResNet:
    """A `PreActResNet`; see there."""
    return PreActResNet(depth, width, num_classes, mean=mean, std=std, generator=generator)


def resnet20(
    num_classes: int = 10,
    *,
    mean: Sequence[float] = CIFAR10_MEAN,
    std: Sequence[float] = CIFAR10_STD,
    generator: torch.Generator | None = None,
) -> PreActResNet:
    """`preact_resnet` of depth 20 and width 16."""
    return PreActResNet(20, 16, num_classes, mean=mean, std=std, generator=generator)


def resnet56(
    num_classes: int = 10,
    *,
    mean: Sequence[float] = CIFAR10_MEAN,
    std: Sequence[float] = CIFAR10_STD,
    generator: torch.Generator | None = None,
) -> PreActResNet:
    """`preact_resnet` of depth 56 and width 16: 27 blocks, the paper's network."""
    return PreActResNet(56, 16, num_classes, mean=mean, std=std, generator=generator)
