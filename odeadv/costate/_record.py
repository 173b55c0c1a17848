"""The recording pass: one solve and one backward pass, keeping the costate at every node."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from odeadv.costate._recorded import RecordedCostate
from odeadv.fields import AdversarialField
from odeadv.splitting import CostateKind, Grid, Stepper
from odeadv.support.isolation import Buffers, RandomState, differentiating, inside_transform, version


def record(
    field: AdversarialField,
    x0: Tensor,
    grid: Grid,
    stepper: Stepper,
    *,
    kind: CostateKind = "linear",
    differentiate: bool = False,
    checkpoints: int | None = None,
    keep_states: bool = False,
) -> RecordedCostate:
    """Solve once, back-propagate the loss, and return a_n = dL/dx_n at every node of ``grid``.

    The field's transforms are then applied to the nodes. No weight gradients are computed. Buffers (batch-norm
    statistics), ``.grad`` and the global random state stay as they were, so that a later solve sees the same statistics
    and draws the same noise.

    Args:
        field: gives ``f``, the read-out and the loss.
        x0: initial state.
        grid: the nodes.
        stepper: advances the trajectory by ``f`` alone, or by ``f`` driven by an earlier recording.
        kind: evaluation of the result between nodes.
        differentiate: keep the recording in the autograd graph.
        checkpoints: number of segments of the grid. The autograd graph of one segment is kept at a time, and each
            segment runs again in the backward pass, with the same result bit for bit. None keeps the whole graph, as do
            torch.func transforms.
        keep_states: keep the states at the nodes even if ``kind`` does not need them.

    Raises:
        TypeError, ValueError: if the result of a transform of the field cannot replace the nodes.
        ValueError: if the loss is not a scalar, or does not depend on the state by differentiable operations.
    """
    again = checkpoints is not None and not inside_transform()
    states: Sequence[Tensor]
    nodes: Sequence[Tensor]
    with differentiating(field.modules, x0.device):
        if inside_transform():
            states, nodes = _by_transform(field, x0 if differentiate else x0.detach(), grid, stepper)
        elif checkpoints is None:
            # A new node of the graph, so that dL/dx_0 is taken through the trajectory only.
            start = _leaf(x0.clone() if x0.is_inference() or differentiate else x0.detach())
            states = [start, *stepper.states(start, grid)]
            nodes = torch.autograd.grad(
                _loss(field, states[-1]), states, create_graph=differentiate, allow_unused=True, materialize_grads=True
            )
        else:
            states, nodes = _in_segments(field, x0, grid, stepper, checkpoints)
    f = stepper.counted[0]
    f.vjps += f.evaluations // 2 if again else f.evaluations
    if kind == "linear" and not keep_states:
        states = ()  # a linear costate does not need them between the nodes
    if not differentiate:
        states, nodes = [state.detach() for state in states], [node.detach() for node in nodes]
    if field.transforms:
        nodes = _transformed(field, nodes, x0.device, differentiate)
    return RecordedCostate(grid, nodes, states, field.f, kind, differentiate)


def _loss(field: AdversarialField, final: Tensor) -> Tensor:
    _, loss = field.evaluate(final)
    if not loss.requires_grad:
        raise ValueError("loss: does not depend on the state by differentiable operations; expected a function of x")
    return loss


def _leaf(x: Tensor) -> Tensor:
    return x if x.requires_grad else x.requires_grad_()


def _by_transform(
    field: AdversarialField, x0: Tensor, grid: Grid, stepper: Stepper
) -> tuple[list[Tensor], Sequence[Tensor]]:
    """Return states and costates at the nodes by `torch.func.vjp` of each step, whose ends may differ in shape."""
    states, pulls = [x0], []
    pull: Any
    for step in grid:
        end, pull = torch.func.vjp(partial(stepper.advance, step=step), states[-1])  # type: ignore[misc]  # without has_aux: two
        states.append(end)
        pulls.append(pull)
    loss, pull = torch.func.vjp(lambda x: field.evaluate(x)[1], states[-1])  # type: ignore[misc]
    nodes = [pull(torch.ones_like(loss))[0]]
    for pull in reversed(pulls):
        nodes.append(pull(nodes[-1])[0])
    return states, nodes[::-1]


def _in_segments(
    field: AdversarialField, x0: Tensor, grid: Grid, stepper: Stepper, count: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Return states and costates at the nodes, with the graph of one segment alive at a time."""
    ends = sorted({round(i * len(grid) / count) for i in range(count + 1)})
    states = [x0.clone() if x0.is_inference() else x0.detach()]
    begun = {}
    for n in range(len(grid)):
        if n in ends:
            begun[n] = RandomState(x0.device), Buffers(field.modules)
        # Detached, not under no_grad: f may itself call torch.autograd.grad.
        states.append(stepper.advance(states[-1], grid[n]).detach())
    nodes = [torch.empty(0)] * len(states)
    for first, last in reversed(list(pairwise(ends))):
        for kept in begun[first]:
            kept.put_back()
        inner = [_leaf(states[first].detach())]
        for n in range(first, last):
            inner.append(stepper.advance(inner[-1], grid[n]))
        from_loss = last == len(grid)
        nodes[first : last + 1] = torch.autograd.grad(
            _loss(field, inner[-1]) if from_loss else inner[-1],
            inner,
            None if from_loss else nodes[last],
            allow_unused=True,
            materialize_grads=True,
        )
    return states, nodes


def _transformed(
    field: AdversarialField, nodes: Sequence[Tensor], device: torch.device, differentiate: bool
) -> Sequence[Tensor]:
    """Apply the field's transforms to the nodes, and check shape, dtype and device of the result."""
    with differentiating(field.modules, device), torch.set_grad_enabled(differentiate):
        for transform in field.transforms:
            before = [version(node) for node in nodes]
            given = transform(tuple(nodes))
            if any(v >= 0 and node._version != v for v, node in zip(before, nodes, strict=True)):
                raise ValueError("transform: modifies the recorded nodes in place; return new tensors")
            try:
                values = list(given)
            except TypeError:
                raise TypeError(
                    f"transform: returned {type(given).__name__}, expected a sequence of {len(nodes)} tensors"
                ) from None
            if len(values) != len(nodes):
                raise ValueError(f"transform: returned {len(values)} tensors, expected {len(nodes)}, one per node")
            for n, (value, node) in enumerate(zip(values, nodes, strict=True)):
                _check_node(n, value, node)
            nodes = values
    return nodes if differentiate else [node.detach() for node in nodes]


def _check_node(n: int, value: object, node: Tensor) -> None:
    expected = f"{node.dtype} of shape {tuple(node.shape)} on {node.device}"
    if not isinstance(value, Tensor):
        raise TypeError(f"transform: returned {type(value).__name__} for node {n}, expected a tensor, {expected}")
    if (value.shape, value.dtype, value.device) != (node.shape, node.dtype, node.device):
        raise ValueError(
            f"transform: returned {value.dtype} of shape {tuple(value.shape)} on {value.device} for node {n}, "
            f"expected {expected}"
        )
