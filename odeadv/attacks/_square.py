"""The Square attack: random search that needs no gradient. Its proposals in L2 are in `_square_l2`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from odeadv.attacks._best import Best
from odeadv.attacks._setting import Setting, setting
from odeadv.attacks._square_l2 import Bumps, signs, tiled
from odeadv.attacks.balls import BALLS, Bounds, L2Ball, Norm
from odeadv.attacks.checks import check_generator, check_images, radius
from odeadv.attacks.objective import Loss, Tally
from odeadv.support.checks import choice, integer, number
from odeadv.support.isolation import Mode

_SHARES = {"linf": 0.8, "l2": 0.1}
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of p, at these queries of 10,000


def square(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    generator: torch.Generator,
    norm: Norm = "linf",
    queries: int = 5000,
    loss: Loss = "margin",
    target: Tensor | None = None,
    p: float | None = None,
    eot: int = 1,
    mode: Mode = "eval",
    tally: Tally | None = None,
) -> Tensor:
    """The Square attack: changes of random squares, kept where they raise the loss or fool the model.

    L-infinity: the first query has vertical stripes of +-eps, each one pixel wide; every later one sets a random square
    to x + eps or x - eps, the sign drawn for each channel. L2: the first query has bumps of random signs in tiles all
    over; every later one moves the length that the perturbation has in two random squares into one of them, as a bump
    of random sign on what is there (the side is odd and at least 3). The side of the square is
    sqrt(p * height * width), p halved at queries 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000 of 10,000, rescaled
    to ``queries``. No gradient is asked for: the model may be of any kind. Source: Andriushchenko et al. 2020, "Square
    Attack: a query-efficient black-box adversarial attack via random search", Algorithms 1 to 3.

    Args:
        model: as for `fgsm`, but it need not be differentiable.
        images: (n, channels, height, width), floating, values in [0, 1].
        labels: as for `fgsm`.
        eps: as for `fgsm`.
        generator: as for `fgsm`.
        norm: ``"linf"`` or ``"l2"``.
        queries: how often each example goes through the model at most (times ``eot``); it stops once it is fooled.
        loss: as for `fgsm`.
        target: as for `fgsm`.
        p: the share of the pixels in the first squares, in (0, 1]; None takes the authors' 0.8, for L2 0.1.
        eot: how many forward passes logits and losses are averaged over.
        mode: as for `fgsm`.
        tally: as for `fgsm`; ``tally.queries`` says how many each example took.

    Returns:
        The attacked images, like those of `fgsm`: per example the first query that fooled the model, or, if none did,
        the one of highest loss. (The clean image is not among the queries.)

    Raises:
        TypeError: as `fgsm`.
        ValueError: as `fgsm`, and if the images are not 4-D or ``p`` not in (0, 1].
    """
    eps = radius(eps, norm)
    queries = integer("queries", queries)
    choice("norm", norm, BALLS)
    p = _SHARES[norm] if p is None else number("p", p, least=0)
    if not 0 < p <= 1:
        raise ValueError(f"p: got {p!r}, expected a number in (0, 1]")
    check_generator(generator)
    check_images(images)
    if images.ndim != 4:
        raise ValueError(f"images: got shape {tuple(images.shape)}, expected (n, channels, height, width)")
    given = setting(
        model,
        images,
        labels,
        eps=eps,
        norm=norm,
        loss=loss,
        target=target,
        start=partial(tiled, eps=eps) if norm == "l2" else _stripes,
        restarts=1,
        eot=eot,
        generator=generator,
        mode=mode,
        tally=tally,
    )
    with given as attack:
        proposals: Proposals
        if isinstance(attack.ball, L2Ball):
            proposals = Bumps(attack.ball, generator)
        else:
            assert isinstance(attack.ball, Bounds)
            proposals = Corners(attack.ball, generator)
        return _search(attack, proposals, queries=queries, p=p)


def share(query: int, *, queries: int, p: float) -> float:
    """The share of the pixels in the square of query ``query`` (from 1) of ``queries``."""
    rescaled = query * 10_000 // queries
    return float(p * 0.5 ** sum(rescaled > step for step in _HALVINGS))


class Proposals(Protocol):
    """What the search tries next."""

    def proposed(self, best: Tensor, share: float, index: Tensor) -> Tensor:
        """Images to try instead of ``best``, (k, channels, height, width), of the examples ``index``, (k,)."""


@dataclass(frozen=True)
class Corners:
    """In the L-infinity norm: a random square set to x + eps or x - eps, by channel (Algorithm 2).

    Attributes:
        ball: the allowed set.
        generator: the source of all randomness.
    """

    ball: Bounds
    generator: torch.Generator

    def proposed(self, best: Tensor, share: float, index: Tensor) -> Tensor:
        """See `Proposals`."""
        lower, upper = self.ball
        n, channels, height, width = lower.shape
        size = side(share, (height, width))
        # Drawn for all examples, so that those of one do not depend on which others are fooled.
        rows, columns = (_window(n, length, size, self.generator) for length in (height, width))
        inside = rows[:, None, :, None] & columns[:, None, None, :]
        raised = signs((n, channels, 1, 1), self.generator).to(lower)[index] > 0
        inside = inside.to(best.device)[index]
        return torch.where(inside, torch.where(raised, upper[index], lower[index]), best)


def side(share: float, shape: tuple[int, int]) -> int:
    """The side of a square with ``share`` of the pixels of an image, in pixels, at least 1."""
    return min(max(round(math.sqrt(share * shape[0] * shape[1])), 1), *shape)


def _stripes(images: Tensor, generator: torch.Generator) -> Tensor:
    """Clean images plus or minus 1 in vertical stripes, one pixel wide; projection leaves eps of it."""
    n, channels, _, width = images.shape
    return images + signs((n, channels, 1, width), generator).to(images)


def _search(attack: Setting, proposals: Proposals, *, queries: int, p: float) -> Tensor:
    objective, best = attack.objective, Best(attack.images)
    x = attack.begin()
    scores = objective.evaluate(x)
    best.offer(x, scores.losses, objective.fooled(scores))
    for query in range(1, queries):
        index = best.open()
        if len(index) == 0:
            break
        if not attack.independent:
            index = torch.arange(len(x), device=index.device)
        tried = proposals.proposed(best.images[index], share(query, queries=queries, p=p), index)
        tried = attack.ball.rows(index).project(tried)
        scores = objective.evaluate(tried, index)
        best.offer(tried, scores.losses, objective.fooled(scores, index), index)
    return best.images


def _window(n: int, length: int, size: int, generator: torch.Generator) -> Tensor:
    """(n, length) bool: in each row ``size`` adjacent places, drawn uniformly."""
    first = torch.randint(length - size + 1, (n, 1), generator=generator, device=generator.device)
    places = torch.arange(length, device=generator.device)
    return (places >= first) & (places < first + size)
