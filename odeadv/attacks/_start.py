"""Where an attack starts: a function of the clean images and their bounds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from odeadv.attacks._linf import Bounds

Start = Callable[[Tensor, Bounds], Tensor]


def clean_start(images: Tensor, bounds: Bounds) -> Tensor:
    """The clean images themselves."""
    return images


def uniform_start(eps: float, generator: torch.Generator) -> Start:
    """A start drawn uniformly from the eps-ball, then projected (Madry et al. 2018).

    The draw is made on the generator's device and in row-major order, so one seed gives one start whatever the
    device and memory format of the images.
    """

    def start(images: Tensor, bounds: Bounds) -> Tensor:
        uniform = torch.rand(images.shape, generator=generator, device=generator.device, dtype=images.dtype)
        return bounds.project(images + eps * (2 * uniform.to(images.device) - 1))

    return start
