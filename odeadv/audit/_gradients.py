"""Checks that the gradient describes the loss: not masked, not saturated, not lost in rounding."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from odeadv.attacks import ifgsm
from odeadv.attacks.objective import PerExampleLoss, cross_entropy, margin
from odeadv.audit._checklist import Finding, check, not_applicable
from odeadv.audit._subject import Subject

# Two attacks of about equal strength differ on more examples than two runs of the same attack, so allow a multiple of
# the tolerance.
_EQUAL_STRENGTH = 5

# The curvature of a loss changes its slope by a few per cent over eps/100. The gradient of another function differs
# much more.
_SLOPE_TOLERANCE = 0.25


@check(
    "gradients not zero",
    "If the gradient of the loss is exactly zero, a gradient attack does not move. The robustness is masked (rounding, "
    "a step function, a saturated softmax), not real.",
)
def gradients_not_zero(subject: Subject) -> Finding:
    """Count the examples whose gradient is zero or not finite."""
    zero = not_finite = 0
    for part in subject.batches():
        _, found = _gradient(subject.model, subject.images[part], subject.labels[part], cross_entropy)
        flat = found.flatten(1)
        zero += int((flat == 0).all(dim=1).sum())
        not_finite += int((~flat.isfinite()).any(dim=1).sum())
    figures = {"zero": zero, "not_finite": not_finite, "fraction_zero": zero / subject.n}
    text = f"{zero} of {subject.n} examples have a gradient of exactly zero, {not_finite} one that is not finite"
    return Finding(zero <= subject.allowed and not not_finite, text, figures)


@check(
    "another loss",
    "The margin of the logits, or rescaled logits, break images that cross-entropy does not: cross-entropy saturates "
    "on this model, so its robust accuracy is too high.",
    repeatable=True,
)
def another_loss(subject: Subject) -> Finding:
    """Attack the examples that resist cross-entropy with other losses."""
    scale = float(subject.logits(subject.images).std(dim=1).mean())
    if not scale > 0:
        return not_applicable("all logits of an image are equal")
    plain = subject.evaluated(subject.spec(subject.counts.steps)).attacks[0]
    survivors = subject.resisted(plain)
    index = survivors.nonzero().squeeze(1)
    rescaled = _Rescaled(subject.model, scale).eval()
    before = len(index)
    for loss in (cross_entropy, margin):
        index = _survivors(subject, rescaled, index, loss)
    broken = before - len(index)
    kept = torch.zeros_like(survivors)
    kept[index] = True
    subject.unbroken &= kept
    loose = max(1, _EQUAL_STRENGTH * subject.allowed)
    figures = {"broken_by_other_losses_only": broken, "allowed": loose, "scale": scale}
    text = f"{broken} of {subject.n} examples resist cross-entropy but fall to rescaled logits or the margin"
    return Finding(broken <= loose, text, figures)


@check(
    "local linearity",
    "A small step along the gradient does not change the loss as the gradient says. The loss may have steps (rounded "
    "inputs, quantised activations) or be shattered; or the gradient is that of another function, which is what a "
    "straight-through estimator does on purpose. Attacks along such a gradient may still work: compare with the "
    "gradient-free attack.",
    repeatable=True,
)
def local_linearity(subject: Subject) -> Finding:
    """Compare the change of the margin over small and large steps with the change that the gradient predicts."""
    part = subject.batches()[0]
    model, dtype = _double(subject)
    images, labels = subject.images[part].to(dtype), subject.labels[part]
    losses, gradient = _gradient(model, images, labels, margin)
    flat = gradient.flatten(1)
    # The slope in the steepest direction is the dual norm of the gradient.
    slope = flat.abs().sum(dim=1) if subject.norm == "linf" else flat.norm(dim=1)
    length = slope.view(-1, *[1] * (images.ndim - 1)).clamp(min=torch.finfo(dtype).tiny)
    direction = gradient.sign() if subject.norm == "linf" else gradient / length
    kept = slope > 0
    small, large = (
        _median_ratio(model, images + radius * direction, labels, losses, radius * slope, kept)
        for radius in (0.01 * subject.eps, subject.eps)
    )
    usable = float(kept.float().mean())
    good = usable > 0.5 and abs(small - 1) <= _SLOPE_TOLERANCE
    # A straight-through estimator follows a step function on average: its gradient fits large steps, not small ones.
    straight = usable > 0.5 and not good and 0.5 <= large <= 2
    figures = {
        "ratio_at_eps_over_100": small,
        "ratio_at_eps": large,
        "fraction_with_slope": usable,
        "may_be_straight_through": straight,
    }
    along = "the gradient's signs" if subject.norm == "linf" else "the gradient"
    text = (
        f"a step of eps/100 along {along} changes the margin by {small:.2f} times what the "
        f"gradient says, a step of eps by {large:.2f} times (medians)"
    )
    if not usable:
        text = "the gradient of the margin is zero for every image"
    if straight:
        text += "; the gradient fits large steps only, as that of a straight-through estimator does"
    return Finding(good, text, figures)


@check(
    "float precision",
    "The outcomes change if the same attack is computed in float64: the gradients are lost in rounding, so attack in "
    "float64 or on rescaled logits.",
    repeatable=True,
)
def float_precision(subject: Subject) -> Finding:
    """Compare the outcomes of one attack on the model and on its float64 copy."""
    if subject.images.dtype == torch.float64:
        return not_applicable("the model is in float64 already")
    model, dtype = _double(subject)
    if dtype != torch.float64:
        return not_applicable("the model cannot be copied to float64")
    single, double = (
        subject.resisted(subject.evaluated_as(network, images, subject.spec(subject.counts.steps)).attacks[0])
        for network, images in ((subject.model, subject.images), (model, subject.images.double()))
    )
    differ, only_double = int((single != double).sum()), int((single & ~double).sum())
    loose = max(1, _EQUAL_STRENGTH * subject.allowed)
    figures = {"outcomes_that_differ": differ, "broken_in_float64_only": only_double, "allowed": loose}
    text = f"{differ} of {subject.n} worst-so-far outcomes differ between {subject.images.dtype} and float64"
    return Finding(differ <= loose, text.replace("torch.", ""), figures)


GRADIENTS = (gradients_not_zero, another_loss, local_linearity, float_precision)


class _Rescaled(nn.Module):
    """The model with its logits divided by their spread ``scale``, so that their softmax does not saturate."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits / self.scale


