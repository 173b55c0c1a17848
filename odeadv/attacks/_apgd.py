"""Auto-PGD (projected gradient ascent with momentum that chooses its step sizes) and its targeted form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from odeadv.attacks._losses import check_classes_of_dlr
from odeadv.attacks._setting import Best, Setting, setting
from odeadv.attacks._start import GivenStart
from odeadv.attacks.balls import Ball, Norm
from odeadv.attacks.objective import LossArgument, Tally, Target
from odeadv.support.checks import choice, integer, number
from odeadv.support.isolation import Mode

Variant = Literal["paper", "autoattack"]

_INERTIA = 0.75  # alpha in the paper: the share of the new step in the next iterate


def apgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    generator: torch.Generator | None = None,
    steps: int = 100,
    norm: Norm = "linf",
    loss: LossArgument = "ce",
    target: Target | None = None,
    start: GivenStart = "uniform",
    restarts: int = 1,
    rho: float = 0.75,
    variant: Variant = "paper",
    eot: int = 1,
    mode: Mode = "eval",
    tally: Tally | None = None,
) -> Tensor:
    r"""Attack with Auto-PGD: steps with momentum; the step size is halved if the loss stops rising.

    Let P be the projection to the ball and x_0 the start. Let s(x, eta) be x after a step of length eta of `ifgsm`,
    with eta = 2 ``eps`` at first. The iterates are

    .. math::

        z_{k+1} &= P(s(x_k, \eta)), \qquad x_1 = z_1, \\
        x_{k+1} &= P(x_k + 0.75 (z_{k+1} - x_k) + 0.25 (x_k - x_{k-1})).

    Each example is reviewed at the iterations w_j = ceil(p_j * steps), with p_0 = 0, p_1 = 0.22 and
    p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06). A review may halve its eta and move it back to its point of highest
    loss. This happens in two cases. Either the loss rose in fewer than the share ``rho`` of the steps since w_{j-1}.
    Or neither eta nor the highest loss has changed since w_{j-1}. Source: Croce and Hein 2020, "Reliable evaluation of
    adversarial robustness with an ensemble of diverse parameter-free attacks", Algorithm 1.

    Args:
        model: as for `fgsm`.
        images: as for `fgsm`.
        labels: as for `fgsm`.
        eps: as for `fgsm`.
        generator: as for `fgsm`.
        steps: number of steps per run. A run costs ``steps`` gradients and one more forward pass.
        norm: as for `fgsm`.
        loss: as for `fgsm`.
        target: as for `fgsm`.
        start: as for `ifgsm`.
        restarts: number of runs, each from its own start, on the examples that are not fooled yet.
        rho: threshold in [0, 1]: the step size is halved if a smaller share of the steps raised the loss.
        variant: ``"paper"`` follows Algorithm 1. ``"autoattack"`` follows the authors' code, which reviews at other
            iterations unless ``steps`` is 100, and counts rising steps in another way (see docs/attacks.md). From
            the same start it ends with AutoAttack's outcomes.
        eot: as for `fgsm`.
        mode: as for `fgsm`.
        tally: as for `fgsm`.

    Returns:
        The attacked images, with the properties that `fgsm` states. For each example this is the first iterate that
        fools the model (the start counts as an iterate), or the iterate of highest loss if none does. A fooled example
        leaves the batch at the next review, unless some part of the model is in training mode.

    Raises:
        TypeError: as `fgsm`.
        ValueError: as `fgsm`, and if ``rho`` is above 1.
    """
    schedule = _schedule(steps, rho, variant)
    with setting(
        "apgd", model, images, labels, eps=eps, norm=norm, loss=loss, target=target, start=start, restarts=restarts,
        eot=eot, generator=generator, mode=mode, tally=tally,
    ) as attack:  # fmt: skip
        best = Best(attack.images)
        for x0, ball, index in attack.runs(restarts, best):
            _run(attack, schedule, best, x0, ball, index)
        return best.images


def apgd_t(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    generator: torch.Generator | None = None,
    steps: int = 100,
    targets: int = 9,
    norm: Norm = "linf",
    loss: LossArgument = "dlr",
    start: GivenStart = "uniform",
    restarts: int = 1,
    rho: float = 0.75,
    variant: Variant = "autoattack",
    eot: int = 1,
    mode: Mode = "eval",
    tally: Tally | None = None,
) -> Tensor:
    """Attack with targeted Auto-PGD: `apgd` towards each of the most likely wrong classes, one after the other.

    The target of run k is the class with the (k + 1)-th largest logit of the clean image, k = 1, ..., ``targets``.
    Any wrong class counts as fooled, and later runs leave out fooled examples. Images that the model gets wrong
    without an attack are returned unchanged. With the defaults and the same starts, the outcomes equal the outcomes of
    AutoAttack's APGD-T. (AutoAttack draws its starts in another way.) Sources: Croce and Hein 2020, Section 4; the
    authors' code, https://github.com/fra31/auto-attack.

    Args:
        model: as for `fgsm`.
        images: as for `fgsm`.
        labels: as for `fgsm`.
        eps: as for `fgsm`.
        generator: as for `fgsm`.
        steps: as for `apgd`.
        targets: number of target classes. If it exceeds the number of wrong classes, all wrong classes are tried.
        norm: as for `fgsm`.
        loss: as for `fgsm`. ``"kl"`` is not possible. ``"dlr"`` needs at least four classes; with fewer, take
            ``"margin"``.
        start: as for `ifgsm`.
        restarts: number of runs per target.
        rho: as for `apgd`.
        variant: as for `apgd`.
        eot: as for `fgsm`.
        mode: as for `fgsm`.
        tally: as for `fgsm`.

    Returns:
        The attacked images, as from `apgd`. The clean images are among the candidates.

    Raises:
        TypeError: as `fgsm`.
        ValueError: as `apgd`, and if ``loss`` is ``"kl"``.
    """
    schedule = _schedule(steps, rho, variant)
    targets = integer("targets", targets)
    if loss == "kl":
        raise ValueError("loss: got 'kl', expected 'dlr', 'ce', 'margin' or a function: it is not defined for targets")
    with setting(
        "apgd_t", model, images, labels, eps=eps, norm=norm, loss=loss, target=None, start=start, restarts=restarts,
        eot=eot, generator=generator, mode=mode, tally=tally,
    ) as attack:  # fmt: skip
        best = Best(attack.images)
        attack.reseed()
        scores = attack.loss.evaluate(attack.images)
        if loss == "dlr":
            check_classes_of_dlr(scores.logits, 4)  # also if no image is attacked, because all are wrong already
        wrong = attack.loss.fooled(scores)
        # A clean image is returned only if the model gets it wrong. Its loss lacks a target, so it cannot be compared.
        best.offer(attack.images, torch.full_like(scores.losses, -torch.inf), wrong)
        ranked = scores.logits.argsort(dim=1, descending=True)
        for rank in range(1, min(targets, ranked.shape[1] - 1) + 1):
            attack.loss.aim(ranked[:, rank])
            for x0, ball, index in attack.runs(restarts, best, begun=True):
                _run(attack, schedule, best, x0, ball, index)
        return best.images


@dataclass(frozen=True)
class _Schedule:
    """The reviews of step sizes.

    Attributes:
        steps: number of steps.
        rho: the step size is halved if a smaller share of the steps raised the loss.
        reviews: the iterations w_1 < w_2 < ... at which step sizes are reviewed.
        paper: True for Algorithm 1; False for the rules of the authors' code.
    """

    steps: int
    rho: float
    reviews: tuple[int, ...]
    paper: bool


def _schedule(steps: int, rho: float, variant: Variant) -> _Schedule:
    steps = integer("steps", steps)
    rho = number("rho", rho, least=0, most=1)
    paper = choice("variant", variant, ("paper", "autoattack")) == "paper"
    return _Schedule(steps, rho, checkpoints(steps) if paper else autoattack_checkpoints(steps), paper)


def checkpoints(steps: int) -> tuple[int, ...]:
    """Return the iterations w_1 < w_2 < ... <= ``steps`` at which the paper reviews step sizes."""
    # p is counted in hundredths. With floats, ceil would round 57.00000000000001 up to 58.
    before, p, reviewed = 0, 22, []
    while p <= 100:
        reviewed.append(-(-p * steps // 100))
        before, p = p, p + max(p - before - 3, 6)
    return tuple(dict.fromkeys(reviewed))


def autoattack_checkpoints(steps: int) -> tuple[int, ...]:
    """Return the iterations at which the authors' code reviews step sizes: sums of truncated periods."""
    # The float products must be the same as in the authors' code, because int() truncates them.
    period, shorter, shortest = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    reviewed, last = [], period
    while last <= steps:
        reviewed.append(last)
        period = max(period - shorter, shortest)
        last += period
    return tuple(reviewed)


