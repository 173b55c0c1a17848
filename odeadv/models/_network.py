"""The interface of networks that are fields, on which training, attacks and evaluation rely."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odeadv.fields import AdversarialField, Loss, Operator, Problem, VectorField
from odeadv.models._layers import Stem
from odeadv.solver import solve
from odeadv.splitting import Exact, TorchDiffEq, get_substep
from odeadv.support.deferred import holds, is_deferring

if TYPE_CHECKING:
    from jaxtyping import Float

#: A function ``loss(output, targets)`` that returns a scalar tensor. The default is the mean cross-entropy.
TargetLoss = Callable[[Any, Any], Tensor]


@runtime_checkable
class Network(Protocol):
    """The interface of a network for training, attacks and evaluation.

    Any `torch.nn.Module` with `num_classes`, `solve_options` and `field` fits. Every module has the other methods,
    which are listed for type checkers only. The outputs ``net(inputs)`` equal ``odeadv.solve(net.field(inputs,
    targets), **net.solve_options).output``.
    """

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        ...

    @property
    def solve_options(self) -> Mapping[str, Any]:
        """Arguments for `odeadv.solve` that belong to `field`. A trainer passes them on."""
        ...

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of ``images``."""
        ...

    def field(self, images: Tensor, labels: Tensor, eta: float = 0.0, *, loss: Loss | None = None) -> AdversarialField:
        """Return the network as the field of Eq. 7. The field contains its problem.

        Args:
            images: the inputs of the network, (n, channels, height, width) in [0, 1] for images.
            labels: class numbers (n,), int64; a network may accept other targets.
            eta: factor of the costate, for the gradient of the loss of this batch. 0 gives the plain network.
            loss: ``loss(output)`` returns a scalar tensor; None means the loss of the network, the mean cross-entropy
                with ``labels``.
        """
        ...

    def __call__(self, images: Tensor) -> Any:
        """Return the logits of ``images``."""
        ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yield the trainable tensors, as `torch.nn.Module` does; without those of submodules if not ``recurse``."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """Yield the network and all its submodules, as `torch.nn.Module` does."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Switch to training mode, or to evaluation mode if not ``mode``, and return the network."""
        ...

    def eval(self) -> Any:
        """Switch to evaluation mode, and return the network."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return weights and buffers by name."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any:
        """Copy weights and buffers from ``state_dict``."""
        ...


class FieldNetwork(nn.Module):
    """The network head(x(T)) with dx/dt = f(t, x) and x(0) = stem(inputs), solved in steps of ``dt`` up to the time T.

    All models are subclasses. A subclass defines f in `dynamics`, and sets the attributes ``stem``, ``head``,
    ``num_classes``, ``t_span`` and ``dt``.
    """

    stem: nn.Module
    head: nn.Module
    num_classes: int
    t_span: tuple[float, float]
    dt: float
    substep: str | TorchDiffEq = "euler"

    @property
    def solve_options(self) -> dict[str, Any]:
        """Arguments for `odeadv.solve` that belong to `field`. A trainer passes them on."""
        return options_for(self.substep)

    def dynamics(self, dt: float, inputs: Any) -> Operator:
        """Return f as an operator that will be solved in steps of ``dt``.

        Args:
            dt: step size. It matters for noise within the blocks only.
            inputs: inputs of the network. They matter for a `BlockNetwork` only: they decide which of its blocks jump.
        """
        raise NotImplementedError

    def readout(self, inputs: Any) -> Callable[[Tensor], Tensor]:
        """Return the map from the last state to the output, which is the head, for these ``inputs``."""
        return self.head

    def check_inputs(self, inputs: Any) -> None:
        """Raise an error if the stem cannot take ``inputs``. This default accepts all inputs."""

    def default_loss(self, targets: Any, inputs: Any) -> Loss:
        """Check ``targets``, and return the mean cross-entropy with them as a function of the logits.

        Args:
            targets: class numbers (n,), int64, or probabilities (n, classes).
            inputs: the batch of n inputs of the network.

        Raises:
            TypeError, ValueError: if the targets do not fit. The message names ``labels``.
        """
        check_targets(targets, inputs, self.num_classes)
        return lambda logits: mean_cross_entropy(logits, targets)

    def field(
        self,
        images: Float[Tensor, "n *input"],
        labels: Tensor,
        eta: float = 0.0,
        *,
        loss: Loss | None = None,
    ) -> AdversarialField:
        """Return the network as the field of Eq. 7 with its problem: x0 = stem(images), time span and steps.

        The loss is the cross-entropy of the logits, averaged over the batch. eta multiplies the gradient of this mean.
        For another batch size, keep eta / batch_size constant: the paper's eta = 50 (CIFAR-10) and 1000 (CIFAR-100)
        belong to batches of 128. ``odeadv.solve(net.field(images, labels, eta), scheme="lie")`` is Eq. 5.

        Args:
            images: the inputs of the network, with n samples. Pixels are in [0, 1].
            labels: class numbers (n,), int64, or probabilities (n, classes) for soft labels and mixup.
            eta: strength of the costate.
            loss: ``loss(logits)`` returns a scalar tensor. It replaces the mean cross-entropy, and ``labels`` is then
                ignored. eta multiplies the gradient of this loss without normalisation.

        Raises:
            TypeError: if images are not floating-point, labels have another dtype, or ``loss`` is not callable.
            ValueError: if the number of channels or the labels do not fit.
        """
        return adversarial_field(self, images, labels, eta, loss, self.dt)


class ImageNetwork(FieldNetwork):
    """A `FieldNetwork` for images in [0, 1]. Its `Stem` normalises the images."""

    stem: Stem

    def check_inputs(self, inputs: Any) -> None:
        """Raise an error unless ``inputs`` is a batch of images. The message names ``images``."""
        self.stem.check(inputs)


def adversarial_field(
    net: FieldNetwork, inputs: Any, targets: Any, eta: float, loss: Loss | None, dt: float
) -> AdversarialField:
    """Return the field of ``net`` with steps of ``dt``, see `FieldNetwork.field`."""
    net.check_inputs(inputs)
    return AdversarialField(
        net.dynamics(dt, inputs),
        net.default_loss(targets, inputs) if loss is None else loss,
        eta,
        readout=net.readout(inputs),
        x0=lambda: net.stem(inputs),
        t_span=net.t_span,
        dt=dt,
    )


def final_state(net: FieldNetwork, inputs: Any, dt: float, substep: str | TorchDiffEq) -> Tensor:
    """Return the final state x(T) of the plain field of ``net``, solved in steps of ``dt``."""
    net.check_inputs(inputs)
    field = VectorField({"f": net.dynamics(dt, inputs)}, Problem(net.stem(inputs), net.t_span, dt))
    final: Tensor = solve(field, substep=substep).xs[-1]
    return final


def mean_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy, in float32 at least, because the mean would lose most digits in 16 bits."""
    if targets.is_inference():  # autograd cannot save labels from inference mode for the backward pass of a recording
        targets = targets.clone()
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)


