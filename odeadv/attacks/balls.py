"""The sets that attacks stay in, by norm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Norm = Literal["linf", "l2"]


class Ball(Protocol):
    """The images that are allowed around clean ones: a ball of some norm, within [0, 1]."""

    def project(self, x: Tensor) -> Tensor:
        """Allowed images near ``x``; same shape, dtype and memory format as ``x``."""

    def ascend(self, x: Tensor, gradient: Tensor, alpha: float | Tensor) -> Tensor:
        """``x`` after the step of length ``alpha``, in this norm, that raises a function of this gradient most."""

    def rows(self, index: Tensor) -> Ball:
        """The set around the images ``index`` only."""


class Bounds(NamedTuple):
    """The lowest and highest allowed value of every pixel; both shaped like the images."""

    lower: Tensor
    upper: Tensor

    def project(self, x: Tensor) -> Tensor:
        """The nearest allowed images to ``x``; same shape, dtype and memory format as ``x``."""
        return x.clamp(self.lower, self.upper)

    def ascend(self, x: Tensor, gradient: Tensor, alpha: float | Tensor) -> Tensor:
        """``x`` after a step of length ``alpha`` (a number, or one for each image) along the gradient's signs."""
        return sign_step(x, gradient, alpha if isinstance(alpha, Tensor) else min(alpha, 2.0))  # 2 leaves the box

    def rows(self, index: Tensor) -> Bounds:
        """The bounds of the images ``index`` only, numbers or (n,) bool."""
        return Bounds(rows(self.lower, index), rows(self.upper, index))


def rows(images: Tensor, index: Tensor) -> Tensor:
    """``images`` chosen by ``index``, numbers or (n,) bool, in their memory format (plain indexing may lose it)."""
    taken = images[index]
    last = images.ndim == 4 and images.is_contiguous(memory_format=torch.channels_last)
    return taken.contiguous(memory_format=torch.channels_last) if last else taken


def linf_bounds(images: Tensor, eps: float) -> Bounds:
    """The intersection of the eps-ball around ``images`` with [0, 1], with rounding always towards ``images``.

    In exact arithmetic on the returned values, ``images - lower <= eps`` and ``upper - images <= eps``, and no wider
    bound of that dtype has this for the largest radius <= eps that the dtype represents.

    Args:
        images: (n, ...), values in [0, 1], any floating dtype.
        eps: radius >= 0.
    """
    zero, infinity = images.new_tensor(0.0), images.new_tensor(torch.inf)
    radius = images.new_tensor(min(eps, 1.0))  # beyond 1 the ball holds the whole box
    if radius.item() > eps:
        radius = torch.nextafter(radius, zero)
    # A floating-point sum less its larger part is exact, so both comparisons with what is left are exact too.
    # (For the lower bound, images < radius needs no such care: the bound is then 0.)
    lower = images - radius
    lower = torch.where(images - lower > radius, torch.nextafter(lower, infinity), lower)
    upper = images + radius
    excess = upper - torch.maximum(images, radius) > torch.minimum(images, radius)
    upper = torch.where(excess, torch.nextafter(upper, zero), upper)
    return Bounds(lower.clamp(min=0), upper.clamp(max=1))


def sign_step(x: Tensor, gradient: Tensor, alpha: float | Tensor) -> Tensor:
    """``x + alpha * sign(gradient)``: the steepest ascent of length ``alpha`` in the L-infinity norm."""
    if isinstance(alpha, Tensor):
        return x + alpha * gradient.sign()
    return torch.add(x, gradient.sign(), alpha=alpha)


@dataclass(frozen=True)
class L2Ball:
    """All images in [0, 1] within ``eps`` of ``images`` in the Euclidean norm of each image.

    Attributes:
        images: (n, ...), the clean images, values in [0, 1], any floating dtype.
        eps: radius >= 0, in pixel units of [0, 1] (one pixel from black to white has length 1).
    """

    images: Tensor
    eps: float

    def project(self, x: Tensor) -> Tensor:
        """``x`` scaled down to the ball, then clipped to [0, 1]; same shape, dtype and memory format as ``x``.

        In exact arithmetic on the returned values no image is further than ``eps`` from the clean one. Images in the
        ball are only clipped. (As in all the usual libraries, this is a point of the ball and the box, but not always
        the nearest.)
        """
        if self.eps < 1e-300:  # 0, or where float64 has too few digits to scale to it
            return torch.empty_like(x).copy_(self.images)
        clean = self.images.double()
        offset = x.double() - clean
        # Relative to eps, so that no square underflows. 1 - slack pays for the rounding of this very sum, and twice of
        # it makes a second projection find the first one inside.
        slack = (offset[0].numel() + 8) * torch.finfo(torch.float64).eps
        length = (offset / self.eps).square().sum(dim=_pixels(x), keepdim=True).sqrt()
        allowed = offset * ((1 - 2 * slack) / length.clamp(min=1 - slack))
        scaled = (clean + allowed).to(x.dtype)
        # Rounding to the dtype of the images may lengthen an offset: take such pixels one number back.
        outside = (scaled.double() - clean).abs() > allowed.abs()
        scaled = torch.where(outside, torch.nextafter(scaled, self.images), scaled)
        return torch.where(length <= 1 - slack, x, scaled).clamp(0, 1)

    def ascend(self, x: Tensor, gradient: Tensor, alpha: float | Tensor) -> Tensor:
        """``x`` after a step of length ``alpha`` (a number, or one for each image) along the gradient.

        The steepest ascent of that length in the L2 norm. Where the gradient is 0, ``x`` stays.
        """
        direction = unit(gradient)
        if isinstance(alpha, Tensor):
            return x + alpha * direction
        return torch.add(x, direction, alpha=min(alpha, torch.finfo(x.dtype).max / 4))  # so that no pixel overflows

    def rows(self, index: Tensor) -> L2Ball:
        """The balls around the images ``index`` only."""
        return L2Ball(self.images[index], self.eps)


def unit(gradient: Tensor) -> Tensor:
    """Each example of ``gradient``, (n, ...), divided by its L2 norm; 0 stays 0."""
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    # Divided by the largest entry first, as the square of 1e-30 is no float32.
    wide = divided(wide, wide.abs().amax(dim=_pixels(wide), keepdim=True))
    return divided(wide, wide.square().sum(dim=_pixels(wide), keepdim=True).sqrt()).to(gradient.dtype)


def divided(numerator: Tensor, denominator: Tensor) -> Tensor:
    """``numerator / denominator``, and 0 where the denominator is 0."""
    return torch.where(denominator > 0, numerator / denominator, torch.zeros_like(numerator))


def _pixels(tensor: Tensor) -> tuple[int, ...]:
    return tuple(range(1, tensor.ndim))


BALLS: Mapping[str, Callable[[Tensor, float], Ball]] = MappingProxyType({"linf": linf_bounds, "l2": L2Ball})
