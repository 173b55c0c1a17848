"""What a trainer, an attack or an evaluation may rely on: a network that is a field with its problem."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from odeadv.fields import AdversarialField, Operator, Problem, VectorField
from odeadv.models._layers import Stem
from odeadv.solver import solve
from odeadv.splitting import Exact, TorchDiffEq, get_substep

Loss = Callable[[Tensor], Tensor]


@runtime_checkable
class Network(Protocol):
    """Images in [0, 1] to logits, and the same as a field: all that training, attacks and evaluation ask for.

    Any `torch.nn.Module` with `num_classes`, `solve_options` and `field` fits; the rest is a module's own and stands
    here for type checkers.
    ``net(images)`` equals ``odeadv.solve(net.field(images, labels), **net.solve_options).output``.
    """

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        ...

    @property
    def solve_options(self) -> Mapping[str, Any]:
        """Keywords that `odeadv.solve` is to be given with `field`; a trainer passes them on."""
        ...

    def forward(self, images: Tensor) -> Tensor:
        """Logits of ``images``."""
        ...

    def field(self, images: Tensor, labels: Tensor, eta: float = 0.0, *, loss: Loss | None = None) -> AdversarialField:
        """The network as the field of Eq. 7, carrying its problem."""
        ...

    def __call__(self, images: Tensor) -> Any:
        """Logits of ``images``."""
        ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """See `torch.nn.Module`."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """See `torch.nn.Module`."""
        ...

    def train(self, mode: bool = True) -> Any:
        """See `torch.nn.Module`."""
        ...

    def eval(self) -> Any:
        """See `torch.nn.Module`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """See `torch.nn.Module`."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any:
        """See `torch.nn.Module`."""
        ...


class FieldNetwork(nn.Module):
    """Logits head(x(T)) of dx/dt = f(t, x) from x(0) = stem(images), solved in steps of ``dt``: what the models share.

    A subclass says what f is, in `dynamics`, and sets the attributes below.
    """

    stem: Stem
    head: nn.Module
    num_classes: int
    t_span: tuple[float, float]
    dt: float
    substep: str | TorchDiffEq = "euler"

    @property
    def solve_options(self) -> dict[str, Any]:
        """Keywords for `odeadv.solve` beside the field; a trainer passes them on."""
        return options_for(self.substep)

    def dynamics(self, dt: float) -> Operator:
        """The field f as an operator that is to be solved in steps of ``dt`` (which only noise depends on)."""
        raise NotImplementedError

    def field(
        self,
        images: Float[Tensor, "n 3 h w"],
        labels: Int[Tensor, " n"],
        eta: float = 0.0,
        *,
        loss: Loss | None = None,
    ) -> AdversarialField:
        """The network as the field of Eq. 7, carrying its problem: x0 = stem(images), its time span and steps.

        The loss is the cross-entropy of the head's logits, averaged over the batch. eta scales the gradient of that
        mean, so eta / batch_size is what is invariant: the paper's eta = 50 (CIFAR-10) and 1000 (CIFAR-100) belong
        to batches of 128. ``odeadv.solve(net.field(images, labels, eta), scheme="lie")`` is Eq. 5.

        Args:
            images: in [0, 1].
            labels: class numbers.
            eta: strength of the costate.
            loss: ``loss(logits)``, a scalar tensor, instead of the mean cross-entropy with ``labels``. eta scales its
                gradient as it is.

        Raises:
            TypeError: if images are not floating-point, labels not int64, or ``loss`` not callable.
            ValueError: if the images' channels or the labels do not fit.
        """
        return adversarial_field(self, images, labels, eta, loss, self.dt)


def adversarial_field(
    net: FieldNetwork, images: Tensor, labels: Tensor, eta: float, loss: Loss | None, dt: float
) -> AdversarialField:
    """`FieldNetwork.field` of ``net`` with steps of ``dt``."""
    check_images(images, net.stem.conv.in_channels)
    _check_labels(labels, images, net.num_classes)
    return AdversarialField(
        net.dynamics(dt),
        (lambda logits: F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels))
        if loss is None
        else loss,
        eta,
        readout=net.head,
        x0=lambda: net.stem(images),
        t_span=net.t_span,
        dt=dt,
    )


def final_state(net: FieldNetwork, images: Tensor, dt: float, substep: str | TorchDiffEq) -> Tensor:
    """x(T) of the plain field of ``net``, in steps of ``dt``."""
    check_images(images, net.stem.conv.in_channels)
    field = VectorField({"f": net.dynamics(dt)}, Problem(net.stem(images), net.t_span, dt))
    return solve(field, substep=substep).xs[-1]


def options_for(substep: str | TorchDiffEq) -> dict[str, Any]:
    """Keywords for `odeadv.solve` on an adversarial field whose f is advanced by ``substep``.

    The costate is integrated by the same rule; torchdiffeq's methods leave it to Simpson's, which is exact for linear
    and Hermite costates. Euler is the default of `odeadv.solve` and is not named.
    """
    if substep == "euler":
        return {}
    if isinstance(get_substep(substep), TorchDiffEq):
        return {"substep": {"f": substep, "costate": "rk4"}}
    return {"substep": substep}


def read_substep(substep: str | TorchDiffEq | Mapping[str, Any]) -> str | TorchDiffEq:
    """The sub-step of a model: a name, a `TorchDiffEq`, or the arguments of one.

    Raises:
        TypeError, ValueError: naming ``substep``.
    """
    if isinstance(substep, Mapping):
        try:
            return TorchDiffEq(**substep)
        except TypeError:
            raise TypeError(f"substep: got {dict(substep)!r}, expected the arguments of odeadv.TorchDiffEq") from None
    if not isinstance(substep, str | TorchDiffEq):
        raise TypeError(f"substep: got {type(substep).__name__}, expected a name or odeadv.TorchDiffEq(...)")
    if isinstance(get_substep(substep), Exact):
        raise ValueError("substep: 'exact' needs a field with a known flow, which a network is not; take 'rk4'")
    return substep


def plain_substep(substep: str | TorchDiffEq) -> str | dict[str, Any]:
    """``substep`` as plain values that `read_substep` understands."""
    if isinstance(substep, str):
        return substep
    values = {field.name: getattr(substep, field.name) for field in dataclasses.fields(substep)}
    return values | {"options": dict(substep.options)}


def check_images(images: Tensor, channels: int) -> None:
    """Refuse what are not images of ``channels`` channels, by name."""
    if images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(f"images: got shape {tuple(images.shape)}, expected (n, {channels}, height, width)")
    if not images.is_floating_point():
        raise TypeError(f"images: got {images.dtype}, expected floating-point images in [0, 1]; divide by 255")


def _check_labels(labels: Tensor, images: Tensor, num_classes: int) -> None:
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels: got {got}, expected a tensor of int64 class numbers")
    if not len(images):
        raise ValueError("images: got none, expected at least one")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels: got shape {tuple(labels.shape)}, expected ({len(images)},), one an image")
    if labels.device.type == "cpu" and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"labels: got classes {int(labels.min())} to {int(labels.max())}, expected 0 to {num_classes - 1}"
        )


def check_sizes(**sizes: Any) -> None:
    """Refuse sizes that are no integers, or below 1, by name."""
    names = ", ".join(sizes)
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in sizes.values()):
        raise TypeError(f"{names}: got {', '.join(map(repr, sizes.values()))}, expected integers")
    if any(value < 1 for value in sizes.values()):
        raise ValueError(f"{names}: got {' and '.join(map(str, sizes.values()))}, expected at least 1 each")


def check_statistics(mean: Sequence[float], std: Sequence[float]) -> None:
    """Refuse normalisation constants of different numbers of channels."""
    if len(mean) != len(std):
        raise ValueError(f"mean, std: got {len(mean)} and {len(std)} values, expected one an image channel each")
