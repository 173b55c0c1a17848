"""Derivatives of a map at a point as products: J v and J^T a, never J."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Linearised:
    """The map ``g`` at ``x``: its value, and products with its Jacobian J, all from one evaluation.

    J^T w is linear in w, so J v is its derivative with respect to w: two backward passes. They work for everything that
    can be differentiated twice, including batch norm in training mode, which forward-mode differentiation refuses. For
    a complex state J^T is the adjoint of J in the real inner product.

    Args:
        g: the map. Make the object while autograd is on.
        x: the point.
    """

    def __init__(self, g: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self._x = x.detach().clone().requires_grad_()
        self._y = g(self._x)
        self._probe: Tensor | None = None
        self._pulled: Tensor | None = None

    @property
    def value(self) -> Tensor:
        """The value g(x)."""
        return self._y.detach()

    def vjp(self, a: Tensor) -> Tensor:
        """Return J^T a."""
        if not self._y.requires_grad:
            return torch.zeros_like(self._x, requires_grad=False)
        return gradient(self._y, self._x, a)

    def jvp(self, v: Tensor) -> Tensor:
        """Return J v."""
        if not self._y.requires_grad:
            return torch.zeros_like(self.value)
        if self._pulled is None:
            self._probe = torch.zeros_like(self._y, requires_grad=True)
            self._pulled = gradient(self._y, self._x, self._probe, keep=True)
        assert self._probe is not None
        return gradient(self._pulled, self._probe, v) if self._pulled.requires_grad else torch.zeros_like(self.value)


def gradient(y: Tensor, x: Tensor, weights: Tensor, *, keep: bool = False) -> Tensor:
    """Return the product of ``weights`` with the Jacobian of ``y`` by ``x``; with ``keep`` it is in the graph."""
    result: Tensor
    (result,) = torch.autograd.grad(
        y, x, weights, retain_graph=True, create_graph=keep, allow_unused=True, materialize_grads=True
    )
    return result
