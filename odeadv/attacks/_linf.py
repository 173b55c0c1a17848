"""The L-infinity geometry: the allowed set around the clean images, projection to it, the sign step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
