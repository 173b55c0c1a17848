"""Auto-PGD: projected gradient ascent with momentum that chooses its own step sizes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from odeadv.attacks._setting import Best, setting
from odeadv.attacks._start import GivenStart
from odeadv.attacks.balls import Ball, Norm
from odeadv.attacks.checks import radius
from odeadv.attacks.objective import AttackLoss, Loss, Scores, Tally
from odeadv.support.checks import integer, number
from odeadv.support.isolation import Mode

_INERTIA = 0.75  # the paper's alpha


def apgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    generator: torch.Generator | None,
    steps: int = 100,
    norm: Norm = "linf",
    loss: Loss = "ce",
    target: Tensor | None = None,
    start: GivenStart = "uniform",
    restarts: int = 1,
    rho: float = 0.75,
    eot: int = 1,
    mode: Mode = "eval",
    tally: Tally | None = None,
) -> Tensor:
    """Auto-PGD: steps with momentum, whose length halves at checkpoints where the loss has stopped rising.

    With P the projection, x_0 the start, eta = 2 eps at first, and s(x, eta) the step of length eta of `ifgsm`::

        z_{k+1} = P(s(x_k, eta))
        x_{k+1} = P(x_k + 0.75 (z_{k+1} - x_k) + 0.25 (x_k - x_{k-1})),   x_1 = z_1.

    At iteration w_j = ceil(p_j * steps), p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06), an
    example's eta is halved, and it goes on from its point of highest loss, if since w_{j-1} the loss rose in fewer than
    ``rho`` of the steps, or if neither eta nor the highest loss have changed. Source: Croce and Hein 2020, "Reliable
    evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks", Algorithm 1.

    Args:
        model: as for `fgsm`.
        images: as for `fgsm`.
        labels: as for `fgsm`.
        eps: as for `fgsm`.
        generator: as for `fgsm`; None only if nothing is random.
        steps: how many steps, in each run. A run costs ``steps`` gradients and one forward pass more.
        norm: as for `fgsm`.
        loss: as for `fgsm`.
        target: as for `fgsm`.
        start: as for `ifgsm`.
        restarts: how many runs, each from a start of its own and on the examples that are not fooled yet.
        rho: the share of rising steps below which the step size is halved, in [0, 1].
        eot: as for `fgsm`.
        mode: as for `fgsm`.
        tally: as for `fgsm`.

    Returns:
        The attacked images, like those of `fgsm`: per example the first iterate (the start among them) that fools the
        model, or, if there is none, the one of highest loss. An example that is fooled leaves the batch at the next
        checkpoint, unless some part of the model is in training mode.

    Raises:
        TypeError: as `fgsm`.
        ValueError: as `ifgsm`, and if ``rho`` is above 1.
    """
    eps = radius(eps, norm)
    steps = integer("steps", steps)
    rho = number("rho", rho, least=0)
    if rho > 1:
        raise ValueError(f"rho: got {rho!r}, expected a number in [0, 1]")
    given = setting(
        model,
        images,
        labels,
        eps=eps,
        norm=norm,
        loss=loss,
        target=target,
        start=start,
        restarts=restarts,
        eot=eot,
        generator=generator,
        mode=mode,
        tally=tally,
    )
    with given as attack:

        def run(x0: Tensor, ball: Ball, index: Tensor | None, best: Best) -> None:
            trying = _Trying(attack.objective, best, drops=attack.independent)
            eta = 2 * min(eps, math.sqrt(x0[0].numel()))  # no ball in the box is larger
            _run(trying, x0, ball, index, eta=eta, steps=steps, rho=rho)

        return attack.best_of(restarts, run)


def checkpoints(steps: int) -> tuple[int, ...]:
    """The iterations w_1 < w_2 < ... <= ``steps`` at which step sizes are reviewed."""
    # In hundredths, so that ceil does not round 57.00000000000001 up.
    before, p, reviewed = 0, 22, []
    while p <= 100:
        reviewed.append(-(-p * steps // 100))
        before, p = p, p + max(p - before - 3, 6)
    return tuple(dict.fromkeys(reviewed))


class _Trying:
    """Scores iterates and offers each to ``best``; ``drops`` says whether fooled examples may leave the batch."""

    def __init__(self, objective: AttackLoss, best: Best, *, drops: bool) -> None:
        self._objective, self.best, self.drops = objective, best, drops

    def __call__(self, x: Tensor, index: Tensor | None, *, differentiate: bool) -> Scores:
        scores = (self._objective.differentiate if differentiate else self._objective.evaluate)(x, index)
        self.best.offer(x, scores.losses, self._objective.fooled(scores, index), index)
        return scores


class _State(NamedTuple):
    """One run between two iterations; every part has one row for each example.

    Attributes:
        x, before: x_k and x_{k-1}.
        gradient, loss: at x_k.
        eta: step sizes, (n, 1, ...).
        top, top_gradient, top_loss: the point of highest loss so far.
        rises: steps since the last checkpoint in which the loss rose.
        reviewed_loss: the highest loss at the last checkpoint.
        halved: whether eta was halved there.
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


