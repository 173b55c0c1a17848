"""The start of an attack: a function of the clean images and the ball around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from odeadv.attacks.balls import Ball, Norm, unit
from odeadv.support.checks import did_you_mean, number, shown
from odeadv.support.deferred import holds

Start = Callable[[Tensor, Ball], Tensor]
GivenStart = Literal["clean", "uniform", "gaussian"] | Tensor | Callable[[Tensor, torch.Generator], Tensor]

# This radius is as good as infinite for images in [0, 1], and it does not overflow in any dtype.
_FAR = 1e4

_NAMES = ("clean", "uniform", "gaussian")


@dataclass(frozen=True)
class Gaussian:
    """A start at the clean images plus normal noise. Source: the start of TRADES (Zhang et al. 2019).

    Attributes:
        std: standard deviation of each pixel's noise, in pixel units of [0, 1]; TRADES uses 0.001.

    Raises:
        TypeError: if ``std`` is not a number.
        ValueError: if ``std`` is negative or not finite.
    """

    std: float = 0.001

    def __post_init__(self) -> None:
        number("std", self.std, least=0)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return ``images + std * noise``, before any projection. The noise is drawn from ``generator``."""
        return images + self.std * _draw(torch.randn, images.shape, images, generator)


def clean_start(images: Tensor, bounds: Ball) -> Tensor:
    """Return the clean images themselves."""
    return images


def uniform_start(eps: float | Tensor, generator: torch.Generator) -> Start:
    """Return a start that draws uniformly from the L-infinity ball, then projects (Madry et al. 2018).

    The numbers are drawn on the generator's device and in row-major order. So a seed gives the same start on every
    device and in every memory format of the images.
    """

    def start(images: Tensor, bounds: Ball) -> Tensor:
        uniform = _draw(torch.rand, images.shape, images, generator)
        return bounds.project((images + _at_most(eps, uniform) * (2 * uniform - 1)).to(images.dtype))

    return start


def uniform_l2_start(eps: float | Tensor, generator: torch.Generator) -> Start:
    """Return a start that draws uniformly from the L2 ball, then projects.

    The direction is the direction of a normal random vector. The length is eps * u^(1 / pixels) with u uniform in
    [0, 1], because the volume of a ball grows as radius^pixels.
    """

    def start(images: Tensor, bounds: Ball) -> Tensor:
        direction = unit(_draw(torch.randn, images.shape, images, generator))
        radii = _draw(torch.rand, torch.Size([len(images)] + [1] * (images.ndim - 1)), images, generator)
        radii = radii ** (1 / images[0].numel())
        return bounds.project((images + _at_most(eps, radii) * radii * direction).to(images.dtype))

    return start


def is_random(start: object) -> bool:
    """Return True if ``start`` draws random numbers, or is a function that may draw them."""
    return not isinstance(start, Tensor) and not (isinstance(start, str) and start == "clean")


def resolve_start(
    start: object, images: Tensor, *, eps: float | Tensor, norm: Norm, generator: torch.Generator | None
) -> Start:
    """Return the start for a name, a tensor or a function.

    Args:
        start: the argument ``start`` of the attack.
        images: the clean images.
        eps: radius of the ball.
        norm: norm of the ball.
        generator: the source of random starts; None if the start is not random (see `is_random`).

    Raises:
        TypeError: if ``start`` is neither a name, a tensor nor a function.
        ValueError: if the name is unknown or the tensor is not like ``images``.
    """
    expected = "'clean', 'uniform', 'gaussian', a tensor like the images, or a function (images, generator) -> images"
    if isinstance(start, Tensor):
        return _tensor_start(start, images)
    if isinstance(start, str) and start == "clean":
        return clean_start
    if isinstance(start, str) and start not in _NAMES:
        raise ValueError(f"start: got {shown(start)}, expected {expected}{did_you_mean(start, _NAMES)}")
    if not isinstance(start, str) and not callable(start):
        raise TypeError(f"start: got {shown(start)}, expected {expected}")
    assert generator is not None
    source = generator
    if start == "uniform":
        return (uniform_start if norm == "linf" else uniform_l2_start)(eps, source)
    draw = Gaussian() if isinstance(start, str) else start

    def projected(images: Tensor, ball: Ball) -> Tensor:
        started = draw(images, source)
        if not isinstance(started, Tensor) or started.shape != images.shape:
            raise ValueError(f"start: returned {_described(started)}, expected a tensor of shape {tuple(images.shape)}")
        # Gaussian never returns NaN, so skip the check: reading its result would stop an accelerator's queue.
        if not isinstance(draw, Gaussian) and not (~started.isnan()).all():
            raise ValueError("start: returned NaN, expected pixel values")
        return ball.project(torch.empty_like(images).copy_(started.detach()))

    return projected


def _tensor_start(given: Tensor, images: Tensor) -> Start:
    if given.shape != images.shape or not given.is_floating_point() or given.device != images.device:
        raise ValueError(
            f"start: got {_described(given)}, expected floating {tuple(images.shape)} on the device of the images"
        )
    if not holds((~given.isnan()).all()):
        raise ValueError("start: contains NaN, expected pixel values")
    return lambda clean, ball: ball.project(torch.empty_like(clean).copy_(given.detach()))


def _at_most(eps: float | Tensor, like: Tensor) -> float | Tensor:
    """Return the smaller of ``eps`` and `_FAR`; a tensor gets the dtype of ``like``, as a number would."""
    return eps.clamp(max=_FAR).to(like.dtype) if isinstance(eps, Tensor) else min(eps, _FAR)


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)} on {value.device}"
    return type(value).__name__


def _draw(kind: Callable[..., Tensor], shape: torch.Size, images: Tensor, generator: torch.Generator) -> Tensor:
    dtype = torch.promote_types(images.dtype, torch.float32)  # a bfloat16 has only 8 bits of randomness
    return kind(shape, generator=generator, device=generator.device, dtype=dtype).to(images.device)
