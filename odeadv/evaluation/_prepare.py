"""Make the model ready: as it is, or as a copy that is folded or compiled."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from odeadv.attacks.objective import AttackLoss
from odeadv.evaluation.trust import beyond


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to be attacked.

    Attributes:
        model: the user's own model, or a copy that is equal to it up to rounding.
        compiled: ``model`` compiled for batches of ``batch_size`` images, or None.
        batch_size: images in a batch of the compiled model. It would be compiled anew for another size.
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
    """Scores the images of one batch and differentiates its cross-entropy; counts images sent through the model.

    Args:
        prepared: the model.
        labels: (n,).
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
        """Return the scorer of the examples chosen by ``keep``, (n,) bool; its cost counts here too."""
        self._parts.append(self._prepared.scorer(self._labels[keep]))
        return self._parts[-1]

    def logits(self, images: Tensor) -> Tensor:
        """Return logits (n, classes)."""
        return self._plain.logits(images)

    def correct(self, images: Tensor, passes: int = 1) -> Tensor:
        """Return (passes, n) bool: True if an image is classified correctly in that forward pass."""
        return torch.stack([self.right(self.logits(images)) for _ in range(passes)])

    def right(self, logits: Tensor) -> Tensor:
        """Return (n,) bool: True if the largest logit is that of the label."""
        return logits.argmax(dim=1) == self._labels

    def gradient(self, images: Tensor) -> Tensor:
        """Return the gradient of the summed cross-entropy, shaped like ``images``."""
        return self._fast.gradient(images)

    def logits_and_gradient(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and the gradient of the summed cross-entropy from one forward pass."""
        return self._fast.logits_and_gradient(images)


def prepare(model: nn.Module, probe: Tensor, *, folded: bool, compiled: bool) -> Prepared:
    """Return ``model`` as asked. A step that fails is left out, with a warning and a note.

    Args:
        model: in eval mode. It is never changed: folding and compiling work on a copy.
        probe: a batch of images, of the size that the evaluation has.
        folded: fold batch norms.
        compiled: compile the model with torch.compile.
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
    except Exception as error:  # a user's module may refuse in any way
        notes.append(f"the model cannot be copied ({type(error).__name__}: {error}): neither folded nor compiled")
        return model
    if probe.ndim == 4 and probe.is_contiguous(memory_format=torch.channels_last):
        copied = copied.to(memory_format=torch.channels_last)
    return copied


def _fold(model: nn.Module, probe: Tensor, notes: list[str]) -> nn.Module:
    try:
        folded, count = fold(copy.deepcopy(model))
        with torch.no_grad():
            plain, other = model(probe), folded(probe)
    except Exception as error:  # the traced graph may fail in any way
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "  # messages of fold need no type
        notes.append(f"not folded: {kind}{error}")
        return model
    # Folding rounds every weight once, which a deep network amplifies: ResNet-56 differs by some 100 units in the last
    # place. A wrong fold differs in the first places.
    limit = 1e4 * torch.finfo(plain.dtype).eps
    if count and not beyond(plain, other, limit):
        return folded
    distance = float((plain - other).abs().max())
    why = f"logits differ by {distance:.1g}, more than {limit:.1g} of their scale" if count else "no batch norm found"
    notes.append(f"not folded: {why}")
    return model


def _compile(model: nn.Module, probe: Tensor, notes: list[str]) -> nn.Module | None:
    try:
        compiled: nn.Module = torch.compile(model, dynamic=False)  # type: ignore[assignment]
        leaf = probe.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        torch.autograd.grad(compiled(leaf).sum(), leaf)
    except Exception as error:  # for example, no C++ compiler
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        notes.append(f"not compiled, as torch.compile failed ({type(error).__name__}: {reason})")
        return None
    return compiled


_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Affine(nn.Module):
    """scale * x + shift per channel, in one pass; its derivative needs ``scale`` only, not x.

    Args:
        scale: (channels,).
        shift: (channels,).
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        """Return scale * x + shift, for ``x`` (n, channels, ...)."""
        shape = (-1, *(1 for _ in x.shape[2:]))  # BatchNorm1d takes (n, channels) and (n, channels, length)
        return torch.addcmul(self.shift.view(shape), x, self.scale.view(shape))


def fold(model: nn.Module) -> tuple[nn.Module, int]:
    """Fold the batch norms of ``model``, a copy in eval mode that may be changed. Return it and the number folded.

    A batch norm goes into the weights of the convolution before it, if nothing else reads that convolution. Any other
    batch norm becomes an `Affine`; so does one after a convolution that has hooks or whose weights are computed
    (spectral or weight norm). A batch norm that is called by keyword stays. Scales are computed in float64 and rounded
    once. The result equals the model up to rounding.

    Raises:
        ValueError: if torch.fx cannot trace the model's forward, for example because it branches on values.
    """
    try:
        traced = fx.GraphModule(model, fx.Tracer().trace(model))
    except Exception as error:  # a tracer raises whatever the traced code raises
        raise ValueError(f"fold: the model's forward cannot be traced ({type(error).__name__}: {error})") from error
    parts = dict(traced.named_modules())
    uses = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    count = 0
    for node in list(traced.graph.nodes):
        norm = parts.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(norm, _NORMS) or norm.running_mean is None or norm.running_var is None or node.kwargs:
            continue
        source = node.args[0]
        before = parts.get(str(source.target)) if source.op == "call_module" else None
        scale, shift = _affine(norm)
        alone = len(source.users) == 1 and uses.count(source.target) == 1 and uses.count(node.target) == 1
        if isinstance(before, _CONVOLUTIONS) and alone and _plain_weight(before):
            _absorb(before, scale, shift)
            node.replace_all_uses_with(source)
            traced.graph.erase_node(node)
        else:
            like = norm.running_mean
            affine = Affine(scale.to(like), shift.to(like))
            name = f"affine_{count}"
            traced.add_module(name, affine)
            node.target = name
        count += 1
    traced.graph.lint()
    traced.recompile()
    traced.delete_all_unused_submodules()
    return traced.eval(), count


def _plain_weight(convolution: nn.Module) -> bool:
    """Return True if its weight is a parameter that nothing recomputes before a pass."""
    return "weight" in convolution._parameters and not (convolution._forward_pre_hooks or convolution._forward_hooks)


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return scale and shift of a batch norm in eval mode, (channels,) in float64."""
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    scale = (variance + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.detach().double()
    shift = -mean * scale
    return scale, shift + norm.bias.detach().double() if norm.affine else shift


def _absorb(convolution: nn.Module, scale: Tensor, shift: Tensor) -> None:
    assert isinstance(convolution, _CONVOLUTIONS)
    weight = convolution.weight.detach()
    broadcast = scale.reshape(-1, *(1 for _ in weight.shape[1:]))
    bias = shift if convolution.bias is None else convolution.bias.detach().double() * scale + shift
    layout = (
        torch.channels_last if weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last) else None
    )
    folded = (weight.double() * broadcast).to(weight.dtype)
    folded = folded if layout is None else folded.contiguous(memory_format=layout)
    convolution.weight = nn.Parameter(folded, requires_grad=False)
    convolution.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
