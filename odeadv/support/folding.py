"""Networks in evaluation mode with their batch norms folded into convolutions: equal up to rounding, and faster."""

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


class Folded(nn.Module):
    """``model`` in evaluation mode with folded batch norms. It equals the model up to rounding.

    A batch norm goes into the weights of the convolution before it, if nothing else reads that convolution. Any other
    batch norm becomes an `Affine`; so does one after a convolution that has hooks or whose weights are computed
    (spectral or weight norm). A batch norm that is called by keyword stays. Scales are computed in float64 and rounded
    once. The model is not changed, and all its other modules and parameters are shared with it.

    A pass needs evaluation mode, as attacks set it. `eval` sets the mode of the shared modules, too.

    Args:
        model: in any mode. It is traced in evaluation mode by torch.fx.

    Attributes:
        count: number of batch norms that are folded.

    Raises:
        ValueError: if torch.fx cannot trace the model's forward, for example because it branches on values.
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
        """Fold the weights and statistics that the model has now."""
        with torch.no_grad():
            for fold in self._folds:
                fold.follow()

    def forward(self, images: Tensor) -> Any:
        """Return what the model returns in evaluation mode.

        Raises:
            ValueError: in training mode.
        """
        if self.training:
            raise ValueError("fold: got a pass in training mode, expected evaluation mode; leave out fold=True")
        return self.graph(images)


class _FoldTracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return True for modules of torch, and for batch norms that say that they are torch's in evaluation mode."""
        return getattr(m, "plain_in_evaluation", False) or super().is_leaf_module(m, module_qualified_name)


@dataclass(frozen=True)
class _Fold:
    """A batch norm, the convolution that it goes into (None: an `Affine`), and the module that replaces both."""

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
        """Write the scale and shift of the norm, or the weights of the convolution with both, to the module."""
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
    """Return True if its weight is a parameter that nothing recomputes before a pass."""
    return "weight" in convolution._parameters and not (convolution._forward_pre_hooks or convolution._forward_hooks)


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Return scale and shift of a batch norm in evaluation mode, (channels,) in float64."""
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    scale = (variance + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.detach().double()
    shift = -mean * scale
    return scale, shift + norm.bias.detach().double() if norm.affine else shift
