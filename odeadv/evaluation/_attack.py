"""Run all attacks of a protocol on one batch: FGSM and IFGSM from `_ifgsm.py`, the others from `odeadv.attacks`."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from odeadv.attacks.balls import L2Ball, linf_bounds
from odeadv.attacks.checks import check_logits
from odeadv.evaluation._ifgsm import IfgsmRun, SharedRuns, run_of
from odeadv.evaluation._own import own_attack
from odeadv.evaluation._prepare import Prepared
from odeadv.evaluation.protocols import AUTOATTACK, AttackSpec, Protocol, attack_function, pyautoattack, takes
from odeadv.evaluation.trust import FLAT
from odeadv.support.digests import derived_seed

# An image needs at least this many values 0 or 1 before their gradients can show that the model clips its images.
FEWEST_AT_BOUNDS = 16


class Batch(NamedTuple):
    """Images and labels on the model's device.

    Attributes:
        images: the images in the form that the model takes.
        labels: (n,) int64.
        places: (n,) int64 on the CPU, the numbers of the examples in the data.
    """

    images: Tensor
    labels: Tensor
    places: Tensor


@dataclass(frozen=True)
class Rules:
    """The settings of one evaluation that are the same for every batch.

    Attributes:
        protocol: the attacks.
        seed: seed of the attacks that draw random numbers.
        stochastic: True for a random model. Its images are scored by fresh forward passes. Worst-so-far outcomes would
            count noise as an attack, so they are not kept.
        passes: number of forward passes that score the final images of an attack.
        repeatable: True if equal images always have equal gradients.
        highest_label: the largest label of all batches.
        keep_images: True if the attacked images are kept; attacks then share no work.
        by_example: for each attack (`Protocol.names`), its arguments that differ between examples, with one value per
            example of the data.
    """

    protocol: Protocol
    seed: int
    stochastic: bool
    passes: int
    repeatable: bool
    highest_label: int
    keep_images: bool = False
    by_example: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def measures_worst(self, spec: AttackSpec) -> bool:
        """Return True if worst-so-far outcomes of the attack are kept."""
        # Without shared work, only the last iterate is known.
        unseen = self.keep_images and spec.shared and spec.score == "last" and (spec.steps or 1) > 1
        return spec.measures_worst and not self.stochastic and not unseen


@dataclass
class BatchOutcomes:
    """Outcomes of one batch, by the names of the attacks (`Protocol.names`).

    Attributes:
        clean: (passes, n) bool, True if the clean image is classified correctly.
        last: (passes, n) bool per attack, True if its final image is classified correctly.
        worst: (n,) bool per attack, True if the clean image and every scored iterate are classified correctly.
        signs: (n,) bool per sign that an attack may be meaningless for an image. Three signs concern the gradient.
            ``"no gradient"``: it is exactly zero. ``"at bounds"``: the image has enough pixels that are 0 or 1, and
            the gradient is not zero at some other pixel. ``"clipped"``: in addition, the gradient is exactly zero at
            all pixels that are 0 or 1. Signs in the cross-entropy: ``"saturated"`` (it is exactly zero, also under
            IFGSM); ``"lowered"`` (IFGSM has lowered it). Signs in the outputs: ``"probabilities"``; ``"bounded"``
            (all in [0, 1]); ``"flat"`` (nearly equal); ``"clipped logits"`` (several are exactly 0, none is negative).
        forward_passes: number of images sent through the model.
        gradient_evaluations: number of those images that were also differentiated.
        notes: warnings of the attacks.
        images: the attacked images per attack, if they are kept.
    """

    clean: Tensor
    signs: dict[str, Tensor]
    last: dict[str, Tensor] = field(default_factory=dict)
    worst: dict[str, Tensor] = field(default_factory=dict)
    forward_passes: int = 0
    gradient_evaluations: int = 0
    notes: list[str] = field(default_factory=list)
    images: dict[str, Tensor] = field(default_factory=dict)


def batch_outcomes(prepared: Prepared, batch: Batch, rules: Rules, number: int) -> BatchOutcomes:
    """Run the attacks on one batch, except the attacks that a queue runs (`_ifgsm.queues_of`).

    Args:
        prepared: the model.
        batch: the clean images and labels.
        rules: the settings of the evaluation.
        number: number of the batch; it is part of the seed of attacks that draw random numbers.
    """
    images, labels, _ = batch
    specs = dict(zip(rules.protocol.names, rules.protocol.attacks, strict=True))
    shared = {
        name: spec for name, spec in specs.items() if spec.shared and spec.score == "last" and not rules.keep_images
    }
    scorer = prepared.scorer(labels)
    gradient = None
    if shared:
        logits, gradient = scorer.logits_and_gradient(images)
    else:
        logits = scorer.logits(images)
    clean = scorer.right(logits)
    more = scorer.correct(images, rules.passes - 1) if rules.passes > 1 else clean[None][:0]
    outcomes = BatchOutcomes(torch.cat([clean[None], more]), _signs(logits, labels, images, gradient))
    if gradient is not None:
        lengths: dict[IfgsmRun, list[int]] = {}
        for spec in shared.values():
            lengths.setdefault(run_of(spec), []).append(spec.steps or 1)
        shared_runs = SharedRuns(
            scorer, images, clean, gradient, lengths, repeatable=rules.repeatable, passes=rules.passes
        )
        runs = shared_runs.outcomes()
        outcomes.signs |= _signs_under_way(scorer.losses(logits), shared_runs.losses)
        for name, spec in shared.items():
            outcomes.last[name], outcomes.worst[name] = runs[run_of(spec), spec.steps or 1]
    counted = CountingModel(prepared.model, rules.highest_label)
    written = [json.dumps(spec.to_dict(), sort_keys=True) for spec in specs.values()]
    for place, (name, spec) in enumerate(specs.items()):
        if name not in shared and (rules.keep_images or not (spec.shared and spec.score == "worst")):
            # The seed depends on the attack and not on its place in the protocol. It also contains the number of equal
            # attacks before this one, so that equal attacks draw different numbers.
            drawn_at = f"{number} {written[place]} {written[:place].count(written[place])}"
            _separate(outcomes, name, spec, counted, batch, rules, drawn_at)
    if rules.stochastic:
        outcomes.worst.clear()
    outcomes.forward_passes = scorer.forward_passes + counted.forward_passes
    outcomes.gradient_evaluations = scorer.gradient_evaluations + counted.gradient_evaluations
    outcomes.notes = list(dict.fromkeys(outcomes.notes))
    return outcomes


def _signs(logits: Tensor, labels: Tensor, images: Tensor, gradient: Tensor | None) -> dict[str, Tensor]:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    none = torch.zeros_like(labels, dtype=torch.bool)
    bounded = ((wide >= 0) & (wide <= 1)).all(dim=1)
    of_gradient = dict.fromkeys(("no gradient", "at bounds", "clipped"), none)
    return {
        **(of_gradient if gradient is None else _signs_of_gradient(images, gradient)),
        "lowered": none,
        "bounded": bounded,
        "flat": wide.amax(dim=1) - wide.amin(dim=1) < FLAT,
        "clipped logits": (wide >= 0).all(dim=1) & ((wide == 0).sum(dim=1) > 1),
        "saturated": functional.cross_entropy(wide, labels, reduction="none") == 0,
        # Probabilities sum to 1 up to rounding; 1e-3 allows for the rounding of half precision.
        "probabilities": bounded & ((wide.sum(dim=1) - 1).abs() < 1e-3),
    }


def _signs_of_gradient(images: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    zero, edge = (gradient == 0).flatten(1), ((images == 0) | (images == 1)).flatten(1)
    at_bounds = edge.sum(dim=1) >= FEWEST_AT_BOUNDS
    inside = (~zero & ~edge).any(dim=1)
    return {
        "no gradient": zero.all(dim=1),
        "at bounds": at_bounds & inside,
        "clipped": at_bounds & inside & (zero | ~edge).all(dim=1),
    }


def _signs_under_way(clean: Tensor, reached: Tensor) -> dict[str, Tensor]:
    """Return the signs in the cross-entropy of clean images and of last iterates (``reached``; NaN means unknown)."""
    known = ~reached.isnan()  # a decrease by 1 % or by 1e-6 may be rounding
    return {"lowered": known & (reached < 0.99 * clean - 1e-6), "saturated": (clean == 0) & (~known | (reached == 0))}


def _separate(
    outcomes: BatchOutcomes,
    name: str,
    spec: AttackSpec,
    model: CountingModel,
    batch: Batch,
    rules: Rules,
    drawn_at: str,
) -> None:
    """Run an attack that does not share work with other attacks, and add its outcomes.

    If only its worst-so-far score is requested, the attack runs only on examples whose clean image is classified
    correctly.
    """
    clean = outcomes.clean[0]
    only_worst = spec.score == "worst" and not rules.stochastic
    chosen = clean if only_worst else torch.ones_like(clean)
    right = clean.new_zeros(rules.passes, len(clean))
    ended = batch.images
    if chosen.any():
        images, labels = batch.images[chosen], batch.labels[chosen]
        model.expect(images)
        rows = batch.places[chosen.cpu()]
        own = {key: values[rows].to(labels.device) for key, values in rules.by_example.get(name, {}).items()}
        found, notes = attacked(spec, model, images, labels, seed=rules.seed, place=drawn_at, by_example=own)
        outcomes.notes += notes
        for sign, there in model.signs.items():
            outcomes.signs[sign] = outcomes.signs[sign].clone()
            outcomes.signs[sign][chosen] |= there
        with torch.no_grad():
            right[:, chosen] = torch.stack([model(found).argmax(dim=1) == labels for _ in range(rules.passes)])
        ended = batch.images.clone()
        ended[chosen] = found
    if not only_worst:
        outcomes.last[name] = right
    if rules.measures_worst(spec):
        outcomes.worst[name] = clean & right[0]
    if rules.keep_images:
        outcomes.images[name] = ended


class CountingModel(nn.Module):
    """A model that checks its logits, and counts images sent through it and images that were differentiated.

    Args:
        model: maps images to logits.
        highest_label: the largest label of all batches.

    Attributes:
        forward_passes: number of images sent through the model so far.
        gradient_evaluations: number of those images that were also differentiated.
        signs: (n,) bool each, see `BatchOutcomes`. They are measured in passes that contain all expected images (see
            `expect`). ``"no gradient"`` is True if the gradient was exactly zero in every such pass. The other signs
            come from the first such pass.
    """

    def __init__(self, model: nn.Module, highest_label: int) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.highest_label = highest_label
        self.forward_passes = self.gradient_evaluations = 0
        self.signs: dict[str, Tensor] = {}
        self._expected = 0

    def expect(self, images: Tensor) -> None:
        """Watch the gradients of these images from now on."""
        self.signs, self._expected = {}, len(images)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of ``x``."""
        logits = check_logits(self.model(x), len(x), self.highest_label)
        self.forward_passes += len(x)
        if logits.requires_grad:
            logits.register_hook(self._came_back)  # type: ignore[no-untyped-call]
        if x.requires_grad and len(x) == self._expected:
            x.register_hook(partial(self._reached, x.detach()))  # type: ignore[no-untyped-call]
        return logits

    def _came_back(self, gradient: Tensor) -> None:
        self.gradient_evaluations += len(gradient)

    def _reached(self, images: Tensor, gradient: Tensor) -> None:
        if self.signs:
            self.signs["no gradient"] &= (gradient == 0).flatten(1).all(dim=1)
        else:
            self.signs = _signs_of_gradient(images, gradient)


