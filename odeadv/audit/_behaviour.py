"""Checks that the model is a function of the image, with finite logits and the right number of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from odeadv.attacks.checks import answered, check_classes
from odeadv.audit._checklist import Finding, check, not_applicable
from odeadv.audit._subject import Subject
from odeadv.evaluation.trust import FEWEST, PROBES, batch_dependence, behaviour, is_rounding

# A float32 softmax over 1,000 classes sums to 1 up to 1e-5. Logits rarely do so by accident.
_SUM_TOLERANCE = 1e-4

# With ten examples per class the examples lack the highest class with probability exp(-10).
_EXAMPLES_PER_CLASS = 10


@check(
    "finite logits",
    "Logits that are NaN or infinite compare as wrong or right by accident: no accuracy means anything.",
    attacks=False,
)
def finite_logits(subject: Subject) -> Finding:
    """Run the model on all examples and check that its logits are finite, of shape (n, classes)."""
    probe = subject.images[:PROBES].clone()
    try:
        with torch.no_grad():
            answer = answered(subject.model, probe)
        if not isinstance(answer, Tensor) or answer.ndim != 2:
            check_classes(answer, len(probe), 0)  # raises an error with advice
        for part in subject.batches():
            subject.behaviours.append(behaviour(subject.model, subject.images[part]))
    except Exception as error:  # a user's model may raise any error
        subject.unusable = "the forward pass failed"
        return Finding(False, f"the forward pass failed with {type(error).__name__}: {error}")
    logits = torch.cat([found.logits for found in subject.behaviours])
    bad = int((~logits.isfinite()).any(dim=1).sum())
    if bad:
        subject.unusable = "logits are unusable"
    subject.outputs = logits
    subject.unbroken &= logits.argmax(dim=1) == subject.labels
    found = f"{bad} of {subject.n} examples have logits that are not finite"
    return Finding(not bad, found, {"examples_not_finite": bad})


@check(
    "number of classes",
    "With more logits than classes, an attack may end in a class that does not exist; with fewer, the accuracy is "
    "wrong.",
    attacks=False,
)
def number_of_classes(subject: Subject) -> Finding:
    """Check the number of logits against ``num_classes``, or against the highest label."""
    width, seen = subject.outputs.shape[1], int(subject.labels.max()) + 1
    subject.attackable = seen <= width and width >= 2
    figures = {"logits": width, "highest_label": seen - 1, "num_classes": subject.num_classes}
    found = f"{width} logits, labels up to {seen - 1}"
    if width < 2:
        return Finding(False, f"{found}; for one logit z, let the model return torch.cat([-z, z], 1)", figures)
    if subject.num_classes is not None:
        good = width == subject.num_classes and seen <= width
        return Finding(good, f"{found}, {subject.num_classes} classes asked", figures)
    if seen < width and subject.n < _EXAMPLES_PER_CLASS * width:
        return not_applicable(f"{found}: too few examples to tell; give num_classes")
    return Finding(seen == width, found, figures)


@check(
    "same answer twice",
    "The model draws random numbers, so one gradient is one draw of many. Average over passes (EOT) before you "
    "believe a robust accuracy, and check that no dropout is left on.",
    attacks=False,
)
def same_answer_twice(subject: Subject) -> Finding:
    """Check that passes with and without gradients agree, and that all parts of the model are in eval mode."""
    seen, random = subject.behaviours, subject.random
    difference = max(found.difference for found in seen)
    training = sorted({name for found in seen for name in found.training})
    note = f"; in training mode after eval(): {', '.join(training)}" if training else ""
    with_gradient, disagrees = max(found.with_gradient for found in seen), any(found.disagrees for found in seen)
    if disagrees and not random:
        note += f"; a pass with gradients on differs from a pass without by {with_gradient:.2g}"
    random_gradient = any(found.random_gradient for found in seen)
    if random_gradient:
        note += "; two gradients of the same images differ by more than rounding: the backward pass is random"
    found = f"two forward passes differ by at most {difference:.2g}: EOT is {'' if random else 'not '}needed{note}"
    figures = {
        "largest_difference": difference,
        "with_gradient": with_gradient,
        "random_gradient": random_gradient,
        "training_mode": training,
    }
    return Finding(not random and not disagrees and not training and not random_gradient, found, figures)


@check(
    "same answer in any batch",
    "The logits of an image depend on the other images, its place or the size of its batch. Neither the accuracy nor "
    "an attack is then about single images: use running statistics, not those of the batch, and fixed steps of an ODE "
    "solver, not one step size that it chooses for the batch.",
    attacks=False,
    repeatable=True,
)
def same_answer_in_any_batch(subject: Subject) -> Finding:
    """Compare the logits of a batch with logits of single images, of a reversed batch and of a larger batch."""
    differences = {0.0: subject.images[:0]}
    for part, found in zip(subject.batches(), subject.behaviours, strict=True):
        difference = batch_dependence(subject.model, subject.images[part], found.logits)
        if difference is not None:
            differences[difference] = subject.images[part]
    # A difference is NaN if logits become NaN or infinite in another batch. NaN counts as the largest difference.
    largest = max(differences, key=lambda difference: math.inf if math.isnan(difference) else difference)
    rounding = largest > 0 and is_rounding(subject.model, differences[largest], largest)
    text = (
        f"logits alone, in reversed order and in a larger batch differ by up to {largest:.2g}"
        if largest != 0
        else "logits alone, in reversed order and in a larger batch are the same"
    )
    if rounding:
        text += ", which is rounding that a steep model amplifies"
    return Finding(largest == 0 or rounding, text, {"largest_difference": largest, "is_rounding": rounding})


@check(
    "state left alone",
    "The forward pass changes the model, so every image met a different model and the result depends on the order of "
    "evaluation.",
    attacks=False,
)
def state_left_alone(subject: Subject) -> Finding:
    """Check that a forward pass does not change buffers, parameters or attributes."""
    tensors = sorted({item for found in subject.behaviours for item in found.changed_tensors})
    attributes = sorted({item for found in subject.behaviours for item in found.changed_attributes})
    changed = ", ".join(tensors + attributes)
    found = f"a forward pass in eval mode changes {changed}" if changed else "no buffer, parameter or attribute changes"
    return Finding(not changed, found, {"tensors": tensors, "attributes": attributes})


@check(
    "logits, not probabilities",
    "The outputs look like probabilities. The cross-entropy of probabilities has weak gradients, so attacks on them "
    "are weaker than attacks on the logits.",
    attacks=False,
)
def logits_not_probabilities(subject: Subject) -> Finding:
    """Check that the rows of the output are not probabilities; report if they are log-probabilities."""
    logits = subject.outputs
    sums = logits.double().sum(dim=1)
    probabilities = bool((logits >= 0).all() and (logits <= 1).all() and ((sums - 1).abs() < _SUM_TOLERANCE).all())
    logs = bool((logits <= 0).all() and (logits.double().exp().sum(dim=1) - 1).abs().max() < _SUM_TOLERANCE)
    found = (
        "every row is between 0 and 1 and sums to 1"
        if probabilities
        else f"rows sum to {sums.min():.3g} to {sums.max():.3g}"
    )
    return Finding(not probabilities, found, {"probabilities": probabilities, "log_probabilities": logs})


@check(
    "better than guessing",
    "The model is right no more often than by guessing, so attacks have nothing to break and the lines below mean "
    "little. Check the weights, the order of the classes, and if the model normalises images in [0, 1] itself.",
    attacks=False,
)
def better_than_guessing(subject: Subject) -> Finding:
    """Check that the clean accuracy is above the accuracy of guessing."""
    width = subject.outputs.shape[1]
    right = int((subject.outputs.argmax(dim=1) == subject.labels).sum())
    found = f"{right} of {subject.n} clean examples are right, of {width} classes"
    if subject.n < FEWEST:
        return not_applicable(f"{found}: too few examples to tell")
    return Finding(right > subject.n / width, found, {"clean": right / subject.n, "guessing": 1 / width})


BEHAVIOUR = (
    finite_logits,  # must be first: the other checks read its records
    number_of_classes,
    better_than_guessing,
    same_answer_twice,
    same_answer_in_any_batch,
    state_left_alone,
    logits_not_probabilities,
)
