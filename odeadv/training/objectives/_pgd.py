"""Adversarial training on projected gradient descent (Madry et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass

from odeadv import attacks
from odeadv.attacks.checks import non_negative, radius
from odeadv.support.isolation import Mode
from odeadv.support.plain import with_floats
from odeadv.training._step import Objective, Passed, Step


def check_attack(eps: float, alpha: float, steps: int, mode: str) -> None:
    """Raise ValueError, by name, for what no attack can be made with."""
    radius(eps)
    non_negative("alpha", alpha)
    if steps < 1:
        raise ValueError(f"steps: got {steps}, expected at least 1")
    if mode not in ("eval", "train", "unchanged"):
        raise ValueError(f"mode: got {mode!r}, expected 'eval', 'train' or 'unchanged'")


@dataclass(frozen=True)
class Pgd(Objective, name="pgd"):
    """L(f(x'), y), x' by PGD on the undefended network; with a defence L_LAD(f(x'), y).

    Attributes:
        eps: radius of the L-infinity ball, in pixel units of [0, 1].
        alpha: step size, in the same units.
        steps: steps from a start drawn uniformly from the ball.
        mode: mode of the network during the attack; its statistics are left alone in either.
    """

    adversarial = True

    eps: float = 8 / 255
    alpha: float = 2 / 255
    steps: int = 10
    mode: Mode = "eval"

    def __post_init__(self) -> None:
        with_floats(self)
        check_attack(self.eps, self.alpha, self.steps, self.mode)

    def __call__(self, step: Step) -> Passed:
        """Attack, then the defended pass of the attacked images."""
        start = step.images + self.eps * (2.0 * step.draws.uniform(step.images) - 1.0)
        attacked = attacks.ifgsm(
            step.target,
            step.images,
            step.labels,
            eps=self.eps,
            alpha=self.alpha,
            steps=self.steps,
            start=start,
            mode=self.mode,
        )
        return step.defended(attacked)
