"""Damped residual blocks, the baselines of Yang et al. 2020, with one learned scalar per block. They are fields too."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Float

DampingKind = Literal["damp", "lambda-damp"]


class Damping(nn.Module):
    """Damps a residual f(x), with strength lambda >= 0 from a learned scalar ``k``.

    Attributes:
        span: the interval from which k is drawn uniformly.
        k: the learned scalar.
    """

    span: ClassVar[tuple[float, float]]

    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.full((), self.span[0]))

    def initialise(self, generator: torch.Generator | None) -> None:
        """Draw k from ``generator``, or from the global random state if it is None."""
        nn.init.uniform_(self.k, *self.span, generator=generator)

    @property
    def strength(self) -> Tensor:
        """The damping lambda, a scalar."""
        raise NotImplementedError

    def forward(self, f: Float[Tensor, "n c h w"], x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Return the velocity at ``x``, given the residual ``f`` there."""
        raise NotImplementedError


class Damp(Damping):
    """In-ResNet: velocity f - lambda x, so x_{n+1} = f_n(x_n) + (1 - lambda_n) x_n, lambda = relu(1 - k)."""

    span = (0.75, 0.8)

    @property
    def strength(self) -> Tensor:
        """The damping lambda = relu(1 - k)."""
        return F.relu(1.0 - self.k)

    def forward(self, f: Float[Tensor, "n c h w"], x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """See `Damping.forward`."""
        return f - self.strength * x


class LambdaDamp(Damping):
    """lambda-In-ResNet: velocity (1 + lambda) f - lambda x, x_{n+1} = (1 + lambda_n) f_n + (1 - lambda_n) x_n.

    lambda = relu(k).
    """

    span = (0.2, 0.25)

    @property
    def strength(self) -> Tensor:
        """The damping lambda = relu(k)."""
        return F.relu(self.k)

    def forward(self, f: Float[Tensor, "n c h w"], x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """See `Damping.forward`."""
        strength = self.strength
        return (1.0 + strength) * f - strength * x


_KINDS: dict[str, type[Damping]] = {"damp": Damp, "lambda-damp": LambdaDamp}


def make_damping(kind: DampingKind | None) -> Damping | None:
    """Return the damping called ``kind``, with its k not drawn yet; None for None.

    Raises:
        ValueError: for an unknown name.
    """
    if kind is None:
        return None
    if kind not in _KINDS:
        raise ValueError(
            f"damping: got {kind!r}, expected None, 'damp' (In-ResNet) or 'lambda-damp' (lambda-In-ResNet)"
        )
    return _KINDS[kind]()
