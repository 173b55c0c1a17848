"""Whether the model is a function from images to logits: the same answer every time, finite, of the right width."""

from __future__ import annotations

import torch

from odeadv.audit._report import Check
from odeadv.audit._subject import Subject, not_applicable, verdict
from odeadv.evaluation.trust import Behaviour, batch_dependence, behaviour

_MEANING = {
    "finite logits": (
        "Logits that are NaN or infinite compare as wrong or right by accident: no accuracy means anything."
    ),
    "number of classes": (
        "With logits that are no class an attack may end in a class that does not exist; with fewer than the "
        "labels the accuracy is wrong."
    ),
    "same answer twice": (
        "The model draws random numbers, so one gradient is one draw of many: average over passes (EOT) "
        "before believing a robust accuracy, and check that no dropout was left on."
    ),
    "same answer in any batch": (
        "The logits of an image depend on the other images, its place or the size of its batch, so that neither the "
        "accuracy nor an attack is about single images: use running statistics, not those of the batch."
    ),
    "state left alone": (
        "The forward pass changes the model, so every image met a different one and the result depends on the "
        "order of evaluation."
    ),
    "logits, not probabilities": (
        "The outputs look like probabilities: cross-entropy of them has weak gradients, so attacks on them "
        "are weaker than on the logits."
    ),
}


def behaviour_checks(subject: Subject) -> tuple[list[Check], bool]:
    """The lines, and whether attacks on the model make sense at all; tells ``subject`` if the model is random."""
    seen: list[Behaviour] = []
    try:
        for part in subject.batches():
            seen.append(behaviour(subject.model, subject.images[part]))
    except Exception as error:  # a user's model may raise anything
        why = f"the forward pass raised {type(error).__name__}: {error}"
        first = Check("finite logits", "fail", {}, why, _MEANING["finite logits"])
        return [first, *_rest("the forward pass failed")], False
    logits = torch.cat([found.logits for found in seen])
    wrong_shape = logits.ndim != 2
    bad = 0 if wrong_shape else int((~logits.isfinite()).any(dim=1).sum())
    finite = Check(
        "finite logits",
        verdict(not bad and not wrong_shape),
        {"examples_not_finite": bad},
        f"{bad} of {subject.n} examples have logits that are not finite"
        if not wrong_shape
        else f"the model returned shape {tuple(logits.shape)}, expected ({subject.n}, classes)",
        _MEANING["finite logits"],
    )
    if finite.status == "fail":
        return [finite, *_rest("logits are unusable")], False
    subject.random = any(found.random for found in seen)
    classes = _classes(subject, logits.shape[1])
    checks = [finite, classes, _same_twice(seen), _any_batch(subject, seen), _state(seen), _probabilities(logits)]
    return checks, int(subject.labels.max()) < logits.shape[1]


def _rest(why: str) -> list[Check]:
    return [not_applicable(name, why, meaning) for name, meaning in list(_MEANING.items())[1:]]


def _classes(subject: Subject, width: int) -> Check:
    name, seen = "number of classes", int(subject.labels.max()) + 1
    figures = {"logits": width, "highest_label": seen - 1, "num_classes": subject.num_classes}
    found = f"{width} logits, labels up to {seen - 1}"
    if subject.num_classes is not None:
        good = width == subject.num_classes and seen <= width
        return Check(name, verdict(good), figures, f"{found}, {subject.num_classes} classes asked", _MEANING[name])
    if seen < width and subject.n < 10 * width:
        return not_applicable(name, f"{found}: too few examples to tell; give num_classes", _MEANING[name])
    return Check(name, verdict(seen == width), figures, found, _MEANING[name])


def _same_twice(seen: list[Behaviour]) -> Check:
    name = "same answer twice"
    difference, random = max(found.difference for found in seen), any(found.random for found in seen)
    training = sorted({name for found in seen for name in found.training})
    note = f"; in training mode after eval(): {', '.join(training)}" if training else ""
    with_gradient, disagrees = max(found.with_gradient for found in seen), any(found.disagrees for found in seen)
    if disagrees and not random:
        note += f"; a pass that a gradient could be asked of differs from one without by {with_gradient:.2g}"
    found = f"two forward passes differ by at most {difference:.2g}: EOT is {'' if random else 'not '}needed{note}"
    figures = {"largest_difference": difference, "with_gradient": with_gradient, "training_mode": training}
    return Check(name, verdict(not random and not disagrees and not training), figures, found, _MEANING[name])


def _any_batch(subject: Subject, seen: list[Behaviour]) -> Check:
    name = "same answer in any batch"
    if subject.random:
        return not_applicable(name, "the model is random, so its answers differ anyway", _MEANING[name])
    differences: list[float] = []
    for part, found in zip(subject.batches(), seen, strict=True):
        difference = batch_dependence(subject.model, subject.images[part], found.logits)
        differences += [] if difference is None else [difference]
    largest = max(differences, default=0.0)
    text = (
        f"logits alone, in reversed order and in a larger batch differ by up to {largest:.2g}"
        if differences
        else "logits alone, in reversed order and in a larger batch are the same"
    )
    return Check(name, verdict(not differences), {"largest_difference": largest}, text, _MEANING[name])


def _state(seen: list[Behaviour]) -> Check:
    name = "state left alone"
    tensors = sorted({item for found in seen for item in found.changed_tensors})
    attributes = sorted({item for found in seen for item in found.changed_attributes})
    what = ", ".join(tensors + attributes)
    found = f"a forward pass in eval mode changes {what}" if what else "no buffer, parameter or attribute changes"
    figures = {"tensors": tensors, "attributes": attributes}
    return Check(name, verdict(not what), figures, found, _MEANING[name])


def _probabilities(logits: torch.Tensor) -> Check:
    name = "logits, not probabilities"
    sums = logits.double().sum(dim=1)
    probabilities = bool((logits >= 0).all() and (logits <= 1).all() and ((sums - 1).abs() < 1e-4).all())
    logs = bool((logits <= 0).all() and (logits.double().exp().sum(dim=1) - 1).abs().max() < 1e-4)
    found = (
        "every row is between 0 and 1 and sums to 1"
        if probabilities
        else f"rows sum to {sums.min():.3g} to {sums.max():.3g}"
    )
    figures = {"probabilities": probabilities, "log_probabilities": logs}
    return Check(name, verdict(not probabilities), figures, found, _MEANING[name])
