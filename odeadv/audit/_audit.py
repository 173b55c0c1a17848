"""The checklist, in order: first whether the model can be attacked at all, then whether attacks on it work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from odeadv.attacks.checks import answered, check_images, check_labels, check_model, own_dtype
from odeadv.attacks.objective import attacking, constant
from odeadv.audit._attacks import attack_checks
from odeadv.audit._behaviour import behaviour_checks
from odeadv.audit._gradients import gradient_checks
from odeadv.audit._report import Audit
from odeadv.audit._subject import Subject
from odeadv.data import as_model_input
from odeadv.evaluation.trust import PROBES
from odeadv.support.checks import integer, number


def audit(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    *,
    eps: float = 8 / 255,
    generator: torch.Generator,
    steps: int = 20,
    more_steps: int = 100,
    restarts: int = 3,
    queries: int = 500,
    tolerance: float = 0.01,
    num_classes: int | None = None,
    surrogate: nn.Module | None = None,
    batch_size: int = 128,
    progress: Callable[[str], object] | None = None,
) -> Audit:
    """Run the checklist on ``model``; it comes back as it was, and so does the global random state.

    A model with a fault that makes attacks meaningless (logits that are not finite, too few classes) fails those
    lines, and the others are not applicable. A random model is attacked by single draws.

    Args:
        model: images to logits (n, classes); its normalisation inside.
        data: (images, labels): a few hundred examples will do. Images floating in [0, 1], or uint8 (n, h, w,
            channels).
        eps: radius of the L-infinity ball whose robust accuracy is in question, in pixel units of [0, 1].
        generator: the only source of randomness.
        steps: of IFGSM and PGD, with alpha = eps / 4.
        more_steps: the largest number of steps, where accuracy must have converged.
        restarts: random starts of PGD.
        queries: of the gradient-free attack.
        tolerance: the fraction of examples by which one attack may differ from another without a failure; never
            below one example.
        num_classes: how many logits there must be; None takes the highest label there is, where there are enough
            examples to tell.
        surrogate: another model for the same task, for the transfer attack; not applicable without.
        batch_size: images in one forward pass.
        progress: called with the name of each group of checks before it is run.

    Returns:
        One `Check` a line, and accuracy against eps and against steps.

    Raises:
        TypeError: if an argument is of the wrong type or dtype.
        ValueError: if an argument is out of range or of the wrong shape, or the model does not take the images' dtype.
    """
    check_model(model)
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: got {generator!r}, expected e.g. torch.Generator().manual_seed(0)")
    if surrogate is not None:
        check_model(surrogate)
    images, labels = _inputs(model, data)
    given = {"steps": steps, "more_steps": more_steps, "restarts": restarts, "queries": queries}
    counts = {name: integer(name, value) for name, value in {**given, "batch_size": batch_size}.items()}
    if not 0 < number("eps", eps, least=0) <= 0.5:
        raise ValueError(f"eps: got {eps!r}, expected a radius above 0, at most 0.5, e.g. 8/255")
    tolerance = number("tolerance", tolerance, least=0)
    say: Callable[[str], object] = progress if progress is not None else lambda _: None

    settings: dict[str, Any] = {**counts, "tolerance": tolerance, "alpha": eps / 4}
    with attacking(model, "eval"):
        torch.manual_seed(_drawn(generator))  # inside: the global state is put back
        subject = Subject(
            model,
            constant(images),
            constant(labels).to(images.device),
            float(eps),
            tolerance,
            generator,
            surrogate,
            num_classes,
            counts["steps"],
            counts["more_steps"],
            counts["restarts"],
            counts["queries"],
            counts["batch_size"],
        )
        if own_dtype(model, subject.images.dtype) != subject.images.dtype:  # refused, where other failures are reported
            with torch.no_grad():
                answered(model, subject.images[:PROBES].clone())
        say("behaviour")
        checks, usable = behaviour_checks(subject)
        say("gradients")
        checks += gradient_checks(subject, usable)
        say("attacks")
        found = attack_checks(subject, usable)
    return Audit(
        tuple(checks + found.checks), len(images), float(eps), found.against_eps, found.against_steps, settings
    )


def _inputs(model: nn.Module, data: object) -> tuple[Tensor, Tensor]:
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise TypeError(f"data: got {type(data).__name__}, expected a pair (images, labels)")
    images, labels = data
    own = next((p for p in model.parameters() if p.is_floating_point()), None)
    if isinstance(images, Tensor) and images.dtype == torch.uint8:
        dtype = torch.get_default_dtype() if own is None else own.dtype
        images = as_model_input(images, device=images.device, dtype=dtype, channels_last=False)
    check_images(images)
    check_labels(labels, len(images))
    return images if own is None else images.to(own.device), labels


def _drawn(generator: torch.Generator) -> int:
    return int(torch.randint(2**31, (), generator=generator, device=generator.device))
