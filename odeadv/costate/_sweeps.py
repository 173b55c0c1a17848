"""The recordings of a solve: one, several, or sweeps until the costate is that of its own trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from odeadv.costate._converge import Recorder, attached, fixed_point
from odeadv.costate._recorded import Costate, RecordedCostate, SummedCostate
from odeadv.costate._settings import Recordings
from odeadv.splitting import Grid


@dataclass(frozen=True)
class Swept:
    """The result of all recordings.

    Attributes:
        costate: drives the solve.
        residuals: relative change of each sweep, if they are to converge.
        converged: whether they did; True for a fixed number of recordings.
        products: products with the Jacobian of f, or derivatives of them, that Newton's method took.
    """

    costate: Costate
    residuals: tuple[float, ...] = ()
    converged: bool = True
    products: int = 0


def sweep(
    record: Recorder, plan: Recordings, *, grid: Grid | None = None, coarse: Sequence[Grid] = (), implicit: bool = False
) -> Swept:
    """Make the recordings of ``plan``, each on a trajectory driven by the recordings before.

    Args:
        record: makes a recording.
        plan: what to record.
        grid: the steps, if they are fixed.
        coarse: coarser grids to begin on, if the recordings are to converge.
        implicit: give a converged costate its gradient, by the implicit function theorem.
    """
    if plan.converge is not None:
        level = fixed_point(record, plan.converge, coarse, grid)
        if implicit and level.converged:
            rtol = torch.finfo(level.recorded.nodes[0].dtype).eps ** 0.75
            level.recorded = attached(level, rtol)
        return Swept(level.recorded, tuple(level.residuals), level.converged, level.products)
    parts: list[RecordedCostate] = []
    drive: Costate | None = None
    for _ in range(plan.passes):
        parts.append(record(drive))
        drive = SummedCostate(tuple(parts)) if plan.adding and len(parts) > 1 else parts[-1]
    assert drive is not None
    return Swept(drive)
