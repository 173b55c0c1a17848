"""What an evaluation found: outcomes of every example, accuracies, and what it cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from torch import Tensor

_NORMAL_QUANTILE = 1.959963984540054  # of 0.975


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of an accuracy of ``correct`` out of ``n`` >= 1 (Wilson 1927)."""
    z2 = _NORMAL_QUANTILE**2
    centre = (correct + z2 / 2) / (n + z2)
    half = _NORMAL_QUANTILE / (n + z2) * math.sqrt(correct * (n - correct) / n + z2 / 4)
    return max(centre - half, 0.0), min(centre + half, 1.0)


@dataclass(frozen=True, eq=False)
class AttackResult:
    """What one attack did. Accuracies are fractions in [0, 1].

    Attributes:
        name: ``"fgsm"`` or ``"ifgsm"``.
        eps: radius of the L-infinity ball, in pixel units of [0, 1].
        alpha: size of one step, in the same units.
        steps: number of steps.
        outcomes: (n,) bool on the CPU, true where the *last iterate* is classified correctly.
        worst_so_far_outcomes: (n,) bool on the CPU, true where the clean image and *every iterate* are.
    """

    name: str
    eps: float
    alpha: float
    steps: int
    outcomes: Tensor
    worst_so_far_outcomes: Tensor

    @property
    def robust_correct(self) -> int:
        """How many last iterates are classified correctly."""
        return int(self.outcomes.sum())

    @property
    def robust_accuracy(self) -> float:
        """The fraction of last iterates that are classified correctly: the paper's figure."""
        return self.robust_correct / len(self.outcomes)

    @property
    def worst_so_far_correct(self) -> int:
        """For how many examples the clean image and every iterate are classified correctly."""
        return int(self.worst_so_far_outcomes.sum())

    @property
    def worst_so_far_accuracy(self) -> float:
        """`worst_so_far_correct` as a fraction; never above the robust accuracy, and not comparable with it."""
        return self.worst_so_far_correct / len(self.worst_so_far_outcomes)


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """The result of `evaluate`; prints as a small table. Accuracies are fractions in [0, 1].

    Attributes:
        protocol: name of the protocol.
        clean_outcomes: (n,) bool on the CPU, true where the clean image is classified correctly.
        attacks: one result for each attack of the protocol, in its order.
        forward_passes: images sent through the model.
        gradient_evaluations: images sent back through it too.
        seconds: wall-clock time.
    """

    protocol: str
    clean_outcomes: Tensor
    attacks: tuple[AttackResult, ...]
    forward_passes: int
    gradient_evaluations: int
    seconds: float

    @property
    def n(self) -> int:
        """Number of examples."""
        return len(self.clean_outcomes)

    @property
    def clean_correct(self) -> int:
        """How many clean images are classified correctly."""
        return int(self.clean_outcomes.sum())

    @property
    def clean_accuracy(self) -> float:
        """The fraction of clean images that are classified correctly."""
        return self.clean_correct / self.n

    @property
    def average(self) -> float:
        """Mean of the robust (last-iterate) accuracies: the paper's "Avg". The clean accuracy is not in it."""
        return fmean(attack.robust_accuracy for attack in self.attacks)

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON-ready data, without outcomes; ``*_interval`` are 95 % Wilson intervals [low, high]."""
        return {
            "schema": "odeadv.evaluation/1",
            "protocol": self.protocol,
            "n": self.n,
            **_accuracy("clean", self.clean_correct, self.n),
            "attacks": [
                {
                    "name": attack.name,
                    "eps": attack.eps,
                    "eps_255": _in_255(attack.eps),
                    "alpha": attack.alpha,
                    "alpha_255": _in_255(attack.alpha),
                    "steps": attack.steps,
                    **_accuracy("robust", attack.robust_correct, self.n),
                    **_accuracy("worst_so_far", attack.worst_so_far_correct, self.n),
                }
                for attack in self.attacks
            ],
            "average": self.average,
            "forward_passes": self.forward_passes,
            "gradient_evaluations": self.gradient_evaluations,
            "seconds": self.seconds,
        }

    def __repr__(self) -> str:
        lines = [
            f"{self.protocol}: n = {self.n}, {self.forward_passes / self.n:g} forward passes and "
            f"{self.gradient_evaluations / self.n:g} gradients per image, {self.seconds:.1f} s",
            f"{'attack':<8}{'eps*255':>9}{'alpha*255':>11}{'steps':>7}{'robust %':>10}{'worst so far %':>16}",
            f"{'clean':<8}{'':27}{100 * self.clean_accuracy:>10.2f}",
        ]
        lines += [
            f"{attack.name:<8}{_in_255(attack.eps):>9g}{_in_255(attack.alpha):>11g}{attack.steps:>7}"
            f"{100 * attack.robust_accuracy:>10.2f}{100 * attack.worst_so_far_accuracy:>16.2f}"
            for attack in self.attacks
        ]
        return "\n".join([*lines, f"{'average of the attacks':<35}{100 * self.average:>10.2f}"])


def _accuracy(name: str, correct: int, n: int) -> dict[str, Any]:
    return {
        f"{name}_correct": correct,
        f"{name}_accuracy": correct / n,
        f"{name}_interval": list(wilson_interval(correct, n)),
    }


def _in_255(value: float) -> float:
    return round(255 * value, 9)  # so that 12/255 reads 12 again
