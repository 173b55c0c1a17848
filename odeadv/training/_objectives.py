"""TRADES (Zhang et al. 2019, arXiv:1901.08573)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from odeadv import attacks
from odeadv.attacks.balls import linf_bounds
from odeadv.attacks.checks import radius
from odeadv.support.checks import choice, number
from odeadv.support.isolation import Mode
from odeadv.support.plain import with_floats
from odeadv.training._step import Objective, Passed, Step


@dataclass(frozen=True)
class Trades(Objective, name="trades"):
    """L(f(x), y) + (1/lam) KL(f(x) || f(x')); x' maximises that divergence.

    With a defence gamma L(f(x), y) + (1 - gamma) L_LAD(f(x'), y) + (1/lam) KL(f(x) || f(x')). The divergence is
    averaged over the batch; gradients go through both of its sides. Training accuracy is that of f(x).

    Attributes:
        eps, alpha, steps, mode: of the attack, as for `Pgd`.
        lam: the paper's lambda.
        gamma: share of the clean loss if there is a defence.
        start: the attack starts from x + 0.001 times standard normal noise. ``"free"`` takes the first gradient there,
            as the reference code does. ``"clamped"`` projects the start to [0, 1] first, as odeadv did before this
            field existed: a pixel of 0 or 1 then starts in place if its noise points outward.
    """

    adversarial = True

    eps: float = 8 / 255
    alpha: float = 2 / 255
    steps: int = 10
    mode: Mode = "eval"
    lam: float = 1 / 6
    gamma: float = 0.5
    start: Literal["free", "clamped"] = field(default="free", metadata={"before": "clamped"})

    def __post_init__(self) -> None:
        with_floats(self)
        check_attack(self.eps, self.alpha, self.steps, self.mode)
        if not (math.isfinite(self.lam) and self.lam > 0):
            raise ValueError(f"lam: got {self.lam}, expected a finite number above 0")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma: got {self.gamma}, expected a number in [0, 1]")
        choice("start", self.start, ("free", "clamped"))

    def __call__(self, step: Step) -> Passed:
        """Attack the divergence, then the passes of the clean and of the attacked images."""
        start = step.images + 0.001 * step.draws.normal(step.images)
        if self.start == "clamped":
            start = linf_bounds(step.images, self.eps).project(start)
        attacked = attacks.ifgsm(
            step.target,
            step.images,
            step.labels,
            eps=self.eps,
            alpha=self.alpha,
            steps=self.steps,
            loss="kl",
            start=start,
            mode=self.mode,
        )
        step.seen = attacked
        logits = step.plain(step.images)
        clean = step.cross_entropy(logits)
        divergence = batch_kl(logits, step.plain(attacked)) / self.lam
        if not step.defence.active:
            return Passed(clean + divergence, logits)
        defended = step.defended(attacked)
        return Passed(self.gamma * clean + (1.0 - self.gamma) * defended.loss + divergence, logits)


def batch_kl(clean: Tensor, attacked: Tensor) -> Tensor:
    """KL(softmax(clean) || softmax(attacked)), averaged over the batch, in at least float32."""
    dtype = torch.promote_types(clean.dtype, torch.float32)
    return F.kl_div(
        F.log_softmax(attacked.to(dtype), dim=1),
        F.log_softmax(clean.to(dtype), dim=1),
        log_target=True,
        reduction="batchmean",
    )


def check_attack(eps: float, alpha: float, steps: int, mode: str) -> None:
    """Raise ValueError, by name, for what no attack can be made with."""
    radius(eps)
    number("alpha", alpha, least=0)
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
            start=linf_bounds(step.images, self.eps).project(start),
            mode=self.mode,
        )
        return step.defended(attacked)


@dataclass(frozen=True)
class Natural(Objective, name="natural"):
    """L(f(x), y); with a defence L_LAD(f(x), y)."""

    def __call__(self, step: Step) -> Passed:
        """The defended pass of the clean images."""
        return step.defended(step.images)
