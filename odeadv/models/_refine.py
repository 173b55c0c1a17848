"""A trained network solved on finer steps than it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from odeadv.fields import AdversarialField, Operator
from odeadv.models._network import (
    FieldNetwork,
    Loss,
    adversarial_field,
    check_sizes,
    final_state,
    plain_substep,
    read_substep,
)
from odeadv.splitting import TorchDiffEq


def refine(net: FieldNetwork, k: int, *, substep: str | TorchDiffEq | Mapping[str, Any] | None = None) -> Refined:
    """``net`` re-solved with steps 1/k as long; see `Refined`."""
    return Refined(net, k, substep=substep)


class Refined(FieldNetwork):
    """The equation of ``net`` with its own weights (not copies), solved with k steps where ``net`` takes one.

    For a `PreActResNet` dt = 1/k, block n acting on [n, n + 1] throughout; k = 1 is the network, bit for bit. Jumps
    happen once. In training mode batch-norm statistics move with every evaluation, k times as often. Noise is the
    diffusion term sigma dW of the equation: each of the k Euler steps adds std / sqrt(k) N(0, 1), so that its variance
    over a unit of time is that of ``net``; at a jump it is that of the jump. Sub-steps of several stages draw it for
    each of them. Whatever the batch norm makes of the states between is what the trained block makes of them.

    Args:
        net: a `PreActResNet`, an `OdeNet`, or one refined already, whose factors multiply.
        k: steps for each of the network's.
        substep: what advances f within a step, as for `OdeNet`; that of ``net`` if not given.

    Raises:
        TypeError, ValueError: naming ``net``, ``k`` or ``substep``.
    """

    net: FieldNetwork
    k: int

    def __init__(
        self, net: FieldNetwork, k: int, *, substep: str | TorchDiffEq | Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        if not isinstance(net, FieldNetwork):
            raise TypeError(f"net: got {type(net).__name__}, expected a PreActResNet or an OdeNet")
        check_sizes(k=k)
        substep = net.substep if substep is None else read_substep(substep)
        if isinstance(net, Refined):
            k *= net.k
            net = net.net
        self.net, self.k, self.substep = net, k, substep
        self.num_classes, self.t_span, self.dt = net.num_classes, net.t_span, net.dt / k
        self.training = net.training

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n classes"]:
        """Logits of ``images``, which lie in [0, 1].

        Raises:
            odeadv.SolveError: if the state becomes NaN or infinite.
        """
        logits: Tensor = self.net.head(final_state(self.net, images, self.dt, self.substep))
        return logits

    def dynamics(self, dt: float) -> Operator:
        """The field of the network."""
        return self.net.dynamics(dt)

    def field(
        self,
        images: Float[Tensor, "n 3 h w"],
        labels: Int[Tensor, " n"],
        eta: float = 0.0,
        *,
        loss: Loss | None = None,
    ) -> AdversarialField:
        """The field of the network with the finer steps; see `PreActResNet.field`."""
        return adversarial_field(self.net, images, labels, eta, loss, self.dt)

    @property
    def config(self) -> dict[str, Any]:
        """Plain values from which `odeadv.models.build` makes an equal architecture."""
        return {"name": "refined", "net": self.net.config, "k": self.k, "substep": plain_substep(self.substep)}

    def extra_repr(self) -> str:
        """The arguments that made it."""
        return f"k={self.k}, substep={self.substep!r}"
