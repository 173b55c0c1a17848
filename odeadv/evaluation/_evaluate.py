"""Running a protocol, sharing the work that its attacks have in common."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import chain, islice

import torch
from torch import Tensor, nn

from odeadv.attacks._checks import check_images, check_labels, check_model, positive_integer
from odeadv.attacks._iterates import iterates
from odeadv.attacks._linf import linf_bounds
from odeadv.attacks._objective import Objective, attacking, constant
from odeadv.evaluation._evaluation import AttackResult, Evaluation
from odeadv.evaluation._images import as_model_input
from odeadv.evaluation._protocols import AttackSpec, Protocol, resolve_protocol


def evaluate(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    protocol: str | Protocol = "table2",
    *,
    batch_size: int = 128,
    device: torch.device | str | None = None,
    channels_last: bool = True,
    progress: Callable[[int, int], object] | None = None,
) -> Evaluation:
    """Clean and robust accuracy of ``model`` on ``data``; the model runs in eval mode and is restored afterwards.

    The figures are those of `odeadv.attacks.fgsm` and `odeadv.attacks.ifgsm` called one by one, with less work: one
    clean forward and backward pass gives the clean accuracy, FGSM at every radius and the first step of every IFGSM;
    attacks that differ in their number of steps only come from one run; the forward pass that scores an iterate is
    that of the next step's gradient. Arithmetic is in the dtype of the images, without any autocast of its own.

    Args:
        model: images to logits (n, classes); its normalisation inside.
        data: (images, labels) on any device. Images: floating, (n, channels, h, w) or (n, ...), in [0, 1]; or uint8,
            (n, h, w, channels), converted batch by batch to the model's dtype / 255. Labels: (n,) int64.
        protocol: one of `PROTOCOLS` (``"table1"``, ``"table2"``, ``"table6"``) or a `Protocol`.
        batch_size: images in one forward pass.
        device: where to compute; None takes the model's. The model is not moved.
        channels_last: lay 4-D images out channels-last in memory (same values; often faster convolutions).
        progress: called as ``progress(done, total)``, in batches, after each batch.

    Returns:
        Robust accuracies by last iterate, and apart from them worst-so-far accuracies, with outcomes and cost.

    Raises:
        TypeError: if an argument is of the wrong type or dtype.
        ValueError: if an argument is out of range or of the wrong shape, the protocol is unknown, or logits or
            gradients are not finite.
    """
    protocol = resolve_protocol(protocol)
    batch_size = positive_integer("batch_size", batch_size)
    check_model(model)
    images, labels = _checked(data)
    device = _device(model, images, device)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    if progress is not None and not callable(progress):
        raise TypeError(f"progress: got {progress!r}, expected None or a function (done, total)")

    began = time.perf_counter()
    forward_passes = gradient_evaluations = 0
    outcomes: list[Tensor] = []
    starts = range(0, len(images), batch_size)
    with attacking(model, "eval"):
        for done, first in enumerate(starts, start=1):
            part = slice(first, first + batch_size)
            x = as_model_input(constant(images[part]), device=device, dtype=dtype, channels_last=channels_last)
            y = constant(labels[part]).to(device)
            objective = Objective(model, y)
            outcomes.append(_outcomes(objective, x, y, protocol.attacks).cpu())
            forward_passes += objective.forward_passes
            gradient_evaluations += objective.gradient_evaluations
            if progress is not None:
                progress(done, len(starts))
    clean, *attacked = torch.cat(outcomes, dim=1)
    return Evaluation(
        protocol=protocol.name,
        clean_outcomes=clean,
        attacks=tuple(
            AttackResult(spec.name, spec.eps, spec.alpha, spec.steps, last, worst)
            for spec, last, worst in zip(protocol.attacks, attacked[::2], attacked[1::2], strict=True)
        ),
        forward_passes=forward_passes,
        gradient_evaluations=gradient_evaluations,
        seconds=time.perf_counter() - began,
    )


def _outcomes(objective: Objective, images: Tensor, labels: Tensor, attacks: Sequence[AttackSpec]) -> Tensor:
    """Which images of one batch are classified correctly: (1 + 2 * attacks, n) bool.

    Rows: clean; then for each attack its last iterate, and the clean image and all iterates together.
    """
    logits, clean_gradient = objective.logits_and_gradient(images)
    clean = logits.argmax(dim=1) == labels
    runs: dict[tuple[float, float], int] = {}
    for spec in attacks:
        runs[spec.eps, spec.alpha] = max(spec.steps, runs.get((spec.eps, spec.alpha), 0))
    scored = {
        (eps, alpha): _score_run(objective, images, labels, clean_gradient, eps=eps, alpha=alpha, steps=steps)
        for (eps, alpha), steps in runs.items()
    }
    rows = [clean]
    for spec in attacks:
        correct = scored[spec.eps, spec.alpha][: spec.steps]
        rows += [correct[-1], clean & correct.all(dim=0)]
    return torch.stack(rows)


def _score_run(
    objective: Objective,
    images: Tensor,
    labels: Tensor,
    clean_gradient: Tensor,
    *,
    eps: float,
    alpha: float,
    steps: int,
) -> Tensor:
    """Which of the iterates 1 to ``steps`` are classified correctly: (steps, n) bool."""
    correct: list[Tensor] = []

    def scoring_gradient(iterate: Tensor) -> Tensor:
        logits, gradient = objective.logits_and_gradient(iterate)
        correct.append(logits.argmax(dim=1) == labels)
        return gradient

    bounds = linf_bounds(images, eps)
    path = iterates(scoring_gradient, images, alpha=alpha, bounds=bounds, first_gradient=clean_gradient)
    last = next(islice(path, steps - 1, None))
    correct.append(objective.logits(last).argmax(dim=1) == labels)
    return torch.stack(correct)


def _checked(data: object) -> tuple[Tensor, Tensor]:
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise TypeError(f"data: got {type(data).__name__}, expected a pair (images, labels)")
    images, labels = data
    if isinstance(images, Tensor) and images.dtype == torch.uint8:
        if images.ndim != 4 or images.shape[3] not in (1, 3) or images.numel() == 0:
            raise ValueError(
                f"images: got uint8 of shape {tuple(images.shape)}, expected (n, h, w, channels) with 1 or 3 channels"
            )
    else:
        check_images(images)
    check_labels(labels, len(images))
    return images, labels


def _device(model: nn.Module, images: Tensor, device: torch.device | str | None) -> torch.device:
    own = next((tensor.device for tensor in chain(model.parameters(), model.buffers())), None)
    if device is None:
        return own or images.device
    asked = torch.device(device)
    if own is not None and (asked.type != own.type or asked.index not in (None, own.index)):
        raise ValueError(f"device: got {asked}, expected that of the model, {own} (the model is not moved)")
    return own or asked
