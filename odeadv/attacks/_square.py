"""The Square attack: random search that needs no gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from odeadv.attacks._setting import Best, Setting, setting
from odeadv.attacks.balls import Bounds, L2Ball, Norm, divided
from odeadv.attacks.checks import check_images, lengths
from odeadv.attacks.objective import LossArgument, Tally, Target
from odeadv.support.checks import integer, number
from odeadv.support.isolation import Mode

# The share p is halved after each of these queries of 10,000, as in the authors' code.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)

SMALLEST = 3  # smallest side of an L2 window in pixels: a bump has two signs and a middle
TILES = 5  # number of bumps of the first L2 query along the shorter side of the image, as in the authors' code


def square(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    generator: torch.Generator | None = None,
    norm: Norm = "linf",
    queries: int = 5000,
    loss: LossArgument = "margin",
    target: Target | None = None,
    p: float = 0.8,
    eot: int = 1,
    mode: Mode = "eval",
    tally: Tally | None = None,
) -> Tensor:
    """Attack by random search: change random squares, and keep a change if it raises the loss or fools the model.

    In the L-infinity norm the first query adds vertical stripes of +-eps to the clean image x, each one pixel wide.
    Every later query sets a random square to x + eps or x - eps, with a random sign per channel. In the L2 norm the
    first query adds bumps of random signs in tiles. Every later query takes two random squares of equal side, which is
    odd and at least 3. It adds a bump of random sign to the perturbation in the first square. It sets the perturbation
    in the second square to zero and gives its length to the first square.

    The side of the square is sqrt(p * height * width). p is halved at queries 10, 50, 200, 500, 1000, 2000, 4000, 6000
    and 8000 of 10,000, rescaled to ``queries``. The model need not be differentiable. Source:
    Andriushchenko et al. 2020, "Square Attack: a query-efficient black-box adversarial attack via random search",
    Algorithms 1 to 3.

    Args:
        model: as for `fgsm`. It need not be differentiable.
        images: (n, channels, height, width), floating, values in [0, 1].
        labels: as for `fgsm`.
        eps: as for `fgsm`.
        generator: as for `fgsm`.
        norm: ``"linf"`` or ``"l2"``.
        queries: the largest number of queries per example. A query costs ``eot`` forward passes. An example gets no
            further query after it is fooled.
        loss: as for `fgsm`.
        target: as for `fgsm`.
        p: the share of the pixels in the first squares, in (0, 1]; AutoAttack uses 0.8 in both norms.
        eot: number of forward passes over which logits and losses are averaged.
        mode: as for `fgsm`.
        tally: as for `fgsm`. ``tally.queries`` has the number of queries of each example.

    Returns:
        The attacked images, with the properties that `fgsm` states. For each example this is the first query that
        fooled the model, or the query of highest loss if none did. (The clean image is not a query.)

    Raises:
        TypeError: as `fgsm`.
        ValueError: as `fgsm`, and if the images are not 4-D or ``p`` is not in (0, 1].
    """
    queries = integer("queries", queries)
    p = number("p", p, above=0, most=1)
    check_images(images)
    if images.ndim != 4:
        raise ValueError(f"images: got shape {tuple(images.shape)}, expected (n, channels, height, width)")
    start = partial(tiled, eps=lengths("eps", eps, images)) if norm == "l2" else _stripes
    with setting(
        "square", model, images, labels, eps=eps, norm=norm, loss=loss, target=target, start=start, restarts=1, eot=eot,
        generator=generator, mode=mode, tally=tally,
    ) as attack:  # fmt: skip
        return _search(attack, queries=queries, p=p)


def share(query: int, *, queries: int, p: float) -> float:
    """Return the share of the pixels that the square of query number ``query`` (from 1) of ``queries`` covers."""
    rescaled = query * 10_000 // queries
    return float(p * 0.5 ** sum(rescaled > step for step in _HALVINGS))


class Proposals(Protocol):
    """The images that the search tries next."""

    def proposed(self, best: Tensor, share: float, index: Tensor) -> Tensor:
        """Return images to try next, shaped like ``best``.

        Args:
            best: (k, channels, height, width), the best images so far.
            share: the share of the pixels that a square covers.
            index: (k,), the numbers of the examples.
        """


@dataclass(frozen=True)
class Corners:
    """Proposals in the L-infinity norm: set a random square to x + eps or x - eps, per channel (Algorithm 2).

    Attributes:
        ball: the allowed set.
        generator: the source of all randomness.
    """

    ball: Bounds
    generator: torch.Generator

    def proposed(self, best: Tensor, share: float, index: Tensor) -> Tensor:
        """Return images to try; see `Proposals`."""
        lower, upper = self.ball
        n, channels, height, width = lower.shape
        size = side(share, (height, width))
        # Draw for all examples, so that the draws of one do not depend on which others are fooled.
        rows, columns = (_window(n, length, size, self.generator) for length in (height, width))
        inside = rows[:, None, :, None] & columns[:, None, None, :]
        raised = signs((n, channels, 1, 1), self.generator).to(lower)[index] > 0
        inside = inside.to(best.device)[index]
        return torch.where(inside, torch.where(raised, upper[index], lower[index]), best)


def side(share: float, shape: tuple[int, int]) -> int:
    """Return the side of a square with ``share`` of the pixels of an image, in pixels, at least 1."""
    return min(max(round(math.sqrt(share * shape[0] * shape[1])), 1), *shape)


def _stripes(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return the images plus or minus 1 in vertical stripes, one pixel wide; the projection reduces 1 to eps."""
    n, channels, _, width = images.shape
    return images + signs((n, channels, 1, width), generator).to(images)


