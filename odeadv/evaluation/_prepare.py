"""The model as an evaluation runs it: as it is, or a copy that is folded, compiled or differentiated in bfloat16."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn

from odeadv.attacks.objective import AttackLoss
from odeadv.evaluation.trust import beyond

Gradients = Literal["full", "bf16"]


class _Bf16(nn.Module):
    """The model under bfloat16 autocast, with logits in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            logits: Tensor = self.model(x)
        return logits.float()


@dataclass(frozen=True)
class Prepared:
    """A model ready to be attacked.

    Attributes:
        exact: scores images; the user's own model, or a copy equal to it up to rounding.
        gradient: gives gradients; ``exact``, or in bfloat16.
        compiled: ``gradient``, compiled for batches of ``batch_size`` images, or None.
        batch_size: of the compiled one; batches of another size are not compiled anew.
        approximate: whether logits of ``gradient`` must not be scored.
        notes: what a reader of the result should know.
    """

    exact: nn.Module
    gradient: nn.Module
    compiled: nn.Module | None
    batch_size: int
    approximate: bool
    notes: tuple[str, ...]

    def scorer(self, labels: Tensor) -> Scorer:
        """For one batch with these labels."""
        fast = self.compiled if self.compiled is not None and len(labels) == self.batch_size else self.gradient
        return Scorer(self.exact, fast, labels, self.approximate, self.scorer)


class Scorer:
    """Scores one batch, and differentiates its loss; counts images sent through the model.

    Args:
        exact: scores.
        fast: gives gradients, and scores too unless ``approximate``.
        labels: (n,).
        approximate: whether what ``fast`` gets wrong has to be confirmed by ``exact``.
        make: makes the scorer of other labels.
    """

    def __init__(
        self,
        exact: nn.Module,
        fast: nn.Module,
        labels: Tensor,
        approximate: bool,
        make: Callable[[Tensor], Scorer],
    ) -> None:
        self.approximate, self._make, self._parts = approximate, make, list[Scorer]()
        self._exact = AttackLoss(exact, labels)
        self._fast = self._exact if fast is exact else AttackLoss(fast, labels)
        self._model, self._labels = exact, labels
        self._confirmed = 0

    @property
    def forward_passes(self) -> int:
        """Images sent through the model so far, whichever its form."""
        both = self._exact.forward_passes + (0 if self._fast is self._exact else self._fast.forward_passes)
        return both + self._confirmed + sum(part.forward_passes for part in self._parts)

    @property
    def gradient_evaluations(self) -> int:
        """How many of these were also differentiated."""
        return self._fast.gradient_evaluations + sum(part.gradient_evaluations for part in self._parts)

    def part(self, keep: Tensor) -> Scorer:
        """For the examples chosen by ``keep``, (n,) bool; what it costs is counted here too."""
        self._parts.append(self._make(self._labels[keep]))
        return self._parts[-1]

    def correct(self, images: Tensor) -> Tensor:
        """(n,) bool: which images are classified correctly."""
        return self._exact.logits(images).argmax(dim=1) == self._labels

    def gradient(self, images: Tensor) -> Tensor:
        """Of the summed cross-entropy, shaped like ``images``."""
        return self._fast.gradient(images)

    def correct_and_gradient(self, images: Tensor, *, open: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Which images are classified correctly, and the gradient, from one forward pass if that is exact.

        Otherwise mistakes are confirmed by an exact pass over the examples in ``open`` (default: all) that look
        wrong; examples outside ``open`` are not looked at again.
        """
        logits, gradient = self._fast.logits_and_gradient(images)
        correct = logits.argmax(dim=1) == self._labels
        if not self.approximate:
            return correct, gradient
        suspects = (~correct if open is None else ~correct & open).nonzero().squeeze(1)
        if len(suspects):
            exact = AttackLoss(self._model, self._labels[suspects])
            correct = correct.clone()
            correct[suspects] = exact.logits(images[suspects]).argmax(dim=1) == self._labels[suspects]
            self._confirmed += exact.forward_passes
        return correct, gradient


def prepare(
    model: nn.Module, probe: Tensor, *, batch_size: int, folded: bool, compiled: bool, gradients: Gradients
) -> Prepared:
    """``model`` as asked. What cannot be done is left out and said in a warning and in the notes.

    Args:
        model: in eval mode; never changed: what is folded or compiled is a copy.
        probe: a batch of images, of ``batch_size`` or fewer.
        batch_size: of the evaluation.
        folded: fold batch norms.
        compiled: compile the model with torch.compile.
        gradients: ``"full"`` or ``"bf16"``.
    """
    notes: list[str] = []
    exact = model
    if folded or compiled or gradients == "bf16":
        exact = _copy(model, probe, notes)
    copied, plain = exact is not model, exact
    if folded and copied:
        exact = _fold(exact, probe, notes)
    # In bfloat16 batch norm itself is faster than the multiply-add that folding makes of it.
    gradient = _Bf16(plain) if gradients == "bf16" else exact
    fast = _compile(gradient, probe, notes) if compiled and copied else None
    for note in notes:
        warnings.warn(note, RuntimeWarning, stacklevel=4)
    return Prepared(exact, gradient, fast, len(probe), gradients == "bf16", tuple(notes))


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
    except Exception as error:  # of a model that was traced into something else than it is
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "  # ours say what is wrong
        notes.append(f"not folded: {kind}{error}")
        return model
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
    except Exception as error:  # no C++ compiler, an operation that inductor does not know, ...
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        notes.append(f"not compiled, as torch.compile failed ({type(error).__name__}: {reason})")
        return None
    return compiled


_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Affine(nn.Module):
    """x -> scale * x + shift for each channel, in one pass; its derivative needs ``scale`` only, not x.

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
        """The affine image of ``x``, (n, channels, ...)."""
        shape = (-1, *(1 for _ in x.shape[2:]))  # of BatchNorm1d, (n, channels) or (n, channels, length)
        return torch.addcmul(self.shift.view(shape), x, self.scale.view(shape))


def fold(model: nn.Module) -> tuple[nn.Module, int]:
    """``model``, a copy in eval mode that may be changed, with its batch norms folded; and how many were.

    A batch norm that alone follows a convolution goes into its weights; any other becomes an `Affine`, as do those
    after a convolution whose weights are computed (spectral or weight norm) or that has hooks. One that is called by
    keyword stays. Scales are computed in float64 and rounded once. The result equals the model up to rounding.

    Raises:
        ValueError: if the model's forward cannot be traced (torch.fx), e.g. as it branches on values.
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
    """Whether its weight is a parameter that nothing recomputes before a pass."""
    return "weight" in convolution._parameters and not (convolution._forward_pre_hooks or convolution._forward_hooks)


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm in eval mode, (channels,) in float64."""
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
