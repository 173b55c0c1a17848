"""The sets of allowed images for each norm, with projections and steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Norm = Literal["linf", "l2"]

# float64 has too few digits to scale an offset to a radius below this one. Such a ball is replaced by its centre.
_POINT = 1e-300


class Ball(Protocol):
    """The images that are allowed around the clean images: a ball in some norm, intersected with [0, 1]."""

    def project(self, x: Tensor) -> Tensor:
        """Return allowed images near ``x``, with its shape, dtype and memory format."""

    def ascend(self, x: Tensor, gradient: Tensor, alpha: float | Tensor) -> Tensor:
        """Return ``x`` after a step of length ``alpha`` in the direction of steepest ascent in this norm."""

    def rows(self, index: Tensor) -> Ball:
        """Return the set around the images ``index`` only."""


class Bounds(NamedTuple):
    """The L-infinity ball: the lowest and the highest allowed value of every pixel, both shaped like the images."""

    lower: Tensor
    upper: Tensor

    def project(self, x: Tensor) -> Tensor:
        """Return the allowed images that are nearest to ``x``, with its shape, dtype and memory format."""
        return x.clamp(self.lower, self.upper)

    def ascend(self, x: Tensor, gradient: Tensor, alpha: float | Tensor) -> Tensor:
        """Return ``x`` after a step of length ``alpha`` (a number, or one per image) along the gradient's signs."""
        # A step of 2 leaves [0, 1] from every point. A longer step has the same effect and may overflow in float16.
        return sign_step(x, gradient, alpha if isinstance(alpha, Tensor) else min(alpha, 2.0))

    def rows(self, index: Tensor) -> Bounds:
        """Return the bounds of the images ``index`` only; ``index`` has numbers or is (n,) bool."""
        return Bounds(rows(self.lower, index), rows(self.upper, index))


def rows(images: Tensor, index: Tensor) -> Tensor:
    """Return the images chosen by ``index``, numbers or (n,) bool, in the memory format of ``images``."""
    taken = images[index]
    # Plain indexing may return contiguous images.
    last = images.ndim == 4 and images.is_contiguous(memory_format=torch.channels_last)
    return taken.contiguous(memory_format=torch.channels_last) if last else taken


def linf_bounds(images: Tensor, eps: float | Tensor) -> Bounds:
    """Return the intersection of the eps-ball around ``images`` with [0, 1], rounded towards ``images``.

    In exact arithmetic on the returned values, ``images - lower <= eps`` and ``upper - images <= eps``. The bounds are
    the widest that satisfy this for the largest radius <= eps that the dtype represents.

    Args:
        images: (n, ...), values in [0, 1], any floating dtype.
        eps: radius >= 0; a number, or a float64 tensor (n, 1, ...) with one radius per image.
    """
    zero, infinity = images.new_tensor(0.0), images.new_tensor(torch.inf)
    if isinstance(eps, Tensor):
        radius = eps.clamp(max=1).to(images.dtype)
        radius = torch.where(radius.double() > eps, torch.nextafter(radius, zero), radius)
    else:
        # Round on the CPU, because reading a value back would wait for the device. A radius above 1 acts as 1.
        near = torch.tensor(min(eps, 1.0), dtype=images.dtype)
        radius = torch.where(near.double() > eps, torch.nextafter(near, torch.zeros_like(near)), near)
        radius = radius.to(images.device, non_blocking=True)
    # A floating-point sum minus its larger part is exact, so both comparisons with the radius are exact too.
    # (If images < radius, the lower bound is 0 anyway.)
    lower = images - radius
    lower = torch.where(images - lower > radius, torch.nextafter(lower, infinity), lower)
    upper = images + radius
    excess = upper - torch.maximum(images, radius) > torch.minimum(images, radius)
    upper = torch.where(excess, torch.nextafter(upper, zero), upper)
    return Bounds(lower.clamp(min=0), upper.clamp(max=1))


