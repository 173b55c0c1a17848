"""The strength s of a defence: the relative rise of the loss that the perturbation makes."""

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
        nodes: the first-order rise of the loss by node, shape (N + 1,); x_0 comes first. Their sum is
            eta sum |a_n|^2. It is empty if nothing was recorded.
    """

    plain: Tensor
    defended: Tensor
    nodes: Tensor

    @classmethod
    def none(cls, loss: Tensor) -> Strength:
        """Return the strength of a pass without a perturbation."""
        return cls(loss.detach(), loss.detach(), loss.new_zeros(0))

    def flat(self) -> Tensor:
        """Return L, L_LAD and the nodes as one float64 vector, which sums over steps without loss."""
        return torch.cat([self.plain.view(1), self.defended.view(1), self.nodes.to(self.plain)]).to(torch.float64)


@dataclass(frozen=True)
class EpochStrength:
    """The strength of an epoch, as numbers; every field is a ratio of sums over the steps of the epoch.

    Attributes:
        measured: L_LAD / L - 1.
        first_order: eta sum |a_n|^2 / L.
        nodes: the shares of ``first_order`` by node.
    """

    measured: float | None = None
    first_order: float | None = None
    nodes: tuple[float, ...] = ()

    @classmethod
    def of(cls, sums: Tensor | None) -> EpochStrength:
        """Read the sums of `Strength.flat`; unknown or infinite numbers are None."""
        if sums is None:
            return cls()
        plain, defended, *nodes = sums.tolist()
        if not all(map(math.isfinite, (plain, defended, *nodes))) or plain == 0.0:
            return cls()
        return cls(defended / plain - 1.0, math.fsum(nodes) / plain, tuple(node / plain for node in nodes))


def watch_loss(field: AdversarialField) -> list[Tensor]:
    """Return a list that receives every value of the field's loss, detached.

    The first value is L: the solver records the costate on the unperturbed trajectory first. Reading it there costs
    no pass of its own.
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
    """Return the rise of the loss by node, to first order in eta, shape (N + 1,).

    A push p of the state at time t raises the loss by <p, a(t)>. The pushes of a step and their times follow from
    the stages of the scheme. Lie pushes x_{n+1} by eta a_{n+1}, which gives eta |a_{n+1}|^2 at every node but x_0.

    Args:
        drive: the N + 1 tensors that drive the state. If they are not costates (random directions), the result is the
            rise that costates of the same norms would make.
        grid: times of the nodes.
        scheme: how the drive is composed with f.
        eta: as the field has it.
        recordings: number of costates that ``drive`` is the sum of.
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
"""Elements converted at a time on a CPU. They stay in its cache; whole nodes in float32 cost 4 % of a step."""


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return <a, b>, summed in float32 at least."""
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
    # A view in memory order, so that a channels_last tensor is not copied; both tensors of a product have one layout.
    if node.ndim == 4 and node.is_contiguous(memory_format=torch.channels_last):
        node = node.permute(0, 2, 3, 1)
    return node.reshape(-1)


def _pushes(scheme: Scheme) -> list[tuple[float, float, float]]:
    """Return (length, time of the costate, progress of f) of every stage that pushes, in units of the step."""
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
    """Return the weights of |a_n|^2, <a_n, a_{n+1}> and |a_{n+1}|^2 in a step, costates being linear in between."""
    pushes = _pushes(scheme)
    return (
        math.fsum(length * (1 - t) * (1 - p) for length, t, p in pushes),
        math.fsum(length * (t * (1 - p) + p * (1 - t)) for length, t, p in pushes),
        math.fsum(length * t * p for length, t, p in pushes),
    )


def _weights_at_jump(scheme: Scheme) -> tuple[float, float]:
    """Return the weights of |a_n|^2 and |a_{n+1}|^2 at a jump, where a push takes the costate of its own side."""
    pushes = _pushes(scheme)
    return math.fsum(length * (1 - p) for length, _, p in pushes), math.fsum(length * p for length, _, p in pushes)