class _ApgdState(NamedTuple):
    """The state of one run between two iterations; every tensor has one row per example.

    Attributes:
        x: x_k.
        before: x_{k-1}.
        gradient: the gradient at x_k.
        loss: the next step counts as rising if its loss exceeds this loss.
        eta: step sizes, (n, 1, ...).
        top: the point of highest loss so far.
        top_gradient: the gradient at ``top``.
        top_loss: the loss at ``top``.
        rises: number of steps since the last review in which the loss rose.
        reviewed_loss: the highest loss at the last review.
        halved: True if eta was halved at the last review.
    """

    x: Tensor
    before: Tensor
    gradient: Tensor
    loss: Tensor
    eta: Tensor
    top: Tensor
    top_gradient: Tensor
    top_loss: Tensor
    rises: Tensor
    reviewed_loss: Tensor
    halved: Tensor


def _run(attack: Setting, schedule: _Schedule, best: Best, x0: Tensor, ball: Ball, index: Tensor | None) -> None:
    """Run once from ``x0`` on the examples ``index`` (None: all), and offer every iterate to ``best``."""
    loss = attack.loss
    scores = loss.differentiate(x0, index)
    best.offer(x0, scores.losses, loss.fooled(scores, index), index)
    assert scores.gradient is not None
    n = len(x0)
    state = _ApgdState(
        x=x0,
        before=x0,
        gradient=scores.gradient,
        # The authors' code compares the loss after the first step with an entry of its table that is still 0.
        loss=scores.losses if schedule.paper else torch.zeros_like(scores.losses),
        eta=_first_eta(attack.eps, x0, index),
        top=x0,
        top_gradient=scores.gradient,
        top_loss=scores.losses,
        rises=torch.zeros(n, dtype=torch.int64, device=x0.device),
        reviewed_loss=scores.losses,
        # True switches the second condition off at the first review, as the authors' code does.
        halved=torch.full((n,), not schedule.paper, device=x0.device),
    )
    last_review = 0
    for k in range(1, schedule.steps + 1):
        x = _next(state, ball, inertia=1.0 if k == 1 else _INERTIA)
        if k == schedule.steps:
            attack.offer(best, x, index)  # the last iterate needs only a score, not a gradient
            return
        scores = loss.differentiate(x, index)
        best.offer(x, scores.losses, loss.fooled(scores, index), index)
        assert scores.gradient is not None
        state = _moved(state, x, scores.losses, scores.gradient)
        if k in schedule.reviews:
            state = _reviewed(state, schedule, steps=k - last_review)
            last_review = k
            still_open = ~(best.fooled if index is None else best.fooled[index])
            if not still_open.any():
                return
            if attack.independent and not still_open.all():
                rows = still_open.nonzero()[:, 0]
                index = rows if index is None else index[rows]
                state, ball = _ApgdState._make(part[rows] for part in state), ball.rows(rows)