def attacked(
    spec: AttackSpec,
    model: CountingModel,
    images: Tensor,
    labels: Tensor,
    *,
    seed: int,
    place: str,
    by_example: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, list[str]]:
    """Return the final images of the attack, and its warnings.

    ``by_example`` has the arguments of the attack that differ between the images.

    Random numbers come from a generator that is seeded by ``seed`` and ``place``, a text that names the batch and the
    attack. So they do not depend on earlier work. The global random state does not change.
    """
    own_seed = derived_seed(seed, place)
    if spec.name == AUTOATTACK:
        return _autoattack(spec, model, images, labels, own_seed)
    function = attack_function(spec.name)
    arguments = spec.arguments() | dict(by_example or {})
    if spec.score == "worst" and isinstance(spec.name, str) and takes(function, "keep"):
        arguments["keep"] = "worst"  # return the first iterate that fools the model, not the last iterate
    if takes(function, "generator") and "generator" not in arguments:
        arguments["generator"] = torch.Generator(device="cpu").manual_seed(own_seed)
    if callable(spec.name):
        return own_attack(spec, function, model, images, labels, arguments, own_seed), []
    return function(model, images, labels, **arguments), []


def _autoattack(
    spec: AttackSpec, model: CountingModel, images: Tensor, labels: Tensor, seed: int
) -> tuple[Tensor, list[str]]:
    """Run AutoAttack (Croce and Hein 2020) with pyautoattack, the authors' code; project its images to the ball."""
    autoattack = pyautoattack()
    if images.dtype != torch.float32 or images.ndim != 4:
        raise ValueError(
            f"images: got {images.dtype} of shape {tuple(images.shape)}, expected float32 (n, channels, height, width) "
            "for 'autoattack'"
        )
    options: dict[str, Any] = {"norm": "Linf", "version": "standard", **spec.options}
    if "attacks" in options:
        options["attacks"] = list(options["attacks"])
    assert isinstance(spec.eps, float)
    plain = images.contiguous()  # pyautoattack calls .view, which needs contiguous images
    cuda = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), _tracing_kept(), _logged("auto-attack") as warned:
        attack = autoattack(model, eps=spec.eps, seed=seed, device=images.device, **options)
        with torch.no_grad():
            classes = model(plain[:1]).shape[1]
        _check_classes(attack.attacks_to_run, classes)
        for part in (attack.apgd_targeted, attack.fab):
            part.n_target_classes = min(part.n_target_classes, classes - 1)
        found, _ = attack.run_standard_evaluation(plain, labels, batch_size=len(plain))
    # Rounding makes the balls of pyautoattack slightly wider.
    if options["norm"] == "Linf":
        found = linf_bounds(plain, spec.eps).project(found)
    elif options["norm"] == "L2":
        found = L2Ball(plain, spec.eps).project(found)
    return found.detach(), list(dict.fromkeys(warned))


def _check_classes(names: Collection[str], classes: int) -> None:
    """Raise ValueError if a loss needs more logits than the model has: DLR needs 3, its targeted form 4."""
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
    """Restore the trace function of a debugger or of coverage, which AutoAttack's checks remove."""
    trace = sys.gettrace()
    try:
        yield
    finally:
        sys.settrace(trace)


@contextmanager
def _logged(name: str) -> Iterator[list[str]]:
    """Yield a list of the warnings that the logger ``name`` receives in the body."""
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
