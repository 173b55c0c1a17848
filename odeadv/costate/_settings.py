"""What to record: a number of times, or until convergence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from odeadv.support.checks import choice, integer, number


@dataclass(frozen=True)
class Converge:
    """Sweep until the recorded costate is the one that drives the trajectory: the fixed point of Eq. 7.

    The fixed point solves the two-point boundary-value problem dx/dt = f + eta a, da/dt = -(df/dx)^T a. Let I be the
    growth of the costate's effect over the span. Plain sweeps contract by about eta * I and diverge if eta * I is 1 or
    more. Anderson acceleration also reaches fixed points beyond 1, if they exist and ``memory`` is at least the number
    of directions that do not contract. Such a fixed point is a stationary point of the control problem but not a limit
    of sweeps. Near eta * I = 1 there is none, and iterates that grow out of proportion are reported as not converged.

    With ``costate="collocation"`` Newton's method solves the problem without sweeps. Only ``rtol`` and ``most`` (the
    largest number of Newton steps) then have an effect.

    Attributes:
        rtol: stop if the change of a sweep, relative to the costate, is below this. The default is the two-thirds power
            of the dtype's rounding unit (4e-11 in float64, 2e-5 in float32).
        most: largest number of recordings (on each grid, and for each beginning on it).
        memory: number of sweeps that Anderson acceleration combines; 0 for plain sweeps (Picard iteration).
        method: ``"anderson"``, or ``"newton"``: Newton's method, whose linear systems GMRES solves by products with the
            linearised sweep. It squares the error in each step, needs no memory of directions, and shortens steps that
            go too far. It keeps the graph of a recording, and f must allow to be differentiated twice.
        nested: begin on coarser grids (every second node, down to 4 steps). Each finer grid continues from what the
            coarser one found, so few sweeps remain on the given steps. By default with ``"newton"``, and with
            methods of order three or more, whose coarse solutions are close enough. If coarse grids do not help, the
            iteration begins again on the given steps. Fields with pieces or with losses at given times, odd numbers of
            steps and adaptive steps lack coarser grids.

    Raises:
        ValueError: naming the attribute that is out of range.
    """

    rtol: float | None = None
    most: int = 50
    memory: int = 5
    method: Literal["anderson", "newton"] = "anderson"
    nested: bool | None = None

    def __post_init__(self) -> None:
        if self.rtol is not None and not 0 < number("rtol", self.rtol) < 1:
            raise ValueError(f"rtol: got {self.rtol!r}, expected a number between 0 and 1, or None")
        integer("most", self.most, least=2)
        integer("memory", self.memory, least=0)
        choice("method", self.method, ("anderson", "newton"))


@dataclass(frozen=True)
class Recordings:
    """The recordings that a solve makes.

    Attributes:
        passes: their number, if it is fixed.
        adding: drive by the sum of all recordings so far (``ascent``), instead of the last one (``sweeps``).
        converge: sweep until convergence instead.
    """

    passes: int = 1
    adding: bool = False
    converge: Converge | None = None
