"""An attack of the user's own as a column of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from odeadv.attacks.balls import BALLS
from odeadv.attacks.checks import lengths
from odeadv.attacks.objective import reseed
from odeadv.evaluation.protocols import AttackSpec, radius_text
from odeadv.support.digests import derived_seed
from odeadv.support.isolation import untouched


def own_attack(
    spec: AttackSpec,
    function: Callable[..., object],
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    arguments: dict[str, Any],
    seed: int,
) -> Tensor:
    """Run an attack of the user's own, and return its images in the ball.

    It gets copies of the images, seeded random numbers, and weights without gradients. Modes and buffers are restored.

    Raises:
        TypeError: if it does not return images of the same shape and dtype.
        ValueError: if it leaves the ball or [0, 1] by more than rounding, or returns NaN.
    """
    with _seeded(images.device, derived_seed(seed, "global")), _frozen(model), untouched(model):
        given = images.clone(memory_format=torch.contiguous_format)  # .view fails on images with channels last
        found = function(model, given, labels.clone(), **arguments)
    if not isinstance(found, Tensor) or (
        (found.shape, found.dtype, found.device) != (images.shape, images.dtype, images.device)
    ):
        got, expected = (
            f"{x.dtype} of shape {tuple(x.shape)} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
            for x in (found, images)
        )  # fmt: skip
        raise TypeError(f"{spec.label}: returned {got}, expected images, {expected}")
    ball = BALLS[spec.options.get("norm", "linf")](images, lengths("eps", arguments["eps"], images))
    inside = ball.project(found.detach())
    outside = float((inside - found.detach()).abs().max())
    if not outside <= max(1e-6, torch.finfo(images.dtype).eps):  # more than rounding, or NaN
        raise ValueError(
            f"{spec.label}: returned images that leave the ball of radius {radius_text(spec.eps, spec.options)} or "
            f"[0, 1] by {outside:.3g}, expected images in both, such as (images + (x - images).clamp(-eps, eps))"
            ".clamp(0, 1)"
        )
    return inside


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter have or require a gradient in the body: it may call ``backward`` and ``zero_grad``."""
    kept = [(weight, weight.requires_grad, weight.grad) for weight in model.parameters()]
    try:
        for weight, _, _ in kept:
            weight.grad = None
            weight.requires_grad_(False)
        yield
    finally:
        for weight, requires_grad, grad in kept:
            weight.requires_grad_(requires_grad)
            weight.grad = grad


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch's global random state in the body, on the CPU and on ``device``, and restore it after it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        reseed(torch.Generator().manual_seed(seed), device)
        yield
