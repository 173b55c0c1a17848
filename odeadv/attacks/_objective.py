"""What an attack ascends: a model's loss on one labelled batch, and its gradient with respect to the images."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from odeadv._state import Mode, untouched
from odeadv.attacks._checks import check_logits

PerExampleLoss = Callable[[Tensor, Tensor], Tensor]
Loss = Literal["ce"] | PerExampleLoss


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, reduction="none")


def resolve_loss(loss: object) -> PerExampleLoss:
    """The function that ``loss`` names or is; ValueError for an unknown name, TypeError for anything else."""
    if loss == "ce":
        return _cross_entropy
    if isinstance(loss, str):
        raise ValueError(f"loss: got {loss!r}, expected 'ce' or a function (logits, labels) -> losses of shape (n,)")
    if not callable(loss):
        raise TypeError(f"loss: got {loss!r}, expected 'ce' or a function (logits, labels) -> losses of shape (n,)")
    return loss


@contextlib.contextmanager
def attacking(model: nn.Module, mode: Mode) -> Iterator[None]:
    """Gradients on, also under a caller's ``no_grad`` or ``inference_mode``; ``model`` in ``mode``, then restored."""
    with torch.inference_mode(False), torch.enable_grad(), untouched(model, mode=mode):
        yield


def constant(tensor: Tensor) -> Tensor:
    """``tensor`` without history, and fit for autograd if it was made under ``inference_mode``."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


class Objective:
    """The loss of ``model`` on images with these labels, as a function of the images; ascended by attacks.

    Losses are summed over the batch, so an example's gradient neither depends on the batch nor shrinks with it.
    Only images are differentiated: no weight gradient is computed, no ``.grad`` written. Use it inside `attacking`.

    Args:
        model: (n, ...) images to (n, classes) logits.
        labels: (n,) int64.
        loss: (logits, labels) to losses of shape (n,).

    Attributes:
        forward_passes: images sent through the model so far.
        gradient_evaluations: how many of these were also differentiated.
    """

    def __init__(self, model: nn.Module, labels: Tensor, loss: PerExampleLoss = _cross_entropy) -> None:
        self.forward_passes = 0
        self.gradient_evaluations = 0
        self._model = model
        self._labels = labels
        self._highest_label = int(labels.max())
        self._loss = loss

    def logits(self, images: Tensor) -> Tensor:
        """Logits (n, classes), without a graph. ValueError if they are not finite or not of that shape."""
        with torch.no_grad():
            return self._forward(images)

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
        n = len(images)
        leaf = images.detach().requires_grad_()
        logits = self._forward(leaf)
        losses = self._loss(logits, self._labels)
        if not isinstance(losses, Tensor):
            raise TypeError(f"loss: returned {type(losses).__name__}, expected a tensor of shape ({n},)")
        if losses.shape != (n,):
            raise ValueError(f"loss: returned shape {tuple(losses.shape)}, expected ({n},), one for each image")
        gradient = torch.autograd.grad(losses.sum(), leaf, allow_unused=True)[0] if losses.requires_grad else None
        if gradient is None:
            raise ValueError("model: the loss of its logits has no gradient with respect to the images (detached?)")
        if gradient.isnan().any():
            raise ValueError("model: the gradient of the loss with respect to the images contains NaN")
        self.gradient_evaluations += n
        return logits.detach(), gradient

    def _forward(self, images: Tensor) -> Tensor:
        logits = check_logits(self._model(images), len(images), self._highest_label)
        self.forward_passes += len(images)
        return logits
