"""Damped residual blocks with one learned scalar per block, the baselines of Yang et al. 2020."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Float

DampingKind = Literal["damp", "lambda-damp"]


class Damping(nn.Module):
    """Damps a residual f(x). The strength lambda >= 0 depends on a learned scalar k.

    Attributes:
        span: interval of the uniform distribution of the initial k.
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
        """The strength lambda of the damping, a scalar tensor."""
        raise NotImplementedError

    def forward(self, f: Float[Tensor, "n c h w"], x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Return the velocity at the state ``x``, from the residual ``f`` at the same state."""
        raise NotImplementedError


class Damp(Damping):
    """The damping of In-ResNet: the velocity is f - lambda x, with lambda = relu(1 - k).

    The step of block n is x_{n+1} = f_n(x_n) + (1 - lambda_n) x_n.
    """

    span = (0.75, 0.8)

    @property
    def strength(self) -> Tensor:
        """The strength lambda = relu(1 - k)."""
        return F.relu(1.0 - self.k)

    def forward(self, f: Float[Tensor, "n c h w"], x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """See `Damping.forward`."""
        return f - self.strength * x


class LambdaDamp(Damping):
    """The damping of lambda-In-ResNet: the velocity is (1 + lambda) f - lambda x, with lambda = relu(k).

    The step of block n is x_{n+1} = (1 + lambda_n) f_n(x_n) + (1 - lambda_n) x_n.
    """

    span = (0.2, 0.25)

    @property
    def strength(self) -> Tensor:
        """The strength lambda = relu(k)."""
        return F.relu(self.k)

    def forward(self, f: Float[Tensor, "n c h w"], x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """See `Damping.forward`."""
        strength = self.strength
        return (1.0 + strength) * f - strength * x


_KINDS: dict[str, type[Damping]] = {"damp": Damp, "lambda-damp": LambdaDamp}


def make_damping(kind: DampingKind | None) -> Damping | None:
    """Return the damping with the name ``kind``, or None for None. Draw its k later by `Damping.initialise`.

    Raises:
        ValueError: if the name is unknown.
    """
    if kind is None:
        return None
    if kind not in _KINDS:
        raise ValueError(
            f"damping: got {kind!r}, expected None, 'damp' (In-ResNet) or 'lambda-damp' (lambda-In-ResNet)"
        )
    return _KINDS[kind]()
