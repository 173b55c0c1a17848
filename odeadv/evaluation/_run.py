"""All attacks of a protocol on one batch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from odeadv.evaluation._attack import Counted, attacked
from odeadv.evaluation._ifgsm import Run, SharedRuns
from odeadv.evaluation._prepare import Prepared
from odeadv.evaluation.protocols import AttackSpec


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


def worst_groups(attacks: Sequence[AttackSpec]) -> dict[Run, list[int]]:
    """Places of the (I)FGSM attacks of which only the worst-so-far score is asked, by radius and step size."""
    groups: dict[Run, list[int]] = {}
    for place, spec in enumerate(attacks):
        if spec.shared and spec.score == "worst":
            groups.setdefault(_run(spec), []).append(place)
    return groups


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


def _run(spec: AttackSpec) -> Run:
    return spec.eps, spec.eps if spec.alpha is None else spec.alpha
