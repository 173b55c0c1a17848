"""The interface of objectives and defences in a training step, and the module that a data-parallel engine wraps."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odeadv.models import FieldNetwork, Network, TargetLoss
from odeadv.support.folding import Folded
from odeadv.support.plain import Choice
from odeadv.training._strength import Strength


@dataclass(frozen=True)
class Passed:
    """The result of a pass through the network.

    Attributes:
        loss: scalar, averaged over the batch.
        logits: (n, classes), the logits on which training accuracy is counted.
        images: the images of the pass. Eq. 16 is measured on them at the end of an epoch.
        strength: strength of the defence in this pass; None if the defence does not measure it.
    """

    loss: Tensor
    logits: Tensor
    images: Tensor | None = None
    strength: Strength | None = None


class Draws:
    """Random numbers of one step for some rows of the global batch.

    Every draw is made for the global batch, and then the rows are selected. So the numbers of an example do not depend
    on the process or micro-batch that computes it. They depend only on (seed, step), so no state needs to be saved.

    Args:
        seed: seed of the run.
        step: number of the step in the run.
        rows: the rows of the batch to draw for.
        total: number of rows in the global batch.
        device: the device on which the numbers are drawn. Each kind of device gives different numbers.
    """

    def __init__(self, seed: int, step: int, rows: slice, total: int, *, device: str | torch.device = "cpu") -> None:
        digest = hashlib.sha256(f"odeadv draws {seed} {step}".encode()).digest()
        self._generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        self._rows, self._total = rows, total

    @classmethod
    def fresh(cls, total: int) -> Draws:
        """Return the draws of a whole batch of ``total`` rows, seeded from torch's global random state."""
        return cls(int(torch.randint(2**62, ())), 0, slice(0, total), total)

    def uniform(self, like: Tensor) -> Tensor:
        """Return uniform numbers in [0, 1), shaped like ``like``; its first axis has one entry per row."""
        return self._drawn(torch.rand, like)

    def normal(self, like: Tensor) -> Tensor:
        """Return standard normal numbers, shaped like ``like``; its first axis has one entry per row."""
        return self._drawn(torch.randn, like)

    def permutation(self, n: int, device: torch.device) -> Tensor:
        """Return a random order of ``n`` rows on ``device``; the rows belong to this part, not to the global batch."""
        return torch.randperm(n, generator=self._generator, device=self._generator.device).to(device)

    def _drawn(self, kind: Callable[..., Tensor], like: Tensor) -> Tensor:
        shape = (self._total, *like.shape[1:])
        return kind(shape, generator=self._generator, device=self._generator.device)[self._rows].to(like)


class Defence(Choice):
    """Solves the forward pass that is trained on. A subclass is a frozen dataclass that registers a name.

    ``class Mine(Defence, name="mine")`` implements `__call__`; configurations then know ``{"name": "mine"}``.
    """

    #: True if the defended pass differs from the plain pass. Only then TRADES adds the loss of a defended pass.
    active: bool = True
    #: Factor of the perturbation; 0 for a defence without a perturbation.
    eta: float = 0.0
    #: If set, training chooses eta on its first batches so that the perturbation has this strength; see `Layerwise`.
    strength: float | None = None
    #: Number of epochs in which training raises eta from 0 to its value.
    warmup: int = 0

    def with_eta(self, eta: float) -> Defence:
        """Return the same defence with the factor ``eta``, and without ``strength`` and ``warmup``."""
        changed: Any = dataclasses.replace(self, eta=eta, strength=None, warmup=0)  # type: ignore[type-var]
        return changed  # type: ignore[no-any-return]

    def __call__(
        self,
        net: Network,
        images: Tensor,
        labels: Tensor,
        *,
        share: float = 1.0,
        draws: Draws | None = None,
        loss: TargetLoss | None = None,
    ) -> Passed:
        """Return loss and logits of the defended pass.

        Args:
            net: the network in training mode; its batch statistics are updated once.
            images: the inputs of the network; (n, channels, height, width) in [0, 1] for images.
            labels: (n,), int64, or other targets that ``net.field`` takes.
            share: n / (size of the global batch). eta belongs to the mean loss over the global batch. The gradient of
                the mean over n images is 1 / share times as large, so multiply eta by ``share``.
            draws: the random numbers of the step.
            loss: a function ``loss(output, labels)`` that replaces the network's loss (mean cross-entropy). Training
                gives it only if the objective or the configuration has another loss.
        """
        raise NotImplementedError


