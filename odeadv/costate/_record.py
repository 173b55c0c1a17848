"""The recording pass: one solve and one backward pass, keeping the costate at every node."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from odeadv.costate._recorded import RecordedCostate
from odeadv.costate._total import Rule, TotalLoss
from odeadv.fields import AdversarialField
from odeadv.splitting import CostateKind, Grid, Stepper, TimeStep
from odeadv.support.isolation import Recompute, differentiating, inside_transform, version

Recorded = tuple[Sequence[Tensor], Sequence[Tensor], dict[int, Tensor]]  # states, nodes, nodes after their losses


def record(
    field: AdversarialField,
    x0: Tensor,
    grid: Grid,
    stepper: Stepper,
    *,
    kind: CostateKind = "linear",
    differentiate: bool = False,
    segments: Recompute | None = None,
    keep_states: bool = False,
    rule: Rule = "trapezoid",
) -> RecordedCostate:
    """Solve once, back-propagate the total loss, and return a_n = dL/dx_n at every node of ``grid``.

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
        segments: runs the trajectory in segments, whose autograd graph is not kept. Inside torch.func transforms the
            whole graph is kept.
        keep_states: keep the states at the nodes even if ``kind`` does not need them.
        rule: quadrature of the field's running cost.

    Raises:
        TypeError, ValueError: if the result of a transform of the field cannot replace the nodes.
        ValueError: if the loss is not a scalar, or does not depend on the state by differentiable operations.
    """
    total = TotalLoss.on(grid, field, rule)
    f = stepper.counted[0]
    with differentiating(field.modules, x0.device):
        if inside_transform():
            found = _by_transform(total, x0 if differentiate else x0.detach(), grid, stepper)
            evaluations = f.evaluations
        else:
            # A new node of the graph, so that dL/dx_0 is taken through the trajectory only.
            start = _leaf(x0.clone() if x0.is_inference() or differentiate else x0.detach())
            traced = _Traced.along(total, start, grid, stepper, segments)
            evaluations = f.evaluations
            found = traced.costates(total, create_graph=differentiate)
    states, nodes, leaving = found
    f.vjps += evaluations
    if kind == "linear" and not keep_states:
        states = ()  # a linear costate does not need them between the nodes
    if not differentiate:
        states, nodes = [state.detach() for state in states], [node.detach() for node in nodes]
        leaving = {n: node.detach() for n, node in leaving.items()}
    if field.transforms:
        nodes = _transformed(field, nodes, x0.device, differentiate)
    running = None if field.running is None else field.running_cost
    return RecordedCostate(grid, nodes, states, field.f, kind, differentiate, running=running, leaving=leaving)


class _Traced(NamedTuple):
    """A part of a trajectory with its graph.

    Attributes:
        states: x_n, the end of step n - 1.
        leaving: x_n again, the start of step n, by n; only if there is a loss at n.
        terms: losses at nodes but the last, and running costs of steps.
        last: the time of the last node.
    """

    states: list[Tensor]
    leaving: dict[int, Tensor]
    terms: list[Tensor]
    last: float

    @classmethod
    def along(
        cls, total: TotalLoss, start: Tensor, grid: Grid, stepper: Stepper, segments: Recompute | None
    ) -> _Traced:
        """Return the trajectory from ``start`` along ``grid``, in segments if they are to be run again."""
        if segments is None:
            return cls.through(total, start, grid, stepper)
        whole = cls([start], {}, [], grid.times[-1])
        for part in grid.parts(segments.every):
            first = len(whole.states) - 1
            found = segments(cls.through, total, whole.states[-1], part, stepper)
            whole.states.extend(found.states[1:])
            whole.leaving.update({first + n: x for n, x in found.leaving.items()})
            whole.terms.extend(found.terms)
        return whole

    @classmethod
    def through(cls, total: TotalLoss, start: Tensor, grid: Grid, stepper: Stepper) -> _Traced:
        """Return the trajectory from ``start`` along ``grid`` in one piece."""
        if not total.field.accumulates:
            return cls([start, *stepper.states(start, grid)], {}, [], grid.times[-1])
        states, leaving, terms = [start], dict[int, Tensor](), list[Tensor]()
        for n, step in enumerate(grid):
            x = states[n]
            losses = total.at(step.t0, x)
            if losses:
                # A view is a node of its own in the graph, so its gradient is that of the later steps alone.
                x = leaving[n] = x.view_as(x)
            end = stepper.advance(x, step)
            terms += losses + total.over(step, stepper, x, end)
            states.append(end.view_as(end))
        return cls(states, leaving, terms, grid.times[-1])

    def costates(self, total: TotalLoss, *, create_graph: bool) -> Recorded:
        """Return states, costates at the nodes, and costates after the losses at nodes."""
        x = self.states[-1]
        terms = [*self.terms, total.field.evaluate(x)[1], *total.at(self.last, x)]
        terms = [term for term in terms if term.requires_grad]
        if not terms:
            raise ValueError(
                "loss: does not depend on the state by differentiable operations; expected a function of x"
            )
        inputs = [*self.states, *self.leaving.values()]
        found = torch.autograd.grad(terms, inputs, create_graph=create_graph, allow_unused=True, materialize_grads=True)
        nodes = found[: len(self.states)]
        return self.states, nodes, dict(zip(self.leaving, found[len(nodes) :], strict=True))


def _leaf(x: Tensor) -> Tensor:
    return x if x.requires_grad else x.requires_grad_()


def _by_transform(total: TotalLoss, x0: Tensor, grid: Grid, stepper: Stepper) -> Recorded:
    """Return states and costates at the nodes by `torch.func.vjp` of each step, whose ends may differ in shape."""
    states, pulls = [x0], []
    pull: Any

    def advance(x: Tensor, step: TimeStep) -> tuple[Tensor, ...]:
        end = stepper.advance(x, step)
        return (end, *total.over(step, stepper, x, end))

    for step in grid:
        ends, pull = torch.func.vjp(partial(advance, step=step), states[-1])  # type: ignore[misc]  # without has_aux: two
        states.append(ends[0])
        pulls.append((pull, [torch.ones_like(cost) for cost in ends[1:]]))

    def final(x: Tensor) -> Tensor:
        return sum(total.at(grid.times[-1], x), start=total.field.evaluate(x)[1])

    loss, pull = torch.func.vjp(final, states[-1])  # type: ignore[misc]
    nodes, leaving = [pull(torch.ones_like(loss))[0]], {}
    for n, (pull, ones) in reversed(list(enumerate(pulls))):
        a = pull((nodes[-1], *ones))[0]
        if grid.times[n] in total.losses:
            leaving[n] = a
            a = a + torch.func.grad(lambda x, n=n: total.at(grid.times[n], x)[0])(states[n])
        nodes.append(a)
    return states, nodes[::-1], leaving


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
