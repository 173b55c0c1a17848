"""The parts that all attacks share: checks of arguments, restoring the model, restarts, choosing the best image."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from odeadv.attacks._start import GivenStart, Start, is_random, resolve_start
from odeadv.attacks.balls import BALLS, Ball, Norm
from odeadv.attacks.checks import (
    check_generator,
    check_images,
    check_labels,
    check_model,
    check_target,
    lengths,
    radius,
)
from odeadv.attacks.objective import (
    AttackLoss,
    LossArgument,
    Tally,
    Target,
    TargetName,
    attacking,
    constant,
    reseed,
    resolve_loss,
)
from odeadv.support.checks import choice, integer, shown
from odeadv.support.isolation import Mode


class Best:
    """The best candidate of each example: the first that fools the model, or else the one of highest loss.

    Attributes:
        images: (n, ...), the chosen candidates.
        losses: (n,), losses of the chosen candidates; -infinity before the first candidate.
        fooled: (n,) bool, True if the chosen candidate fools the model.
    """

    def __init__(self, images: Tensor) -> None:
        self.images = torch.empty_like(images).copy_(images)
        self.losses = torch.full((len(images),), -torch.inf, dtype=torch.float64, device=images.device)
        self.fooled = torch.zeros(len(images), dtype=torch.bool, device=images.device)

    def offer(self, candidates: Tensor, losses: Tensor, fooled: Tensor, index: Tensor | None = None) -> None:
        """Keep each candidate that is better than the present choice.

        Args:
            candidates: (m, ...), attacked images of the examples ``index``.
            losses: (m,), losses of the candidates.
            fooled: (m,) bool, True if the candidate fools the model.
            index: (m,), the numbers of the examples; None means all n examples.
        """
        rows: Tensor | slice = slice(None) if index is None else index
        better = ~self.fooled[rows] & (fooled | (losses > self.losses[rows]))
        shaped = better.view(-1, *[1] * (candidates.ndim - 1))
        self.images[rows] = torch.where(shaped, candidates, self.images[rows])
        self.losses[rows] = torch.where(better, losses.double(), self.losses[rows])
        self.fooled[rows] |= fooled

    def open(self) -> Tensor:
        """Return the numbers of the examples that are not fooled yet."""
        return (~self.fooled).nonzero()[:, 0]


@dataclass(frozen=True)
class Setting:
    """One call of an attack: the model's loss, the images, the ball around them and the start.

    Attributes:
        images: (n, ...), the clean images.
        eps: radius of the ball; a number, or a float64 tensor (n, 1, ...).
        ball: the allowed set around the images.
        loss: the function that is raised.
        start: the start of a run.
        generator: the source of all randomness; None if the attack is not random.
        target: the name of the rule that chooses targets; None without such a rule.
        independent: True if all parts of the model are in eval mode. Then the logits of an example should not depend
            on the rest of the batch, so fooled examples may be left out.
    """

    images: Tensor
    eps: float | Tensor
    ball: Ball
    loss: AttackLoss
    start: Start
    generator: torch.Generator | None
    target: TargetName | None
    independent: bool

    def begin(self) -> Tensor:
        """Return the start of the first run; from then on the generator also seeds the noise of the model."""
        x = self.start(self.images, self.ball)
        self.reseed()
        self.loss.compare_with(self.images)
        if self.target is not None:
            self.loss.choose_target(self.target, self.images)
        return x

    def reseed(self) -> None:
        """If there is a generator, seed the global random state, from which a stochastic model draws."""
        if self.generator is not None:
            reseed(self.generator, self.images.device)

    def runs(self, count: int, best: Best, *, begun: bool = False) -> Iterator[tuple[Tensor, Ball, Tensor | None]]:
        """Yield start, ball and example numbers (None: all) of up to ``count`` runs.

        If examples are independent, a run has only the examples that are not fooled yet. The runs end when all examples
        are fooled.

        Args:
            count: the largest number of runs.
            best: the caller offers its candidates to it; it says which examples are fooled.
            begun: True if the model has been seeded already.
        """
        for number in range(count):
            if best.fooled.all():
                return
            x0 = self.start(self.images, self.ball) if number or begun else self.begin()
            if self.independent and best.fooled.any():
                index = best.open()
                yield x0[index], self.ball.rows(index), index
            else:
                yield x0, self.ball, None

    def offer(self, best: Best, x: Tensor, index: Tensor | None = None) -> None:
        """Score the candidates ``x`` of the examples ``index`` without a gradient, and offer them to ``best``."""
        scores = self.loss.evaluate(x, index)
        best.offer(x, scores.losses, self.loss.fooled(scores, index), index)


@contextlib.contextmanager
def setting(
    attack: str,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    norm: Norm,
    loss: LossArgument,
    target: Target | None,
    start: GivenStart,
    restarts: int,
    eot: int,
    generator: torch.Generator | None,
    mode: Mode,
    tally: Tally | None,
) -> Iterator[Setting]:
    """Check the arguments of the attack called ``attack`` and prepare it.

    The body runs with the model in ``mode``. Afterwards the model and the global random state are restored.
    """
    check_model(model)
    check_images(images)
    check_labels(labels, len(images), images.device)
    choice("norm", norm, BALLS)
    if isinstance(eps, Tensor) and eps.ndim:
        eps = lengths("eps", eps, images, most=1.0 if norm == "linf" else None)
    else:
        eps = radius(eps, norm)
    rule = resolve_loss(loss)
    restarts = integer("restarts", restarts)
    eot = integer("eot", eot)
    named: TargetName | None = None
    if isinstance(target, str):
        choice("target", target, get_args(TargetName))
        named = target
    wanted = None if isinstance(target, str) else check_target(target, labels)
    if target is not None and not rule.targeted:
        raise ValueError(f"loss: got {shown(loss)} with a target, expected 'ce', 'margin', 'dlr' or a function")
    random = is_random(start)
    if generator is None and (random or eot > 1):
        generator = torch.Generator().manual_seed(0)
    if generator is not None:
        check_generator(generator)
    starting = resolve_start(start, images, eps=eps, norm=norm, generator=generator)
    if restarts > 1 and not random:
        raise ValueError(f"restarts: got {restarts} from the same start, expected 1, or a random start")
    if tally is not None and not isinstance(tally, Tally):
        raise TypeError(f"tally: got {shown(tally)}, expected an odeadv.attacks.Tally or None")
    with attacking(model, mode, images.device):
        images = constant(images)
        attacked = AttackLoss(
            model,
            constant(labels),
            rule,
            target=None if wanted is None else constant(wanted),
            eot=eot,
            deferred=True,
            tally=tally,
            attack=attack,
        )
        independent = not any(part.training for part in model.modules())
        yield Setting(images, eps, BALLS[norm](images, eps), attacked, starting, generator, named, independent)
        attacked.raise_if_not_finite()
