"""Checks that attacks get stronger with radius, steps and restarts, and are not beaten by weaker attacks."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from odeadv import attacks
from odeadv.audit._checklist import Finding, check, not_applicable
from odeadv.audit._subject import Subject
from odeadv.evaluation import AttackSpec
from odeadv.support.isolation import untouched

# Comparisons allow a multiple of the tolerance: 5 if the attacks are about equally strong, 2 if one is clearly
# stronger.
_EQUAL_STRENGTH = 5
_OTHER_STRENGTH = 2

# After 12 bisections the distance to the boundary is below eps/8 at the usual radii.
_BISECTIONS = 12

_RADII = (0.25, 0.5, 1, 2, 4, 8, 16)  # radii of the curve, as multiples of eps
_STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500)  # numbers of steps of the curve


@check(
    "iterative beats single step",
    "A single step breaks more than many: the gradient misleads after the first step, so the iterative figure is not "
    "the robustness.",
)
def iterative_beats_single_step(subject: Subject) -> Finding:
    """Compare the last iterates of FGSM and IFGSM."""
    steps = subject.counts.steps
    single_step = AttackSpec("fgsm", subject.eps, options=subject.norm_option)
    result = subject.evaluated(single_step, subject.spec(steps, worst=False))
    single, iterative = result.attacks
    subject.resistant &= subject.resisted(iterative)
    figures = {"fgsm": single.robust_accuracy, "ifgsm": iterative.robust_accuracy, "clean": result.clean_accuracy}
    good = iterative.robust_correct <= single.robust_correct + subject.allowed
    text = (
        f"last-iterate accuracy {100 * single.robust_accuracy:.1f} % under FGSM, "
        f"{100 * iterative.robust_accuracy:.1f} % under IFGSM-{steps}; clean {100 * result.clean_accuracy:.1f} %"
    )
    return Finding(good, text, figures)


@check(
    "accuracy falls to 0 with eps",
    "An attack that may change every pixel at will must break everything. If it does not, the attack fails, and it "
    "fails at small eps too.",
)
def accuracy_falls_to_0_with_eps(subject: Subject) -> Finding:
    """Attack at growing radii, up to the radius that allows every image."""
    largest = subject.largest_eps
    radii = [subject.eps * factor for factor in _RADII if subject.eps * factor < largest] + [largest]
    result = subject.evaluated(*(subject.spec(subject.counts.steps, eps=radius) for radius in radii))
    accuracies = [result.clean_accuracy] + [subject.accuracy(attack) for attack in result.attacks]
    subject.against_eps = tuple(zip([0.0, *radii], accuracies, strict=True))
    loose = _EQUAL_STRENGTH * subject.allowed / subject.n
    falling = all(b <= a + loose for a, b in pairwise(accuracies))
    gone = accuracies[-1] * subject.n <= subject.allowed
    text = f"{100 * accuracies[-1]:.1f} % of the examples are right at eps = {largest:.3g}, which allows any image" + (
        "" if falling else ", and the accuracy rises with eps on the way"
    )
    return Finding(falling and gone, text, {"at_largest_eps": accuracies[-1], "never_rises": falling})


@check(
    "more steps converge",
    "The accuracy still falls at the end of the longest run: more steps would lower it further, so it is only an upper "
    "bound.",
)
def more_steps_converge(subject: Subject) -> Finding:
    """Attack with growing numbers of steps and compare the last two."""
    most = subject.counts.more_steps
    middle = max(1, most // 2)
    counts = sorted({count for count in _STEPS if count < most} | {middle, most})
    result = subject.evaluated(*(subject.spec(count) for count in counts))
    by_count = dict(zip(counts, result.attacks, strict=True))
    subject.against_steps = tuple((count, subject.accuracy(attack)) for count, attack in by_count.items())
    subject.resistant &= subject.resisted(by_count[most])
    half, last = (int(subject.resisted(by_count[count]).sum()) for count in (middle, most))
    loose = _OTHER_STRENGTH * subject.allowed
    figures = {"at_half": half / subject.n, "at_end": last / subject.n, "allowed": loose}
    text = f"{half - last} of {subject.n} examples fall between {middle} and {most} steps"
    return Finding(half - last <= loose, text, figures)


@check(
    "restarts",
    "Random starts break images that the first start does not: the loss has many local maxima, so report the worst of "
    "several restarts.",
    repeatable=True,
)
def restarts(subject: Subject) -> Finding:
    """Attack from several random starts and count the examples that only later starts break."""
    count = subject.counts.restarts
    if count < 2:
        return not_applicable("restarts=1")
    specs = (subject.spec(subject.counts.steps, name="pgd") for _ in range(count))
    runs = [subject.resisted(attack) for attack in subject.evaluated(*specs).attacks]
    first = int((subject.resistant & runs[0]).sum())
    subject.resistant &= torch.stack(runs).all(dim=0)
    more = first - int(subject.resistant.sum())
    loose = _EQUAL_STRENGTH * subject.allowed
    figures = {"broken_by_further_starts_only": more, "restarts": count, "allowed": loose}
    text = f"{more} of {subject.n} examples fall only to starts 2 to {count} of PGD"
    return Finding(more <= loose, text, figures)


@check(
    "gradient-free does not beat gradients",
    "A gradient-free attack breaks examples that gradients do not: the gradients are masked.",
    repeatable=True,
)
def gradient_free_does_not_beat_gradients(subject: Subject) -> Finding:
    """Run the Square attack on the examples that resist gradients."""
    if subject.images.ndim != 4:
        return not_applicable("the square attack needs images (n, channels, height, width)")
    broken = _broken(
        subject,
        lambda images, labels: attacks.square(
            subject.model, images, labels, eps=subject.eps, norm=subject.norm, queries=subject.counts.queries,
            generator=subject.generator,
        ),
    )  # fmt: skip
    return _beaten(subject, broken, f"the square attack with {subject.counts.queries} queries")


@check(
    "transfer does not beat gradients",
    "Images made on another model break examples that the model's own gradients do not: the gradients are masked.",
    repeatable=True,
)
def transfer_does_not_beat_gradients(subject: Subject) -> Finding:
    """Attack a surrogate model, and try the attacked images on the examples that resist gradients."""
    surrogate = subject.surrogate
    if surrogate is None:
        return not_applicable("no surrogate= was given to attack from")
    eps, steps = subject.eps, subject.counts.steps
    right = {"before": 0, "after": 0}  # how often the surrogate itself is right on the examples that are tried

    def attack(images: Tensor, labels: Tensor) -> Tensor:
        found = attacks.ifgsm(surrogate, images, labels, eps=eps, alpha=eps / 4, steps=steps, norm=subject.norm)
        with torch.no_grad():
            for key, seen in (("before", images), ("after", found)):
                right[key] += int((surrogate(seen).argmax(dim=1) == labels).sum())
        return found

    tried = int(subject.resistant.sum())
    with untouched(surrogate, mode="eval"):
        with torch.no_grad():
            same = torch.equal(surrogate(subject.images[:2]), subject.logits(subject.images[:2]))
        if same:
            return not_applicable("the surrogate is the model itself")
        broken = _broken(subject, attack)
    before, after = right["before"], right["after"]
    own = f", which is right on {before} of the {tried} tried, and on {after} under its attack" if tried else ""
    finding = _beaten(subject, broken, f"IFGSM-{steps} on the surrogate{own}")
    if not finding.passed or not tried:
        return finding
    guessed = 1 / subject.outputs.shape[1]
    if before <= tried * guessed + 2 * math.sqrt(tried * guessed * (1 - guessed)):
        return not_applicable(f"the surrogate is right on {before} of {tried} examples: as good as guessing")
    if not broken and before == after:
        return not_applicable("the attack on the surrogate breaks nothing, not even the surrogate")
    return finding


def _beaten(subject: Subject, broken: int, attack: str) -> Finding:
    loose = _OTHER_STRENGTH * subject.allowed
    text = f"{broken} of {subject.n} examples resist all gradient attacks but fall to {attack}"
    return Finding(broken <= loose, text, {"broken_by_it_only": broken, "allowed": loose})


def _broken(subject: Subject, attack: Callable[[Tensor, Tensor], Tensor]) -> int:
    """Return the number of resistant examples that the attack breaks."""
    broken = 0
    index = subject.resistant.nonzero().squeeze(1)
    for part in torch.split(index, subject.counts.batch_size) if len(index) else ():
        images, labels = subject.images[part], subject.labels[part]
        wrong = subject.logits(attack(images, labels)).argmax(dim=1) != labels
        subject.unbroken[part[wrong]] = False
        broken += int(wrong.sum())
    return broken


@check(
    "planted examples are found",
    "Adversarial examples that are known to lie within the ball are not found, so the attack misses others too.",
    repeatable=True,
)
def planted_examples_are_found(subject: Subject) -> Finding:
    """Attack from points just before the boundary between two images of different classes."""
    right = subject.correct(subject.images)
    index = right.nonzero().squeeze(1)[: subject.counts.batch_size]
    labels = subject.labels[index]
    others = [int((subject.labels != label).logical_and(right).int().argmax()) for label in labels.tolist()]
    ends = subject.images[others] if others else subject.images[:0]
    keep = (subject.labels[others] != labels) if others else torch.zeros(0, dtype=torch.bool)
    if not keep.any():
        return not_applicable("no two examples of different classes are classified correctly")
    inside, outside, labels = subject.images[index][keep], ends[keep], labels[keep]
    # Two images are at most largest_eps apart, so this number of halvings brings them to a distance of eps/8.
    for _ in range(max(_BISECTIONS, math.ceil(math.log2(8 * subject.largest_eps / subject.eps)))):
        middle = (inside + outside) / 2
        good = (subject.logits(middle).argmax(dim=1) == labels).reshape(-1, *(1 for _ in middle.shape[1:]))
        inside, outside = torch.where(good, middle, inside), torch.where(good, outside, middle)
    offset = (inside - outside).flatten(1)
    distance = offset.abs().amax(dim=1) if subject.norm == "linf" else offset.norm(dim=1)
    near = distance <= subject.eps / 4  # the planted example must be well within the ball
    if not near.any():
        return not_applicable("the boundary cannot be located to eps/4 in this precision")
    inside, labels = inside[near], labels[near]
    attacked = attacks.ifgsm(
        subject.model, inside, labels, eps=subject.eps, alpha=subject.eps / 4, steps=subject.counts.steps, keep="worst",
        norm=subject.norm,
    )  # fmt: skip
    missed = int((subject.logits(attacked).argmax(dim=1) == labels).sum())
    loose = max(1, len(inside) // 50)  # 2 %: rounding may hide the boundary for a few images
    figures = {"planted": len(inside), "missed": missed, "allowed": loose}
    text = f"{missed} of {len(inside)} planted adversarial examples are missed"
    return Finding(missed <= loose, text, figures)


ATTACKS = (
    iterative_beats_single_step,
    accuracy_falls_to_0_with_eps,
    more_steps_converge,
    restarts,
    gradient_free_does_not_beat_gradients,  # must follow the gradient attacks: it attacks the examples that resist them
    transfer_does_not_beat_gradients,
    planted_examples_are_found,
)
