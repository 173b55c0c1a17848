"""What attacks ascend, by name: cross-entropy, margin, difference of logits ratio, Kullback-Leibler divergence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

PerExampleLoss = Callable[[Tensor, Tensor], Tensor]
LossName = Literal["ce", "margin", "dlr", "kl"]
Loss = LossName | PerExampleLoss


class Truth(NamedTuple):
    """What the logits of a batch are compared with.

    Attributes:
        labels: (n,) int64, the true classes.
        target: (n,) int64, the classes that a targeted attack wants; None for an untargeted one.
        clean: (n, classes), logits of the clean images; None unless the loss needs them.
    """

    labels: Tensor
    target: Tensor | None = None
    clean: Tensor | None = None

    def rows(self, index: Tensor | None) -> Truth:
        """That of the examples ``index`` only; None means all."""
        if index is None:
            return self
        target, clean = (None if part is None else part[index] for part in (self.target, self.clean))
        return Truth(self.labels[index], target, clean)

    def fooled(self, logits: Tensor) -> Tensor:
        """(n,) bool: whether the class is not the true one, or, of a targeted attack, is the target."""
        predicted = logits.argmax(dim=1)
        return predicted != self.labels if self.target is None else predicted == self.target


@dataclass(frozen=True)
class LossRule:
    """A loss as `AttackLoss` uses it.

    Attributes:
        ascended: (logits, truth) to losses of shape (n,), of which more is worse for the model.
        needs_clean: whether it reads ``truth.clean``.
        targeted: whether it is defined for targeted attacks.
    """

    ascended: Callable[[Tensor, Truth], Tensor]
    needs_clean: bool = False
    targeted: bool = True


def of_labels(function: PerExampleLoss) -> LossRule:
    """The rule that ascends ``function(logits, labels)``, or, of a targeted attack, descends it at the target."""

    def ascended(logits: Tensor, truth: Truth) -> Tensor:
        if truth.target is None:
            return function(logits, truth.labels)
        losses = function(logits, truth.target)
        return -losses if isinstance(losses, Tensor) else losses  # what is not a tensor is refused by the caller

    return LossRule(ascended)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """``logsumexp(z) - z_y``, (n,)."""
    return functional.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """``max_{j != y} z_j - z_y``, (n,): positive where the class is wrong. Source: Carlini and Wagner 2017, f_6."""
    own = labels[:, None]
    others = logits.scatter(1, own, -torch.inf)
    return others.amax(dim=1) - logits.gather(1, own)[:, 0]


def _dlr(logits: Tensor, truth: Truth) -> Tensor:
    """Difference of logits ratio; pi sorts the logits z from high to low. Source: Croce and Hein 2020, Eq. 6 and 7.

    ``(max_{j != y} z_j - z_y) / (z_pi1 - z_pi3)``; targeted, ``(z_t - z_y) / (z_pi1 - (z_pi3 + z_pi4) / 2)``.
    """
    needed = 3 if truth.target is None else 4
    if logits.shape[1] < needed:
        raise ValueError(f"loss: 'dlr' got {logits.shape[1]} classes, expected at least {needed}; use 'margin'")
    top = logits.topk(needed, dim=1).values
    if truth.target is None:
        return margin(logits, truth.labels) / (top[:, 0] - top[:, 2] + 1e-12)
    gain = (logits.gather(1, truth.target[:, None]) - logits.gather(1, truth.labels[:, None]))[:, 0]
    return gain / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12)


def _kl(logits: Tensor, truth: Truth) -> Tensor:
    """``sum_j p_j (log p_j - log q_j)``, p of the clean and q of the attacked images. Source: Zhang et al. 2019."""
    assert truth.clean is not None
    clean, attacked = (part.log_softmax(dim=1) for part in (truth.clean, logits))
    return functional.kl_div(attacked, clean, reduction="none", log_target=True).sum(dim=1)


LOSS_RULES: Mapping[str, LossRule] = MappingProxyType(
    {
        "ce": of_labels(cross_entropy),
        "margin": of_labels(margin),
        "dlr": LossRule(_dlr),
        "kl": LossRule(_kl, needs_clean=True, targeted=False),
    }
)


def resolve_loss(loss: object) -> LossRule:
    """The rule that ``loss`` names or is; ValueError for an unknown name, TypeError for anything else."""
    expected = "'ce', 'margin', 'dlr', 'kl' or a function (logits, labels) -> losses of shape (n,)"
    if isinstance(loss, str):
        if loss not in LOSS_RULES:
            raise ValueError(f"loss: got {loss!r}, expected {expected}")
        return LOSS_RULES[loss]
    if not callable(loss):
        raise TypeError(f"loss: got {loss!r}, expected {expected}")
    return of_labels(loss)
