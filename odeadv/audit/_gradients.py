"""Whether the gradient tells the truth about the loss: not masked, not saturated, not lost in rounding."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from odeadv.audit._report import Check
from odeadv.audit._subject import Loss, Subject, cross_entropy, gradient, margin, not_applicable, resisted, verdict
from odeadv.evaluation import AttackSpec, Protocol, evaluate

_MEANING = {
    "gradients not zero": (
        "Where the gradient of the loss is exactly zero a gradient attack stands still: the robustness is "
        "masked (rounding, a step function, a saturated softmax), not real."
    ),
    "another loss": (
        "The margin of the logits, rescaled, breaks images that cross-entropy does not: cross-entropy "
        "saturates on this model, so its robust accuracy is too high."
    ),
    "local linearity": (
        "A small step along the gradient does not change the loss as the gradient says: the gradient is "
        "shattered, masked or computed for another function than the forward pass."
    ),
    "float precision": (
        "The outcomes change when the same attack is computed in float64: the gradients are lost in rounding, "
        "so attack in float64 or on rescaled logits."
    ),
}


def gradient_checks(subject: Subject, usable: bool) -> list[Check]:
    """The lines; not applicable if the model cannot be attacked."""
    if not usable:
        return [not_applicable(name, "the model cannot be attacked", why) for name, why in _MEANING.items()]
    checks = []
    for name, check in zip(_MEANING, (_not_zero, _another_loss, _linearity, _precision), strict=True):
        try:
            checks.append(check(subject, name))
        except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
            checks.append(Check(name, "fail", {}, f"could not be checked: {error}", _MEANING[name]))
    return checks


def _not_zero(subject: Subject, name: str) -> Check:
    zero = not_finite = 0
    for part in subject.batches():
        _, found = gradient(subject.model, subject.images[part], subject.labels[part], cross_entropy)
        flat = found.flatten(1)
        zero += int((flat == 0).all(dim=1).sum())
        not_finite += int((~flat.isfinite()).any(dim=1).sum())
    figures = {"zero": zero, "not_finite": not_finite, "fraction_zero": zero / subject.n}
    found_text = f"{zero} of {subject.n} examples have a gradient of exactly zero, {not_finite} one that is not finite"
    return Check(name, verdict(zero <= subject.allowed and not not_finite), figures, found_text, _MEANING[name])


class _Rescaled(nn.Module):
    """The model with logits divided by their spread, so that no softmax of them saturates."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits / self.scale


def _another_loss(subject: Subject, name: str) -> Check:
    scale = float(subject.logits(subject.images).std(dim=1).mean())
    if not scale > 0:
        return not_applicable(name, "all logits of an image are equal", _MEANING[name])
    plain = subject.evaluated(AttackSpec("ifgsm", subject.eps, subject.eps / 4, subject.steps)).attacks[0]
    survivors = resisted(plain).to(subject.labels.device)
    broken = 0
    index = survivors.nonzero().squeeze(1)
    rescaled = _Rescaled(subject.model, scale).eval()
    for loss in (cross_entropy, margin):
        if len(index):
            kept = _survivors(subject, rescaled, index, loss)
            broken += len(index) - len(kept)
            index = kept
    loose = max(1, 5 * subject.allowed)
    figures = {"broken_by_other_losses_only": broken, "allowed": loose, "scale": scale}
    found = f"{broken} of {subject.n} examples resist cross-entropy but fall to rescaled logits or the margin"
    return Check(name, verdict(broken <= loose), figures, found, _MEANING[name])


def _survivors(subject: Subject, model: nn.Module, index: Tensor, loss: Loss) -> Tensor:
    """Which of ``index`` IFGSM along ``loss`` does not break."""
    from odeadv.attacks import ifgsm

    kept = []
    for part in torch.split(index, subject.batch_size):
        images, labels = subject.images[part], subject.labels[part]
        found = ifgsm(
            model,
            images,
            labels,
            eps=subject.eps,
            alpha=subject.eps / 4,
            steps=subject.steps,
            loss=loss,
        )
        with torch.no_grad():
            kept.append(part[subject.model(found).argmax(dim=1) == labels])
    return torch.cat(kept)


def _double(subject: Subject) -> tuple[nn.Module, torch.dtype]:
    """A copy of the model in float64; or, if it cannot be copied, the model itself."""
    try:
        return copy.deepcopy(subject.model).double(), torch.float64
    except Exception:  # a user's module may refuse in any way
        return subject.model, subject.images.dtype


def _linearity(subject: Subject, name: str) -> Check:
    part = subject.batches()[0]
    model, dtype = _double(subject)
    images, labels = subject.images[part].to(dtype), subject.labels[part]
    if subject.random:
        return not_applicable(name, "the model is random, so the loss has no fixed surface", _MEANING[name])
    losses, found = gradient(model, images, labels, margin)
    slope = found.flatten(1).abs().sum(dim=1)  # of the loss along the signs of the gradient
    ratios = {}
    for share in (0.01, 1.0):
        radius = share * subject.eps
        with torch.no_grad():
            gained = margin(model(images + radius * found.sign()), labels) - losses
        kept = slope > 0
        ratios[share] = float((gained[kept] / (radius * slope[kept])).median()) if kept.any() else float("nan")
    usable = float((slope > 0).float().mean())
    good = usable > 0.5 and abs(ratios[0.01] - 1) <= 0.25
    figures = {"ratio_at_eps_over_100": ratios[0.01], "ratio_at_eps": ratios[1.0], "fraction_with_slope": usable}
    text = (
        f"a step of eps/100 along the gradient's signs changes the margin by {ratios[0.01]:.2f} times what the "
        f"gradient says, a step of eps by {ratios[1.0]:.2f} times (medians)"
    )
    return Check(name, verdict(good), figures, text, _MEANING[name])


def _precision(subject: Subject, name: str) -> Check:
    if subject.images.dtype == torch.float64:
        return not_applicable(name, "the model is in float64 already", _MEANING[name])
    if subject.random:
        return not_applicable(name, "the model is random, so outcomes differ anyway", _MEANING[name])
    model, dtype = _double(subject)
    if dtype != torch.float64:
        return not_applicable(name, "the model cannot be copied to float64", _MEANING[name])
    protocol = Protocol("audit", (AttackSpec("ifgsm", subject.eps, subject.eps / 4, subject.steps),))
    pair = []
    for network, images in ((subject.model, subject.images), (model, subject.images.double())):
        pair.append(evaluate(network, (images, subject.labels), protocol, batch_size=subject.batch_size).attacks[0])
    single, double = (resisted(attack) for attack in pair)
    differ, only_double = int((single != double).sum()), int((single & ~double).sum())
    loose = max(1, 5 * subject.allowed)
    figures = {"outcomes_that_differ": differ, "broken_in_float64_only": only_double, "allowed": loose}
    text = f"{differ} of {subject.n} worst-so-far outcomes differ between {subject.images.dtype} and float64"
    return Check(name, verdict(differ <= loose), figures, text.replace("torch.", ""), _MEANING[name])
