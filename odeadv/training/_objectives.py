"""Training objectives: natural, PGD, TRADES, MART, and adversarial weight perturbation of these.

In formulas, x are the images, x' the attacked images, and y the labels. The undefended network has the logits f(x) and
the probability p_k of class k. L is the mean cross-entropy, and L_LAD is the loss of the defended pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from odeadv import attacks
from odeadv.attacks.balls import linf_bounds
from odeadv.attacks.checks import radius
from odeadv.support.checks import choice, integer, number
from odeadv.support.isolation import Mode, without_effects
from odeadv.support.plain import with_floats
from odeadv.training._step import Objective, Passed, Step


@dataclass(frozen=True)
class Natural(Objective, name="natural"):
    """Natural training: the loss L(f(x), y) of logits f(x) and labels y; with a defence L_LAD(f(x), y)."""

    def loss(self, step: Step, attacked: Tensor) -> Passed:
        """Return the defended pass of the clean images."""
        return step.defended(attacked)


@dataclass(frozen=True)
class Pgd(Objective, name="pgd"):
    """Adversarial training: the loss L(f(x'), y), with x' from PGD on the undefended network.

    With a defence the loss is L_LAD(f(x'), y).

    Source: Madry et al. 2018, arXiv:1706.06083.

    Attributes:
        eps: radius of the L-infinity ball, in pixel units of [0, 1].
        alpha: step size, in the same units.
        steps: number of steps, from a start drawn uniformly from the ball.
        mode: mode of the network during the attack; the attack does not change batch statistics in any mode.

    Raises:
        TypeError, ValueError: if an attribute is out of range; the message names it.
    """

    adversarial = True

    eps: float = 8 / 255
    alpha: float = 2 / 255
    steps: int = 10
    mode: Mode = "eval"

    def __post_init__(self) -> None:
        with_floats(self)
        check_attack(self.eps, self.alpha, self.steps, self.mode)

    def attack(self, step: Step) -> Tensor:
        """Return the images after PGD on the cross-entropy."""
        return uniform_pgd(self, step)

    def loss(self, step: Step, attacked: Tensor) -> Passed:
        """Return the defended pass of the attacked images."""
        return step.defended(attacked)


@dataclass(frozen=True)
class Trades(Objective, name="trades"):
    """TRADES: the loss L(f(x), y) + (1/lam) KL(f(x) || f(x')). The attack chooses x' to maximise the divergence.

    With a defence the loss is gamma L(f(x), y) + (1 - gamma) L_LAD(f(x'), y) + (1/lam) KL(f(x) || f(x')). The
    divergence is averaged over the batch, and gradients flow through both of its arguments. Training accuracy is
    counted on f(x). Source: Zhang et al. 2019, arXiv:1901.08573.

    Attributes:
        eps, alpha, mode: as for `Pgd`.
        steps: number of steps of the attack.
        lam: the paper's lambda.
        gamma: weight of the clean loss if there is a defence.
        start: the attack starts from x + 0.001 times standard normal noise. ``"free"`` takes the first gradient at
            this point, as the authors' code does. ``"clamped"`` first projects the start to the ball and to [0, 1].
            Then a pixel of 0 or 1 does not move if its noise points outward.

    Raises:
        TypeError, ValueError: if an attribute is out of range; the message names it.
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
        number("lam", self.lam, above=0)
        number("gamma", self.gamma, least=0, most=1)
        choice("start", self.start, ("free", "clamped"))

    def attack(self, step: Step) -> Tensor:
        """Return the images after sign steps that raise the divergence."""
        start = step.images + 0.001 * step.draws.normal(step.images)
        if self.start == "clamped":
            start = linf_bounds(step.images, self.eps).project(start)
        return attacks.ifgsm(
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

    def loss(self, step: Step, attacked: Tensor) -> Passed:
        """Return the loss of the passes of the clean and of the attacked images."""
        logits = step.plain(step.images)
        clean = step.cross_entropy(logits)
        divergence = batch_kl(logits, step.plain(attacked)) / self.lam
        if not step.defence.active:
            return Passed(clean + divergence, logits, attacked)
        defended = step.defended(attacked)
        total = self.gamma * clean + (1.0 - self.gamma) * defended.loss + divergence
        return Passed(total, logits, attacked, defended.strength)


@dataclass(frozen=True)
class Mart(Objective, name="mart"):
    """MART: the loss BCE(f(x'), y) + lam mean_i KL(f(x_i) || f(x'_i)) (1 - p_y(x_i)), with x' from PGD.

    BCE is the boosted cross-entropy -log p_y(x') - log(1 - max_{k != y} p_k(x')); i numbers the examples. With a
    defence the BCE is computed on the defended pass, and the divergence on undefended passes. Training accuracy is
    counted on the logits of the BCE. Source: Wang et al. 2020, "Improving Adversarial Robustness Requires Revisiting
    Misclassified Examples".

    Attributes:
        eps, alpha, steps, mode: as for `Pgd`.
        lam: weight of the divergence; the paper's lambda.

    Raises:
        TypeError, ValueError: if an attribute is out of range; the message names it.
    """

    adversarial = True

    eps: float = 8 / 255
    alpha: float = 2 / 255
    steps: int = 10
    mode: Mode = "eval"
    lam: float = 5.0

    def __post_init__(self) -> None:
        with_floats(self)
        check_attack(self.eps, self.alpha, self.steps, self.mode)
        number("lam", self.lam, least=0)

    def attack(self, step: Step) -> Tensor:
        """Return the images after PGD on the cross-entropy."""
        return uniform_pgd(self, step)

    def loss(self, step: Step, attacked: Tensor) -> Passed:
        """Return the loss of the passes of the clean and of the attacked images."""

        def boosted(logits: Tensor, labels: Tensor) -> Tensor:
            return step.cross_entropy(logits) + _margin(logits, labels).mean()

        clean = step.plain(step.images)
        defended = step.defended(attacked, boosted)
        logits = step.plain(attacked) if step.defence.active else defended.logits
        right = _probabilities(clean).gather(1, step.labels[:, None])[:, 0]
        divergence = (kl(clean, logits) * (1.0 - right)).mean()
        return Passed(defended.loss + self.lam * divergence, defended.logits, attacked, defended.strength)


@dataclass(frozen=True)
class Awp(Objective, name="awp"):
    """Adversarial weight perturbation: the loss of ``base`` at the weights w + v, where v raises this loss.

    For every weight tensor w_l of two or more dimensions, v_l = gamma ||w_l|| g_l / ||g_l||. Here g is the gradient of
    the loss of ``base`` on the attacked images. The attack is made at w. After the backward pass the weights are reset
    to w, and the optimiser steps from w. ``base`` may use a defence. Every process and micro-batch has its own v.
    Source: Wu, Xia and Wang 2020, arXiv:2004.05884.

    Attributes:
        base: the objective whose loss is used.
        gamma: size of the perturbation relative to the weights.

    Raises:
        TypeError, ValueError: if an attribute is out of range; the message names it.
    """

    base: Objective = field(default_factory=Pgd)
    gamma: float = 0.005

    def __post_init__(self) -> None:
        with_floats(self)
        whole = isinstance(self.base, Objective) and type(self.base).loss is not Objective.loss
        if not whole or isinstance(self.base, Awp):
            raise TypeError(f"base: got {self.base!r}, expected an objective that has a method loss, such as Pgd()")
        number("gamma", self.gamma, least=0)

    @property
    def adversarial(self) -> bool:  # type: ignore[override]  # follows the base
        """True if ``base`` trains on attacked images."""
        return self.base.adversarial

    @property
    def eps(self) -> float:
        """The attack radius of ``base``; 0 for an objective without one."""
        return float(getattr(self.base, "eps", 0.0))

    @property
    def steps(self) -> int:
        """The number of attack steps of ``base``; 0 if it does not attack."""
        return int(getattr(self.base, "steps", 0))

    def attack(self, step: Step) -> Tensor:
        """Return the images that ``base`` trains on."""
        return self.base.attack(step)

    def loss(self, step: Step, attacked: Tensor) -> Passed:
        """Return the loss of ``base`` at the perturbed weights; `Step.undo` restores the weights."""
        weights = [w for w in step.net.parameters() if w.requires_grad and w.ndim > 1]
        with torch.enable_grad(), without_effects(list(step.net.modules()), attacked.device):
            up = torch.autograd.grad(self.base.loss(step, attacked).loss, weights, allow_unused=True)
        kept = [weight.detach().clone() for weight in weights]

        def put_back() -> None:
            for weight, value in zip(weights, kept, strict=True):
                weight.data.copy_(value)  # subtraction would leave rounding errors

        step.undo.append(put_back)
        for weight, gradient in zip(weights, up, strict=True):
            if gradient is not None:
                length = torch.linalg.vector_norm(weight.detach()) / (torch.linalg.vector_norm(gradient) + 1e-12)
                # Use .data, because autograd must not notice that weights change between its two passes.
                weight.data.add_(gradient * (self.gamma * length))
        return self.base.loss(step, attacked)


def uniform_pgd(objective: Pgd | Mart, step: Step) -> Tensor:
    """Return images after PGD on the cross-entropy, from a start drawn uniformly from the ball and projected."""
    start = step.images + objective.eps * (2.0 * step.draws.uniform(step.images) - 1.0)
    return attacks.ifgsm(
        step.target,
        step.images,
        step.labels,
        eps=objective.eps,
        alpha=objective.alpha,
        steps=objective.steps,
        start=linf_bounds(step.images, objective.eps).project(start),
        mode=objective.mode,
    )


def batch_kl(clean: Tensor, attacked: Tensor) -> Tensor:
    """Return KL(softmax(clean) || softmax(attacked)), averaged over the batch, in at least float32."""
    # The mean of `kl` would sum in another order, but committed TRADES records must be reproduced bit for bit.
    return F.kl_div(*_logs(clean, attacked), log_target=True, reduction="batchmean")


def kl(clean: Tensor, attacked: Tensor) -> Tensor:
    """Return KL(softmax(clean) || softmax(attacked)) of every example, (n,), in at least float32."""
    return F.kl_div(*_logs(clean, attacked), log_target=True, reduction="none").sum(1)


def _logs(clean: Tensor, attacked: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities (attacked, clean), in the order of the arguments of `torch.nn.functional.kl_div`."""
    dtype = torch.promote_types(clean.dtype, torch.float32)
    return F.log_softmax(attacked.to(dtype), dim=1), F.log_softmax(clean.to(dtype), dim=1)


def _probabilities(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -log(1 - p_k) of the most likely wrong class k, (n,)."""
    probabilities = _probabilities(logits)
    wrong = probabilities.scatter(1, labels[:, None], -1.0).amax(1)
    # 1.0001 is from the authors' code; it bounds the loss if a wrong class has probability 1.
    return -(1.0001 - wrong).log()


def check_attack(eps: float, alpha: float, steps: int, mode: str) -> None:
    """Raise TypeError or ValueError, naming the argument, if an attack argument is out of range."""
    radius(eps)
    number("alpha", alpha, least=0)
    integer("steps", steps)
    choice("mode", mode, ("eval", "train", "unchanged"))
