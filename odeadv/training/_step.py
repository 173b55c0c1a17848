"""One training step as the objectives see it, and the module that a data-parallel engine wraps."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odeadv.models import FieldNetwork, Network
from odeadv.support.plain import Choice
from odeadv.training._strength import Strength


@dataclass(frozen=True)
class Passed:
    """What a pass through the network came to.

    Attributes:
        loss: scalar, averaged over the batch.
        logits: (n, classes), of the pass that accuracy is counted on.
        strength: of the defence in this pass, if the defence says it.
    """

    loss: Tensor
    logits: Tensor
    strength: Strength | None = None


class Draws:
    """Random numbers of one step for some rows of the global batch, whatever process or micro-batch they are in.

    Every draw is made for the whole batch and cut, so that the numbers of an example do not depend on how the batch
    is spread; and they follow from (seed, step) alone, so that there is no state to save.

    Args:
        seed: of the run.
        step: number of the step in the run.
        rows: which rows of the batch these are.
        total: rows in the global batch.
    """

    def __init__(self, seed: int, step: int, rows: slice, total: int) -> None:
        digest = hashlib.sha256(f"odeadv draws {seed} {step}".encode()).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        self._rows, self._total = rows, total

    @classmethod
    def fresh(cls, total: int) -> Draws:
        """Return the draws of a whole batch of ``total`` rows, seeded from torch's global random state."""
        return cls(int(torch.randint(2**62, ())), 0, slice(0, total), total)

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform on [0, 1), of the shape, dtype and device of ``like``, whose first axis are the rows."""
        whole = torch.rand((self._total, *like.shape[1:]), generator=self._generator)
        return whole[self._rows].to(like)

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal, otherwise as `uniform`."""
        whole = torch.randn((self._total, *like.shape[1:]), generator=self._generator)
        return whole[self._rows].to(like)

    def permutation(self, n: int, device: torch.device) -> Tensor:
        """A random order of ``n`` rows (of these rows, not of the global batch)."""
        return torch.randperm(n, generator=self._generator).to(device)


class Defence(Choice):
    """How the forward pass that is trained on is solved. A subclass is a frozen dataclass that registers a name.

    ``class Mine(Defence, name="mine")`` implements `__call__`; configurations then know ``{"name": "mine"}``.
    """

    #: Whether the pass differs from the plain one; TRADES adds a term of its own only then.
    active: bool = True
    #: Strength of the perturbation; 0 for a defence that has none.
    eta: float = 0.0
    #: If set, training chooses eta from it on its first batches; see `Layerwise`.
    strength: float | None = None
    #: Epochs over which training raises eta to its value.
    warmup: int = 0

    def with_eta(self, eta: float) -> Defence:
        """Return the same defence with this eta, chosen and warmed up."""
        changed: Any = dataclasses.replace(self, eta=eta, strength=None, warmup=0)  # type: ignore[type-var]
        return changed  # type: ignore[no-any-return]

    def __call__(
        self, net: Network, images: Tensor, labels: Tensor, *, share: float = 1.0, draws: Draws | None = None
    ) -> Passed:
        """Loss and logits of the defended pass.

        Args:
            net: in the mode it is trained in; statistics are to be updated once.
            images: (n, channels, height, width) in [0, 1].
            labels: (n,), int64.
            share: n / (size of the global batch). eta belongs to the mean over the global batch, and the gradient of
                the mean over n images is 1 / share times as large: multiply eta by ``share``.
            draws: the step's random numbers.
        """
        raise NotImplementedError


class Objective(Choice):
    """What a step minimises. A subclass is a frozen dataclass that registers a name; see CONTRIBUTING.md.

    ``class Mine(Objective, name="mine")`` implements `__call__`; configurations then know ``{"name": "mine"}``.
    """

    #: Whether it trains on attacked images: validation then goes by robust accuracy.
    adversarial: bool = False

    def __call__(self, step: Step) -> Passed:
        """The loss to minimise, and the logits that training accuracy is counted on.

        Args:
            step: the images, the labels and the passes that can be made of them.
        """
        raise NotImplementedError


@dataclass
class Step:
    """What an objective is given: a batch and the ways to send it through the network.

    Attributes:
        net: the network, in training mode.
        images: (n, channels, height, width) in [0, 1].
        labels: (n,), int64.
        defence: how `defended` passes are solved.
        draws: the step's random numbers.
        share: see `Defence`.
        seen: the images that diagnostics look at: of the last defended pass or attack; by default ``images``.
        strength: of the last defended pass.
        attacked_net: the network as attacks run it (compiled, if that was asked for).
    """

    net: FieldNetwork
    images: Tensor
    labels: Tensor
    defence: Defence
    draws: Draws
    share: float = 1.0
    seen: Tensor | None = None
    strength: Strength | None = None
    attacked_net: nn.Module | None = None

    @property
    def target(self) -> nn.Module:
        """The module to attack."""
        return self.net if self.attacked_net is None else self.attacked_net

    def plain(self, images: Tensor) -> Tensor:
        """Logits of the undefended network."""
        logits: Tensor = self.net(images)
        return logits

    def defended(self, images: Tensor) -> Passed:
        """Loss (mean cross-entropy with ``labels``) and logits of the defended pass."""
        self.seen = images
        passed = self.defence(self.net, images, self.labels, share=self.share, draws=self.draws)
        self.strength = passed.strength
        return passed

    def cross_entropy(self, logits: Tensor) -> Tensor:
        """Mean cross-entropy of ``logits`` with the labels, in at least float32."""
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), self.labels)


class StepModule(nn.Module):
    """Network, objective and defence as one module, so that data-parallel wrappers see a single forward pass.

    Args:
        net: the network.
        objective, defence: see there.
        attacked: the network as attacks run it, if not ``net`` itself.
    """

    def __init__(
        self, net: FieldNetwork, objective: Objective, defence: Defence, attacked: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.net = net
        self._objective, self.defence = objective, defence
        self.__dict__["_attacked"] = attacked  # not a submodule: its parameters are those of net
        self.seen: tuple[Tensor, Tensor] | None = None
        self.strength: Strength | None = None

    def forward(self, images: Tensor, labels: Tensor, draws: Draws, share: float) -> tuple[Tensor, Tensor]:
        """Loss and detached logits of a step."""
        step = Step(self.net, images, labels, self.defence, draws, share, attacked_net=self.__dict__["_attacked"])
        passed = self._objective(step)
        self.strength = step.strength if self.defence.active else Strength.none(passed.loss)
        self.seen = (images if step.seen is None else step.seen).detach(), labels
        return passed.loss, passed.logits.detach()
