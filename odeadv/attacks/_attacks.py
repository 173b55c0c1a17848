"""The public attacks, each a choice of start, step size and number of steps."""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor, nn

from odeadv._state import Mode
from odeadv.attacks._checks import check_images, check_labels, check_model, non_negative, positive_integer
from odeadv.attacks._iterates import iterates
from odeadv.attacks._linf import linf_bounds
from odeadv.attacks._objective import Loss, Objective, attacking, constant, resolve_loss
from odeadv.attacks._start import Start, clean_start, uniform_start


def fgsm(
    model: nn.Module, images: Tensor, labels: Tensor, *, eps: float, loss: Loss = "ce", mode: Mode = "eval"
) -> Tensor:
    """The fast gradient sign method: one signed step of size ``eps`` from the images, clipped to [0, 1].

    Bitwise equal to `ifgsm` with ``steps=1, alpha=eps``. Source: Goodfellow, Shlens and Szegedy 2015, "Explaining
    and Harnessing Adversarial Examples".

    Args:
        model: images to logits (n, classes); its normalisation inside.
        images: (n, channels, height, width) or (n, ...), floating, values in [0, 1].
        labels: (n,), int64 class indices, on the device of the images.
        eps: radius of the L-infinity ball, in pixel units of [0, 1], e.g. 8/255.
        loss: what is ascended: ``"ce"``, cross-entropy, or a function (logits, labels) -> losses of shape (n,).
        mode: run the model in ``"eval"`` or ``"train"`` mode, or ``"unchanged"``. Whichever, modes, buffers,
            ``requires_grad`` and ``.grad`` of the model are afterwards what they were.

    Returns:
        The attacked images: shape, dtype, device and memory format of ``images``, detached. No pixel is further
        than ``eps`` from the clean one, to the last bit, nor outside [0, 1].

    Raises:
        TypeError: if an argument is of the wrong type or dtype.
        ValueError: if an argument is out of range or of the wrong shape, or if logits or gradient are not finite.
    """
    return _attack(model, images, labels, eps=eps, alpha=eps, steps=1, loss=loss, mode=mode)


def ifgsm(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    alpha: float,
    steps: int,
    loss: Loss = "ce",
    mode: Mode = "eval",
) -> Tensor:
    """The iterated fast gradient sign method: ``steps`` signed steps from the images, no random start.

    Each iterate is projected to the eps-ball and to [0, 1]; the last one is returned. Source: Kurakin, Goodfellow
    and Bengio 2017, "Adversarial Examples in the Physical World".

    Args:
        model: as for `fgsm`.
        images: as for `fgsm`.
        labels: as for `fgsm`.
        eps: radius of the L-infinity ball, in pixel units of [0, 1].
        alpha: size of one step, in the same units.
        steps: how many steps.
        loss: as for `fgsm`.
        mode: as for `fgsm`.

    Returns:
        The attacked images, as from `fgsm`.

    Raises:
        TypeError: as `fgsm`.
        ValueError: as `fgsm`.
    """
    return _attack(model, images, labels, eps=eps, alpha=alpha, steps=steps, loss=loss, mode=mode)


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    alpha: float,
    steps: int,
    generator: torch.Generator,
    loss: Loss = "ce",
    mode: Mode = "eval",
) -> Tensor:
    """Projected gradient descent: `ifgsm` from a start drawn uniformly from the eps-ball, clipped to [0, 1].

    Source: Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks".

    Args:
        model: as for `fgsm`.
        images: as for `fgsm`.
        labels: as for `fgsm`.
        eps: radius of the L-infinity ball, in pixel units of [0, 1].
        alpha: size of one step, in the same units.
        steps: how many steps.
        generator: the only source of the start's randomness; of any device, e.g. ``torch.Generator().manual_seed(0)``.
        loss: as for `fgsm`.
        mode: as for `fgsm`.

    Returns:
        The attacked images, as from `fgsm`.

    Raises:
        TypeError: as `fgsm`.
        ValueError: as `fgsm`, and if ``generator`` is not a ``torch.Generator``.
    """
    if not isinstance(generator, torch.Generator):
        raise ValueError(f"generator: got {generator!r}, expected e.g. torch.Generator().manual_seed(0)")
    start = uniform_start(non_negative("eps", eps), generator)
    return _attack(model, images, labels, eps=eps, alpha=alpha, steps=steps, loss=loss, mode=mode, start=start)


def _attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    alpha: float,
    steps: int,
    loss: Loss,
    mode: Mode,
    start: Start = clean_start,
) -> Tensor:
    eps = non_negative("eps", eps)
    alpha = non_negative("alpha", alpha)
    steps = positive_integer("steps", steps)
    per_example_loss = resolve_loss(loss)
    check_model(model)
    check_images(images)
    check_labels(labels, len(images), images.device)
    with attacking(model, mode):
        images = constant(images)
        bounds = linf_bounds(images, eps)
        objective = Objective(model, constant(labels), per_example_loss)
        path = iterates(objective.gradient, start(images, bounds), alpha=alpha, bounds=bounds)
        return next(islice(path, steps - 1, None))