def _first_eta(eps: float | Tensor, x0: Tensor, index: Tensor | None) -> Tensor:
    """Return 2 eps for each example, (n, 1, ...)."""
    largest = math.sqrt(x0[0].numel())  # a larger radius gives the same set within [0, 1]
    shape = (len(x0), *[1] * (x0.ndim - 1))
    if isinstance(eps, Tensor):
        chosen = eps if index is None else eps[index]
        return 2 * chosen.clamp(max=largest).to(x0.dtype)
    return x0.new_full(shape, 2 * min(eps, largest))


def _next(state: _ApgdState, ball: Ball, *, inertia: float) -> Tensor:
    """Return x_{k+1}."""
    z = ball.project(ball.ascend(state.x, state.gradient, state.eta))
    if inertia == 1.0:
        return z
    return ball.project(state.x + inertia * (z - state.x) + (1 - inertia) * (state.x - state.before))


def _moved(state: _ApgdState, x: Tensor, loss: Tensor, gradient: Tensor) -> _ApgdState:
    """Return the state after the step to ``x``."""
    higher = loss > state.top_loss
    shaped = higher.view(state.eta.shape)
    return state._replace(
        x=x,
        before=state.x,
        gradient=gradient,
        loss=loss,
        top=torch.where(shaped, x, state.top),
        top_gradient=torch.where(shaped, gradient, state.top_gradient),
        top_loss=torch.where(higher, loss, state.top_loss),
        rises=state.rises + (loss > state.loss),
    )


def _reviewed(state: _ApgdState, schedule: _Schedule, *, steps: int) -> _ApgdState:
    """Return the state after a review, ``steps`` steps after the last review.

    An example that is stuck gets half its eta and moves back to its point of highest loss.
    """
    fewest = schedule.rho * steps
    # The authors' code also counts equality as too few rises.
    too_few = state.rises < fewest if schedule.paper else state.rises <= fewest
    stuck = too_few | (~state.halved & (state.top_loss == state.reviewed_loss))
    shaped = stuck.view(state.eta.shape)
    return state._replace(
        x=torch.where(shaped, state.top, state.x),
        gradient=torch.where(shaped, state.top_gradient, state.gradient),
        # The authors' code compares the next loss with the loss of the point before the move.
        loss=torch.where(stuck, state.top_loss, state.loss) if schedule.paper else state.loss,
        eta=torch.where(shaped, state.eta / 2, state.eta),
        rises=torch.zeros_like(state.rises),
        reviewed_loss=state.top_loss,
        halved=stuck,
    )
