"""A network of continuous depth: a time-dependent convolutional field between a stem and a head.

The field is the field of the neural ODEs of Chen et al. 2018 (arXiv:1806.07366): GroupNorm, and the time t as an extra
channel of every convolution. The flow of a single segment is a homeomorphism, which cannot separate all pairs of sets
(Dupont et al. 2019, arXiv:1904.01681). Several stages joined by jumps, or extra channels, do not have this limit.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odeadv.fields import Jump, Operator, Piecewise
from odeadv.models._layers import CIFAR10_MEAN, CIFAR10_STD, Stem, conv, initialise
from odeadv.models._network import ImageNetwork, final_state, plain_substep, read_substep
from odeadv.splitting import TorchDiffEq
from odeadv.support.checks import integer, number

if TYPE_CHECKING:
    from jaxtyping import Float


class ConvField(nn.Module):
    """The velocity f(t, x) = GN-ReLU-conv3x3-GN-ReLU-conv3x3-GN. The time t is an extra input channel of each conv.

    It is called as ``f(t, x)``, so any ODE solver can use it.

    Args:
        channels: number of channels of the state.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(channels), conv(channels + 1, channels, 3, 1)
        self.norm2, self.conv2 = _norm(channels), conv(channels + 1, channels, 3, 1)
        self.norm3 = _norm(channels)

    def forward(self, t: Float[Tensor, ""], x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Return dx/dt at the time ``t`` and the state ``x``."""
        y = self.conv1(_with_time(t, F.relu(self.norm1(x))))
        z = self.conv2(_with_time(t, F.relu(self.norm2(y))))
        velocity: Tensor = self.norm3(z)
        return velocity


class Downsample(nn.Module):
    """The jump between two segments: a residual block with a projection, to twice the channels and half the grid.

    Args:
        channels: number of channels of the input. The output has twice as many.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(channels), conv(channels, 2 * channels, 3, 2)
        self.norm2, self.conv2 = _norm(2 * channels), conv(2 * channels, 2 * channels, 3, 1)
        self.shortcut = conv(channels, 2 * channels, 1, 2)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """Return the state at the beginning of the next segment."""
        y = F.relu(self.norm1(x))
        z: Tensor = self.shortcut(y) + self.conv2(F.relu(self.norm2(self.conv1(y))))
        return z


class OdeNet(ImageNetwork):
    """The network head(x(T)), with the solution x of dx/dt = f(t, x) from x(0) = stem(images) to the final time T.

    The network has ``stages`` segments of length ``t_end``. Each segment has a separate `ConvField` f and a separate
    clock from 0 to ``t_end``. A jump between two segments halves the grid and doubles the channels. It takes the time
    of one step, t_end / steps. The layers do not use batch statistics, so training and evaluation mode are the same.

    ``net(images)`` is the solve by ``substep``. ``net.field`` is Eq. 7 on the same steps, so this network is trained
    like a residual network: ``odeadv.solve(net.field(images, labels, eta), scheme="lie", **net.solve_options)``.

    Args:
        width: number of channels of the first segment.
        num_classes: number of logits.
        stages: number of segments.
        steps: number of steps per segment. The costate is recorded at the ends of the steps.
        substep: the method that advances f within a step: a name of `odeadv.substep_names`,
            ``"torchdiffeq:METHOD"``, an `odeadv.TorchDiffEq`, or a dict of the arguments of a `TorchDiffEq`.
        t_end: length of a segment.
        mean, std: mean and standard deviation per channel, for pixels in [0, 1].
        generator: source of the initial weights; by default the global random state.

    Raises:
        TypeError, ValueError: if an argument does not fit. The message names the argument.
    """

    def __init__(
        self,
        width: int = 16,
        num_classes: int = 10,
        *,
        stages: int = 3,
        steps: int = 4,
        substep: str | TorchDiffEq | Mapping[str, Any] = "rk4",
        t_end: float = 1.0,
        mean: Sequence[float] = CIFAR10_MEAN,
        std: Sequence[float] = CIFAR10_STD,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        width, num_classes = integer("width", width), integer("num_classes", num_classes)
        stages, steps = integer("stages", stages), integer("steps", steps)
        self.substep = read_substep(substep)
        self.width, self.num_classes = width, num_classes
        self.t_end, self.steps = number("t_end", t_end, above=0.0), steps
        self.dt = self.t_end / steps
        # The end is a multiple of dt, as in the grid, so that both have the same rounding errors.
        self.t_span = (0.0, self.dt * (stages * steps + stages - 1))
        self._config = {
            "name": "ode_net",
            "width": width,
            "num_classes": num_classes,
            "stages": stages,
            "steps": steps,
            "substep": plain_substep(self.substep),
            "t_end": self.t_end,
            "mean": [float(value) for value in mean],
            "std": [float(value) for value in std],
        }
        with contextlib.nullcontext() if generator is None else torch.random.fork_rng(devices=[]):
            self.stem = Stem(width, mean, std)
            widths = [width * 2**stage for stage in range(stages)]
            self.segments = nn.ModuleList(ConvField(channels) for channels in widths)
            self.jumps = nn.ModuleList(Downsample(channels) for channels in widths[:-1])
            self.head = nn.Sequential(
                _norm(widths[-1]),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(widths[-1], num_classes),
            )
        initialise(self, generator)

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n classes"]:
        """Return the logits of ``images`` with pixels in [0, 1].

        Raises:
            odeadv.SolveError: if the state becomes NaN or infinite.
        """
        logits: Tensor = self.head(final_state(self, images, self.dt, self.substep))
        return logits

    def dynamics(self, dt: float, inputs: Any) -> Operator:
        """Return an operator with the segments, each on a separate clock, and the jumps between them."""
        if not self.jumps:
            return Operator(self.segments[0])
        pieces: list[Operator | Jump] = []
        edges = [0.0]
        for stage, segment in enumerate(self.segments):
            if stage:
                pieces.append(Jump(self.jumps[stage - 1]))
                edges.append(self.dt * (stage * (self.steps + 1)))
            pieces.append(_from(edges[-1], segment))
            edges.append(self.dt * (stage * (self.steps + 1) + self.steps))
        return Piecewise(pieces, edges)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of the network as plain values. `odeadv.models.build` makes the same network architecture."""
        return copy.deepcopy(self._config)

    def extra_repr(self) -> str:
        """Return the arguments as text."""
        config = self._config
        return ", ".join(f"{name}={config[name]!r}" for name in ("steps", "substep", "t_end"))


def ode_net(
    width: int = 16,
    num_classes: int = 10,
    *,
    stages: int = 3,
    steps: int = 4,
    substep: str | TorchDiffEq | Mapping[str, Any] = "rk4",
    t_end: float = 1.0,
    mean: Sequence[float] = CIFAR10_MEAN,
    std: Sequence[float] = CIFAR10_STD,
    generator: torch.Generator | None = None,
) -> OdeNet:
    """Return an `OdeNet`. The arguments are described in `OdeNet`."""
    return OdeNet(
        width,
        num_classes,
        stages=stages,
        steps=steps,
        substep=substep,
        t_end=t_end,
        mean=mean,
        std=std,
        generator=generator,
    )


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, channels), channels)


def _with_time(t: Tensor, x: Tensor) -> Tensor:
    return torch.cat([x, t.to(x.dtype).expand(x.shape[0], 1, *x.shape[2:])], dim=1)


def _from(start: float, segment: nn.Module) -> Operator:
    if start == 0.0:
        return Operator(segment)
    return Operator(lambda t, x: segment(t - start, x), modules=(segment,))
