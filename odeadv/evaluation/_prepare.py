"""Prepare the model for an evaluation: use it unchanged, or fold or compile a copy."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from odeadv.attacks.objective import AttackLoss
from odeadv.evaluation.trust import FOLD_LIMIT, beyond
from odeadv.support.folding import Folded


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to be attacked.

    Attributes:
        model: the user's model, or a copy that is equal to it up to rounding.
        compiled: ``model`` compiled for batches of ``batch_size`` images, or None.
        batch_size: number of images in a batch of the compiled model; another size would need another compilation.
        notes: sentences for the reader of the result.
    """

    model: nn.Module
    compiled: nn.Module | None
    batch_size: int
    notes: tuple[str, ...]

    def scorer(self, labels: Tensor) -> Scorer:
        """Return the scorer of a batch with these labels."""
        return Scorer(self, labels)


class Scorer:
    """Score the images of one batch, differentiate the cross-entropy, and count images sent through the model.

    Args:
        prepared: the model.
        labels: (n,) int64, labels of the batch.
    """

    def __init__(self, prepared: Prepared, labels: Tensor) -> None:
        fast = prepared.compiled if prepared.compiled is not None and len(labels) == prepared.batch_size else None
        self._prepared, self._labels, self._parts = prepared, labels, list[Scorer]()
        self._plain = AttackLoss(prepared.model, labels)
        self._fast = self._plain if fast is None else AttackLoss(fast, labels)

    @property
    def forward_passes(self) -> int:
        """The number of images sent through the model so far."""
        own = self._plain.forward_passes + (0 if self._fast is self._plain else self._fast.forward_passes)
        return own + sum(part.forward_passes for part in self._parts)

    @property
    def gradient_evaluations(self) -> int:
        """The number of images that were also differentiated."""
        return self._fast.gradient_evaluations + sum(part.gradient_evaluations for part in self._parts)

    def part(self, keep: Tensor) -> Scorer:
        """Return a scorer for the examples chosen by ``keep``, (n,) bool; its cost is also counted in this scorer."""
        self._parts.append(self._prepared.scorer(self._labels[keep]))
        return self._parts[-1]

    def logits(self, images: Tensor) -> Tensor:
        """Return logits (n, classes)."""
        return self._plain.logits(images)

    def correct(self, images: Tensor, passes: int = 1) -> Tensor:
        """Return (passes, n) bool: True if the image is classified correctly in the forward pass."""
        return torch.stack([self.right(self.logits(images)) for _ in range(passes)])

    def right(self, logits: Tensor) -> Tensor:
        """Return (n,) bool: True if the label has the largest logit."""
        return logits.argmax(dim=1) == self._labels

    def losses(self, logits: Tensor) -> Tensor:
        """Return the cross-entropy of each example, (n,), in at least float32."""
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return functional.cross_entropy(wide, self._labels, reduction="none")

    def gradient(self, images: Tensor) -> Tensor:
        """Return the gradient of the summed cross-entropy, shaped like ``images``."""
        return self._fast.gradient(images)

    def logits_and_gradient(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and the gradient of the summed cross-entropy from one forward pass."""
        return self._fast.logits_and_gradient(images)


def prepare(model: nn.Module, probe: Tensor, *, folded: bool, compiled: bool) -> Prepared:
    """Return ``model``, folded or compiled as requested. If a step fails, it is skipped with a warning and a note.

    Args:
        model: the model in eval mode. It is never changed: folding and compiling use a copy.
        probe: a batch of images of the size that the evaluation uses.
        folded: True to fold batch norms.
        compiled: True to compile the model with torch.compile.
    """
    notes: list[str] = []
    ready, fast = model, None
    if folded or compiled:
        ready = _copy(model, probe, notes)
    if ready is not model:
        ready = _fold(ready, probe, notes) if folded else ready
        fast = _compile(ready, probe, notes) if compiled else None
    for note in notes:
        warnings.warn(note, RuntimeWarning, stacklevel=4)
    return Prepared(ready, fast, len(probe), tuple(notes))


def _copy(model: nn.Module, probe: Tensor, notes: list[str]) -> nn.Module:
    try:
        copied = copy.deepcopy(model).eval().requires_grad_(False)
    except Exception as error:  # copying a user's module may raise any error
        notes.append(f"the model cannot be copied ({type(error).__name__}: {error}): neither folded nor compiled")
        return model
    if probe.ndim == 4 and probe.is_contiguous(memory_format=torch.channels_last):
        copied = copied.to(memory_format=torch.channels_last)
    return copied


def _fold(model: nn.Module, probe: Tensor, notes: list[str]) -> nn.Module:
    try:
        folded = Folded(model).eval()
        with torch.no_grad():
            plain, other = model(probe), folded(probe)
    except Exception as error:  # the traced graph may raise any error
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "  # messages of fold need no type
        notes.append(f"not folded: {kind}{error}")
        return model
    limit = FOLD_LIMIT * torch.finfo(plain.dtype).eps
    if folded.count and not beyond(plain, other, limit):
        return folded
    distance = float((plain - other).abs().max())
    why = (
        f"logits differ by {distance:.1g}, more than {limit:.1g} of their scale"
        if folded.count
        else "no batch norm found"
    )
    notes.append(f"not folded: {why}")
    return model


def _compile(model: nn.Module, probe: Tensor, notes: list[str]) -> nn.Module | None:
    try:
        compiled: nn.Module = torch.compile(model, dynamic=False)  # type: ignore[assignment]
        leaf = probe.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        torch.autograd.grad(compiled(leaf).sum(), leaf)
    except Exception as error:  # for example, a C++ compiler is missing
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        notes.append(f"not compiled, as torch.compile failed ({type(error).__name__}: {reason})")
        return None
    return compiled
