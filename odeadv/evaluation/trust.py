"""What an evaluation refuses to evaluate: models whose answers are no function of the image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from odeadv.attacks.checks import answered
from odeadv.support.digests import _private

PROBES = 2  # images in a probing forward pass
_GAP = 1e3  # logits this many times larger than the next smaller ones have a scale of their own
GRADIENT_PROBES = 64  # images whose gradients are computed twice, before long runs


@dataclass(frozen=True)
class Behaviour:
    """What forward passes on the same images showed.

    Attributes:
        logits: of the first.
        difference: largest difference between two that were run alike, in the unit of the logits.
        random: whether that is more than rounding.
        repeats: whether there is none, to the last bit.
        with_gradient: largest difference between a pass that a gradient could be asked of and one without.
        disagrees: whether that is more than rounding.
        changed_tensors: buffers and parameters that a forward pass wrote to.
        changed_attributes: other attributes of modules that it changed.
        training: submodules that were in training mode after it, though eval mode was set before.
    """

    logits: Tensor
    difference: float
    random: bool
    repeats: bool
    with_gradient: float
    disagrees: bool
    changed_tensors: tuple[str, ...]
    changed_attributes: tuple[str, ...]
    training: tuple[str, ...]


def behaviour(model: nn.Module, images: Tensor, *, times: int = 2) -> Behaviour:
    """Run ``model`` ``times`` on ``images`` without a gradient, and as often so that one could be asked for.

    Call it with the model in eval mode and protected.

    Raises:
        TypeError: if it does not return a floating tensor.
        ValueError: if it writes to the images.
    """
    with torch.no_grad():
        before = _state(model)
        plain = [_logits(answered(model, images.clone()))]
        after = _state(model)
        training = tuple(name or "model" for name, part in model.named_modules() if part.training)
        plain += [_logits(model(images)) for _ in range(times - 1)]
    with torch.enable_grad():
        graph = [_logits(model(images.detach().clone().requires_grad_())) for _ in range(times)]
    last = _state(model)
    changed = sorted({*_changed(before, after), *_changed(before, last)})
    tensors = sorted(name for kind, name in changed if kind == "tensor")
    attributes = sorted(name for kind, name in changed if kind == "attribute" and not name.endswith(".training"))
    alike = [(same[0], other) for same in (plain, graph) for other in same[1:]]
    return Behaviour(
        plain[0],
        max(_distance(a, b) for a, b in alike),
        any(differs(a, b) for a, b in alike),
        all(torch.equal(a, b) for a, b in alike),
        _distance(plain[0], graph[0]),
        differs(plain[0], graph[0]),
        tuple(tensors),
        tuple(attributes),
        training,
    )


def batch_dependence(model: nn.Module, images: Tensor, logits: Tensor) -> float | None:
    """How much the ``logits`` of ``images`` change with the batch; None if by no more than rounding.

    The first images alone, all of them in reversed order, and all in a larger batch, at other places in it.
    """
    few = min(PROBES, len(images))
    with torch.no_grad():
        alone = torch.cat([_logits(model(images[i : i + 1])) for i in range(few)])
        reverse = _logits(model(_laid_out(images.flip(0), images))).flip(0)
        before = (1 - images[:few]).repeat_interleave(2, dim=0)[: 2 * few - 1]  # an odd number: parities change
        batch = _laid_out(torch.cat([before, images, 1 - images[:few]]), images)
        larger = _logits(model(batch))[len(before) :][: len(images)]
    pairs = ((logits[:few], alone), (logits, reverse), (logits, larger))
    return max(_distance(a, b) for a, b in pairs) if any(differs(a, b) for a, b in pairs) else None


def whole_batch_dependence(model: nn.Module, images: Tensor, logits: Tensor) -> float | None:
    """How much ``logits``, of the first ``images``, change in a batch of them all; None if by no more than rounding.

    Batches of other sizes are summed by other kernels: sixteen times the usual tolerance.
    """
    with torch.no_grad():
        found = _logits(model(images))[: len(logits)]
    logits = logits[: len(found)]
    return _distance(logits, found) if differs(logits, found, units=1024) else None


def batch_forwards(n: int) -> int:
    """How many images `batch_dependence` sends through the model for ``n``."""
    few = min(PROBES, n)
    return few + n + (2 * few - 1) + n + few


def _laid_out(images: Tensor, like: Tensor) -> Tensor:
    """``images`` in the memory format of ``like``."""
    last = like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last)
    return images.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if a.shape == b.shape else float("inf")


def _changed(before: Mapping[tuple[str, str], Any], after: Mapping[tuple[str, str], Any]) -> list[tuple[str, str]]:
    return [key for key in before.keys() | after.keys() if not _same(before.get(key), after.get(key))]


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
    # Of a model said to be random even a difference like rounding may be a small draw, and the next a larger one.
    if found.disagrees and (found.repeats if stochastic else not found.random):
        raise ValueError(
            "model: its logits where a gradient could be asked for differ from those without one by "
            f"{found.with_gradient:.2g}, so attacks meet another model than is scored; expected a forward that does "
            "not look at the gradient mode or requires_grad"
        )


def refuse_batches(difference: float | None) -> None:
    """ValueError if an answer depends on the rest of its batch, by ``difference``."""
    if difference is not None:
        raise ValueError(
            "model: the logits of an image depend on the other images in its batch, its place or the batch size (by "
            f"{difference:.2g}), so outcomes are not those of the images; expected each image to be answered by "
            "itself: use running statistics in eval mode, not those of the batch"
        )


def differs(a: Tensor, b: Tensor, *, units: float = 64) -> bool:
    """Whether two answers (n, classes) to the same images differ by more than ``units`` in the last place."""
    return beyond(a, b, units * torch.finfo(a.dtype).eps)


def beyond(a: Tensor, b: Tensor, relative: float) -> bool:
    """Whether logits (n, classes) differ by more than ``relative`` times their scale, see `scales`.

    What is not finite differs from all but its like.
    """
    if a.shape != b.shape:
        return True
    same = (a == b) | (a.isnan() & b.isnan())
    apart = (a - b).abs()
    return not bool((same | (apart.isfinite() & (apart <= relative * scales(a)))).all())


def scales(logits: Tensor) -> Tensor:
    """The size that rounding of each column of ``logits`` (n, classes) is measured by, (classes,).

    It is the largest logit, but for classes a thousand times and more above all others: a class that is masked by -1e9
    must not say what is rounding in the others.
    """
    sizes, order = logits.abs().amax(dim=0).sort()
    jump = sizes[1:] > _GAP * sizes[:-1]
    # What is 0 (a class that is never answered) or alone at the bottom may owe its size to cancellation.
    jump &= (sizes[:-1] > 0).cumsum(0) >= 2
    group = torch.cat([jump.new_zeros(1), jump]).cumsum(0)
    largest = torch.stack([sizes[group == k][-1] for k in range(int(group[-1]) + 1)])
    return torch.empty_like(sizes).scatter_(0, order, largest[group])


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
            elif isinstance(value, (list, dict, set)) and (not name.startswith("_") or _private(name, value)):
                state["attribute", dot + name] = repr(value) if len(value) < 1000 else len(value)
    return state


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b) or (a != a).any())
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)
