"""What an attack ascends: a model's loss on one labelled batch, and its gradient with respect to the images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from odeadv.attacks._losses import Loss, LossRule, PerExampleLoss, Truth, cross_entropy, of_labels, resolve_loss
from odeadv.attacks.checks import answered, check_classes
from odeadv.support.isolation import Mode, untouched

__all__ = ["AttackLoss", "Loss", "PerExampleLoss", "Scores", "Tally", "attacking", "constant", "reseed", "resolve_loss"]

_LOGITS_NOT_FINITE = "model: returned logits that are not finite, so no attack on it can be trusted"
_LOSS_NAN = "loss: returned NaN for finite logits, by which no attack can rank images"
_GRADIENT_NOT_FINITE = "model: the gradient of the loss with respect to the images contains NaN or infinity"


@contextlib.contextmanager
def attacking(model: nn.Module, mode: Mode, device: torch.device | None = None) -> Iterator[None]:
    """Gradients on, also under a caller's ``no_grad`` or ``inference_mode``; ``model`` in ``mode``, then restored.

    Torch's global random state (of the CPU, and of ``device`` if that is a CUDA device) is put back as well.
    """
    cuda: list[int] = []
    if device is not None and device.type == "cuda":
        cuda = [torch.cuda.current_device() if device.index is None else device.index]
    # Leaving inference mode comes first: buffers copied within it could not be used for a backward pass.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices=cuda),
        untouched(model, mode=mode),
    ):
        yield


def reseed(generator: torch.Generator, device: torch.device) -> None:
    """Seed torch's global random state, which stochastic models draw from, by one draw from ``generator``."""
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def constant(tensor: Tensor) -> Tensor:
    """``tensor`` without history, and fit for autograd if it was made under ``inference_mode``."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


@dataclass
class Tally:
    """What an attack has asked of the model for each example; give an empty one to an attack, then read it.

    Attributes:
        queries: (n,) int64, how often the example went through the model.
        gradients: (n,) int64, how often this was also differentiated.
    """

    queries: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    gradients: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))


class Scores(NamedTuple):
    """Of one batch: logits (n, classes), losses (n,), and, where asked for, the gradient, like the images."""

    logits: Tensor
    losses: Tensor
    gradient: Tensor | None = None


class AttackLoss:
    """The loss of ``model`` on images with these labels, as a function of the images; ascended by attacks.

    Losses are summed over the batch, so an example's gradient neither depends on the batch nor shrinks with it, and
    computed in at least float32, whatever the dtype of the logits (bfloat16 under autocast).
    Only images are differentiated: no weight gradient is computed, no ``.grad`` written. Use it inside `attacking`.

    Args:
        model: (n, ...) images to (n, classes) logits.
        labels: (n,) int64.
        loss: (logits, labels) to losses of shape (n,), or a `LossRule`.
        target: (n,) int64, the classes that a targeted attack wants.
        eot: how many forward passes logits, losses and gradients are averaged over, for models that draw noise.
        deferred: do not wait for the result of the check that logits and gradients are finite (on an accelerator
            each would stop the queue): `raise_if_not_finite` then raises, once, for all that happened before.
        tally: counts per example, zeroed here.

    Attributes:
        forward_passes: images sent through the model so far.
        gradient_evaluations: how many of these were also differentiated.
        truth: what the logits are compared with.
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
    ) -> None:
        self.forward_passes = 0
        self.gradient_evaluations = 0
        self.truth = Truth(labels, target)
        self._model = model
        self._highest_label = int(labels.max()) if target is None else max(int(labels.max()), int(target.max()))
        self._rule = loss if isinstance(loss, LossRule) else of_labels(loss)
        self._eot = eot
        self._deferred = deferred
        self._finite: dict[str, Tensor] = {}
        self._tally = tally
        if tally is not None:
            tally.queries, tally.gradients = torch.zeros_like(labels), torch.zeros_like(labels)

    def compare_with(self, clean: Tensor) -> None:
        """Evaluate the logits of the clean images, once, if the loss needs them."""
        if self._rule.needs_clean:
            self.truth = self.truth._replace(clean=_wide(self.logits(clean)))

    def logits(self, images: Tensor) -> Tensor:
        """Logits (n, classes), without a graph. ValueError if they are not finite or not of that shape."""
        with torch.no_grad():
            return _mean([self._forward(images, None) for _ in range(self._eot)])

    def gradient(self, images: Tensor) -> Tensor:
        """Gradient of the summed loss, shaped like ``images``. Raises as `logits_and_gradient`."""
        return self.logits_and_gradient(images)[1]

    def logits_and_gradient(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, classes) and the gradient of the summed loss (shaped like ``images``) from one forward pass.

        Raises:
            TypeError: if the model's or the loss's result is not a tensor.
            ValueError: if one of them is not of the right shape, logits or gradient are not finite, a label has no
                logit, or the loss does not depend on the images.
        """
        scores = self.differentiate(images)
        assert scores.gradient is not None
        return scores.logits, scores.gradient

    def evaluate(self, images: Tensor, index: Tensor | None = None) -> Scores:
        """Logits and losses without a graph; ``images`` are those of the examples ``index`` (None: all)."""
        with torch.no_grad():
            passes = [self._score(images, index) for _ in range(self._eot)]
        return Scores(*(_mean(list(part)) for part in zip(*passes, strict=True)))

    def differentiate(self, images: Tensor, index: Tensor | None = None) -> Scores:
        """Logits, losses and the gradient of their sum, each the mean over ``eot`` passes; otherwise as `evaluate`.

        Raises as `logits_and_gradient`.
        """
        passes = [self._differentiate(images, index) for _ in range(self._eot)]
        return Scores(*(_mean(list(part)) for part in zip(*passes, strict=True)))

    def fooled(self, scores: Scores, index: Tensor | None = None) -> Tensor:
        """(n,) bool: whether the (mean) logits of the examples ``index`` are what the attack wants."""
        return self.truth.rows(index).fooled(scores.logits)

    def raise_if_not_finite(self) -> None:
        """ValueError if logits or gradients so far were not finite; for ``deferred``, which does not raise at once."""
        for message, finite in self._finite.items():
            if not finite:
                raise ValueError(message)

    def _differentiate(self, images: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        leaf = images.detach().requires_grad_()
        logits, losses = self._score(leaf, index)
        gradient = torch.autograd.grad(losses.sum(), leaf, allow_unused=True)[0] if losses.requires_grad else None
        if gradient is None:
            self.raise_if_not_finite()
            raise ValueError("model: the loss of its logits has no gradient with respect to the images (detached?)")
        self._check_finite(gradient, _GRADIENT_NOT_FINITE)
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
            raise ValueError(f"loss: returned shape {tuple(losses.shape)}, expected ({n},), one for each image")
        self._check(~losses.detach().isnan().any(), _LOSS_NAN)
        return logits, losses

    def _forward(self, images: Tensor, index: Tensor | None) -> Tensor:
        logits = check_classes(self._answer(images), len(images), self._highest_label)
        self._check_finite(logits, _LOGITS_NOT_FINITE)
        self.forward_passes += len(images)
        if self._tally is not None:
            self._tally.queries[slice(None) if index is None else index] += 1
        return logits

    def _answer(self, images: Tensor) -> object:
        # A model that writes to its images is refused at the first pass, which is not given the caller's own.
        first = not self.forward_passes and not images.requires_grad
        return answered(self._model, images.clone() if first else images)

    def _check_finite(self, tensor: Tensor, message: str) -> None:
        self._check((tensor.detach() * 0).sum() == 0, message)  # a tenth of the time of isfinite().all()

    def _check(self, good: Tensor, message: str) -> None:
        if self._deferred:
            self._finite[message] = good & self._finite.get(message, good)
        elif not good:
            raise ValueError(message)


def _wide(logits: Tensor) -> Tensor:
    """``logits`` in at least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _mean(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors).mean(dim=0)
