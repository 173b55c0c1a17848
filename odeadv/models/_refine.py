"""A trained network that is solved with finer steps than in training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from odeadv.fields import AdversarialField, Loss, Operator
from odeadv.models._network import FieldNetwork, adversarial_field, final_state, plain_substep, read_substep
from odeadv.splitting import TorchDiffEq
from odeadv.support.checks import integer

if TYPE_CHECKING:
    from jaxtyping import Float


def refine(net: FieldNetwork, k: int, *, substep: str | TorchDiffEq | Mapping[str, Any] | None = None) -> Refined:
    """Return ``net`` with k times as many steps. The arguments are described in `Refined`."""
    return Refined(net, k, substep=substep)


class Refined(FieldNetwork):
    """The equation of ``net``, solved with k steps for each step of ``net``. The weights are shared, not copied.

    A `PreActResNet` is solved with dt = 1/k, and block n acts on the times [n, n + 1]. With k = 1 the result is
    bit-identical to the network. A jump acts once. In training mode every evaluation updates the batch-norm statistics,
    so they are updated k times as often. Batch norm is then applied to states between the layers, which its statistics
    do not include.

    Noise is the diffusion term sigma dW of the equation. Each of the k Euler steps adds std / sqrt(k) N(0, 1), so the
    variance over a unit of time is the same as for ``net``. A jump adds the same noise as in ``net``. A sub-step with
    several stages draws noise for each stage.

    Args:
        net: a `PreActResNet`, an `OdeNet`, a wrapped network, or a `Refined` network. In the last case the factors
            multiply.
        k: number of steps per step of the network.
        substep: the method that advances f within a step, see `OdeNet`; by default the sub-step of ``net``.

    Raises:
        TypeError, ValueError: if ``net``, ``k`` or ``substep`` does not fit. The message names the argument.
    """

    net: FieldNetwork
    k: int

    def __init__(
        self, net: FieldNetwork, k: int, *, substep: str | TorchDiffEq | Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        if not isinstance(net, FieldNetwork):
            raise TypeError(
                f"net: got {type(net).__name__}, expected a network of odeadv.models, such as a PreActResNet"
            )
        k = integer("k", k)
        substep = net.substep if substep is None else read_substep(substep)
        if isinstance(net, Refined):
            k *= net.k
            net = net.net
        self.net, self.k, self.substep = net, k, substep
        self.t_span, self.dt = net.t_span, net.dt / k
        self.training = net.training

    @property
    def num_classes(self) -> int:  # type: ignore[override]  # that of the network, which may find it by running
        """Number of logits."""
        return self.net.num_classes

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n classes"]:
        """Return the logits of ``images`` with pixels in [0, 1].

        Raises:
            odeadv.SolveError: if the state becomes NaN or infinite.
        """
        logits: Tensor = self.net.readout(images)(final_state(self.net, images, self.dt, self.substep))
        return logits

    def dynamics(self, dt: float, inputs: Any) -> Operator:
        """Return the field of the network."""
        return self.net.dynamics(dt, inputs)

    def field(
        self,
        images: Float[Tensor, "n *input"],
        labels: Tensor,
        eta: float = 0.0,
        *,
        loss: Loss | None = None,
    ) -> AdversarialField:
        """Return the field of the network with finer steps; see `FieldNetwork.field`."""
        return adversarial_field(self.net, images, labels, eta, loss, self.dt)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of the network as plain values. `odeadv.models.build` makes the same network architecture."""
        return {"name": "refined", "net": self.net.config, "k": self.k, "substep": plain_substep(self.substep)}

    def extra_repr(self) -> str:
        """Return the arguments as text."""
        return f"k={self.k}, substep={self.substep!r}"
