"""Whether attacks behave as they must: stronger with radius, steps and restarts, and never beaten by weaker ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from odeadv import attacks
from odeadv.audit._report import Check
from odeadv.audit._subject import Subject, not_applicable, resisted, verdict
from odeadv.evaluation import AttackSpec

_BISECTIONS = 12

_MEANING = {
    "iterative beats single step": (
        "A single step breaks more than many: the gradient misleads after the first step, so the iterative "
        "figure is not the robustness."
    ),
    "accuracy falls to 0 with eps": (
        "An attack that may change every pixel at will must break everything; if it does not, it is the "
        "attack that fails, and at small eps too."
    ),
    "more steps converge": (
        "The accuracy still falls at the end of the longest run: more steps would lower it further, so it is "
        "an upper bound only."
    ),
    "restarts": (
        "Random starts break images that the first start does not: the loss has many local maxima, so report "
        "the worst of several restarts."
    ),
    "gradient-free does not beat gradients": (
        "A gradient-free attack breaks what gradients do not: the gradients are masked."
    ),
    "transfer does not beat gradients": (
        "Images made on another model break what the model's own gradients do not: the gradients are masked."
    ),
    "planted examples are found": (
        "Adversarial examples that are known to lie within the ball are not found, so the attack misses "
        "examples elsewhere too."
    ),
}


@dataclass
class Found:
    """The lines and curves so far, and who resisted.

    Attributes:
        checks: the lines.
        against_eps: (eps, worst-so-far accuracy).
        against_steps: (steps, worst-so-far accuracy).
        resistant: (n,) bool, the examples that no gradient attack broke.
    """

    checks: list[Check] = field(default_factory=list)
    against_eps: tuple[tuple[float, float], ...] = ()
    against_steps: tuple[tuple[int, float], ...] = ()
    resistant: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))


def attack_checks(subject: Subject, usable: bool) -> Found:
    """The lines; not applicable if the model cannot be attacked."""
    found = Found(resistant=torch.ones(subject.n, dtype=torch.bool, device=subject.labels.device))
    checks: tuple[Callable[[Subject, str, Found], Check], ...] = (
        _iterative,
        _radius,
        _convergence,
        _restarts,
        _gradient_free,
        _transfer,
        _planted,
    )
    for name, check in zip(_MEANING, checks, strict=True):
        if not usable:
            found.checks.append(not_applicable(name, "the model cannot be attacked", _MEANING[name]))
            continue
        try:
            found.checks.append(check(subject, name, found))
        except (ValueError, TypeError, RuntimeError) as error:
            found.checks.append(Check(name, "fail", {}, f"could not be checked: {error}", _MEANING[name]))
    return found


def _iterative(subject: Subject, name: str, found: Found) -> Check:
    eps, steps = subject.eps, subject.steps
    result = subject.evaluated(AttackSpec("fgsm", eps), AttackSpec("ifgsm", eps, eps / 4, steps))
    single, iterative = result.attacks
    found.resistant &= resisted(iterative).to(found.resistant.device)
    figures = {"fgsm": single.robust_accuracy, "ifgsm": iterative.robust_accuracy, "clean": result.clean_accuracy}
    good = iterative.robust_correct <= single.robust_correct + subject.allowed
    text = (
        f"last-iterate accuracy {100 * single.robust_accuracy:.1f} % under FGSM, "
        f"{100 * iterative.robust_accuracy:.1f} % under IFGSM-{steps}; clean {100 * result.clean_accuracy:.1f} %"
    )
    return Check(name, verdict(good), figures, text, _MEANING[name])


def _radius(subject: Subject, name: str, found: Found) -> Check:
    radii = [subject.eps * factor for factor in (0.25, 0.5, 1, 2, 4, 8, 16) if subject.eps * factor < 1] + [1.0]
    specs = [AttackSpec("ifgsm", radius, radius / 4, subject.steps, "worst") for radius in radii]
    result = subject.evaluated(*specs)
    accuracies = [result.clean_accuracy] + [attack.worst_so_far_accuracy for attack in result.attacks]
    found.against_eps = tuple(zip([0.0, *radii], accuracies, strict=True))
    loose = 5 * subject.allowed / subject.n
    falling = all(b <= a + loose for a, b in pairwise(accuracies))
    gone = accuracies[-1] * subject.n <= subject.allowed
    text = f"{100 * accuracies[-1]:.1f} % of the examples are right at eps = 1, any image at all" + (
        "" if falling else ", and the accuracy rises with eps on the way"
    )
    figures = {"at_eps_1": accuracies[-1], "never_rises": falling}
    return Check(name, verdict(falling and gone), figures, text, _MEANING[name])


def _convergence(subject: Subject, name: str, found: Found) -> Check:
    most = subject.more_steps
    counts = sorted(
        {count for count in (1, 2, 5, 10, 20, 50, 100, 200, 500) if count < most} | {max(1, most // 2), most}
    )
    result = subject.evaluated(*(AttackSpec("ifgsm", subject.eps, subject.eps / 4, count, "worst") for count in counts))
    by_count = dict(zip(counts, result.attacks, strict=True))
    found.against_steps = tuple((count, attack.worst_so_far_accuracy) for count, attack in by_count.items())
    found.resistant &= resisted(by_count[most]).to(found.resistant.device)
    half, last = by_count[max(1, most // 2)].worst_so_far_correct, by_count[most].worst_so_far_correct
    loose = 2 * subject.allowed
    figures = {"at_half": half / subject.n, "at_end": last / subject.n, "allowed": loose}
    text = f"{half - last} of {subject.n} examples fall between {max(1, most // 2)} and {most} steps"
    return Check(name, verdict(half - last <= loose), figures, text, _MEANING[name])


def _restarts(subject: Subject, name: str, found: Found) -> Check:
    eps, count = subject.eps, subject.restarts
    if count < 2:
        return not_applicable(name, "restarts=1", _MEANING[name])
    specs = (AttackSpec("pgd", eps, eps / 4, subject.steps, "worst") for _ in range(count))
    runs = [resisted(attack).to(found.resistant.device) for attack in subject.evaluated(*specs).attacks]
    first = int((found.resistant & runs[0]).sum())
    found.resistant &= torch.stack(runs).all(dim=0)
    more = first - int(found.resistant.sum())
    loose = 5 * subject.allowed
    figures = {"broken_by_further_starts_only": more, "restarts": count, "allowed": loose}
    text = f"{more} of {subject.n} examples fall only to starts 2 to {count} of PGD"
    return Check(name, verdict(more <= loose), figures, text, _MEANING[name])


def _gradient_free(subject: Subject, name: str, found: Found) -> Check:
    if subject.images.ndim != 4:
        return not_applicable(name, "the square attack needs images (n, channels, height, width)", _MEANING[name])
    broken = _broken(
        subject,
        found.resistant,
        lambda images, labels: attacks.square(
            subject.model, images, labels, eps=subject.eps, queries=subject.queries, generator=subject.generator
        ),
    )
    return _beaten(subject, name, broken, f"the square attack with {subject.queries} queries")


def _transfer(subject: Subject, name: str, found: Found) -> Check:
    surrogate = subject.surrogate
    if surrogate is None:
        return not_applicable(name, "no surrogate= was given to attack from", _MEANING[name])
    eps, steps = subject.eps, subject.steps
    broken = _broken(
        subject,
        found.resistant,
        lambda images, labels: attacks.ifgsm(surrogate, images, labels, eps=eps, alpha=eps / 4, steps=steps),
    )
    return _beaten(subject, name, broken, f"IFGSM-{steps} on the surrogate")


def _beaten(subject: Subject, name: str, broken: int, attack: str) -> Check:
    loose = 2 * subject.allowed
    figures = {"broken_by_it_only": broken, "allowed": loose}
    text = f"{broken} of {subject.n} examples resist all gradient attacks but fall to {attack}"
    return Check(name, verdict(broken <= loose), figures, text, _MEANING[name])


def _broken(subject: Subject, among: Tensor, attack: Callable[[Tensor, Tensor], Tensor]) -> int:
    """How many of the examples in ``among`` the attack breaks."""
    broken = 0
    index = among.nonzero().squeeze(1)
    for part in torch.split(index, subject.batch_size) if len(index) else ():
        images, labels = subject.images[part], subject.labels[part]
        attacked = attack(images, labels)
        with torch.no_grad():
            broken += int((subject.model(attacked).argmax(dim=1) != labels).sum())
    return broken


def _planted(subject: Subject, name: str, found: Found) -> Check:
    """Between an image and one of another class lies the boundary: start just before it, and it is within reach."""
    if subject.random:
        return not_applicable(name, "the model is random, so no example is adversarial for certain", _MEANING[name])
    right = subject.correct(subject.images)
    index = right.nonzero().squeeze(1)[: subject.batch_size]
    labels = subject.labels[index]
    others = [int((subject.labels != label).logical_and(right).int().argmax()) for label in labels.tolist()]
    ends = subject.images[others] if others else subject.images[:0]
    keep = (subject.labels[others] != labels) if others else torch.zeros(0, dtype=torch.bool)
    if not keep.any():
        return not_applicable(name, "no two examples of different classes are classified correctly", _MEANING[name])
    inside, outside, labels = subject.images[index][keep], ends[keep], labels[keep]
    # Images are at most 1 apart, so that many halvings come to eps/8.
    for _ in range(max(_BISECTIONS, math.ceil(math.log2(8 / subject.eps)))):
        middle = (inside + outside) / 2
        good = (subject.logits(middle).argmax(dim=1) == labels).reshape(-1, *(1 for _ in middle.shape[1:]))
        inside, outside = torch.where(good, middle, inside), torch.where(good, outside, middle)
    distance = (inside - outside).flatten(1).abs().amax(dim=1)
    near = distance <= subject.eps / 4  # the planted example is well within the ball
    if not near.any():
        return not_applicable(name, "the boundary cannot be located to eps/4 in this precision", _MEANING[name])
    inside, labels = inside[near], labels[near]
    attacked = attacks.ifgsm(
        subject.model, inside, labels, eps=subject.eps, alpha=subject.eps / 4, steps=subject.steps, keep="worst"
    )
    missed = int((subject.logits(attacked).argmax(dim=1) == labels).sum())
    loose = max(1, len(inside) // 50)
    figures = {"planted": len(inside), "missed": missed, "allowed": loose}
    text = f"{len(inside) - missed} of {len(inside)} planted adversarial examples are found"
    return Check(name, verdict(missed <= loose), figures, text, _MEANING[name])
