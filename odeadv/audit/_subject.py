"""What is audited, and the ways of looking at it that the checks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from odeadv.audit._report import Check, Status
from odeadv.evaluation import AttackResult, AttackSpec, Evaluation, Protocol, evaluate

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Subject:
    """A model, in eval mode and protected, with examples and what was asked of the audit.

    Attributes:
        model: images to logits.
        images: (n, ...), on the model's device.
        labels: (n,), there too.
        eps: radius of the L-infinity ball.
        tolerance: fraction of examples that is no difference.
        generator: of everything random.
        surrogate: of the transfer attack.
        num_classes: how many logits there must be, if known.
        steps, more_steps, restarts, queries, batch_size: as `audit` was given them.
        random: whether two forward passes differ; found by the first checks.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    eps: float
    tolerance: float
    generator: torch.Generator
    surrogate: nn.Module | None
    num_classes: int | None
    steps: int
    more_steps: int
    restarts: int
    queries: int
    batch_size: int
    random: bool = field(default=False)

    @property
    def n(self) -> int:
        """Number of examples."""
        return len(self.images)

    @property
    def allowed(self) -> int:
        """How many examples may differ without a failure."""
        return max(1, int(self.tolerance * self.n))

    def batches(self) -> Sequence[slice]:
        """All examples, batch by batch."""
        return [slice(first, first + self.batch_size) for first in range(0, self.n, self.batch_size)]

    def logits(self, images: Tensor) -> Tensor:
        """(k, classes), without a graph."""
        with torch.no_grad():
            return torch.cat([self.model(part) for part in torch.split(images, self.batch_size)])

    def correct(self, images: Tensor) -> Tensor:
        """(n,) bool: which of ``images``, one for each example, are classified correctly."""
        return self.logits(images).argmax(dim=1) == self.labels

    def evaluated(self, *attacks: AttackSpec) -> Evaluation:
        """The attacks on all examples; a random model by single draws."""
        data = (self.images, self.labels)
        seed = int(torch.randint(2**31, (), generator=self.generator, device=self.generator.device))
        return evaluate(
            self.model, data, Protocol("audit", attacks), batch_size=self.batch_size, stochastic=self.random, seed=seed
        )


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy (n,)."""
    return functional.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The best other logit less that of the label (n,): positive where the image is misclassified."""
    own = logits.gather(1, labels[:, None]).squeeze(1)
    return logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1) - own


def gradient(model: nn.Module, images: Tensor, labels: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """The losses (n,) and the gradient of their sum, zero where the logits do not depend on the images."""
    leaf = images.detach().requires_grad_()
    losses = loss(model(leaf), labels)
    if not losses.requires_grad:
        return losses.detach(), torch.zeros_like(images)
    found = torch.autograd.grad(losses.sum(), leaf, allow_unused=True)[0]
    return losses.detach(), torch.zeros_like(images) if found is None else found


def resisted(attack: AttackResult) -> Tensor:
    """(n,) bool on the CPU: which examples nothing on the way of the attack broke; it was scored so."""
    assert attack.worst_so_far_outcomes is not None
    return attack.worst_so_far_outcomes


def verdict(good: bool) -> Status:
    """Pass or fail."""
    return "pass" if good else "fail"


def not_applicable(name: str, why: str, meaning: str) -> Check:
    """A line that cannot be judged here."""
    return Check(name, "not applicable", {}, why, meaning)