def sign_step(x: Tensor, gradient: Tensor, alpha: float | Tensor) -> Tensor:
    """Return ``x + alpha * sign(gradient)``: the steepest ascent of length ``alpha`` in the L-infinity norm."""
    if isinstance(alpha, Tensor):
        return (x + alpha * gradient.sign()).to(x.dtype)
    return torch.add(x, gradient.sign(), alpha=alpha)


@dataclass(frozen=True)
class L2Ball:
    """The L2 ball: all images in [0, 1] whose Euclidean distance from the clean image is at most ``eps``.

    Attributes:
        images: (n, ...), the clean images, values in [0, 1], any floating dtype.
        eps: radius >= 0, in pixel units of [0, 1] (one pixel from black to white has length 1). A number, or a
            float64 tensor (n, 1, ...) with one radius per image.
    """

    images: Tensor
    eps: float | Tensor

    def project(self, x: Tensor) -> Tensor:
        """Return ``x`` scaled down to the ball, then clipped to [0, 1], with its shape, dtype and memory format.

        In exact arithmetic on the returned values, the distance of every image from the clean image is at most
        ``eps``. Images in the ball are only clipped. (The result is in the ball and in [0, 1]. It is not always the
        nearest such point; other attack libraries do the same.)
        """
        if not isinstance(self.eps, Tensor) and self.eps < _POINT:
            return torch.empty_like(x).copy_(self.images)
        eps = self.eps.clamp(min=_POINT) if isinstance(self.eps, Tensor) else self.eps
        clean = self.images.double()
        offset = x.double() - clean
        # Divide by eps, so that squares do not underflow. The factor 1 - slack compensates the rounding of this sum.
        # Scaling with twice the slack makes a second projection leave the result unchanged.
        slack = (offset[0].numel() + 8) * torch.finfo(torch.float64).eps
        length = (offset / eps).square().sum(dim=_pixels(x), keepdim=True).sqrt()
        allowed = offset * ((1 - 2 * slack) / length.clamp(min=1 - slack))
        scaled = (clean + allowed).to(x.dtype)
        # Rounding to the dtype of the images may lengthen an offset. Such pixels move to the next number towards the
        # clean image.
        outside = (scaled.double() - clean).abs() > allowed.abs()
        scaled = torch.where(outside, torch.nextafter(scaled, self.images), scaled)
        inside = torch.where(length <= 1 - slack, x, scaled).clamp(0, 1)
        return torch.where(self.eps < _POINT, self.images, inside) if isinstance(self.eps, Tensor) else inside

    def ascend(self, x: Tensor, gradient: Tensor, alpha: float | Tensor) -> Tensor:
        """Return ``x`` after a step of length ``alpha`` (a number, or one per image) along the gradient.

        This is the steepest ascent in the L2 norm. If the gradient is 0, ``x`` does not change.
        """
        direction = unit(gradient)
        if isinstance(alpha, Tensor):
            return (x + alpha * direction).to(x.dtype)
        return torch.add(x, direction, alpha=min(alpha, torch.finfo(x.dtype).max / 4))  # a larger step could overflow

    def rows(self, index: Tensor) -> L2Ball:
        """Return the balls around the images ``index`` only."""
        return L2Ball(self.images[index], self.eps[index] if isinstance(self.eps, Tensor) else self.eps)


def unit(gradient: Tensor) -> Tensor:
    """Return each example of ``gradient``, (n, ...), divided by its L2 norm; 0 stays 0."""
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    # Divide by the largest entry first: the square of 1e-30 underflows in float32.
    wide = divided(wide, wide.abs().amax(dim=_pixels(wide), keepdim=True))
    return divided(wide, wide.square().sum(dim=_pixels(wide), keepdim=True).sqrt()).to(gradient.dtype)


def divided(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return ``numerator / denominator``; entries with denominator 0 are 0."""
    return torch.where(denominator > 0, numerator / denominator, torch.zeros_like(numerator))


def _pixels(tensor: Tensor) -> tuple[int, ...]:
    return tuple(range(1, tensor.ndim))


BALLS: Mapping[str, Callable[[Tensor, float | Tensor], Ball]] = MappingProxyType({"linf": linf_bounds, "l2": L2Ball})
