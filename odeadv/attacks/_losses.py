"""The losses that attacks raise, by name: cross-entropy, margin, difference of logits ratio, KL divergence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from odeadv.support.checks import did_you_mean, shown

PerExampleLoss = Callable[[Tensor, Tensor], Tensor]
LossName = Literal["ce", "margin", "dlr", "kl"]
LossArgument = LossName | PerExampleLoss
TargetName = Literal["most-likely", "least-likely"]
Target = TargetName | Tensor


class Truth(NamedTuple):
    """The classes and logits that a batch of logits is compared with.

    Attributes:
        labels: (n,) int64, the true classes.
        target: (n,) int64, the classes that the attack aims at; None for an untargeted attack.
        clean: (n, classes), logits of the clean images; None unless the loss needs them.
        reach: if True, an attack with a ``target`` succeeds only if the model predicts the target. If False, it
            succeeds with any wrong class, and the target is only a direction (APGD-T).
    """

    labels: Tensor
    target: Tensor | None = None
    clean: Tensor | None = None
    reach: bool = True

    def rows(self, index: Tensor | None) -> Truth:
        """Return the classes and logits of the examples ``index``; None means all examples."""
        if index is None:
            return self
        target, clean = (None if part is None else part[index] for part in (self.target, self.clean))
        return Truth(self.labels[index], target, clean, self.reach)

    def fooled(self, logits: Tensor) -> Tensor:
        """Return (n,) bool: True if the attack has succeeded with the predicted class."""
        predicted = logits.argmax(dim=1)
        return predicted == self.target if self.target is not None and self.reach else predicted != self.labels


@dataclass(frozen=True)
class LossRule:
    """A loss in the form that `AttackLoss` uses.

    Attributes:
        ascended: a function (logits, truth) -> losses of shape (n,); a higher loss is worse for the model.
        needs_clean: True if ``ascended`` reads ``truth.clean``.
        targeted: True if the loss is defined for targeted attacks.
    """

    ascended: Callable[[Tensor, Truth], Tensor]
    needs_clean: bool = False
    targeted: bool = True


def of_labels(function: PerExampleLoss) -> LossRule:
    """Return the rule that raises ``function(logits, labels)``, or lowers ``function(logits, target)``."""

    def ascended(logits: Tensor, truth: Truth) -> Tensor:
        if truth.target is None:
            return function(logits, truth.labels)
        losses = function(logits, truth.target)
        return -losses if isinstance(losses, Tensor) else losses  # the caller rejects other types

    return LossRule(ascended)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return ``logsumexp(z) - z_y``, (n,), for logits z and label y."""
    return functional.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return ``max_{j != y} z_j - z_y``, (n,), for logits z and label y. Source: Carlini and Wagner 2017.

    It is positive if the predicted class is wrong.
    """
    own = labels[:, None]
    others = logits.scatter(1, own, -torch.inf)
    return others.amax(dim=1) - logits.gather(1, own)[:, 0]


def check_classes_of_dlr(logits: Tensor, needed: int) -> None:
    """Raise ValueError if ``logits`` have fewer classes than ``needed``."""
    if logits.shape[1] < needed:
        raise ValueError(f"loss: 'dlr' got {logits.shape[1]} classes, expected at least {needed}; use 'margin'")


def _dlr(logits: Tensor, truth: Truth) -> Tensor:
    """Return the difference of logits ratio, (n,). Source: Croce and Hein 2020, Eq. 6 and 7.

    Let z be the logits, y the label and z_pi1 >= z_pi2 >= ... the sorted logits. The ratio is
    ``(max_{j != y} z_j - z_y) / (z_pi1 - z_pi3)``. For a target t it is
    ``(z_t - z_y) / (z_pi1 - (z_pi3 + z_pi4) / 2)``.
    """
    needed = 3 if truth.target is None else 4
    check_classes_of_dlr(logits, needed)
    top = logits.topk(needed, dim=1).values
    # 1e-12 comes from the authors' code; with it equal logits give 0 and not NaN.
    if truth.target is None:
        return margin(logits, truth.labels) / (top[:, 0] - top[:, 2] + 1e-12)
    gain = (logits.gather(1, truth.target[:, None]) - logits.gather(1, truth.labels[:, None]))[:, 0]
    return gain / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12)


def _kl(logits: Tensor, truth: Truth) -> Tensor:
    """Return ``sum_j p_j (log p_j - log q_j)``, (n,). Source: Zhang et al. 2019.

    p are the probabilities of the clean image, q the probabilities of the attacked image.
    """
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


def likely_targets(name: TargetName, logits: Tensor, labels: Tensor) -> Tensor:
    """Return (n,) int64: the most or the least likely class other than the label."""
    own = labels[:, None]
    if name == "most-likely":
        return logits.scatter(1, own, -torch.inf).argmax(dim=1)
    return logits.scatter(1, own, torch.inf).argmin(dim=1)


def resolve_loss(loss: object) -> LossRule:
    """Return the rule for a name or a function.

    Raises:
        TypeError: if ``loss`` is neither a name nor a function.
        ValueError: if the name is unknown.
    """
    expected = "'ce', 'margin', 'dlr', 'kl' or a function (logits, labels) -> losses of shape (n,)"
    if isinstance(loss, str):
        if loss not in LOSS_RULES:
            raise ValueError(f"loss: got {shown(loss)}, expected {expected}{did_you_mean(loss, LOSS_RULES)}")
        return LOSS_RULES[loss]
    if not callable(loss):
        raise TypeError(f"loss: got {shown(loss)}, expected {expected}")
    return of_labels(loss)
