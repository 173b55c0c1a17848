"""The strength s of a defence: the relative rise of the loss by the perturbation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from odeadv.fields import AdversarialField
from odeadv.splitting import Grid, Scheme


@dataclass(frozen=True)
class Strength:
    """The strength of one pass; all tensors are detached and stay on their device.

    Attributes:
        plain: L, the loss of the undefended network, scalar.
        defended: L_LAD, the loss of the perturbed pass, scalar.
        nodes: the first-order rise of the loss per node, shape (N + 1,), x_0 first. Their sum is eta sum |a_n|^2, with
            the costates a_n. It is empty if no costate was recorded.
    """

    plain: Tensor
    defended: Tensor
    nodes: Tensor

    @classmethod
    def none(cls, loss: Tensor) -> Strength:
        """Return the strength of a pass without a perturbation, whose loss is ``loss``."""
        return cls(loss.detach(), loss.detach(), loss.new_zeros(0))

    def flat(self) -> Tensor:
        """Return L, L_LAD and the nodes as one vector; it is float64, so that sums over steps stay accurate."""
        return torch.cat([self.plain.view(1), self.defended.view(1), self.nodes.to(self.plain)]).to(torch.float64)


@dataclass(frozen=True)
class EpochStrength:
    """The strength of an epoch. Every field is a ratio of two sums over the steps of the epoch.

    Attributes:
        measured: L_LAD / L - 1.
        first_order: eta sum |a_n|^2 / L.
        nodes: the contribution of each node to ``first_order``.
    """

    measured: float | None = None
    first_order: float | None = None
    nodes: tuple[float, ...] = ()

    @classmethod
    def of(cls, sums: Tensor | None) -> EpochStrength:
        """Return the strength for ``sums`` of `Strength.flat`; if a sum is not finite or L is 0, it is unknown."""
        if sums is None:
            return cls()
        plain, defended, *nodes = sums.tolist()
        if not all(map(math.isfinite, (plain, defended, *nodes))) or plain == 0.0:
            return cls()
        return cls(defended / plain - 1.0, math.fsum(nodes) / plain, tuple(node / plain for node in nodes))


def watch_loss(field: AdversarialField) -> list[Tensor]:
    """Return a list that receives every value of the field's loss, detached.

    The first value is L, because the solver first records the costate on the unperturbed trajectory. So L costs no
    extra pass.
    """
    values: list[Tensor] = []
    loss: Callable[[Tensor], Tensor] = field.loss

    def watched(output: Tensor) -> Tensor:
        value = loss(output)
        values.append(value.detach())
        return value

    field.loss = watched
    return values


def first_order(drive: Sequence[Tensor], grid: Grid, scheme: Scheme, eta: float, recordings: int = 1) -> Tensor:
    """Return the rise of the loss per node, to first order in eta, shape (N + 1,).

    If the state is pushed by p at time t, the loss rises by <p, a(t)>, with the costate a(t). The pushes of a step and
    their times follow from the stages of the scheme. For example, Lie pushes x_{n+1} by eta a_{n+1}, so the rise is
    eta |a_{n+1}|^2 at every node except x_0.

    Args:
        drive: the N + 1 tensors that drive the state. If they are not costates (for example random directions), the
            result is the rise for costates of the same norms.
        grid: times of the nodes.
        scheme: the scheme that composes the drive with f.
        eta: eta of the field.
        recordings: number of costates whose sum is ``drive``.
    """
    with torch.no_grad():
        before, cross, after = _weights(scheme)
        early, late = _weights_at_jump(scheme)
        kept = [a.shape == b.shape for a, b in pairwise(drive)]
        lengths = [step.h for step in grid]
        squares = torch.stack([_product(node, node) for node in drive])
        rise = torch.zeros_like(squares)
        rise[:-1] += squares[:-1] * squares.new_tensor(
            [h * (before if same else early) for h, same in zip(lengths, kept, strict=True)]
        )
        rise[1:] += squares[1:] * squares.new_tensor(
            [h * (after if same else late) for h, same in zip(lengths, kept, strict=True)]
        )
        if cross:
            products = torch.stack(
                [
                    _product(a, b) * h if same else squares.new_zeros(())
                    for (a, b), h, same in zip(pairwise(drive), lengths, kept, strict=True)
                ]
            )
            rise[:-1] += 0.5 * cross * products
            rise[1:] += 0.5 * cross * products
        return rise * (eta / recordings)


_PIECE = 2**18
"""Number of elements that are converted together on a CPU, so that they stay in its cache.

Converting whole nodes to float32 would cost 4 % of a step.
"""


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product <a, b>, summed in at least float32."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    left, right = _flat(a), _flat(b)
    if left.dtype == dtype:
        return torch.dot(left, right)
    size = _PIECE if left.device.type == "cpu" else max(len(left), 1)
    pieces = []
    for piece, other in zip(torch.split(left, size), torch.split(right, size), strict=True):
        wide = piece.to(dtype)
        pieces.append(torch.dot(wide, wide if a is b else other.to(dtype)))
    return torch.stack(pieces).sum()


def _flat(node: Tensor) -> Tensor:
    # Return a view in memory order, so that a channels_last tensor is not copied. Both factors have the same layout.
    if node.ndim == 4 and node.is_contiguous(memory_format=torch.channels_last):
        node = node.permute(0, 2, 3, 1)
    return node.reshape(-1)


def _pushes(scheme: Scheme) -> list[tuple[float, float, float]]:
    """Return (length, time of the costate, progress of f) for every stage that pushes, in units of the step."""
    pushes = []
    for factor, stages in scheme.compositions:
        progress = 0.0
        for stage in stages:
            if stage.operator in (0, "f"):
                progress += stage.weight
            else:
                pushes.append((factor * stage.weight, stage.start, progress))
    return pushes


def _weights(scheme: Scheme) -> tuple[float, float, float]:
    """Return the weights of |a_n|^2, <a_n, a_{n+1}> and |a_{n+1}|^2 in step n.

    a_n is the costate at node n; between nodes the costate is taken as linear.
    """
    pushes = _pushes(scheme)
    return (
        math.fsum(length * (1 - t) * (1 - p) for length, t, p in pushes),
        math.fsum(length * (t * (1 - p) + p * (1 - t)) for length, t, p in pushes),
        math.fsum(length * t * p for length, t, p in pushes),
    )


def _weights_at_jump(scheme: Scheme) -> tuple[float, float]:
    """Return the weights of |a_n|^2 and |a_{n+1}|^2 at a jump; a push there uses the costate of its side."""
    pushes = _pushes(scheme)
    return math.fsum(length * (1 - p) for length, _, p in pushes), math.fsum(length * p for length, _, p in pushes)
