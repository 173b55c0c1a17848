"""Layer-wise adversarial defence: LAD, LAD-SM and their relatives, and the controls that they are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from odeadv.fields import AdversarialField
from odeadv.models import Network, TargetLoss
from odeadv.solver import solve
from odeadv.splitting import schemes
from odeadv.support.checks import check_loss, choice, integer, number
from odeadv.support.plain import with_floats
from odeadv.training._step import Defence, Draws, Passed
from odeadv.training._strength import Strength, first_order, watch_loss

#: What perturbs the states; see the attribute ``perturbation`` of `Layerwise`.
PerturbationKind = Literal["costate", "random", "shuffled", "input"]


@dataclass(frozen=True)
class Layerwise(Defence, name="layerwise"):
    """Layer-wise adversarial defence: train the loss L_LAD of a pass that solves dx/dt = f + eta * dL/dx (Eq. 7).

    f is the residual block, L the loss, and a(t) = dL/dx(t) the costate with values a_n at the nodes x_n.

    Attributes:
        scheme: ``"lie"`` is LAD (Eq. 5), ``"strang"`` is LAD-SM (Eq. 8), and ``"strang-midpoint"`` takes a(t + dt/2)
            from the costate equation.
        eta: factor of the costate, for a loss averaged over the *global* batch (all processes and micro-batches of a
            step). For another batch size keep eta / batch_size.
        sweeps: number of recordings, each on the trajectory that the last recording drives (see `odeadv.solve`); or
            "converge".
        ascent: number of recordings that are added up (Eq. 3), instead of ``sweeps``.
        perturbation: the tensors that drive the state. ``"costate"`` is the method; the others are ablations.
            ``"random"`` uses random directions with the norm of the costate at every node and for every example. All
            nodes of one shape share a direction, because the costates of a segment are nearly parallel.
            ``"shuffled"`` uses the costates of other examples of the micro-batch. ``"input"`` uses only the costate
            at x_0: the plain network runs from x_0 + eta a_0. (This is the adjoint of Lie, whose costate acts before
            f; LAD itself never perturbs x_0.)
        strength: choose eta so that the first-order rise of the loss, eta sum |a_n|^2 / L, is this number on the
            first batches of a training. ``eta`` is then ignored; the results of the epochs contain the chosen eta.
        warmup: number of epochs in which eta rises linearly, step by step, from 0 to its value. Like ``strength`` it is
            for `odeadv.training.train`; in a loop of your own, ``defence.with_eta(eta)`` sets the eta of a step.

    Raises:
        TypeError, ValueError: if an attribute is out of range; the message names it.

    Example:
        >>> net = odeadv.models.residual_mlp(4, 16, image_size=8)
        >>> passed = odeadv.training.Layerwise("strang", eta=5.0)(net, torch.rand(2, 3, 8, 8), torch.tensor([3, 7]))
        >>> passed.loss.backward()
        >>> passed.logits.shape
        torch.Size([2, 10])
    """

    scheme: str = "lie"
    eta: float = 50.0
    sweeps: int | Literal["converge"] = 1
    ascent: int | None = None
    perturbation: PerturbationKind = "costate"
    strength: float | None = None
    warmup: int = 0

    def __post_init__(self) -> None:
        with_floats(self)
        object.__setattr__(self, "scheme", schemes.get(self.scheme).name)  # an alias must give the same run
        _check_strength(self)
        if self.sweeps != "converge":
            integer("sweeps", self.sweeps)
        if self.ascent is not None:
            integer("ascent", self.ascent)
            if self.sweeps != 1:
                raise ValueError(f"ascent: got {self.ascent} with sweeps={self.sweeps!r}, expected one of the two")
        choice("perturbation", self.perturbation, get_args(PerturbationKind))
        if self.perturbation == "input" and self.scheme != "lie":
            raise ValueError(f"scheme: got {self.scheme!r} with perturbation='input', expected 'lie'")
        if self.perturbation != "costate" and self.scheme == "strang-midpoint":
            raise ValueError(
                f"scheme: got 'strang-midpoint' with perturbation={self.perturbation!r}; Eq. 9 holds for costates only"
            )
        if self.perturbation in ("random", "shuffled") and self.sweeps == "converge":
            raise ValueError(
                f"sweeps: got 'converge' with perturbation={self.perturbation!r}, which lacks a fixed point"
            )

    def __call__(
        self,
        net: Network,
        images: Tensor,
        labels: Tensor,
        *,
        loss: TargetLoss | None = None,
        share: float = 1.0,
        draws: Draws | None = None,
    ) -> Passed:
        """Return loss, logits and strength of the perturbed pass.

        In your own training loop, a step is
        ``passed = Layerwise("strang", eta=50.0)(net, images, labels); passed.loss.backward()``. The batch-norm
        statistics of ``net`` are updated once, as in a plain pass. The mode of ``net`` does not change.

        Args:
            net: any network with `field`: one of `odeadv.models`, or a network from `odeadv.models.from_blocks` or
                `odeadv.models.from_module`.
            images: a batch of inputs.
            labels: class numbers, probabilities, or the targets of ``loss``.
            loss: a function ``loss(output, labels)`` that returns a scalar tensor, averaged over the batch. The default
                is the network's loss (mean cross-entropy, unless the network has another).
            share: size of this batch divided by the size of the global batch; eta belongs to the mean loss over the
                global batch.
            draws: random numbers of the step; by default they come from torch's global random state. Only ``"random"``
                and ``"shuffled"`` use them, with eta above 0.

        Raises:
            ValueError: if ``strength`` or ``warmup`` is set: `train` uses both; in your own loop set eta by `with_eta`.
        """
        _check_chosen(self)
        scheme = schemes.get(self.scheme)
        if self.perturbation == "input":
            scheme = scheme.adjoint()
        eta = self.eta * share
        field = _field(net, images, labels, eta, loss)
        losses = watch_loss(field)
        if self.perturbation != "costate" and eta != 0.0:
            # Draw a seed only if it is used: torch's global random state also gives the masks of dropout.
            fresh = draws is None and self.perturbation != "input"
            drawn = Draws.fresh(len(images)) if fresh else draws
            field = field.transformed(lambda nodes: _instead(self.perturbation, nodes, drawn))
        recordings = {"ascent": self.ascent} if self.ascent is not None else {"sweeps": self.sweeps}
        solution = solve(field, scheme=scheme, **recordings, **net.solve_options)
        assert solution.loss is not None
        assert solution.output is not None
        if eta == 0.0:
            return Passed(solution.loss, solution.output, images, Strength.none(solution.loss))
        costate = solution.costate
        nodes = first_order(costate.nodes, costate.grid, scheme, eta, self.ascent or 1)
        return Passed(solution.loss, solution.output, images, Strength(losses[0], solution.loss.detach(), nodes))


def _field(net: Network, images: Tensor, labels: Tensor, eta: float, loss: TargetLoss | None) -> AdversarialField:
    """Return the field of ``net``, with ``loss`` instead of the network's loss if ``loss`` is given."""
    if not hasattr(net, "field"):
        raise TypeError(without_field(net))
    if loss is None:
        return net.field(images, labels, eta)
    check_loss(loss)
    return net.field(images, labels, eta, loss=lambda output: loss(output, labels))


