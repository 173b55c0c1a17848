"""The attacks with a fixed step size: FGSM, IFGSM and PGD, and the loop that they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from odeadv.attacks._setting import Best, Setting, setting
from odeadv.attacks._start import GivenStart
from odeadv.attacks.balls import Ball, Norm, divided
from odeadv.attacks.checks import lengths
from odeadv.attacks.objective import LossArgument, Tally, Target
from odeadv.support.checks import choice, integer, number
from odeadv.support.isolation import Mode

Keep = Literal["last", "worst"]


def fgsm(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    norm: Norm = "linf",
    loss: LossArgument = "ce",
    target: Target | None = None,
    eot: int = 1,
    generator: torch.Generator | None = None,
    mode: Mode = "eval",
    tally: Tally | None = None,
) -> Tensor:
    """Attack with the fast gradient sign method: one step of length ``eps`` from the images, clipped to [0, 1].

    Let x be the images and g the gradient of the loss at x. The step is ``x + eps * sign(g)`` in the L-infinity norm
    and ``x + eps * g / ||g||_2`` (FGM) in the L2 norm. The result is bitwise equal to `ifgsm` with
    ``steps=1, alpha=eps``. Source: Goodfellow,
    Shlens and Szegedy 2015, "Explaining and Harnessing Adversarial Examples".

    Args:
        model: maps images to logits (n, classes), classes >= 2, and normalises the images itself.
        images: (n, channels, height, width) or (n, ...), floating, values in [0, 1].
        labels: (n,), int64 class indices, on the device of the images.
        eps: radius of the ball, in pixel units of [0, 1], e.g. 8/255; for L2, 1.0 is one pixel from black to white.
            A floating tensor (n,) gives one radius per image.
        norm: ``"linf"`` or ``"l2"``.
        loss: the function that the attack raises. ``"ce"`` is cross-entropy. ``"margin"`` is max_{j != y} z_j - z_y
            with logits z and label y. ``"dlr"`` is the difference of logits ratio (Croce and Hein 2020). ``"kl"`` is
            KL(clean probabilities || attacked probabilities); its gradient is 0 at the clean images, so give an attack
            that has a ``start`` another one. Or give a function (logits, labels) -> losses (n,). It gets logits in
            at least float32.
        target: (n,), int64 classes to be reached. ``"most-likely"`` and ``"least-likely"`` choose the wrong class with
            the largest or smallest logit of the clean image (one more forward pass). The attack then lowers the loss
            of the target. (``"dlr"`` has a separate targeted form; ``"kl"`` cannot be targeted.)
        eot: number of forward passes over which the gradient is averaged, for models that draw random numbers
            ("expectation over transformation", Athalye et al. 2018).
        generator: the only source of the attack's randomness, on any device. If it is None and the attack needs random
            numbers, ``torch.Generator().manual_seed(0)`` is used, so every call draws the same numbers. During the
            attack the generator also seeds torch's global random state, from which a stochastic model draws.
        mode: run the model in ``"eval"`` or ``"train"`` mode, or ``"unchanged"``. In every case modes, buffers,
            ``requires_grad``, ``.grad`` and torch's global random state are restored afterwards.
        tally: a `Tally` that receives the number of times each example went through the model.

    Returns:
        The attacked images, detached, with the shape, dtype, device and memory format of ``images``. The distance of
        every attacked image from its clean image is at most ``eps``, to the last bit. All pixels are in [0, 1].

    Raises:
        TypeError: if an argument is of the wrong type or dtype.
        ValueError: if an argument is out of range or of the wrong shape, or if logits or gradient are not finite.

    Example:
        >>> net = odeadv.models.pretrained("digits-natural")
        >>> images, labels = torch.rand(2, 3, 16, 16), torch.tensor([3, 7])
        >>> odeadv.attacks.fgsm(net, images, labels, eps=8 / 255).shape
        torch.Size([2, 3, 16, 16])
    """
    return _attack(
        "fgsm", model, images, labels, eps=eps, alpha=eps, steps=1, momentum=0.0, start="clean", restarts=1,
        keep="last", norm=norm, loss=loss, target=target, eot=eot, generator=generator, mode=mode, tally=tally,
    )  # fmt: skip


def ifgsm(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    alpha: float | Tensor | None = None,
    steps: int = 10,
    norm: Norm = "linf",
    loss: LossArgument = "ce",
    target: Target | None = None,
    momentum: float = 0.0,
    start: GivenStart = "clean",
    keep: Keep = "last",
    eot: int = 1,
    generator: torch.Generator | None = None,
    mode: Mode = "eval",
    tally: Tally | None = None,
) -> Tensor:
    """Attack with the iterated fast gradient sign method: ``steps`` steps of length ``alpha``, from the images.

    Each iterate is projected to the ball and to [0, 1]; by default the last one is returned. With ``momentum=1.0``
    it is MI-FGSM. Sources: Kurakin, Goodfellow and Bengio 2017, "Adversarial Examples in the Physical World"; Dong et
    al. 2018, "Boosting Adversarial Attacks with Momentum".

    Args:
        model: as for `fgsm`.
        images: as for `fgsm`.
        labels: as for `fgsm`.
        eps: as for `fgsm`.
        alpha: length of one step in ``norm``, in the units of ``eps``; None means eps / 4. A floating tensor (n,)
            gives one length per image.
        steps: number of steps.
        norm: as for `fgsm`.
        loss: as for `fgsm`.
        target: as for `fgsm`.
        momentum: the decay mu in g_{k+1} = mu g_k + gradient / ||gradient||_1; steps follow g_{k+1}. 0 means that
            steps follow the gradient.
        start: ``"clean"``; ``"uniform"`` draws from the ball; ``"gaussian"`` adds 0.001 times standard normal noise
            (see `Gaussian`); a tensor like ``images``; or a function (images, generator) -> images. Every start is
            projected to the ball and to [0, 1], and all iterates are. Attacks with an argument ``keep`` have one
            exception: if the start is a tensor and ``keep="last"``, the first gradient is taken at the tensor itself,
            as TRADES does.
        keep: ``"last"`` returns the last iterate. ``"worst"`` returns for each example the first iterate that fools
            the model, or the iterate of highest loss if no iterate fools it. The start counts as an iterate. The run
            ends when all examples are fooled. ``"worst"`` costs one more forward pass.
        eot: as for `fgsm`.
        generator: as for `fgsm`.
        mode: as for `fgsm`.
        tally: as for `fgsm`.

    Returns:
        The attacked images, as from `fgsm`.

    Raises:
        TypeError: as `fgsm`.
        ValueError: as `fgsm`.

    Example:
        >>> net = odeadv.models.pretrained("digits-natural")
        >>> images, labels = torch.rand(2, 3, 16, 16), torch.tensor([3, 7])
        >>> odeadv.attacks.ifgsm(net, images, labels, eps=8 / 255, alpha=2 / 255, steps=5).shape
        torch.Size([2, 3, 16, 16])
    """
    return _attack(
        "ifgsm", model, images, labels, eps=eps, alpha=alpha, steps=steps, momentum=momentum, start=start, restarts=1,
        keep=keep, norm=norm, loss=loss, target=target, eot=eot, generator=generator, mode=mode, tally=tally,
    )  # fmt: skip


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    alpha: float | Tensor | None = None,
    steps: int = 10,
    generator: torch.Generator | None = None,
    norm: Norm = "linf",
    loss: LossArgument = "ce",
    target: Target | None = None,
    momentum: float = 0.0,
    start: GivenStart = "uniform",
    restarts: int = 1,
    keep: Keep = "last",
    eot: int = 1,
    mode: Mode = "eval",
    tally: Tally | None = None,
) -> Tensor:
    """Attack with projected gradient descent: `ifgsm` from a start drawn uniformly from the ball, ``restarts`` times.

    Source: Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks".

    Args:
        model: as for `fgsm`.
        images: as for `fgsm`.
        labels: as for `fgsm`.
        eps: as for `fgsm`.
        alpha: as for `ifgsm`.
        steps: number of steps per run.
        generator: as for `fgsm`.
        norm: as for `fgsm`.
        loss: as for `fgsm`.
        target: as for `fgsm`.
        momentum: as for `ifgsm`.
        start: as for `ifgsm`.
        restarts: number of runs, each from its own start. One run returns its last iterate. With several runs, the
            last iterates of all runs are compared for each example. The first of them that fools the model is
            returned, or the one of highest loss if none does. Fooled examples are left out of later runs, unless some
            part of the model is in training mode (examples may then depend on each other). If there are several runs,
            each costs one more forward pass.
        keep: as for `ifgsm`. With ``"worst"`` the choice is among all iterates of all runs.
        eot: as for `fgsm`.
        mode: as for `fgsm`.
        tally: as for `fgsm`.

    Returns:
        The attacked images, as from `fgsm`.

    Raises:
        TypeError: as `fgsm`.
        ValueError: as `fgsm`.

    Example:
        >>> net = odeadv.models.pretrained("digits-natural")
        >>> images, labels = torch.rand(2, 3, 16, 16), torch.tensor([3, 7])
        >>> odeadv.attacks.pgd(net, images, labels, eps=8 / 255, steps=5).shape
        torch.Size([2, 3, 16, 16])
    """
    return _attack(
        "pgd", model, images, labels, eps=eps, alpha=alpha, steps=steps, momentum=momentum, start=start,
        restarts=restarts, keep=keep, norm=norm, loss=loss, target=target, eot=eot, generator=generator, mode=mode,
        tally=tally,
    )  # fmt: skip


def _attack(
    name: str,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    alpha: float | Tensor | None,
    steps: int,
    momentum: float,
    restarts: int,
    keep: Keep,
    **shared: Any,
) -> Tensor:
    """Make ``restarts`` runs of ``steps`` steps; ``shared`` has the other arguments of `setting`."""
    steps = integer("steps", steps)
    momentum = number("momentum", momentum, least=0)
    choice("keep", keep, ("last", "worst"))
    with setting(name, model, images, labels, restarts=restarts, **shared) as attack:
        run = _FixedSteps(attack, attack.eps / 4 if alpha is None else lengths("alpha", alpha, images), steps, momentum)
        if restarts == 1 and keep == "last":
            x0, given = attack.begin(), shared["start"]
            return run(torch.empty_like(x0).copy_(given.detach()) if isinstance(given, Tensor) else x0, attack.ball)
        best = Best(attack.images)
        for x0, ball, index in attack.runs(restarts, best):
            if keep == "last":
                attack.offer(best, run(x0, ball, index), index)
            else:
                run.offering(best, x0, ball, index)
        return best.images


class _FixedSteps:
    """Runs with steps of a fixed length.

    Args:
        attack: the loss and the other parts of this call.
        alpha: length of a step; a number, or a float64 tensor (n, 1, ...).
        steps: number of steps.
        momentum: decay of the momentum; 0 switches momentum off.
    """

    def __init__(self, attack: Setting, alpha: float | Tensor, steps: int, momentum: float) -> None:
        self._attack, self._alpha, self._steps, self._momentum = attack, alpha, steps, momentum

    def __call__(self, x0: Tensor, ball: Ball, index: Tensor | None = None) -> Tensor:
        """Return the last iterate of a run from ``x0``; ``index`` has the numbers of the examples (None: all)."""

        def gradient(x: Tensor) -> Tensor:
            found = self._attack.loss.differentiate(x, index).gradient
            assert found is not None
            return found

        x = x0
        for moved in self._iterates(gradient, x0, ball, index):
            x = moved
        return x

    def offering(self, best: Best, x0: Tensor, ball: Ball, index: Tensor | None) -> None:
        """Offer every iterate, including ``x0``, to ``best``; stop when all examples are fooled."""
        loss = self._attack.loss

        def offered_gradient(x: Tensor) -> Tensor:
            scores = loss.differentiate(x, index)
            assert scores.gradient is not None
            best.offer(x, scores.losses, loss.fooled(scores, index), index)
            return scores.gradient

        x = x0
        for moved in self._iterates(offered_gradient, x0, ball, index):
            x = moved
            if best.fooled.all():
                return
        self._attack.offer(best, x, index)

    def _iterates(
        self, gradient: Callable[[Tensor], Tensor], x0: Tensor, ball: Ball, index: Tensor | None
    ) -> Iterator[Tensor]:
        alpha = self._alpha
        if isinstance(alpha, Tensor):
            # Use at least float32: torch also adds a Python number to a half-precision tensor in float32.
            alpha = alpha.to(torch.promote_types(x0.dtype, torch.float32))
            alpha = alpha if index is None else alpha[index]
        direction = with_momentum(gradient, self._momentum) if self._momentum else gradient
        return islice(iterates(direction, x0, alpha=alpha, bounds=ball), self._steps)


def iterates(
    gradient: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    alpha: float | Tensor,
    bounds: Ball,
    first_gradient: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield x_1, x_2, ... endlessly: x_{k+1} = project(ascend(x_k, gradient(x_k), alpha)), x_0 = ``start``.

    In the L-infinity norm ``ascend`` is x + alpha * sign(gradient), in the L2 norm x + alpha * gradient / ||gradient||.
    The gradient at x_k is evaluated only when x_{k+1} is requested, so k iterates cost k gradients.

    Args:
        gradient: maps images to the gradient, both (n, ...).
        start: x_0, (n, ...), within ``bounds``.
        alpha: step size, in pixel units of [0, 1].
        bounds: the allowed set, with the norm in which steps are measured.
        first_gradient: the gradient at ``start``, if it is known already.
    """
    x, direction = start, first_gradient
    while True:
        x = bounds.project(bounds.ascend(x, gradient(x) if direction is None else direction, alpha))
        yield x
        direction = None


def with_momentum(gradient: Callable[[Tensor], Tensor], decay: float) -> Callable[[Tensor], Tensor]:
    """Return ``gradient`` with memory: g_{k+1} = decay * g_k + gradient(x_k) / ||gradient(x_k)||_1, g_0 = 0.

    Each example has its own memory. A gradient that is 0 adds nothing. Use the returned function for one run only.
    Source: Dong et al. 2018, "Boosting Adversarial Attacks with Momentum", Eq. 6.
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
