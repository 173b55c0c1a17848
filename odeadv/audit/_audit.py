"""The checklist in order: can the model be attacked, are its gradients right, do attacks work?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from odeadv.attacks.balls import BALLS, Norm
from odeadv.attacks.checks import (
    answered,
    check_generator,
    check_model,
    own_dtype,
)
from odeadv.attacks.objective import attacking, constant
from odeadv.audit._attacks import ATTACKS
from odeadv.audit._behaviour import BEHAVIOUR
from odeadv.audit._gradients import GRADIENTS
from odeadv.audit._report import Audit, Check
from odeadv.audit._subject import Counts, Subject
from odeadv.data import as_model_input
from odeadv.evaluation.data import Output, read_data
from odeadv.evaluation.trust import PROBES
from odeadv.support.checks import choice, integer, number, shown
from odeadv.support.extras import extra

# With a larger L-infinity radius every image could become grey, so robustness would be meaningless.
_LARGEST_LINF = 0.5


def audit(
    model: nn.Module,
    data: object,
    *,
    eps: float = 8 / 255,
    norm: Norm = "linf",
    generator: torch.Generator | None = None,
    steps: int = 20,
    more_steps: int = 100,
    restarts: int = 3,
    queries: int = 500,
    tolerance: float = 0.01,
    num_classes: int | None = None,
    surrogate: nn.Module | None = None,
    batch_size: int = 128,
    output: str | int | Callable[[Any], Tensor] | None = None,
    progress: Callable[[str], object] | None = None,
) -> Audit:
    """Run the checklist on ``model``, and restore the model and the global random state afterwards.

    Some faults make attacks meaningless (logits that are not finite, too few classes). Such a fault fails one line, and
    all lines with attacks are then not applicable. Attacks on a random model follow single draws.

    Args:
        model: maps images to logits (n, classes), and normalises the images itself.
        data: (images, labels), a Dataset, a DataLoader or an `ImageDataset`. A few hundred examples are
            enough. Images are floating in [0, 1], or uint8 (n, h, w, channels).
        eps: radius of the ball for which robustness is claimed, in pixel units of [0, 1].
        norm: norm of the ball, ``"linf"`` or ``"l2"``.
        generator: the only source of randomness; None means ``torch.Generator().manual_seed(0)``.
        steps: number of steps of IFGSM and PGD, with alpha = eps / 4.
        more_steps: the largest number of steps; the accuracy must have converged there.
        restarts: number of random starts of PGD.
        queries: number of queries of the gradient-free attack.
        tolerance: two attacks may differ by this fraction of the examples without a failure (at least one example).
        num_classes: the expected number of logits. None expects the highest label plus 1, if there are enough examples
            to see all labels.
        surrogate: another model for the same task. The transfer attack needs it, and is not applicable without it.
        batch_size: number of images in one forward pass.
        output: place of the logits in the outputs of the model and of the surrogate: a key, an attribute, an index, or
            a function of the outputs.
        progress: called with the name of each check before it is run.

    Returns:
        One `Check` per line, the accuracy under all attacks together, and curves of accuracy against eps and steps.

    Raises:
        TypeError: if an argument is of the wrong type or dtype.
        ValueError: if an argument is out of range or of the wrong shape, or the model does not take the images' dtype.
        ModuleNotFoundError: if NumPy is not installed; it comes with the extra ``evaluate``.
    """
    with extra("evaluate"):
        import numpy  # noqa: F401  # a missing package is reported before any work
    check_model(model)
    if surrogate is not None:
        check_model(surrogate, name="surrogate")
    if output is not None:
        model, surrogate = Output(model, output), None if surrogate is None else Output(surrogate, output)
    generator = check_generator(torch.Generator().manual_seed(0) if generator is None else generator)
    images, labels = _inputs(model, data)
    choice("norm", norm, BALLS)
    eps = number("eps", eps, above=0, most=_LARGEST_LINF if norm == "linf" else None)
    given = {"steps": steps, "more_steps": more_steps, "restarts": restarts, "queries": queries}
    counts = Counts(**{name: integer(name, value) for name, value in {**given, "batch_size": batch_size}.items()})
    tolerance = number("tolerance", tolerance, least=0)
    if num_classes is not None:
        num_classes = integer("num_classes", num_classes)
    if progress is not None and not callable(progress):
        raise TypeError(f"progress: got {shown(progress)}, expected a function of one string")
    with attacking(model, "eval"):
        torch.manual_seed(_drawn(generator))  # seed here, so that the global state is restored
        subject = Subject(
            model=model,
            images=constant(images),
            labels=constant(labels).to(images.device),
            eps=eps,
            norm=norm,
            tolerance=tolerance,
            generator=generator,
            surrogate=surrogate,
            num_classes=num_classes,
            counts=counts,
        )
        checks = _checks_of(subject, progress)
    return _result(subject, checks)


def _checks_of(subject: Subject, progress: Callable[[str], object] | None) -> tuple[Check, ...]:
    """Run all lines of the checklist."""
    if own_dtype(subject.model, subject.images.dtype) != subject.images.dtype:
        # Wrong images are a mistake of the caller, not of the model: raise here instead of reporting a failed check.
        with torch.no_grad():
            answered(subject.model, subject.images[:PROBES].clone())
    checks: list[Check] = []
    for run in (*BEHAVIOUR, *GRADIENTS, *ATTACKS):
        if progress is not None:
            progress(run.__name__)
        checks.append(run(subject))
    return tuple(checks)


def _result(subject: Subject, checks: tuple[Check, ...]) -> Audit:
    clean, robust = _headline(subject)
    return Audit(
        checks,
        subject.n,
        subject.eps,
        norm=subject.norm,
        clean_correct=clean,
        robust_correct=robust,
        against_eps=subject.against_eps,
        against_steps=subject.against_steps,
        settings={**asdict(subject.counts), "tolerance": subject.tolerance, "alpha": subject.eps / 4},
    )


def _headline(subject: Subject) -> tuple[int | None, int | None]:
    """Return two numbers of examples: correct without an attack, and correct under every attack; None if unknown.

    Both are unknown for a random model, because noise alone finds a wrong answer among many draws.
    """
    if subject.unusable or subject.random:
        return None, None
    clean = int((subject.outputs.argmax(dim=1) == subject.labels).sum())
    return clean, int(subject.unbroken.sum()) if subject.attackable else None


def _inputs(model: nn.Module, data: object) -> tuple[Tensor, Tensor]:
    images, labels, _ = read_data(data)
    own = next((p for p in model.parameters() if p.is_floating_point()), None)
    if images.dtype == torch.uint8:
        dtype = torch.get_default_dtype() if own is None else own.dtype
        images = as_model_input(images, device=images.device, dtype=dtype, channels_last=False)
    return images if own is None else images.to(own.device), labels


def _drawn(generator: torch.Generator) -> int:
    return int(torch.randint(2**31, (), generator=generator, device=generator.device))
