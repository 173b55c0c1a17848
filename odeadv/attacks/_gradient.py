"""The attacks with a fixed step size, each a choice of start, step, momentum, number of steps and of runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Literal

import torch
from torch import Tensor, nn

from odeadv.attacks._setting import Best, setting
from odeadv.attacks._start import GivenStart
from odeadv.attacks.balls import Ball, Norm, divided
from odeadv.attacks.checks import radius
from odeadv.attacks.objective import AttackLoss, Loss, Tally
from odeadv.support.checks import choice, integer, number
from odeadv.support.isolation import Mode

Keep = Literal["last", "worst"]


def fgsm(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    norm: Norm = "linf",
    loss: Loss = "ce",
    target: Tensor | None = None,
    eot: int = 1,
    generator: torch.Generator | None = None,
    mode: Mode = "eval",
    tally: Tally | None = None,
) -> Tensor:
    """The fast gradient sign method: one step of length ``eps`` from the images, clipped to [0, 1].

    ``x + eps * sign(g)`` in the L-infinity norm, ``x + eps * g / ||g||_2`` (FGM) in the L2 norm, g the gradient of the
    loss. Bitwise equal to `ifgsm` with ``steps=1, alpha=eps``. Source: Goodfellow, Shlens and Szegedy 2015,
    "Explaining and Harnessing Adversarial Examples".

    Args:
        model: images to logits (n, classes); its normalisation inside.
        images: (n, channels, height, width) or (n, ...), floating, values in [0, 1].
        labels: (n,), int64 class indices, on the device of the images.
        eps: radius of the ball, in pixel units of [0, 1], e.g. 8/255; for L2, 1.0 is one pixel from black to white.
        norm: ``"linf"`` or ``"l2"``.
        loss: what is ascended: ``"ce"``, cross-entropy; ``"margin"``, max_{j != y} z_j - z_y; ``"dlr"``, the
            difference of logits ratio (Croce and Hein 2020); ``"kl"``, KL(clean probabilities || attacked) (its
            gradient is 0 at the clean images: start elsewhere); or a function (logits, labels) -> losses (n,). Logits
            are handed over in at least float32.
        target: (n,), int64 classes to be reached; the loss is then that of the target and descended (``"dlr"`` has
            a targeted form of its own, ``"kl"`` has none).
        eot: average the gradient over so many forward passes, for models that draw random numbers ("expectation over
            transformation", Athalye et al. 2018). Above 1 it needs ``generator``.
        generator: the only source of the attack's randomness, of any device, e.g.
            ``torch.Generator().manual_seed(0)``. If given, it also seeds torch's global random state, from which a
            stochastic model draws, for the time of the attack.
        mode: run the model in ``"eval"`` or ``"train"`` mode, or ``"unchanged"``. Whichever, modes, buffers,
            ``requires_grad``, ``.grad`` and torch's global random state are afterwards what they were.
        tally: a `Tally` to be filled with how often each example went through the model.

    Returns:
        The attacked images: shape, dtype, device and memory format of ``images``, detached. None is further than
        ``eps`` from the clean one, to the last bit, nor has a pixel outside [0, 1].

    Raises:
        TypeError: if an argument is of the wrong type or dtype.
        ValueError: if an argument is out of range or of the wrong shape, or if logits or gradient are not finite.
    """
    return ifgsm(
        model,
        images,
        labels,
        eps=eps,
        alpha=eps,
        steps=1,
        norm=norm,
        loss=loss,
        target=target,
        eot=eot,
        generator=generator,
        mode=mode,
        tally=tally,
    )


def ifgsm(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    alpha: float,
    steps: int,
    norm: Norm = "linf",
    loss: Loss = "ce",
    target: Tensor | None = None,
    momentum: float = 0.0,
    start: GivenStart = "clean",
    keep: Keep = "last",
    eot: int = 1,
    generator: torch.Generator | None = None,
    mode: Mode = "eval",
    tally: Tally | None = None,
) -> Tensor:
    """The iterated fast gradient sign method: ``steps`` steps of length ``alpha``, from the images themselves.

    Each iterate is projected to the ball and to [0, 1]; by default the last one is returned. With ``momentum=1.0``
    it is MI-FGSM. Sources: Kurakin, Goodfellow and Bengio 2017, "Adversarial Examples in the Physical World"; Dong et
    al. 2018, "Boosting Adversarial Attacks with Momentum".

    Args:
        model: as for `fgsm`.
        images: as for `fgsm`.
        labels: as for `fgsm`.
        eps: as for `fgsm`.
        alpha: length of one step in ``norm``, in the units of ``eps``.
        steps: how many steps.
        norm: as for `fgsm`.
        loss: as for `fgsm`.
        target: as for `fgsm`.
        momentum: the decay mu of g_{k+1} = mu g_k + gradient / ||gradient||_1, along which steps are taken; 0 for none.
        start: ``"clean"``; ``"uniform"``, in the ball; ``"gaussian"``, 0.001 times standard normal noise (see
            `Gaussian`); a tensor like ``images``; or a function (images, generator) -> images. Whichever, it is
            projected to the ball and to [0, 1]. Random starts need ``generator``.
        keep: ``"last"`` returns the last iterate. ``"worst"`` returns, per example, the first iterate that fools the
            model, or, if there is none, the one of highest loss, the start among them; the run ends when all examples
            are fooled. It costs one more forward pass.
        eot: as for `fgsm`.
        generator: as for `fgsm`.
        mode: as for `fgsm`.
        tally: as for `fgsm`.

    Returns:
        The attacked images, as from `fgsm`.

    Raises:
        TypeError: as `fgsm`.
        ValueError: as `fgsm`, and if randomness is asked for without a ``generator``.
    """
    return pgd(
        model,
        images,
        labels,
        eps=eps,
        alpha=alpha,
        steps=steps,
        norm=norm,
        loss=loss,
        target=target,
        momentum=momentum,
        start=start,
        keep=keep,
        eot=eot,
        generator=generator,
        mode=mode,
        tally=tally,
    )


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    alpha: float,
    steps: int,
    generator: torch.Generator | None,
    norm: Norm = "linf",
    loss: Loss = "ce",
    target: Tensor | None = None,
    momentum: float = 0.0,
    start: GivenStart = "uniform",
    restarts: int = 1,
    keep: Keep = "last",
    eot: int = 1,
    mode: Mode = "eval",
    tally: Tally | None = None,
) -> Tensor:
    """Projected gradient descent: `ifgsm` from a start drawn uniformly from the ball, any number of times.

    Source: Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks".

    Args:
        model: as for `fgsm`.
        images: as for `fgsm`.
        labels: as for `fgsm`.
        eps: as for `fgsm`.
        alpha: as for `ifgsm`.
        steps: how many steps, in each run.
        generator: as for `fgsm`; None only if nothing is random.
        norm: as for `fgsm`.
        loss: as for `fgsm`.
        target: as for `fgsm`.
        momentum: as for `ifgsm`.
        start: as for `ifgsm`.
        restarts: how many runs, each from a start of its own. Of one run the last iterate is returned. Of several,
            per example, that of the first run whose last iterate fools the model, or, if there is none, that of
            highest loss; and examples that are fooled are left out of later runs, unless some part of the model is in
            training mode (then examples may depend on each other). Each run then costs one more forward pass.
        keep: as for `ifgsm`; with ``"worst"`` the choice is among all iterates of all runs.
        eot: as for `fgsm`.
        mode: as for `fgsm`.
        tally: as for `fgsm`.

    Returns:
        The attacked images, as from `fgsm`.

    Raises:
        TypeError: as `fgsm`.
        ValueError: as `ifgsm`.
    """
    eps = radius(eps, norm)
    alpha = number("alpha", alpha, least=0)
    steps = integer("steps", steps)
    momentum = number("momentum", momentum, least=0)
    choice("keep", keep, ("last", "worst"))
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
        if restarts == 1 and keep == "last":
            return _run(attack.objective, attack.begin(), attack.ball, alpha=alpha, steps=steps, momentum=momentum)

        def run(x0: Tensor, ball: Ball, index: Tensor | None, best: Best) -> None:
            _run(
                attack.objective,
                x0,
                ball,
                alpha=alpha,
                steps=steps,
                momentum=momentum,
                index=index,
                best=best,
                every=keep == "worst",
            )

        return attack.best_of(restarts, run)


def _run(
    objective: AttackLoss,
    x0: Tensor,
    ball: Ball,
    *,
    alpha: float,
    steps: int,
    momentum: float,
    index: Tensor | None = None,
    best: Best | None = None,
    every: bool = False,
) -> Tensor:
    """The last iterate; it, and with ``every`` all before it, are offered to ``best``."""

    def offer_and_differentiate(x: Tensor) -> Tensor:
        scores = objective.differentiate(x, index)
        assert scores.gradient is not None
        if best is not None and every:
            best.offer(x, scores.losses, objective.fooled(scores, index), index)
        return scores.gradient

    gradient = with_momentum(offer_and_differentiate, momentum) if momentum else offer_and_differentiate
    x = x0
    for x in islice(iterates(gradient, x0, alpha=alpha, bounds=ball), steps):
        if best is not None and every and best.fooled.all():
            return x
    if best is not None:
        scores = objective.evaluate(x, index)
        best.offer(x, scores.losses, objective.fooled(scores, index), index)
    return x


def iterates(
    gradient: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    alpha: float,
    bounds: Ball,
    first_gradient: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield x_1, x_2, ... without end: x_{k+1} = project(ascend(x_k, gradient(x_k), alpha)), x_0 = ``start``.

    In the L-infinity norm ``ascend`` is x + alpha * sign(gradient), in the L2 norm x + alpha * gradient / ||gradient||.
    Lazy: the gradient at x_k is evaluated when x_{k+1} is asked for, so k iterates cost k gradients.

    Args:
        gradient: images to gradient, both (n, ...).
        start: x_0, (n, ...), within ``bounds``.
        alpha: step size, in pixel units of [0, 1].
        bounds: the allowed set, and the norm that steps are measured in.
        first_gradient: the gradient at ``start``, if known already.
    """
    x, direction = start, first_gradient
    while True:
        x = bounds.project(bounds.ascend(x, gradient(x) if direction is None else direction, alpha))
        yield x
        direction = None


def with_momentum(gradient: Callable[[Tensor], Tensor], decay: float) -> Callable[[Tensor], Tensor]:
    """``gradient`` with memory: g_{k+1} = decay * g_k + gradient(x_k) / ||gradient(x_k)||_1, g_0 = 0, per example.

    A gradient that is 0 adds nothing. One such function serves one run. Source: Dong et al. 2018, "Boosting
    Adversarial Attacks with Momentum", Eq. 6.
    """
    memory: Tensor | None = None

    def accumulated(x: Tensor) -> Tensor:
        nonlocal memory
        found = gradient(x)
        wide = found.to(torch.promote_types(found.dtype, torch.float32))
        normed = divided(wide, wide.abs().sum(dim=tuple(range(1, wide.ndim)), keepdim=True))
        memory = normed if memory is None else decay * memory + normed
        return memory.to(found.dtype)

    return accumulated