def without_field(net: object) -> str:
    """Return the message for a network without a field. Wrappers such as DataParallel hide that of their module."""
    inner = getattr(net, "module", None)
    remedy = "make one of it with odeadv.models.from_module(net, layers=[...])"
    if callable(getattr(inner, "field", None)):
        remedy = "give the network inside of it, net.module"
        if isinstance(net, nn.parallel.DistributedDataParallel):
            remedy += ", and average the gradients of the processes yourself, or use odeadv.training.train"
    return f"net: got {type(net).__name__}, expected a network with a field; {remedy}"


def _check_strength(defence: Layerwise | Penalty) -> None:
    number("eta", defence.eta, least=0)
    integer("warmup", defence.warmup, least=0)
    if defence.strength is not None:
        object.__setattr__(defence, "strength", number("strength", defence.strength, above=0))


def _check_chosen(defence: Layerwise | Penalty) -> None:
    if defence.strength is not None:
        raise ValueError(
            f"strength: got {defence.strength:g} in a single pass, expected None; odeadv.training.train chooses eta "
            "from the first batches, and with_eta(eta) sets one"
        )
    if defence.warmup:
        raise ValueError(
            f"warmup: got {defence.warmup} in a single pass, expected 0; odeadv.training.train counts the epochs, and "
            "with_eta(eta) sets the eta of one step"
        )


