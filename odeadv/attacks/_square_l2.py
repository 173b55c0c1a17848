"""Proposals of the Square attack in the L2 norm: bumps that take over the length of what they replace."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from odeadv.attacks.balls import L2Ball, divided

SMALLEST = 3  # side of a window, in pixels: a bump has two signs and a middle
TILES = 5  # of the first query, along the shorter side of the image


@dataclass(frozen=True)
class Bumps:
    """What the search tries next, in the L2 norm.

    A proposal moves the length of the perturbation in two random windows into the first of them, channel by channel,
    together with what the ball leaves unused; there it is the old perturbation plus a bump of random sign, both of
    length 1, scaled to that length. Source: Andriushchenko et al. 2020, Algorithm 3 and Eq. 2.

    Attributes:
        ball: the allowed set.
        generator: the source of all randomness.
    """

    ball: L2Ball
    generator: torch.Generator

    def side(self, share: float) -> int:
        """The side of a window with ``share`` of the pixels: odd, at least `SMALLEST` where that fits."""
        height, width = self.ball.images.shape[2:]
        most = min(height, width)
        chosen = max(round(math.sqrt(share * height * width)), SMALLEST) // 2 * 2 + 1
        return min(chosen, most - 1 + most % 2)

    def proposed(self, best: Tensor, share: float, index: Tensor) -> Tensor:
        """Images to try instead of ``best``, (k, channels, height, width), of the examples ``index``."""
        n, channels, height, width = self.ball.images.shape
        side = self.side(share)
        corners = [
            torch.randint(length - side + 1, (2, n), generator=self.generator, device=self.generator.device)
            for length in (height, width)
        ]
        sign = signs((n, channels, 1, 1), self.generator)[index.to(self.generator.device)].to(best)
        turned = torch.randint(2, (n, 1, 1), generator=self.generator, device=self.generator.device) > 0
        (top, other_top), (left, other_left) = (corner.to(index.device)[:, index] for corner in corners)
        bump = pattern(side).to(best)
        bumps = torch.where(turned.to(index.device)[index], bump.T, bump)
        placed = best.new_zeros(len(index), 1, height, width)
        here = torch.zeros(placed.shape, dtype=torch.bool, device=placed.device)
        there = here.clone()
        steps = torch.arange(side, device=index.device)
        example = torch.arange(len(index), device=index.device)[:, None, None]
        window = (example, 0, (top[:, None] + steps)[:, :, None], (left[:, None] + steps)[:, None, :])
        placed[window] = bumps
        here[window] = True
        there[example, 0, (other_top[:, None] + steps)[:, :, None], (other_left[:, None] + steps)[:, None, :]] = True

        clean = self.ball.images[index]
        offset = best - clean
        unused = (self.ball.eps**2 - _length(offset, (1, 2, 3)) ** 2).clamp(min=0) / channels
        available = (_length(offset * (here | there), (2, 3)) ** 2 + unused).sqrt()
        inside = offset * here
        mixed = sign * placed + divided(inside, _length(inside, (2, 3)))
        taken = divided(mixed, _length(mixed, (2, 3))) * available
        return clean + torch.where(here, taken, offset * ~there)


def tiled(images: Tensor, generator: torch.Generator, *, eps: float) -> Tensor:
    """Clean images with bumps of random signs in tiles all over, together of length ``eps``."""
    n, channels, height, width = images.shape
    side = max(min(height, width) // TILES, 1)
    rows, columns = height // side, width // side
    sign = signs((n, channels, rows, 1, columns, 1), generator)
    turned = torch.randint(2, (n, 1, rows, 1, columns, 1), generator=generator, device=generator.device) > 0
    bump = pattern(side).to(sign.device)
    tiles = sign * torch.where(turned, bump.T[:, None, :], bump[:, None, :])
    covered = tiles.reshape(n, channels, rows * side, columns * side).to(images)
    whole = torch.zeros_like(images)
    top, left = (height - rows * side) // 2, (width - columns * side) // 2
    whole[:, :, top : top + rows * side, left : left + columns * side] = covered
    return images + eps * divided(whole, _length(whole, (1, 2, 3)))


def pattern(side: int) -> Tensor:
    """(side, side) float64 of length 1: a positive bump beside a negative one, each falling off from its middle."""
    half = side // 2
    both = torch.cat([_bump(side, half), -_bump(side, side - half)], dim=1)
    return both / both.square().sum().sqrt()


def _bump(height: int, width: int) -> Tensor:
    """Eq. 2: at a distance d (in the maximum norm) from the middle, the sum of 1 / k^2 for k from d + 1 to n + 1."""
    n = height // 2
    rows = (torch.arange(height) - height // 2).abs()
    columns = (torch.arange(width) - width // 2).abs()
    sums = torch.cumsum(1.0 / torch.arange(n + 1, 0, -1, dtype=torch.float64) ** 2, dim=0)
    return sums[n - torch.maximum(rows[:, None], columns)]


def _length(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return x.square().sum(dim=axes, keepdim=True).sqrt()


def signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Independent -1.0 and 1.0, each with probability 1/2, on the generator's device."""
    return 2.0 * torch.randint(2, shape, generator=generator, device=generator.device) - 1.0
