"""Attacks that share no work with others: those of `odeadv.attacks`, and AutoAttack through pyautoattack."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from odeadv.attacks.balls import L2Ball, linf_bounds
from odeadv.attacks.checks import check_logits
from odeadv.evaluation._ifgsm import Run, SharedRuns, _run
from odeadv.evaluation._prepare import Prepared
from odeadv.evaluation.protocols import AUTOATTACK, AttackSpec, attack_function, pyautoattack, takes
from odeadv.support.digests import derived_seed


class Counted(nn.Module):
    """A model that counts images sent through it, and those whose gradient comes back, and checks its logits.

    Args:
        model: images to logits.
        highest_label: the largest label there is.
    """

    def __init__(self, model: nn.Module, highest_label: int) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.highest_label = highest_label
        self.forward_passes = self.gradient_evaluations = 0

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ``x``."""
        logits = check_logits(self.model(x), len(x), self.highest_label)
        self.forward_passes += len(x)
        if logits.requires_grad:
            logits.register_hook(self._came_back)  # type: ignore[no-untyped-call]
        return logits

    def _came_back(self, gradient: Tensor) -> None:
        self.gradient_evaluations += len(gradient)


def attacked(
    spec: AttackSpec, model: Counted, images: Tensor, labels: Tensor, *, seed: int, place: str
) -> tuple[Tensor, list[str]]:
    """The images that the attack ends with, and its warnings.

    Random numbers come from a generator seeded by ``seed`` and ``place`` (of the batch and attack), so they do not
    depend on what was run before; the global random state is left alone.
    """
    own_seed = derived_seed(seed, place)
    if spec.name == AUTOATTACK:
        return _autoattack(spec, model, images, labels, own_seed)
    function = attack_function(spec.name)
    arguments = spec.arguments()
    if spec.score == "worst" and takes(function, "keep"):
        arguments["keep"] = "worst"  # the first iterate that fools, not the last iterate
    if takes(function, "generator") and "generator" not in arguments:
        arguments["generator"] = torch.Generator(device="cpu").manual_seed(own_seed)
    return function(model, images, labels, **arguments), []


def _autoattack(
    spec: AttackSpec, model: Counted, images: Tensor, labels: Tensor, seed: int
) -> tuple[Tensor, list[str]]:
    """AutoAttack (Croce and Hein 2020) by pyautoattack, the authors' code as a package; projected to the exact ball."""
    autoattack = pyautoattack()
    if images.dtype != torch.float32 or images.ndim != 4:
        raise ValueError(
            f"images: got {images.dtype} of shape {tuple(images.shape)}, expected float32 (n, channels, height, width) "
            "for 'autoattack'"
        )
    options: dict[str, Any] = {"norm": "Linf", "version": "standard", **spec.options}
    if "attacks" in options:
        options["attacks"] = list(options["attacks"])
    plain = images.contiguous()  # its .view calls need it
    cuda = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), _tracing_kept(), _logged("auto-attack") as warned:
        attack = autoattack(model, eps=spec.eps, seed=seed, device=images.device, **options)
        with torch.no_grad():
            classes = model(plain[:1]).shape[1]
        _check_classes(attack.attacks_to_run, classes)
        for part in (attack.apgd_targeted, attack.fab):
            part.n_target_classes = min(part.n_target_classes, classes - 1)
        found, _ = attack.run_standard_evaluation(plain, labels, batch_size=len(plain))
    # Its own balls are up to a rounding wider.
    if options["norm"] == "Linf":
        found = linf_bounds(plain, spec.eps).project(found)
    elif options["norm"] == "L2":
        found = L2Ball(plain, spec.eps).project(found)
    return found.detach(), list(dict.fromkeys(warned))


def _check_classes(names: Collection[str], classes: int) -> None:
    """ValueError if a part's loss takes logits that there are not: DLR has the third largest."""
    least = {"apgd-dlr": 3, "apgd-t": 4}
    for name in names:
        if classes < least.get(name, 2):
            fit = [other for other in ("apgd-ce", "apgd-dlr", "fab-t", "square") if classes >= least.get(other, 2)]
            raise ValueError(
                f"attacks: {name!r} of AutoAttack needs at least {least[name]} classes, but the model has {classes}; "
                f"take options={{'version': 'custom', 'attacks': {tuple(fit)!r}}}"
            )