def _survivors(subject: Subject, model: nn.Module, index: Tensor, loss: PerExampleLoss) -> Tensor:
    """Return the examples of ``index`` that IFGSM with ``loss`` does not break."""
    kept = [index[:0]]
    for part in torch.split(index, subject.counts.batch_size) if len(index) else ():
        images, labels = subject.images[part], subject.labels[part]
        found = ifgsm(
            model, images, labels, eps=subject.eps, alpha=subject.eps / 4, steps=subject.counts.steps, loss=loss,
            norm=subject.norm,
        )  # fmt: skip
        kept.append(part[subject.logits(found).argmax(dim=1) == labels])
    return torch.cat(kept)


def _gradient(model: nn.Module, images: Tensor, labels: Tensor, loss: PerExampleLoss) -> tuple[Tensor, Tensor]:
    """Return the losses (n,) and the gradient of their sum; the gradient is zero if the logits ignore the images."""
    leaf = images.detach().requires_grad_()
    losses = loss(model(leaf), labels)
    if not losses.requires_grad:
        return losses.detach(), torch.zeros_like(images)
    found = torch.autograd.grad(losses.sum(), leaf, allow_unused=True)[0]
    return losses.detach(), torch.zeros_like(images) if found is None else found


def _median_ratio(
    model: nn.Module, moved: Tensor, labels: Tensor, losses: Tensor, expected: Tensor, kept: Tensor
) -> float:
    """Return the median over ``kept`` of the margin's change divided by ``expected``; NaN if ``kept`` is empty."""
    with torch.no_grad():
        gained = margin(model(moved), labels) - losses
    return float((gained[kept] / expected[kept]).median()) if kept.any() else float("nan")


def _double(subject: Subject) -> tuple[nn.Module, torch.dtype]:
    """Return a float64 copy of the model and its dtype, or the model itself if it cannot be copied."""
    try:
        return copy.deepcopy(subject.model).double(), torch.float64
    except Exception:  # copying a user's module may raise any error
        return subject.model, subject.images.dtype
