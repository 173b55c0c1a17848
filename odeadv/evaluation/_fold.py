"""Batch norm in eval mode is an affine map: folded into the convolution before it, or made one multiply-add."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

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
