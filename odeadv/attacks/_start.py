"""Where an attack starts: a function of the clean images and the ball around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from odeadv.attacks.balls import Ball, Norm, unit
from odeadv.attacks.checks import check_generator
from odeadv.support.checks import number

Start = Callable[[Tensor, Ball], Tensor]
GivenStart = Literal["clean", "uniform", "gaussian"] | Tensor | Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Gaussian:
    """A start at the clean images plus normal noise. Source: the start of TRADES (Zhang et al. 2019).

    Attributes:
        std: standard deviation of each pixel's noise, in pixel units of [0, 1]; TRADES has 0.001.

    Raises:
        TypeError: if ``std`` is not a number.
        ValueError: if it is negative or not finite.
    """

    std: float = 0.001

    def __post_init__(self) -> None:
        number("std", self.std, least=0)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """``images + std * noise``, before any projection."""
        return images + self.std * _draw(torch.randn, images.shape, images, generator)


def clean_start(images: Tensor, bounds: Ball) -> Tensor:
    """The clean images themselves."""
    return images


def uniform_start(eps: float, generator: torch.Generator) -> Start:
    """A start drawn uniformly from the L-infinity ball, then projected (Madry et al. 2018).

    The draw is made on the generator's device and in row-major order, so one seed gives one start whatever the
    device and memory format of the images.
    """

    def start(images: Tensor, bounds: Ball) -> Tensor:
        uniform = _draw(torch.rand, images.shape, images, generator)
        return bounds.project((images + _finite(eps) * (2 * uniform - 1)).to(images.dtype))

    return start


def uniform_l2_start(eps: float, generator: torch.Generator) -> Start:
    """A start drawn uniformly from the L2 ball, then projected: a normal direction at eps * u^(1 / pixels)."""

    def start(images: Tensor, bounds: Ball) -> Tensor:
        direction = unit(_draw(torch.randn, images.shape, images, generator))
        radii = _draw(torch.rand, torch.Size([len(images)] + [1] * (images.ndim - 1)), images, generator)
        radii = radii ** (1 / images[0].numel())
        return bounds.project((images + _finite(eps) * radii * direction).to(images.dtype))

    return start


def resolve_start(
    start: object, images: Tensor, *, eps: float, norm: Norm, generator: torch.Generator | None
) -> tuple[Start, bool]:
    """The start that ``start`` names or is, and whether it is random.

    Raises:
        TypeError: if ``start`` is neither a name, a tensor nor a function.
        ValueError: if the name is unknown, the tensor is not like ``images``, or there is no generator to draw from.
    """
    expected = "'clean', 'uniform', 'gaussian', a tensor like the images, or a function (images, generator) -> images"
    if isinstance(start, Tensor):
        return _tensor_start(start, images), False
    if isinstance(start, str) and start == "clean":
        return clean_start, False
    if isinstance(start, str) and start not in ("uniform", "gaussian"):
        raise ValueError(f"start: got {start!r}, expected {expected}")
    if not isinstance(start, str) and not callable(start):
        raise TypeError(f"start: got {start!r}, expected {expected}")
    drawn_from = check_generator(generator)
    if start == "uniform":
        return (uniform_start if norm == "linf" else uniform_l2_start)(eps, drawn_from), True
    draw = Gaussian() if isinstance(start, str) else start

    def projected(images: Tensor, ball: Ball) -> Tensor:
        started = draw(images, drawn_from)
        if not isinstance(started, Tensor) or started.shape != images.shape:
            raise ValueError(f"start: returned {_described(started)}, expected a tensor of shape {tuple(images.shape)}")
        # Our own draws are not looked at: to wait for the answer stops an accelerator's queue.
        if not isinstance(draw, Gaussian) and not (~started.isnan()).all():
            raise ValueError("start: returned NaN, expected pixel values")
        return ball.project(torch.empty_like(images).copy_(started.detach()))

    return projected, True


def _tensor_start(given: Tensor, images: Tensor) -> Start:
    if given.shape != images.shape or not given.is_floating_point() or given.device != images.device:
        raise ValueError(
            f"start: got {_described(given)}, expected floating {tuple(images.shape)} on the device of the images"
        )
    if not (~given.isnan()).all():
        raise ValueError("start: contains NaN, expected pixel values")
    return lambda clean, ball: ball.project(torch.empty_like(clean).copy_(given.detach()))


def _finite(eps: float) -> float:
    """``eps``, or a number that is as good as infinite beside the box, but overflows in no dtype."""
    return min(eps, 1e4)


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)} on {value.device}"
    return type(value).__name__


def _draw(kind: Callable[..., Tensor], shape: torch.Size, images: Tensor, generator: torch.Generator) -> Tensor:
    dtype = torch.promote_types(images.dtype, torch.float32)  # a bfloat16 has 8 bits only
    return kind(shape, generator=generator, device=generator.device, dtype=dtype).to(images.device)
