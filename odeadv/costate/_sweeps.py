"""The recordings of a solve: one, several, or sweeps until the costate belongs to the trajectory that it drives."""

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
        costate: the costate that drives the solve.
        residuals: relative change of each sweep, if the sweeps have to converge.
        converged: False if the sweeps have to converge and did not; True for a fixed number of recordings.
        products: number of products of Newton's method with the Jacobian of f, including derivatives of such products.
    """

    costate: Costate
    residuals: tuple[float, ...] = ()
    converged: bool = True
    products: int = 0


def sweep(
    record: Recorder, plan: Recordings, *, grid: Grid | None = None, coarse: Sequence[Grid] = (), implicit: bool = False
) -> Swept:
    """Make the recordings of ``plan``, each on a trajectory that the earlier recordings drive.

    Args:
        record: function that makes one recording.
        plan: number and kind of the recordings.
        grid: the steps, if they are fixed.
        coarse: coarser grids for the first sweeps, if the recordings have to converge.
        implicit: True gives a converged costate its gradient, by the implicit function theorem.
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
