"""The audited model, the settings of the audit, and the findings of its checks so far."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from odeadv.attacks.balls import Norm
from odeadv.evaluation import AttackResult, AttackSpec, Evaluation, Protocol, evaluate
from odeadv.evaluation.trust import Behaviour


@dataclass(frozen=True)
class Counts:
    """The numbers among the arguments of `audit`.

    Attributes:
        steps: number of steps of IFGSM and PGD, with alpha = eps / 4.
        more_steps: the largest number of steps.
        restarts: number of random starts of PGD.
        queries: number of queries of the gradient-free attack.
        batch_size: number of images in one forward pass.
    """

    steps: int
    more_steps: int
    restarts: int
    queries: int
    batch_size: int


@dataclass(kw_only=True)
class Subject:
    """A protected model in eval mode with its examples, the settings of the audit, and the findings so far.

    Attributes:
        model: maps images to logits.
        images: (n, ...), on the model's device.
        labels: (n,), on the model's device.
        eps: radius of the ball, in pixel units of [0, 1].
        norm: norm of the ball.
        tolerance: fraction of the examples by which attacks may differ.
        generator: the source of all randomness.
        surrogate: the model for the transfer attack; None if it was not given.
        num_classes: the expected number of logits; None if it is unknown.
        counts: the numbers of steps, restarts, queries and images per pass.
        unusable: the reason why the model's logits cannot be used; empty if they can be used. Set by the first check.
        behaviours: the behaviour of the model on each batch, set by the first check.
        outputs: (n, classes), the logits of the clean images, set by the first check.
        attackable: True if attacks on the model are meaningful, set by the first checks.
        resistant: (n,) bool, True for examples that no attack along the cross-entropy gradient has broken so far.
        unbroken: (n,) bool, True for examples that are correct without an attack and under every attack so far.
        against_eps: (eps, accuracy) pairs, set by a check.
        against_steps: (steps, accuracy) pairs, set by a check.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    eps: float
    norm: Norm
    tolerance: float
    generator: torch.Generator
    surrogate: nn.Module | None
    num_classes: int | None
    counts: Counts
    unusable: str = ""
    behaviours: list[Behaviour] = field(default_factory=list)
    outputs: Tensor = field(default_factory=lambda: torch.zeros(0))
    attackable: bool = False
    resistant: Tensor = field(init=False)
    unbroken: Tensor = field(init=False)
    against_eps: tuple[tuple[float, float], ...] = ()
    against_steps: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        self.resistant = torch.ones_like(self.labels, dtype=torch.bool)
        self.unbroken = torch.ones_like(self.labels, dtype=torch.bool)

    @property
    def n(self) -> int:
        """Number of examples."""
        return len(self.images)

    @property
    def allowed(self) -> int:
        """The number of examples that may differ without a failure."""
        return max(1, int(self.tolerance * self.n))

    @property
    def random(self) -> bool:
        """True if two forward passes differ."""
        return any(found.random for found in self.behaviours)

    @property
    def largest_eps(self) -> float:
        """The radius of the ball that holds every image in [0, 1]."""
        return 1.0 if self.norm == "linf" else math.sqrt(self.images[0].numel())

    @property
    def norm_option(self) -> dict[str, Any]:
        """The attack option ``norm``; empty for L-infinity, because only attacks without options share work."""
        return {} if self.norm == "linf" else {"norm": self.norm}

    def spec(self, steps: int, *, eps: float | None = None, name: str = "ifgsm", worst: bool = True) -> AttackSpec:
        """Return an attack with alpha = eps / 4; ``worst`` scores all its iterates instead of the last one.

        On a random model always the last iterate is scored, because noise alone finds a wrong answer among many draws.
        """
        eps = self.eps if eps is None else eps
        score = "worst" if worst and not self.random else "last"
        return AttackSpec(name, eps, eps / 4, steps, score, self.norm_option)  # type: ignore[arg-type]

    def batches(self) -> Sequence[slice]:
        """Return the slices that divide all examples into batches."""
        return [slice(first, first + self.counts.batch_size) for first in range(0, self.n, self.counts.batch_size)]

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits of ``images``, (k, classes), without a graph."""
        with torch.no_grad():
            return torch.cat([self.model(part) for part in torch.split(images, self.counts.batch_size)])

    def correct(self, images: Tensor) -> Tensor:
        """Return (n,) bool: True if the image is classified correctly; ``images`` has one image per example."""
        return self.logits(images).argmax(dim=1) == self.labels

    def evaluated(self, *attacks: AttackSpec) -> Evaluation:
        """Run the attacks on all examples; attacks on a random model follow single draws."""
        seed = int(torch.randint(2**31, (), generator=self.generator, device=self.generator.device))
        result = self.evaluated_as(self.model, self.images, *attacks, stochastic=self.random, seed=seed)
        for attack in result.attacks:
            if isinstance(attack.eps, float) and attack.eps <= self.eps:
                self.unbroken &= self.resisted(attack)
        return result

    def evaluated_as(self, model: nn.Module, images: Tensor, *attacks: AttackSpec, **options: Any) -> Evaluation:
        """Run the attacks on another form of the model and the images, without the warnings of `evaluate`.

        The warnings are suppressed because the lines of the audit report the same signs.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            return evaluate(
                model, (images, self.labels), Protocol("audit", attacks), batch_size=self.counts.batch_size, **options
            )

    def resisted(self, attack: AttackResult) -> Tensor:
        """Return (n,) bool: True if every scored iterate is correct (for a random model, the last iterate)."""
        found = attack.worst_so_far_outcomes
        if found is None or self.random:
            found = attack.outcomes if attack.outcomes is not None else found
        assert found is not None
        return found.to(self.labels.device)

    def accuracy(self, attack: AttackResult) -> float:
        """Return the fraction of examples that `resisted` the attack."""
        return int(self.resisted(attack).sum()) / self.n
