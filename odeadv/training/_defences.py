"""Layer-wise adversarial defence: LAD, LAD-SM and their relatives, and what they are compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from odeadv.models import Network
from odeadv.solver import solve
from odeadv.splitting import schemes
from odeadv.support.plain import with_floats
from odeadv.training._step import Defence, Draws, Passed

Perturbation = Literal["costate", "random", "shuffled", "input"]


@dataclass(frozen=True)
class Layerwise(Defence, name="layerwise"):
    """dx/dt = f + eta * dL/dx (Eq. 7), solved by a splitting scheme and trained on: L_LAD.

    Attributes:
        scheme: ``"lie"`` is LAD (Eq. 5), ``"strang"`` LAD-SM (Eq. 8), ``"strang-midpoint"`` takes a(t + dt/2) from
            the costate equation.
        eta: strength, for a loss averaged over the *global* batch (all processes and micro-batches of a step);
            eta / batch_size is what is invariant.
        sweeps: recordings, each on the trajectory of the last (see `odeadv.solve`); or "converge".
        ascent: recordings that are added up, Eq. 3, instead of ``sweeps``.
        perturbation: what drives the state: the ``"costate"``; or, for ablations, ``"random"`` directions with the
            costate's norm at every node and for every example (one direction for all nodes of a shape, as costates
            of one segment are nearly parallel), costates ``"shuffled"`` across the micro-batch, or the
            costate at the ``"input"`` alone: x_0 + eta a_0, then the plain network (by the adjoint of Lie, which
            takes G first; LAD itself never perturbs x_0).

    Raises:
        ValueError: naming the attribute that is out of range.
    """

    scheme: str = "lie"
    eta: float = 50.0
    sweeps: int | Literal["converge"] = 1
    ascent: int | None = None
    perturbation: Perturbation = "costate"

    def __post_init__(self) -> None:
        with_floats(self)
        object.__setattr__(self, "scheme", schemes.get(self.scheme).name)  # an alias is the same run
        if not math.isfinite(self.eta) or self.eta < 0:
            raise ValueError(f"eta: got {self.eta}, expected a finite number, at least 0")
        if self.sweeps != "converge" and not _is_count(self.sweeps):
            raise ValueError(f"sweeps: got {self.sweeps!r}, expected an integer of at least 1, or 'converge'")
        if self.ascent is not None and (not _is_count(self.ascent) or self.sweeps != 1):
            raise ValueError(
                f"ascent: got {self.ascent!r} with sweeps={self.sweeps!r}, expected an integer of at least 1, without "
                "sweeps"
            )
        if self.perturbation not in ("costate", "random", "shuffled", "input"):
            raise ValueError(
                f"perturbation: got {self.perturbation!r}, expected 'costate', 'random', 'shuffled' or 'input'"
            )

        if self.perturbation == "input" and self.scheme != "lie":
            raise ValueError(f"scheme: got {self.scheme!r} with perturbation='input', expected 'lie'")
        if self.perturbation != "costate" and self.scheme == "strang-midpoint":
            raise ValueError(
                f"scheme: got 'strang-midpoint' with perturbation={self.perturbation!r}; Eq. 9 holds for costates only"
            )
        if self.perturbation in ("random", "shuffled") and self.sweeps == "converge":
            raise ValueError(
                f"sweeps: got 'converge' with perturbation={self.perturbation!r}, which has no fixed point"
            )

    def __call__(self, net: Network, images: Tensor, labels: Tensor, *, share: float, draws: Draws) -> Passed:
        """Loss and logits of the perturbed pass."""
        scheme = schemes.get(self.scheme)
        field = net.field(images, labels, self.eta * share)
        if self.perturbation != "costate":
            field = field.transformed(lambda nodes: _instead(self.perturbation, nodes, draws))
        recordings = {"ascent": self.ascent} if self.ascent is not None else {"sweeps": self.sweeps}
        solution = solve(
            field,
            scheme=scheme.adjoint() if self.perturbation == "input" else scheme,
            **recordings,
            **net.solve_options,
        )
        assert solution.loss is not None
        assert solution.output is not None
        return Passed(solution.loss, solution.output)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _instead(perturbation: Perturbation, nodes: Sequence[Tensor], draws: Draws) -> list[Tensor]:
    """What takes the place of the costates a_0, ..., a_N, each of the shape of its state."""
    if perturbation == "input":
        return [nodes[0], *(torch.zeros_like(node) for node in nodes[1:])]
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
    """The network as it is: Eq. 6, solved without a costate."""

    active = False

    def __call__(self, net: Network, images: Tensor, labels: Tensor, *, share: float, draws: Draws) -> Passed:
        """Loss and logits of the plain pass."""
        solution = solve(net.field(images, labels), **net.solve_options)
        assert solution.loss is not None
        assert solution.output is not None
        return Passed(solution.loss, solution.output)