def _run(trying: _Trying, x0: Tensor, ball: Ball, index: Tensor | None, *, eta: float, steps: int, rho: float) -> None:
    _, loss, gradient = trying(x0, index, differentiate=True)
    assert gradient is not None
    n = len(x0)
    state = _State(
        x=x0,
        before=x0,
        gradient=gradient,
        loss=loss,
        eta=x0.new_full((n, *[1] * (x0.ndim - 1)), eta),
        top=x0,
        top_gradient=gradient,
        top_loss=loss,
        rises=torch.zeros(n, dtype=torch.int64, device=x0.device),
        reviewed_loss=loss,
        halved=torch.zeros(n, dtype=torch.bool, device=x0.device),
    )
    reviews, last_review = checkpoints(steps), 0
    for k in range(1, steps + 1):
        x = _next(state, ball, inertia=1.0 if k == 1 else _INERTIA)
        scores = trying(x, index, differentiate=k < steps)  # nothing follows the last gradient
        if k == steps:
            return
        assert scores.gradient is not None
        state = _moved(state, x, scores.losses, scores.gradient)
        if k in reviews:
            state = _reviewed(state, fewest=rho * (k - last_review))
            last_review = k
            still_open = ~(trying.best.fooled if index is None else trying.best.fooled[index])
            if not still_open.any():
                return
            if trying.drops and not still_open.all():
                rows = still_open.nonzero()[:, 0]
                index = rows if index is None else index[rows]
                state, ball = _State(*(part[rows] for part in state)), ball.rows(rows)


def _next(state: _State, ball: Ball, *, inertia: float) -> Tensor:
    """x_{k+1}."""
    z = ball.project(ball.ascend(state.x, state.gradient, state.eta))
    if inertia == 1.0:
        return z
    return ball.project(state.x + inertia * (z - state.x) + (1 - inertia) * (state.x - state.before))


def _moved(state: _State, x: Tensor, loss: Tensor, gradient: Tensor) -> _State:
    """The state with x_{k+1} in it."""
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


def _reviewed(state: _State, *, fewest: float) -> _State:
    """The state after a checkpoint: where it got stuck, eta halved and x moved to the point of highest loss."""
    stuck = (state.rises < fewest) | (~state.halved & (state.top_loss == state.reviewed_loss))
    shaped = stuck.view(state.eta.shape)
    return state._replace(
        x=torch.where(shaped, state.top, state.x),
        gradient=torch.where(shaped, state.top_gradient, state.gradient),
        loss=torch.where(stuck, state.top_loss, state.loss),
        eta=torch.where(shaped, state.eta / 2, state.eta),
        rises=torch.zeros_like(state.rises),
        reviewed_loss=state.top_loss,
        halved=stuck,
    )