def _instead(perturbation: PerturbationKind, nodes: Sequence[Tensor], draws: Draws | None) -> list[Tensor]:
    """Return tensors that replace the costates a_0, ..., a_N as the drive, each shaped like its state."""
    if perturbation == "input":
        return [nodes[0], *(torch.zeros_like(node) for node in nodes[1:])]
    assert draws is not None
    if perturbation == "shuffled":
        order = draws.permutation(len(nodes[0]), nodes[0].device)
        return [node[order] for node in nodes]
    directions: dict[torch.Size, Tensor] = {}
    for node in nodes:
        if node.shape not in directions:
            directions[node.shape] = draws.normal(node)
    return [_of_equal_norm(node, directions[node.shape]) for node in nodes]


def _of_equal_norm(node: Tensor, direction: Tensor) -> Tensor:
    axes = tuple(range(1, node.ndim))
    norm = torch.linalg.vector_norm(node, dim=axes, keepdim=True)
    scale: Tensor = norm / torch.linalg.vector_norm(direction, dim=axes, keepdim=True)
    return direction * scale


@dataclass(frozen=True)
class Undefended(Defence, name="none"):
    """No defence: the plain network, Eq. 6, solved without a costate."""

    active = False

    def __call__(
        self,
        net: Network,
        images: Tensor,
        labels: Tensor,
        *,
        loss: TargetLoss | None = None,
        share: float = 1.0,
        draws: Draws | None = None,
    ) -> Passed:
        """Return loss and logits of the plain pass."""
        solution = solve(_field(net, images, labels, 0.0, loss), **net.solve_options)
        assert solution.loss is not None
        assert solution.output is not None
        return Passed(solution.loss, solution.output, images, Strength.none(solution.loss))


@dataclass(frozen=True)
class Penalty(Defence, name="penalty"):
    """The loss L + (eta/2) sum_{n >= 1} |a_n|^2, differentiated through the costates a_n (double backward).

    L is the loss of the plain pass and a_n = dL/dx_n. The penalty writes the first-order effect of LAD explicitly. It
    needs second derivatives, and serves as a control.

    Attributes:
        eta: as for `Layerwise`. Equal eta gives equal strength eta sum |a_n|^2 / L.
        strength, warmup: as for `Layerwise`.

    Raises:
        ValueError: if an attribute is out of range; the message names it.
    """

    eta: float = 50.0
    strength: float | None = None
    warmup: int = 0

    def __post_init__(self) -> None:
        with_floats(self)
        _check_strength(self)

    def __call__(
        self,
        net: Network,
        images: Tensor,
        labels: Tensor,
        *,
        loss: TargetLoss | None = None,
        share: float = 1.0,
        draws: Draws | None = None,
    ) -> Passed:
        """Return the penalised loss, the logits of the plain pass and the strength.

        Raises:
            ValueError: if ``strength`` or ``warmup`` is set; see `Layerwise`.
        """
        _check_chosen(self)
        # The plain pass updates batch statistics. The costate is recorded on first use; this recording keeps its graph
        # and does not update statistics.
        solution = solve(_field(net, images, labels, 0.0, loss), differentiate_costate=True, **net.solve_options)
        assert solution.loss is not None
        assert solution.output is not None
        eta = self.eta * share
        if eta == 0.0:
            return Passed(solution.loss, solution.output, images, Strength.none(solution.loss))
        squares = torch.stack([node.square().sum() for node in solution.costate.nodes[1:]])
        plain, rises = solution.loss.detach(), eta * squares.detach()
        strength = Strength(plain, plain + rises.sum(), torch.cat([rises.new_zeros(1), rises]))
        return Passed(solution.loss + 0.5 * eta * squares.sum(), solution.output, images, strength)
