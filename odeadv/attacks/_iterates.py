"""The loop that all gradient attacks with a fixed step share, and the momentum that may be put into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from odeadv.attacks.balls import Ball, divided


def iterates(
    gradient: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    alpha: float,
    bounds: Ball,
    first_gradient: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield x_1, x_2, ... without end: x_{k+1} = project(ascend(x_k, gradient(x_k), alpha)), x_0 = ``start``.

    In the L-infinity norm ``ascend`` is x + alpha * sign(gradient), in the L2 norm x + alpha * gradient / ||gradient||.
    Lazy: the gradient at x_k is evaluated when x_{k+1} is asked for, so k iterates cost k gradients.

    Args:
        gradient: images to gradient, both (n, ...).
        start: x_0, (n, ...), within ``bounds``.
        alpha: step size, in pixel units of [0, 1].
        bounds: the allowed set, and the norm that steps are measured in.
        first_gradient: the gradient at ``start``, if known already.
    """
    x, direction = start, first_gradient
    while True:
        x = bounds.project(bounds.ascend(x, gradient(x) if direction is None else direction, alpha))
        yield x
        direction = None


def with_momentum(gradient: Callable[[Tensor], Tensor], decay: float) -> Callable[[Tensor], Tensor]:
    """``gradient`` with memory: g_{k+1} = decay * g_k + gradient(x_k) / ||gradient(x_k)||_1, g_0 = 0, per example.

    A gradient that is 0 adds nothing. One such function serves one run. Source: Dong et al. 2018, "Boosting
    Adversarial Attacks with Momentum", Eq. 6.
    """
    memory: Tensor | None = None

    def accumulated(x: Tensor) -> Tensor:
        nonlocal memory
        found = gradient(x)
        wide = found.to(torch.promote_types(found.dtype, torch.float32))
        normed = divided(wide, wide.abs().sum(dim=tuple(range(1, wide.ndim)), keepdim=True))
        memory = normed if memory is None else decay * memory + normed
        return memory.to(found.dtype)

    return accumulated
