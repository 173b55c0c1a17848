"""The recording pass: one solve and one backward pass, which keeps the costate at every node."""

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

# The states x_n, the costates a_n, and the costates after the losses at nodes, by n.
Recorded = tuple[Sequence[Tensor], Sequence[Tensor], dict[int, Tensor]]


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
    """Solve once, back-propagate the total loss L, and return a_n = dL/dx_n at every node of ``grid``.

    The field's transforms are then applied to the nodes. Gradients of weights are not computed. Buffers (such as
    batch-norm statistics), ``.grad`` and the global random state are not changed. A later solve therefore uses the same
    statistics and draws the same noise.

    Args:
        field: the field with ``f``, the read-out and the losses.
        x0: initial state.
        grid: the nodes.
        stepper: advances the trajectory by ``f`` alone, or by ``f`` and an earlier recording.
        kind: evaluation of the costate between nodes.
        differentiate: True keeps the recording in the autograd graph.
        segments: runs the trajectory in segments and does not keep their autograd graphs. Inside torch.func transforms
            the whole graph is kept.
        keep_states: True keeps the states at the nodes even if ``kind`` does not need them.
        rule: quadrature rule for the running cost of the field.

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
            # The start is a new node of the graph, so dL/dx_0 contains the paths through the trajectory only.
            start = _leaf(x0.clone() if x0.is_inference() or differentiate else x0.detach())
            traced = _Traced.along(total, start, grid, stepper, segments)
            evaluations = f.evaluations
            found = traced.costates(total, create_graph=differentiate)
    states, nodes, leaving = found
    f.vjps += evaluations
    if kind == "linear" and not keep_states:
        states = ()  # a linear costate does not use the states
    if not differentiate:
        states, nodes = [state.detach() for state in states], [node.detach() for node in nodes]
        leaving = {n: node.detach() for n, node in leaving.items()}
    if field.transforms:
        nodes = _transformed(field, nodes, x0.device, differentiate)
    running = None if field.running is None else field.running_cost
    return RecordedCostate(grid, nodes, states, field.f, kind, differentiate, running=running, leaving=leaving)


class _Traced(NamedTuple):
    """A part of a trajectory with its autograd graph.

    Attributes:
        states: the states x_n at the nodes, as the ends of the steps.
        leaving: a second tensor for x_n as the start of the next step, by n, for nodes with a loss.
        terms: losses at all nodes except the last, and running costs of the steps.
        last: time of the last node.
    """

    states: list[Tensor]
    leaving: dict[int, Tensor]
    terms: list[Tensor]
    last: float

    @classmethod
    def along(
        cls, total: TotalLoss, start: Tensor, grid: Grid, stepper: Stepper, segments: Recompute | None
    ) -> _Traced:
        """Return the trajectory from ``start`` along ``grid``. If ``segments`` is given, run it in segments."""
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
                # A view is a separate node of the graph, so its gradient contains the later steps only.
                x = leaving[n] = x.view_as(x)
            end = stepper.advance(x, step)
            terms += losses + total.over(step, stepper, x, end)
            states.append(end.view_as(end))
        return cls(states, leaving, terms, grid.times[-1])

    def costates(self, total: TotalLoss, *, create_graph: bool) -> Recorded:
        """Back-propagate the total loss and return states, costates, and costates after the losses, see `Recorded`."""
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
    """Return the same as `_Traced.costates`, with one `torch.func.vjp` per step. Steps may change the shape."""
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
    """Apply the transforms of the field to the nodes, and check shape, dtype and device of each result."""
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
