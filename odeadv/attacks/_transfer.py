"""Attacked images that were made on another model or by other methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from odeadv.attacks._setting import Best
from odeadv.attacks.checks import check_images, check_labels, check_model, check_target
from odeadv.attacks.objective import AttackLoss, LossArgument, attacking, constant, resolve_loss
from odeadv.support.checks import shown
from odeadv.support.isolation import Mode


def worst_of(
    model: nn.Module,
    candidates: Sequence[Tensor],
    labels: Tensor,
    *,
    loss: LossArgument = "ce",
    target: Tensor | None = None,
    mode: Mode = "eval",
) -> Tensor:
    """Return the strongest of several attacked versions of each image.

    The strongest version is the first that fools ``model``, or the version of highest loss if none fools it.

    Args:
        model: as for `fgsm`. It need not be differentiable.
        candidates: attacked images, each (n, ...), all of one shape, floating, values in [0, 1].
        labels: (n,), int64 class indices.
        loss: as for `fgsm`. It ranks the images that do not fool the model. ``"kl"`` is not possible.
        target: (n,), int64 classes to be reached; None if any wrong class counts.
        mode: as for `fgsm`.

    Returns:
        (n, ...), the strongest version of each image, detached.

    Raises:
        TypeError: as `fgsm`.
        ValueError: as `fgsm`, and if ``candidates`` is empty or their shapes differ.
    """
    candidates = tuple(candidates)
    if not candidates:
        raise ValueError("candidates: got none, expected at least one tensor of images")
    for images in candidates:
        check_images(images)
        if images.shape != candidates[0].shape:
            raise ValueError(
                f"candidates: got shapes {tuple(candidates[0].shape)} and {tuple(images.shape)}, expected one shape"
            )
    rule = resolve_loss(loss)
    if rule.needs_clean:
        raise ValueError(f"loss: got {shown(loss)}, expected 'ce', 'margin', 'dlr' or a function")
    check_model(model)
    check_labels(labels, len(candidates[0]), candidates[0].device)
    target = check_target(target, labels)
    with attacking(model, mode, candidates[0].device), torch.no_grad():
        scored = AttackLoss(
            model, constant(labels), rule, target=None if target is None else constant(target), attack="worst_of"
        )
        best = Best(constant(candidates[0]))
        for images in map(constant, candidates):
            scores = scored.evaluate(images)
            best.offer(images, scores.losses, scored.fooled(scores))
    return best.images


def transfer(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    surrogates: Sequence[nn.Module],
    attack: Callable[[nn.Module, Tensor, Tensor], Tensor],
    loss: LossArgument = "ce",
    target: Tensor | None = None,
    mode: Mode = "eval",
) -> Tensor:
    """Attack other models, and return for each image the version that is worst for ``model``.

    The gradient of ``model`` is never used. Source: Papernot, McDaniel and Goodfellow 2016, "Transferability in
    Machine Learning".

    Args:
        model: as for `fgsm`. This is the model that is evaluated. It need not be differentiable.
        images: as for `fgsm`.
        labels: as for `fgsm`.
        surrogates: the models that are attacked.
        attack: called as ``attack(surrogate, images, labels)``, e.g. ``functools.partial(ifgsm, eps=8/255,
            alpha=2/255, steps=20)``.
        loss: as for `worst_of`.
        target: as for `worst_of`. Give it to ``attack`` as well.
        mode: as for `fgsm`. It applies to ``model`` only.

    Returns:
        (n, ...), chosen by `worst_of` among one attacked version per surrogate.

    Raises:
        TypeError: as `worst_of`, and if ``surrogates`` is a model itself.
        ValueError: as `worst_of`, and if ``surrogates`` is empty.
    """
    if isinstance(surrogates, nn.Module):  # a Sequential would be read as a sequence of its layers
        raise TypeError(f"surrogates: got one {type(surrogates).__name__}, expected a sequence of models, e.g. [model]")
    if not surrogates:
        raise ValueError("surrogates: got none, expected at least one model")
    check_model(model)
    check_images(images)
    check_labels(labels, len(images), images.device)
    attacked = [attack(surrogate, images, labels) for surrogate in surrogates]
    return worst_of(model, attacked, labels, loss=loss, target=target, mode=mode)
