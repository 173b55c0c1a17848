"""What every attack has in common: checking the arguments, running the model without a trace, restarting."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from odeadv.attacks._start import GivenStart, Start, resolve_start
from odeadv.attacks.balls import BALLS, Ball, Norm
from odeadv.attacks.checks import check_generator, check_images, check_labels, check_model, check_target, radius
from odeadv.attacks.objective import AttackLoss, Loss, Tally, attacking, constant, reseed, resolve_loss
from odeadv.support.checks import choice, integer
from odeadv.support.isolation import Mode


@dataclass(frozen=True)
class Setting:
    """One call of an attack: what is attacked, within what, from where.

    Attributes:
        images: (n, ...), the clean images.
        ball: the allowed set around them.
        objective: what is ascended.
        start: where a run starts.
        generator: the source of all randomness; None if there is none.
        independent: whether an example's logits do not depend on the others in the batch, as far as modes tell (no
            part of the model is in training mode), so that examples may be left out.
    """

    images: Tensor
    ball: Ball
    objective: AttackLoss
    start: Start
    generator: torch.Generator | None
    independent: bool

    def begin(self) -> Tensor:
        """The start of the first run; from here on the model's own noise comes from the generator, too."""
        x = self.start(self.images, self.ball)
        if self.generator is not None:
            reseed(self.generator, self.images.device)
        self.objective.compare_with(self.images)
        return x

    def best_of(self, restarts: int, run: Callable[[Tensor, Ball, Tensor | None, Best], object]) -> Tensor:
        """The best of ``restarts`` runs, each on the examples that those before it have not fooled.

        Args:
            restarts: how many runs at most; there is no further one when all examples are fooled.
            run: called as ``run(x0, ball, index, best)`` with the start and ball of the examples ``index`` (None:
                all); it offers candidates to ``best``.
        """
        best, index = Best(self.images), None
        for number in range(restarts):
            x0 = self.start(self.images, self.ball) if number else self.begin()
            if index is None:
                run(x0, self.ball, None, best)
            else:
                run(x0[index], self.ball.rows(index), index, best)
            if number < restarts - 1:
                still_open = best.open()
                if len(still_open) == 0:
                    break
                index = still_open if self.independent else None
        return best.images


@contextlib.contextmanager
def setting(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    norm: Norm,
    loss: Loss,
    target: Tensor | None,
    start: GivenStart,
    restarts: int,
    eot: int,
    generator: torch.Generator | None,
    mode: Mode,
    tally: Tally | None,
) -> Iterator[Setting]:
    """Check the arguments; inside, the model is in ``mode``; afterwards it and the random state are as before."""
    eps = radius(eps, norm)
    choice("norm", norm, BALLS)
    rule = resolve_loss(loss)
    restarts = integer("restarts", restarts)
    eot = integer("eot", eot)
    check_model(model)
    check_images(images)
    check_labels(labels, len(images), images.device)
    target = check_target(target, labels)
    if target is not None and not rule.targeted:
        raise ValueError(f"loss: got {loss!r} with a target, expected 'ce', 'margin', 'dlr' or a function")
    if generator is not None or eot > 1:
        check_generator(generator)
    starting, random = resolve_start(start, images, eps=eps, norm=norm, generator=generator)
    if restarts > 1 and not random:
        raise ValueError(f"restarts: got {restarts} from the same start, expected 1, or a random start")
    if tally is not None and not isinstance(tally, Tally):
        raise TypeError(f"tally: got {tally!r}, expected an odeadv.attacks.Tally or None")
    with attacking(model, mode, images.device):
        images = constant(images)
        objective = AttackLoss(
            model,
            constant(labels),
            rule,
            target=None if target is None else constant(target),
            eot=eot,
            deferred=True,
            tally=tally,
        )
        independent = not any(part.training for part in model.modules())
        yield Setting(images, BALLS[norm](images, eps), objective, starting, generator, independent)
        objective.raise_if_not_finite()


class Best:
    """For each example the first candidate that fools the model, and until then the one of highest loss.

    Attributes:
        images: (n, ...), the chosen ones.
        losses: (n,), theirs; -infinity before the first candidate.
        fooled: (n,) bool, whether they fool the model.
    """

    def __init__(self, images: Tensor) -> None:
        self.images = torch.empty_like(images).copy_(images)
        self.losses = torch.full((len(images),), -torch.inf, dtype=torch.float64, device=images.device)
        self.fooled = torch.zeros(len(images), dtype=torch.bool, device=images.device)

    def offer(self, candidates: Tensor, losses: Tensor, fooled: Tensor, index: Tensor | None = None) -> None:
        """Take what is better among ``candidates`` (m, ...), ``losses`` and ``fooled`` (m,).

        Args:
            candidates: attacked images of the examples ``index``.
            losses: theirs.
            fooled: whether they fool the model.
            index: (m,) which examples these are; None means all, m = n.
        """
        rows: Tensor | slice = slice(None) if index is None else index
        better = ~self.fooled[rows] & (fooled | (losses > self.losses[rows]))
        shaped = better.view(-1, *[1] * (candidates.ndim - 1))
        self.images[rows] = torch.where(shaped, candidates, self.images[rows])
        self.losses[rows] = torch.where(better, losses.double(), self.losses[rows])
        self.fooled[rows] |= fooled

    def open(self) -> Tensor:
        """The indices of the examples that no candidate has fooled so far."""
        return (~self.fooled).nonzero()[:, 0]