@contextmanager
def _tracing_kept() -> Iterator[None]:
    """Put back the trace function of a debugger or of coverage, which AutoAttack's checks take away."""
    trace = sys.gettrace()
    try:
        yield
    finally:
        sys.settrace(trace)


@contextmanager
def _logged(name: str) -> Iterator[list[str]]:
    """The warnings that a logger is given inside."""
    messages: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, listener = logging.getLogger(name), Listener(level=logging.WARNING)
    propagate = logger.propagate
    logger.addHandler(listener)
    logger.propagate = False
    try:
        yield messages
    finally:
        logger.removeHandler(listener)
        logger.propagate = propagate


class Batch(NamedTuple):
    """Images and labels on the model's device."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Found:
    """Outcomes of one batch.

    Attributes:
        rows: (1 + 2 * attacks, n) bool: clean; then for each attack the images it ended with, and worst so far.
        forward_passes: images sent through the model.
        gradient_evaluations: how many of these were also differentiated.
        notes: warnings of the attacks.
    """

    rows: Tensor
    forward_passes: int
    gradient_evaluations: int
    notes: list[str]


def batch_outcomes(
    prepared: Prepared,
    batch: Batch,
    attacks: Sequence[AttackSpec],
    *,
    highest_label: int,
    seed: int,
    number: int,
    repeatable: bool,
    queued: bool = False,
) -> Found:
    """What the attacks do to one batch; rows of those that are queued (`worst_groups`) are left false.

    Args:
        prepared: the model.
        batch: the clean images.
        attacks: of the protocol.
        highest_label: the largest label of all batches.
        seed: of the attacks that draw.
        number: of the batch.
        repeatable: whether the same images always have the same gradients.
        queued: run also what is otherwise queued, on the whole batch.
    """
    images, labels = batch
    scorer = prepared.scorer(labels)
    lengths: dict[Run, list[int]] = {}
    for spec in attacks:
        if spec.shared and (queued or spec.score == "last"):
            lengths.setdefault(_run(spec), []).append(spec.steps or 1)
    if lengths and prepared.approximate:
        clean, clean_gradient = scorer.correct(images), scorer.gradient(images)
    elif lengths:
        clean, clean_gradient = scorer.correct_and_gradient(images)
    else:
        clean = scorer.correct(images)
    scored: Mapping[tuple[Run, int], tuple[Tensor, Tensor]] = {}
    if lengths:
        shared = SharedRuns(scorer, images, clean, clean_gradient, lengths, repeatable=repeatable)
        scored = shared.outcomes()
    counted = Counted(prepared.exact, highest_label)
    notes: list[str] = []
    rows = [clean]
    nothing = torch.zeros_like(clean)
    specs = [json.dumps(spec.to_dict(), sort_keys=True) for spec in attacks]
    for place, spec in enumerate(attacks):
        if spec.shared:
            rows += scored.get((_run(spec), spec.steps or 1), (nothing, nothing))
        else:
            # Not its place in the protocol: equal specs in a row are told apart by how many came before.
            drawn_at = f"{number} {specs[place]} {specs[:place].count(specs[place])}"
            last, warned = _separate(spec, counted, batch, clean, seed=seed, place=drawn_at)
            rows += [last, clean & last]
            notes += warned
    return Found(
        torch.stack(rows),
        scorer.forward_passes + counted.forward_passes,
        scorer.gradient_evaluations + counted.gradient_evaluations,
        list(dict.fromkeys(notes)),
    )


def _separate(
    spec: AttackSpec, model: Counted, batch: Batch, clean: Tensor, *, seed: int, place: str
) -> tuple[Tensor, list[str]]:
    """Outcomes of an attack that shares nothing; for its worst-so-far score, of the examples right before it."""
    chosen = clean if spec.score == "worst" else torch.ones_like(clean)
    outcomes = torch.zeros_like(clean)
    if not chosen.any():
        return outcomes, []
    images, labels = batch.images[chosen], batch.labels[chosen]
    found, notes = attacked(spec, model, images, labels, seed=seed, place=place)
    with torch.no_grad():
        outcomes[chosen] = model(found).argmax(dim=1) == labels
    return outcomes, notes
