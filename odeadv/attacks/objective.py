"""The function that an attack raises: the loss of a model on a labelled batch, and its gradient for the images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from odeadv.attacks._losses import (
    LossArgument,
    LossRule,
    PerExampleLoss,
    Target,
    TargetName,
    Truth,
    cross_entropy,
    likely_targets,
    margin,
    of_labels,
    resolve_loss,
)
from odeadv.attacks.checks import answered, check_classes, image_numbers
from odeadv.support.deferred import holds, is_deferring
from odeadv.support.isolation import Mode, untouched

__all__ = [
    "AttackLoss",
    "LossArgument",
    "PerExampleLoss",
    "Scores",
    "Tally",
    "Target",
    "TargetName",
    "attacking",
    "constant",
    "cross_entropy",
    "margin",
    "reseed",
    "resolve_loss",
]

# Texts of messages: the part before the image numbers, and the part after them.
_LOGITS = ("model: returned logits that are not finite for", "so no attack on it can be trusted")
_LOSSES = ("loss: returned NaN for the finite logits of", "so no attack can rank these images")
_GRADIENTS = (
    "model: the gradient of the loss with respect to the images contains NaN or infinity for",
    "so no attack can follow it",
)


@contextlib.contextmanager
def attacking(model: nn.Module, mode: Mode, device: torch.device | None = None) -> Iterator[None]:
    """Run the body with gradients on and ``model`` in ``mode``, then restore the model and the random state.

    Gradients are on even if the caller uses ``no_grad`` or ``inference_mode``. The global random state of the CPU is
    restored, and also the state of ``device`` if it is a CUDA device.
    """
    cuda: list[int] = []
    if device is not None and device.type == "cuda":
        cuda = [torch.cuda.current_device() if device.index is None else device.index]
    # Leave inference mode first: a backward pass cannot use buffers that were copied within it.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices=cuda),
        untouched(model, mode=mode),
    ):
        yield
    # torch 2.4 reuses weights that autocast has cast under no_grad: a later pass would give them no gradient.
    torch.clear_autocast_cache()


def reseed(generator: torch.Generator, device: torch.device) -> None:
    """Seed torch's global random state with one draw from ``generator``; stochastic models draw from that state."""
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def constant(tensor: Tensor) -> Tensor:
    """Return ``tensor`` without history; autograd can use it even if it was made under ``inference_mode``."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


@dataclass
class Tally:
    """The number of times each example went through the model. Give an empty tally to an attack, then read it.

    Attributes:
        queries: (n,) int64, forward passes per example.
        gradients: (n,) int64, forward passes per example that were also differentiated.
    """

    queries: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    gradients: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))


class Scores(NamedTuple):
    """Logits (n, classes) and losses (n,) of a batch, and the gradient, shaped like the images, or None."""

    logits: Tensor
    losses: Tensor
    gradient: Tensor | None = None


class AttackLoss:
    """The loss of ``model`` on images with these labels, as a function of the images. Attacks raise this loss.

    The losses of a batch are summed, not averaged. So an example's gradient does not depend on the rest of the batch
    or on its size. Losses are computed in at least float32, for every dtype of the logits (bfloat16 under autocast).
    Only images are differentiated; weight gradients are not computed, and ``.grad`` is not written. Use this class
    inside `attacking`.

    Args:
        model: maps images (n, ...) to logits (n, classes).
        labels: (n,) int64.
        loss: a function (logits, labels) -> losses of shape (n,), or a `LossRule`.
        target: (n,) int64, the classes that a targeted attack wants.
        eot: the number of forward passes over which logits, losses and gradients are averaged, for models that draw
            random numbers.
        deferred: if True, do not wait for the check that logits, losses and gradients are finite, because each wait
            would stop an accelerator's queue. `raise_if_not_finite` then raises for all passes so far.
        tally: receives the counts per example; it is set to zero here.
        attack: the name of the attack, for messages.

    Attributes:
        forward_passes: number of images sent through the model so far.
        gradient_evaluations: number of those images that were also differentiated.
        truth: the classes and logits that the model's logits are compared with.
    """

    def __init__(
        self,
        model: nn.Module,
        labels: Tensor,
        loss: PerExampleLoss | LossRule = cross_entropy,
        *,
        target: Tensor | None = None,
        eot: int = 1,
        deferred: bool = False,
        tally: Tally | None = None,
        attack: str = "",
    ) -> None:
        self.forward_passes = 0
        self.gradient_evaluations = 0
        self.truth = Truth(labels, target)
        self._model = model
        given = {"labels": labels} if target is None else {"labels": labels, "target": target}
        self._highest = {name: values.max() for name, values in given.items()}
        # If checks are deferred, the highest label is unknown here; `_forward` compares it on the device.
        highest = {name: -1 if is_deferring() else int(value) for name, value in self._highest.items()}
        self._highest_in, self._highest_label = max(highest.items(), key=lambda item: item[1])
        self._rule = loss if isinstance(loss, LossRule) else of_labels(loss)
        self._eot = eot
        self._deferred = deferred
        self._finite: dict[tuple[str, str], Tensor] = {}
        self._tally = tally
        self._attack = attack
        if tally is not None:
            tally.queries, tally.gradients = torch.zeros_like(labels), torch.zeros_like(labels)

    def compare_with(self, clean: Tensor) -> None:
        """If the loss needs the logits of the clean images, compute them once."""
        if self._rule.needs_clean:
            self.truth = self.truth._replace(clean=_wide(self.logits(clean)))

    def choose_target(self, name: TargetName, clean: Tensor) -> None:
        """Choose the target of each example by the logits of its clean image."""
        self.truth = self.truth._replace(target=likely_targets(name, self.logits(clean), self.truth.labels))

    def aim(self, target: Tensor) -> None:
        """Aim at ``target``, (n,) int64, from now on; any wrong class still counts as fooled."""
        self.truth = self.truth._replace(target=target, reach=False)

    def logits(self, images: Tensor) -> Tensor:
        """Return logits (n, classes) without a graph; raise ValueError if they are not finite or have another shape."""
        with torch.no_grad():
            return _mean([self._forward(images, None) for _ in range(self._eot)])

    def gradient(self, images: Tensor) -> Tensor:
        """Return the gradient of the summed loss, shaped like ``images``; raise as `logits_and_gradient`."""
        return self.logits_and_gradient(images)[1]

    def logits_and_gradient(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (n, classes) and the gradient of the summed loss, shaped like ``images``.

        Both come from one forward pass.

        Raises:
            TypeError: if the model or the loss does not return a tensor.
            ValueError: if a result has the wrong shape, logits or gradient are not finite, a label is too large, or the
                loss does not depend on the images.
        """
        scores = self.differentiate(images)
        assert scores.gradient is not None
        return scores.logits, scores.gradient

    def evaluate(self, images: Tensor, index: Tensor | None = None) -> Scores:
        """Return logits and losses without a graph; ``images`` belong to the examples ``index`` (None: all)."""
        with torch.no_grad():
            passes = [self._score(images, index) for _ in range(self._eot)]
        return Scores(*(_mean(list(part)) for part in zip(*passes, strict=True)))

    def differentiate(self, images: Tensor, index: Tensor | None = None) -> Scores:
        """Return logits, losses and the gradient of their sum, each the mean over ``eot`` passes.

        ``images`` belong to the examples ``index`` (None: all). Raises as `logits_and_gradient`.
        """
        passes = [self._differentiate(images, index) for _ in range(self._eot)]
        return Scores(*(_mean(list(part)) for part in zip(*passes, strict=True)))

    def fooled(self, scores: Scores, index: Tensor | None = None) -> Tensor:
        """Return (n,) bool: True if the (mean) logits of an example in ``index`` give the class the attack wants."""
        return self.truth.rows(index).fooled(scores.logits)

    def raise_if_not_finite(self) -> None:
        """Raise ValueError if a logit, loss or gradient so far was not finite; this completes ``deferred`` checks."""
        for what, good in self._finite.items():
            if not holds(good.all()):
                raise ValueError(self._message(what, (~good).nonzero()[:, 0]))

    def _differentiate(self, images: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        leaf = images.detach().requires_grad_()
        logits, losses = self._score(leaf, index)
        gradient = torch.autograd.grad(losses.sum(), leaf, allow_unused=True)[0] if losses.requires_grad else None
        if gradient is None:
            self.raise_if_not_finite()
            raise ValueError(
                "model: its loss does not depend on the images (detached logits?), so attacks cannot follow a gradient"
            )
        self._check(_finite_rows(gradient), _GRADIENTS, index)
        self.gradient_evaluations += len(images)
        if self._tally is not None:
            self._tally.gradients[slice(None) if index is None else index] += 1
        return logits.detach(), losses.detach(), gradient

    def _score(self, images: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
        n = len(images)
        logits = self._forward(images, index)
        losses = self._rule.ascended(_wide(logits), self.truth.rows(index))
        if not isinstance(losses, Tensor):
            raise TypeError(f"loss: returned {type(losses).__name__}, expected a tensor of shape ({n},)")
        if losses.shape != (n,):
            raise ValueError(f"loss: returned shape {tuple(losses.shape)}, expected ({n},), one per image")
        self._check(~losses.detach().isnan(), _LOSSES, index)
        return logits, losses

    def _forward(self, images: Tensor, index: Tensor | None) -> Tensor:
        logits = check_classes(self._answer(images), len(images), self._highest_label, name=self._highest_in)
        if is_deferring() and not self.forward_passes:
            for value in self._highest.values():
                holds(value < logits.shape[1])
        self._check(_finite_rows(logits), _LOGITS, index)
        self.forward_passes += len(images)
        if self._tally is not None:
            self._tally.queries[slice(None) if index is None else index] += 1
        return logits

    def _answer(self, images: Tensor) -> object:
        # The first pass gets a copy of the images. If the model writes to them, it is rejected before it can write to
        # the caller's images.
        first = not self.forward_passes and not images.requires_grad
        return answered(self._model, images.clone() if first else images)

    def _check(self, good: Tensor, what: tuple[str, str], index: Tensor | None) -> None:
        """Check ``good``, (m,) bool, of the examples ``index``, now or (if checks are deferred) later."""
        if not self._deferred:
            if not good.all():
                bad = (~good).nonzero()[:, 0]
                raise ValueError(self._message(what, bad if index is None else index[bad]))
        elif index is None:
            self._finite[what] = good & self._finite.get(what, good)
        else:
            found = self._finite.get(what, torch.ones_like(self.truth.labels, dtype=torch.bool))
            self._finite[what] = found.index_put((index,), good & found[index])

    def _message(self, what: tuple[str, str], bad: Tensor) -> str:
        before, after = what
        during = f" during {self._attack}" if self._attack else ""
        return f"{before} {image_numbers(bad, len(self.truth.labels))}{during}, {after}"


def _finite_rows(tensor: Tensor) -> Tensor:
    """Return (n,) bool: True if all entries of the row are finite."""
    # NaN times 0 and infinity times 0 are NaN. On images this takes a tenth of the time of isfinite().all().
    return (tensor.detach() * 0).sum(dim=tuple(range(1, tensor.ndim))) == 0


def _wide(logits: Tensor) -> Tensor:
    """Return ``logits`` in at least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _mean(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors).mean(dim=0)