def options_for(substep: str | TorchDiffEq) -> dict[str, Any]:
    """Return the arguments for `odeadv.solve` on an `AdversarialField` if ``substep`` advances f.

    The costate is integrated by the same rule. If ``substep`` is a method of torchdiffeq, the costate is integrated by
    Simpson's rule, which is exact for linear and Hermite costates. Euler is the default of `odeadv.solve`, and is left
    out.
    """
    if substep == "euler":
        return {}
    if isinstance(get_substep(substep), TorchDiffEq):
        return {"substep": {"f": substep, "costate": "rk4"}}
    return {"substep": substep}


def read_substep(substep: str | TorchDiffEq | Mapping[str, Any]) -> str | TorchDiffEq:
    """Return the sub-step of a model. It is given as a name, a `TorchDiffEq`, or the arguments of a `TorchDiffEq`.

    Raises:
        TypeError, ValueError: if ``substep`` is not a sub-step that can advance a network.
    """
    if isinstance(substep, Mapping):
        try:
            return TorchDiffEq(**substep)
        except TypeError:
            raise TypeError(f"substep: got {dict(substep)!r}, expected the arguments of odeadv.TorchDiffEq") from None
    if not isinstance(substep, str | TorchDiffEq):
        raise TypeError(f"substep: got {type(substep).__name__}, expected a name or odeadv.TorchDiffEq(...)")
    if isinstance(get_substep(substep), Exact):
        raise ValueError(
            "substep: got 'exact', expected another sub-step such as 'rk4': the exact flow of a network is not known"
        )
    return substep


def plain_substep(substep: str | TorchDiffEq) -> str | dict[str, Any]:
    """Return ``substep`` as plain values that `read_substep` accepts."""
    if isinstance(substep, str):
        return substep
    values = {field.name: getattr(substep, field.name) for field in dataclasses.fields(substep)}
    return values | {"options": dict(substep.options)}


def batch_size(inputs: Any) -> int:
    """Return the length of the first tensor within ``inputs``."""
    while not isinstance(inputs, Tensor):
        inputs = next(iter(inputs.values() if isinstance(inputs, Mapping) else inputs))
    return len(inputs)


def check_targets(labels: Any, inputs: Any, num_classes: int | None) -> None:
    """Raise an error unless ``labels`` are class numbers, or probabilities of the classes, one per input.

    Args:
        labels: the labels that the caller gave.
        inputs: the batch, a tensor or a structure of tensors.
        num_classes: number of logits; None if it is not known.

    Raises:
        TypeError, ValueError: if the labels do not fit, or the batch is empty. The message names ``labels`` or
            ``images``.
    """
    count = batch_size(inputs)
    if not count:
        raise ValueError("images: got none, expected at least one")
    if isinstance(labels, Tensor) and labels.is_floating_point() and labels.ndim == 2:
        if labels.shape != (count, labels.shape[1] if num_classes is None else num_classes):
            width = "classes" if num_classes is None else num_classes
            raise ValueError(f"labels: got probabilities of shape {tuple(labels.shape)}, expected ({count}, {width})")
        return
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(
            f"labels: got {got}, expected int64 class numbers (n,) or probabilities (n, classes); for other targets "
            "give a loss"
        )
    if labels.shape != (count,):
        remedy = "; labels.argmax(1) makes them of one-hot rows" if labels.ndim == 2 else ""
        raise ValueError(
            f"labels: got shape {tuple(labels.shape)}, expected ({count},), one class number per input{remedy}"
        )
    # On a GPU the comparison would wait for the device in every step. It is done there only if it can be read later.
    if num_classes is not None and (labels.device.type == "cpu" or is_deferring()):
        low, high = labels.min(), labels.max()
        if not holds((low >= 0) & (high < num_classes)):
            raise ValueError(f"labels: got classes {int(low)} to {int(high)}, expected 0 to {num_classes - 1}")
