"""What an evaluation refuses to evaluate: models whose answers are no function of the image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PROBES = 2  # images in a probing forward pass


@dataclass(frozen=True)
class Behaviour:
    """What two forward passes on the same images showed.

    Attributes:
        logits: of the first.
        difference: largest difference between the two, in the unit of the logits.
        random: whether that is more than rounding.
        changed_tensors: buffers and parameters that a forward pass wrote to.
        changed_attributes: other attributes of modules that it changed.
        training: submodules that were in training mode after it, though eval mode was set before.
    """

    logits: Tensor
    difference: float
    random: bool
    changed_tensors: tuple[str, ...]
    changed_attributes: tuple[str, ...]
    training: tuple[str, ...]


def behaviour(model: nn.Module, images: Tensor) -> Behaviour:
    """Run ``model`` twice on ``images``; call it with the model in eval mode and protected."""
    with torch.no_grad():
        before = _state(model)
        first = _logits(model(images))
        after = _state(model)
        training = tuple(name or "model" for name, part in model.named_modules() if part.training)
        second = _logits(model(images))
    changed = [key for key in before.keys() | after.keys() if not _same(before.get(key), after.get(key))]
    tensors = sorted(name for kind, name in changed if kind == "tensor")
    attributes = sorted(name for kind, name in changed if kind == "attribute" and not name.endswith(".training"))
    difference = float((first - second).abs().max()) if first.shape == second.shape else float("inf")
    return Behaviour(first, difference, differs(first, second), tuple(tensors), tuple(attributes), training)


def refuse(found: Behaviour, *, stochastic: bool) -> None:
    """ValueError if what was found makes attacks on the model meaningless."""
    if found.changed_tensors:
        raise ValueError(
            f"model: its forward changes {', '.join(found.changed_tensors)} in eval mode, so no two images meet the "
            "same model; expected a forward that leaves the state alone"
        )
    if found.random and not stochastic:
        cause = f" ({', '.join(found.training)} in training mode: dropout left on?)" if found.training else ""
        raise ValueError(
            f"model: two forward passes on the same images differ by {found.difference:.2g}{cause}, so one gradient "
            "says little; average over passes (EOT: a wrapper with passes=) or give stochastic=True for single draws"
        )


def differs(a: Tensor, b: Tensor) -> bool:
    """Whether two answers to the same images differ by more than rounding (64 units in the last place)."""
    if a.shape != b.shape:
        return True
    return bool((a - b).abs().max() > 64 * torch.finfo(a.dtype).eps * a.abs().max())


def _logits(value: object) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"model: returned {got}, expected a floating tensor of logits")
    return value.detach().clone()


def _state(model: nn.Module) -> dict[tuple[str, str], Any]:
    """Copies of all tensors, and of the plain attributes of all modules, by name."""
    state: dict[tuple[str, str], Any] = {}
    for prefix, part in model.named_modules():
        own: Mapping[str, Any] = part.__dict__
        dot = f"{prefix}." if prefix else ""
        for name, tensor in [*part._buffers.items(), *part._parameters.items()]:
            if tensor is not None:
                state["tensor", dot + name] = tensor.detach().clone()
        for name, value in own.items():
            if isinstance(value, Tensor):
                state["attribute", dot + name] = value.detach().clone()
            elif isinstance(value, torch.Generator):
                state["attribute", dot + name] = value.get_state()
            elif value is None or isinstance(value, (bool, int, float, str, tuple)):
                state["attribute", dot + name] = value
            elif isinstance(value, (list, dict, set)) and not name.startswith("_"):
                state["attribute", dot + name] = repr(value) if len(value) < 1000 else len(value)
    return state


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b) or (a != a).any())
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)
