"""Pre-activated residual networks of depth 6n + 2 for small images (He et al. 2016, arXiv:1603.05027)."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odeadv.fields import Jump, Operator, Piecewise
from odeadv.models._damping import Damping, DampingKind, make_damping
from odeadv.models._layers import CIFAR10_MEAN, CIFAR10_STD, Stem, conv, initialise
from odeadv.models._network import ImageNetwork
from odeadv.models._noise import NoiseKind, make_noise, noises_of, read_noise
from odeadv.support.checks import integer

if TYPE_CHECKING:
    from jaxtyping import Float


class PreActBlock(nn.Module):
    """The block x -> x + f(x) with f = BN-ReLU-conv3x3-BN-ReLU-conv3x3.

    With a stride or new channels the block is x -> p(x) + f(x) with the projection shortcut p = BN-ReLU-conv1x1. Such
    a block is a jump between two ODE segments, not an ODE step.

    Args:
        channels_in, channels_out: number of channels of the input and of the output.
        stride: stride of the first convolution and of the projection.
        damping: name of the damping of f, see `odeadv.models.Damping`. A jump cannot be damped.
        noise: standard deviation of the noise that is added to the sum in training; 0 switches the noise off.
        noise_kind: ``"absolute"``, or ``"relative"`` to the standard deviation of the sum.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        stride: int = 1,
        *,
        damping: DampingKind | None = None,
        noise: float = 0.0,
        noise_kind: NoiseKind = "absolute",
    ) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = conv(channels_in, channels_out, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.conv2 = conv(channels_out, channels_out, 3, 1)
        self.shortcut: nn.Module | None = None
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.BatchNorm2d(channels_in), nn.ReLU(inplace=True), conv(channels_in, channels_out, 1, stride)
            )
            if damping is not None:
                raise ValueError(f"damping: got {damping!r} for a block that changes the state's shape, expected None")
        self.damping = make_damping(damping)
        self.noise = make_noise(*read_noise(noise, noise_kind))

    def residual(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """Return f(x) at the state ``x``, with damping if the block has it: an ODE step's velocity without noise."""
        y = self.conv1(F.relu(self.bn1(x), inplace=True))
        z: Tensor = self.conv2(F.relu(self.bn2(y), inplace=True))
        return z if self.damping is None else self.damping(z, x)

    def velocity(self, x: Float[Tensor, "n c h w"], dt: float = 1.0) -> Float[Tensor, "n c h w"]:
        """Return `residual` at ``x``, plus the noise of one step of size ``dt`` if the noise is on."""
        return self._noised(x, self.residual(x), dt)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """Return the next state after ``x``."""
        y: Tensor = x if self.shortcut is None else self.shortcut(x)
        return y + self._noised(y, self.residual(x), 1.0)

    def _noised(self, x: Tensor, f: Tensor, dt: float) -> Tensor:
        if self.noise is None or not self.noise.active:
            return f
        noise: Tensor = self.noise(x, f, dt)
        return f + noise


class PreActResNet(ImageNetwork):
    """A pre-activated ResNet from images in [0, 1] to logits: a stem, three stages of n blocks, and a head.

    ``net(images)`` equals ``head(blocks(stem(images)))`` exactly. Block k is the step from t = k to t = k + 1.

    Args:
        depth: number of layers, 6n + 2. They are the stem, two convolutions per block and the linear layer.
        width: number of channels of the first stage. The later stages have 2 and 4 times as many.
        num_classes: number of logits.
        mean, std: mean and standard deviation per channel, for pixels in [0, 1].
        damping: ``"damp"`` (In-ResNet) or ``"lambda-damp"`` (lambda-In-ResNet), for all blocks except the first block
            and the two jumps (Yang et al. 2020, see `odeadv.models.Damping`).
        noise: standard deviation of Gaussian noise, which is added to every residual sum in training (Wang et al. 2019,
            see `odeadv.models.Noise`); True means 0.1.
        noise_kind: ``"absolute"``, or ``"relative"`` to the standard deviation of the sum.
        generator: source of the initial weights; by default the global random state. The weights do not depend on
            ``damping``, because the scalars of the damping are drawn last.

    Raises:
        TypeError: if ``depth``, ``width`` or ``num_classes`` is not an integer.
        ValueError: if ``depth`` is not 6n + 2, ``width`` or ``num_classes`` is below 1, or a name is unknown.
    """

    def __init__(
        self,
        depth: int,
        width: int = 16,
        num_classes: int = 10,
        *,
        mean: Sequence[float] = CIFAR10_MEAN,
        std: Sequence[float] = CIFAR10_STD,
        damping: DampingKind | None = None,
        noise: float | bool = 0.0,
        noise_kind: NoiseKind = "absolute",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        depth, width = integer("depth", depth), integer("width", width)
        num_classes = integer("num_classes", num_classes)
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth: got {depth}, expected 6n + 2 with n >= 1: 8, 14, 20, 26, ..., 56, ...")
        _check_damping(damping, depth)
        strength, noise_kind = read_noise(noise, noise_kind)
        self.depth, self.width, self.num_classes = depth, width, num_classes
        self._config = {
            "name": "preact_resnet",
            "depth": depth,
            "width": width,
            "num_classes": num_classes,
            "mean": [float(value) for value in mean],
            "std": [float(value) for value in std],
            "damping": damping,
            "noise": strength,
            "noise_kind": noise_kind,
        }
        with contextlib.nullcontext() if generator is None else torch.random.fork_rng(devices=[]):
            self.stem = Stem(width, mean, std)
            self.blocks = nn.ModuleList(_stages(width, (depth - 2) // 6, damping, strength, noise_kind))
            self.head = nn.Sequential(
                nn.BatchNorm2d(4 * width),
                nn.ReLU(inplace=True),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(4 * width, num_classes),
            )
        self.t_span, self.dt = (0.0, float(len(self.blocks))), 1.0
        initialise(self, generator)
        for module in self.modules():
            if isinstance(module, Damping):
                module.initialise(generator)

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n classes"]:
        """Return the logits of ``images`` with pixels in [0, 1]."""
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits

    def dynamics(self, dt: float, inputs: Any) -> Operator:
        """Return an operator with block k on the times [k, k + 1], for steps of ``dt``."""
        return Piecewise([_piece(block, dt) for block in self.blocks], range(len(self.blocks) + 1))

    def noisy_inference(self, on: bool = True) -> PreActResNet:
        """Switch the noise in evaluation mode on, or off if not ``on``, and return the network.

        Raises:
            ValueError: if the network was made without noise.
        """
        for noise in noises_of(self):
            noise.at_inference = on
        return self

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of the network as plain values. `odeadv.models.build` makes the same network architecture."""
        return copy.deepcopy(self._config)

    def extra_repr(self) -> str:
        """Return the arguments as text."""
        shown = f"depth={self.depth}, width={self.width}, num_classes={self.num_classes}"
        damping, noise, kind = (self._config[name] for name in ("damping", "noise", "noise_kind"))
        shown += f", damping={damping!r}" if damping else ""
        return shown + (f", noise={noise:g}, noise_kind={kind!r}" if noise else "")


def _check_damping(damping: DampingKind | None, depth: int) -> None:
    make_damping(damping)
    if damping is not None and depth < 14:
        raise ValueError(
            f"damping: got {damping!r} for depth {depth}, expected depth 14 or more: the first block and "
            "blocks that change the state's shape are never damped, and this network has only such blocks"
        )


def _stages(
    width: int, per_stage: int, damping: DampingKind | None, noise: float, noise_kind: NoiseKind
) -> Iterator[PreActBlock]:
    """Yield the blocks of three stages. The first block of each stage is never damped."""
    channels = width
    for stage in range(3):
        for i in range(per_stage):
            yield PreActBlock(
                channels,
                width * 2**stage,
                stride=2 if stage and not i else 1,
                damping=damping if i else None,
                noise=noise,
                noise_kind=noise_kind,
            )
            channels = width * 2**stage


def _piece(block: nn.Module, dt: float) -> Operator | Jump:
    assert isinstance(block, PreActBlock)
    if block.shortcut is not None:
        return Jump(block)
    return Operator(lambda t, x: block.velocity(x, dt), modules=(block,))


def preact_resnet(
    depth: int = 20,
    width: int = 16,
    num_classes: int = 10,
    *,
    mean: Sequence[float] = CIFAR10_MEAN,
    std: Sequence[float] = CIFAR10_STD,
    damping: DampingKind | None = None,
    noise: float | bool = 0.0,
    noise_kind: NoiseKind = "absolute",
    generator: torch.Generator | None = None,
) -> PreActResNet:
    """Return a `PreActResNet`. The arguments are described in `PreActResNet`.

    Example:
        >>> net = odeadv.models.preact_resnet(20, 16)
        >>> net(torch.rand(2, 3, 32, 32)).shape, len(net.blocks)
        (torch.Size([2, 10]), 9)
    """
    return PreActResNet(
        depth,
        width,
        num_classes,
        mean=mean,
        std=std,
        damping=damping,
        noise=noise,
        noise_kind=noise_kind,
        generator=generator,
    )


def resnet20(
    num_classes: int = 10,
    *,
    mean: Sequence[float] = CIFAR10_MEAN,
    std: Sequence[float] = CIFAR10_STD,
    damping: DampingKind | None = None,
    noise: float | bool = 0.0,
    noise_kind: NoiseKind = "absolute",
    generator: torch.Generator | None = None,
) -> PreActResNet:
    """Return a `PreActResNet` of depth 20 and width 16. The arguments are described in `PreActResNet`."""
    return PreActResNet(
        20,
        16,
        num_classes,
        mean=mean,
        std=std,
        damping=damping,
        noise=noise,
        noise_kind=noise_kind,
        generator=generator,
    )


def resnet56(
    num_classes: int = 10,
    *,
    mean: Sequence[float] = CIFAR10_MEAN,
    std: Sequence[float] = CIFAR10_STD,
    damping: DampingKind | None = None,
    noise: float | bool = 0.0,
    noise_kind: NoiseKind = "absolute",
    generator: torch.Generator | None = None,
) -> PreActResNet:
    """Return a `PreActResNet` of depth 56 and width 16, the paper's network with 27 blocks.

    The arguments are described in `PreActResNet`.
    """
    return PreActResNet(
        56,
        16,
        num_classes,
        mean=mean,
        std=std,
        damping=damping,
        noise=noise,
        noise_kind=noise_kind,
        generator=generator,
    )