def _search(attack: Setting, *, queries: int, p: float) -> Tensor:
    best, generator = Best(attack.images), attack.generator
    assert generator is not None  # the start is random, so there is a generator
    proposals: Proposals
    if isinstance(attack.ball, L2Ball):
        proposals = Bumps(attack.ball, generator)
    else:
        assert isinstance(attack.ball, Bounds)
        proposals = Corners(attack.ball, generator)
    x = attack.begin()
    attack.offer(best, x)
    for query in range(1, queries):
        index = best.open()
        if len(index) == 0:
            break
        if not attack.independent:
            index = torch.arange(len(x), device=index.device)
        tried = proposals.proposed(best.images[index], share(query, queries=queries, p=p), index)
        attack.offer(best, attack.ball.rows(index).project(tried), index)
    return best.images


def _window(n: int, length: int, size: int, generator: torch.Generator) -> Tensor:
    """Return (n, length) bool: in each row ``size`` adjacent entries are True, at a place drawn uniformly."""
    first = torch.randint(length - size + 1, (n, 1), generator=generator, device=generator.device)
    places = torch.arange(length, device=generator.device)
    return (places >= first) & (places < first + size)


@dataclass(frozen=True)
class Bumps:
    """Proposals in the L2 norm.

    A proposal takes two random windows and works channel by channel. The new perturbation of the first window is its
    old perturbation plus a bump of random sign, both scaled to length 1 first. The sum is scaled to a length that
    collects the perturbation of both windows and the length that the ball leaves unused. The rest of the second window
    becomes 0. Source: Andriushchenko et al. 2020, Algorithm 3 and Eq. 2.

    Attributes:
        ball: the allowed set.
        generator: the source of all randomness.
    """

    ball: L2Ball
    generator: torch.Generator

    def side(self, share: float) -> int:
        """Return the side of a window with ``share`` of the pixels: odd, and at least `SMALLEST` if the image is."""
        height, width = self.ball.images.shape[2:]
        most = min(height, width)
        chosen = max(round(math.sqrt(share * height * width)), SMALLEST) // 2 * 2 + 1
        return min(chosen, most - 1 + most % 2)

    def proposed(self, best: Tensor, share: float, index: Tensor) -> Tensor:
        """Return images to try; see `Proposals`."""
        n, channels, height, width = self.ball.images.shape
        side = self.side(share)
        # Draw for all examples, so that the draws of one do not depend on which others are fooled.
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

        ball = self.ball.rows(index)
        offset = best - ball.images
        unused = (ball.eps**2 - _length(offset, (1, 2, 3)) ** 2).clamp(min=0).to(best.dtype) / channels
        available = (_length(offset * (here | there), (2, 3)) ** 2 + unused).sqrt()
        inside = offset * here
        mixed = sign * placed + divided(inside, _length(inside, (2, 3)))
        taken = divided(mixed, _length(mixed, (2, 3))) * available
        return ball.images + torch.where(here, taken, offset * ~there)


def tiled(images: Tensor, generator: torch.Generator, *, eps: float | Tensor) -> Tensor:
    """Return the images plus bumps of random signs in tiles; all bumps of an image together have length ``eps``."""
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
    """Return (side, side) float64 of length 1: a positive and a negative bump, each highest in its middle."""
    half = side // 2
    both = torch.cat([_bump(side, half), -_bump(side, side - half)], dim=1)
    return both / both.square().sum().sqrt()


def _bump(height: int, width: int) -> Tensor:
    """Return Eq. 2 as (height, width): the sum of 1 / k^2 for k from d + 1 to n + 1.

    d is the distance from the middle in the maximum norm, and n is ``height // 2``.
    """
    n = height // 2
    rows = (torch.arange(height) - height // 2).abs()
    columns = (torch.arange(width) - width // 2).abs()
    sums = torch.cumsum(1.0 / torch.arange(n + 1, 0, -1, dtype=torch.float64) ** 2, dim=0)
    return sums[n - torch.maximum(rows[:, None], columns)]


def _length(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return x.square().sum(dim=axes, keepdim=True).sqrt()


def signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return independent -1.0 and 1.0, each with probability 1/2, on the generator's device."""
    return 2.0 * torch.randint(2, shape, generator=generator, device=generator.device) - 1.0