class Objective(Choice):
    """The loss that a step minimises. A subclass is a frozen dataclass that registers a name; see docs/training.md.

    ``class Mine(Objective, name="mine")`` implements `__call__`; configurations then know ``{"name": "mine"}``.
    Alternatively it implements `attack` and `loss`, which `__call__` then combines; `Awp` can wrap such an objective.
    """

    #: True if the objective trains on attacked images. The best epoch is then chosen by robust accuracy.
    adversarial: bool = False

    def attack(self, step: Step) -> Tensor:
        """Return the images to train on, (n, channels, height, width): the clean images unless a subclass attacks.

        Args:
            step: the batch, and functions that send images through the network.
        """
        return step.images

    def loss(self, step: Step, attacked: Tensor) -> Passed:
        """Return the loss on the images from `attack`, and the logits on which training accuracy is counted.

        Args:
            step: the batch, and functions that send images through the network.
            attacked: the images from `attack`.
        """
        raise NotImplementedError

    def __call__(self, step: Step) -> Passed:
        """Return the loss to minimise, and the logits on which training accuracy is counted.

        Args:
            step: the images, the labels, and functions that send images through the network.
        """
        return self.loss(step, self.attack(step))


@dataclass
class Step:
    """The batch of an objective, and the ways to send it through the network.

    Attributes:
        net: the network, in training mode.
        images: (n, channels, height, width) in [0, 1].
        labels: (n,), int64.
        defence: solves `defended` passes.
        draws: the random numbers of the step.
        share: size of this batch divided by the size of the global batch.
        label_smoothing: smoothing of the labels in `cross_entropy` and in `defended` passes.
        attacked_net: the network in the form that attacks run (compiled, if the configuration says so).
        last: the last defended pass.
        undo: functions to call after the backward pass, in reversed order.
    """

    net: FieldNetwork
    images: Tensor
    labels: Tensor
    defence: Defence
    draws: Draws
    share: float = 1.0
    label_smoothing: float = 0.0
    attacked_net: nn.Module | None = None
    last: Passed | None = None
    undo: list[Callable[[], None]] = dataclasses.field(default_factory=list)

    @property
    def target(self) -> nn.Module:
        """The module to attack."""
        return self.net if self.attacked_net is None else self.attacked_net

    def plain(self, images: Tensor) -> Tensor:
        """Return the logits of the undefended network for ``images``, (n, classes)."""
        logits: Tensor = self.net(images)
        return logits

    def defended(self, images: Tensor, loss: TargetLoss | None = None) -> Passed:
        """Return loss and logits of the defended pass of ``images``.

        The loss is the mean cross-entropy with the labels unless ``loss(output, labels)`` is given.
        """
        if loss is None and self.label_smoothing:
            loss = lambda logits, _: self.cross_entropy(logits)  # noqa: E731
        # Pass ``loss`` only if it is set, so that a defence without this argument works with the usual loss.
        other = {} if loss is None else {"loss": loss}
        passed = self.defence(self.net, images, self.labels, share=self.share, draws=self.draws, **other)
        self.last = dataclasses.replace(passed, images=images)
        return self.last

    def cross_entropy(self, logits: Tensor) -> Tensor:
        """Return the mean cross-entropy of ``logits`` with the labels, in at least float32."""
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(wide, self.labels, label_smoothing=self.label_smoothing)


class StepModule(nn.Module):
    """Network, objective and defence as one module, so that data-parallel wrappers see a single forward pass.

    Args:
        net: the network.
        objective: the loss of a step.
        defence: solves the pass that is trained on.
        label_smoothing: as for `Step`.

    Attributes:
        attacked: the network in the form that attacks run (folded, compiled); None for ``net`` itself.
        folded: the folded network in ``attacked``, or None; every pass first updates its weights.
        defence: the defence of the next step; the loop replaces it while eta rises.
        seen: images and labels of the last pass that was trained on.
        strength: strength of the defence in the last step.
    """

    def __init__(
        self,
        net: FieldNetwork,
        objective: Objective,
        defence: Defence,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.net = net
        self._objective, self.defence, self._label_smoothing = objective, defence, label_smoothing
        self.attacked: nn.Module | None = None
        self.folded: Folded | None = None
        self._undo: list[Callable[[], None]] = []
        self.seen: tuple[Tensor, Tensor] | None = None
        self.strength: Strength | None = None

    def attack_through(self, attacked: nn.Module, folded: Folded | None) -> None:
        """Run attacks on ``attacked``, which may contain ``folded``, from now on."""
        # Do not register these as submodules, because they share the parameters of the network.
        self.__dict__.update(attacked=attacked, folded=folded)

    def forward(self, images: Tensor, labels: Tensor, draws: Draws, share: float) -> tuple[Tensor, Tensor]:
        """Return loss and detached logits of a step."""
        if self.folded is not None:
            self.folded.follow()
        step = Step(
            self.net, images, labels, self.defence, draws, share, self._label_smoothing, self.attacked, undo=self._undo,
        )  # fmt: skip
        passed = self._objective(step)
        # If an objective returns its own loss without images, take images and strength from its last defended pass.
        said = passed if passed.images is not None or step.last is None else step.last
        self.strength = said.strength if self.defence.active else Strength.none(passed.loss)
        self.seen = (images if said.images is None else said.images).detach(), labels
        return passed.loss, passed.logits.detach()

    def undo(self) -> None:
        """Restore what the step changed only for its forward and backward passes, such as perturbed weights."""
        while self._undo:
            self._undo.pop()()
