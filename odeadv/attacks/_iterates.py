"""The loop that all sign-gradient attacks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from odeadv.attacks._linf import Bounds, sign_step


def iterates(
    gradient: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    alpha: float,
    bounds: Bounds,
    first_gradient: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield x_1, x_2, ... without end: x_{k+1} = project(x_k + alpha * sign(gradient(x_k))), x_0 = ``start``.

    Lazy: the gradient at x_k is evaluated when x_{k+1} is asked for, so k iterates cost k gradients.

    Args:
        gradient: images to gradient, both (n, ...).
        start: x_0, (n, ...), within ``bounds``.
        alpha: step size, in pixel units of [0, 1].
        bounds: the allowed set.
        first_gradient: the gradient at ``start``, if known already.
    """
    x, direction = start, first_gradient
    while True:
        x = bounds.project(sign_step(x, gradient(x) if direction is None else direction, alpha))
        yield x
        direction = None
