"""Products with the Jacobian J of a map at a point: J v and J^T a. The matrix J is never formed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Linearised:
    """The value g(x) and products with the Jacobian J of ``g`` at ``x``, all from one evaluation of ``g``.

    J^T w is linear in w, and J v is the derivative of J^T w with respect to w, in the direction v. J v therefore takes
    two backward passes. They work for every ``g`` that can be differentiated twice. An example is batch norm in
    training mode, which forward-mode differentiation rejects. For a complex state J^T is the adjoint of J in the real
    inner product.

    Args:
        g: the map. Autograd must be on when the object is made.
        x: the point at which ``g`` is evaluated.
    """

    def __init__(self, g: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self._x = x.detach().clone().requires_grad_()
        self._y = g(self._x)
        self._probe: Tensor | None = None
        self._pulled: Tensor | None = None

    @property
    def value(self) -> Tensor:
        """The value g(x), detached."""
        return self._y.detach()

    def vjp(self, a: Tensor) -> Tensor:
        """Return the product J^T a."""
        if not self._y.requires_grad:
            return torch.zeros_like(self._x, requires_grad=False)
        return gradient(self._y, self._x, a)

    def jvp(self, v: Tensor) -> Tensor:
        """Return the product J v."""
        if not self._y.requires_grad:
            return torch.zeros_like(self.value)
        if self._pulled is None:
            self._probe = torch.zeros_like(self._y, requires_grad=True)
            self._pulled = gradient(self._y, self._x, self._probe, keep=True)
        assert self._probe is not None
        return gradient(self._pulled, self._probe, v) if self._pulled.requires_grad else torch.zeros_like(self.value)


def gradient(y: Tensor, x: Tensor, weights: Tensor, *, keep: bool = False) -> Tensor:
    """Return J^T ``weights`` for the Jacobian J of ``y`` with respect to ``x``; ``keep`` keeps it in the graph."""
    result: Tensor
    (result,) = torch.autograd.grad(
        y, x, weights, retain_graph=True, create_graph=keep, allow_unused=True, materialize_grads=True
    )
    return result
