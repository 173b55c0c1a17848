"""The recording pass: one solve and one backward pass, keeping the costate at every node."""

from __future__ import annotations

import torch
from torch import Tensor

from odeadv._state import recording
from odeadv.costate._recorded import RecordedCostate
from odeadv.fields import AdversarialField
from odeadv.splitting import Grid, Stepper, integrate
from odeadv.splitting._scheme import CostateKind


def record(
    field: AdversarialField,
    x0: Tensor,
    grid: Grid,
    stepper: Stepper,
    *,
    kind: CostateKind = "linear",
    differentiate: bool = False,
) -> RecordedCostate:
    """Solve once and back-propagate the loss, keeping a_n = dL/dx_n at every node of ``grid``.

    Weight gradients are not computed, and buffers (batch-norm statistics), ``.grad`` and the global random state are
    left as they were, so that a solve after it sees the same statistics and draws the same noise.

    Args:
        field: whose ``f``, read-out and loss are used.
        x0: initial state.
        grid: the nodes.
        stepper: what to advance the trajectory with: ``f`` alone, or ``f`` driven by an earlier recording.
        kind: how the result is evaluated between nodes.
        differentiate: keep the recording in the autograd graph.

    Raises:
        ValueError: if the loss is not a scalar, or does not depend on the state by differentiable operations.
    """
    with recording(field.modules, x0.device):
        # A node of its own, so that dL/dx_0 is taken through the trajectory only, whatever else x0 was used for.
        start = x0.clone() if x0.is_inference() or differentiate else x0.detach()
        if not start.requires_grad:
            start.requires_grad_()
        states = [start, *integrate(stepper, start, grid)]
        _, loss = field.evaluate(states[-1])
        if not loss.requires_grad:
            raise ValueError(
                "loss: does not depend on the state by differentiable operations; expected a function of x"
            )
        nodes = torch.autograd.grad(loss, states, create_graph=differentiate, allow_unused=True, materialize_grads=True)
    f = stepper.counted[0]
    f.vjps += f.evaluations
    kept = states if differentiate else [state.detach() for state in states]
    return RecordedCostate(grid, nodes, kept, field.f, kind, differentiate)
