"""Fold the batch norms of a network in evaluation mode into its convolutions: faster, and equal up to rounding."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from odeadv.support.isolation import untouched

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Affine(nn.Module):
    """scale * x + shift per channel, in one pass. The backward pass needs ``scale`` only, so x is not kept.

    Args:
        scale: tensor of shape (channels,).
        shift: tensor of shape (channels,).
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        """Return scale * x + shift for ``x`` of shape (n, channels, ...)."""
        shape = (-1, *(1 for _ in x.shape[2:]))  # BatchNorm1d takes (n, channels) and (n, channels, length)
        return torch.addcmul(self.shift.view(shape), x, self.scale.view(shape))


class Folded(nn.Module):
    """``model`` in evaluation mode with folded batch norms. It equals the model up to rounding.

    A batch norm is folded into the weights of the convolution before it, if nothing else reads that convolution. Any
    other batch norm becomes an `Affine`. A batch norm after a convolution that has hooks or computed weights (spectral
    norm, weight norm) becomes an `Affine` too. A batch norm that is called by keyword stays. Scales are computed in
    float64 and rounded once. ``model`` is not changed; its other modules and parameters are shared.

    A forward pass needs evaluation mode, which attacks set. `eval` also sets the mode of the shared modules.

    Args:
        model: a module in any mode. torch.fx traces it in evaluation mode.

    Attributes:
        count: number of batch norms that are folded.

    Raises:
        ValueError: if torch.fx cannot trace the model's forward, for example if it branches on values.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._folds: list[_Fold] = []
        try:
            with untouched(model, mode="eval"):
                traced = fx.GraphModule(model, _FoldTracer().trace(model))
        except Exception as error:  # a tracer raises whatever the traced code raises
            raise ValueError(f"fold: the model's forward cannot be traced ({type(error).__name__}: {error})") from error
        parts = dict(traced.named_modules())
        uses = [node.target for node in traced.graph.nodes if node.op == "call_module"]
        for node in list(traced.graph.nodes):
            norm = parts.get(str(node.target)) if node.op == "call_module" else None
            if not isinstance(norm, _NORMS) or norm.running_mean is None or norm.running_var is None or node.kwargs:
                continue
            source = node.args[0]
            before = parts.get(str(source.target)) if source.op == "call_module" else None
            alone = len(source.users) == 1 and uses.count(source.target) == 1 and uses.count(node.target) == 1
            absorbing = before if isinstance(before, _CONVOLUTIONS) and alone and _plain_weight(before) else None
            folded = _Fold.of(norm, absorbing)
            self._folds.append(folded)
            at = node if absorbing is None else source
            at.target = f"folded_{len(self._folds)}"
            traced.add_module(at.target, folded.module)
            if absorbing is not None:
                node.replace_all_uses_with(source)
                traced.graph.erase_node(node)
        traced.graph.lint()
        traced.recompile()
        traced.delete_all_unused_submodules()
        self.count = len(self._folds)
        self.graph = traced
        self.follow()

    def follow(self) -> None:
        """Fold the current weights and statistics of the model again."""
        with torch.no_grad():
            for fold in self._folds:
                fold.follow()

    def forward(self, images: Tensor) -> Any:
        """Return the output of the model in evaluation mode.

        Raises:
            ValueError: in training mode.
        """
        if self.training:
            raise ValueError("fold: got a pass in training mode, expected evaluation mode; leave out fold=True")
        return self.graph(images)


class _FoldTracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return True for torch's modules, and for batch norms with ``plain_in_evaluation`` set to True."""
        return getattr(m, "plain_in_evaluation", False) or super().is_leaf_module(m, module_qualified_name)


@dataclass(frozen=True)
class _Fold:
    """A batch norm, the convolution that absorbs it (None for an `Affine`), and the module that replaces both."""

    norm: Any
    convolution: Any
    module: Any

    @classmethod
    def of(cls, norm: Any, convolution: Any) -> _Fold:
        if convolution is None:
            scale, shift = _affine(norm)
            return cls(norm, None, Affine(scale.to(norm.running_mean), shift.to(norm.running_mean)))
        module = copy.deepcopy(convolution)
        weight = module.weight.detach()
        module.weight = nn.Parameter(weight, requires_grad=False)
        module.bias = nn.Parameter(weight.new_zeros(len(norm.running_mean)), requires_grad=False)
        return cls(norm, convolution, module)

    def follow(self) -> None:
        """Write the norm's current scale and shift to the `Affine`, or to the weights and bias of the convolution."""
        scale, shift = _affine(self.norm)
        module, convolution = self.module, self.convolution
        if isinstance(module, Affine):
            module.scale.copy_(scale)
            module.shift.copy_(shift)
        else:
            bias = shift if convolution.bias is None else convolution.bias.double() * scale + shift
            weight = convolution.weight
            module.weight.copy_(weight.double() * scale.view(-1, *(1 for _ in weight.shape[1:])))
            module.bias.copy_(bias)


def _plain_weight(convolution: nn.Module) -> bool:
    """Return True if the weight of ``convolution`` is a parameter that no hook recomputes before a pass."""
    return "weight" in convolution._parameters and not (convolution._forward_pre_hooks or convolution._forward_hooks)


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Return scale and shift of a batch norm in evaluation mode, each of shape (channels,) in float64."""
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    scale = (variance + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.detach().double()
    shift = -mean * scale
    return scale, shift + norm.bias.detach().double() if norm.affine else shift
