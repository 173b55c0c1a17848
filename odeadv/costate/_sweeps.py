"""The recordings of a solve: one, several, or sweeps until the costate is that of its own trajectory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from odeadv.costate._recorded import Costate, RecordedCostate, SummedCostate
from odeadv.splitting import Grid
from odeadv.support.checks import integer, number
from odeadv.support.isolation import read_value

GROWTH = 1e8  # a sweep that changes the costate by this factor has diverged


@dataclass(frozen=True)
class Converge:
    """Sweep until the recorded costate is the one that drives the trajectory: the fixed point of Eq. 7.

    The fixed point solves the two-point boundary-value problem dx/dt = f + eta a, da/dt = -(df/dx)^T a. Let I be the
    growth of the costate's effect over the span. Plain sweeps contract by about eta * I and diverge if eta * I is 1 or
    more. Anderson acceleration also reaches fixed points beyond 1, if they exist and ``memory`` is at least the number
    of directions that do not contract. Such a fixed point is a stationary point of the control problem but not a limit
    of sweeps. Near eta * I = 1 there is none, and iterates that grow out of proportion are reported as not converged.

    Attributes:
        rtol: stop if the change of a sweep, relative to the costate, is below this; by default the two-thirds power of
            the dtype's rounding unit (4e-11 in float64, 2e-5 in float32).
        most: largest number of recordings.
        memory: number of sweeps that Anderson acceleration combines; 0 for plain sweeps (Picard iteration).

    Raises:
        ValueError: naming the attribute that is out of range.
    """

    rtol: float | None = None
    most: int = 50
    memory: int = 5

    def __post_init__(self) -> None:
        if self.rtol is not None and not 0 < number("rtol", self.rtol) < 1:
            raise ValueError(f"rtol: got {self.rtol!r}, expected a number between 0 and 1, or None")
        integer("most", self.most, least=2)
        integer("memory", self.memory, least=0)


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


class Recorder(Protocol):
    """Makes one recording."""

    def __call__(self, drive: Costate | None, grid: Grid | None = None) -> RecordedCostate:
        """Record the costate along the trajectory driven by ``drive`` (None: by f alone), on ``grid`` if given."""
        ...


@dataclass(frozen=True)
class Swept:
    """The result of all recordings.

    Attributes:
        costate: drives the solve.
        residuals: relative change of each sweep, if they are to converge.
        converged: whether they did; True for a fixed number of recordings.
    """

    costate: Costate
    residuals: tuple[float, ...] = ()
    converged: bool = True


def sweep(record: Recorder, plan: Recordings) -> Swept:
    """Make the recordings of ``plan``, each on a trajectory driven by the recordings before."""
    if plan.converge is not None:
        return _converge(record, plan.converge)
    parts: list[RecordedCostate] = []
    drive: Costate | None = None
    for _ in range(plan.passes):
        parts.append(record(drive))
        drive = SummedCostate(tuple(parts)) if plan.adding and len(parts) > 1 else parts[-1]
    assert drive is not None
    return Swept(drive)


def _converge(record: Recorder, settings: Converge) -> Swept:
    """Iterate u -> the costate recorded on the trajectory driven by u, with Anderson acceleration on the nodes."""
    recorded = record(None)
    image = _flat(recorded)
    eps = torch.finfo(recorded.nodes[0].dtype).eps
    # A costate larger than the first one by half of all digits is out of proportion: a blow-up, not a solution.
    rtol, out_of_proportion = settings.rtol or eps ** (2.0 / 3.0), eps**-0.5
    u, first = image, read_value(image.norm(), "sweeps: 'converge'")
    history: list[tuple[Tensor, Tensor]] = []
    residuals: list[float] = []
    while len(residuals) + 1 < settings.most:
        last, recorded = recorded, record(_like(recorded, u), recorded.grid)
        image = _flat(recorded)
        change = image - u
        scale = image.norm().item()
        residual = change.norm().item() / scale if scale else change.norm().item()
        residuals.append(residual)
        if not residual < GROWTH:
            return Swept(last, tuple(residuals), converged=False)
        if residual <= rtol and scale <= max(first, 1e-300) * out_of_proportion:
            return Swept(recorded, tuple(residuals))
        history = [*history, (change, image)][-settings.memory - 1 :]
        u = _anderson(history)
    return Swept(recorded, tuple(residuals), converged=False)


def _anderson(history: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the next iterate from the last (residual, image) pairs: the combination with the smallest residual.

    Anderson (1965), J. ACM 12; in the form of Walker & Ni (2011), SIAM J. Numer. Anal. 49.
    """
    change, image = history[-1]
    if len(history) == 1:
        return image
    changes = torch.stack([change - other for other, _ in history[:-1]])
    images = torch.stack([image - other for _, other in history[:-1]])
    lengths = changes.norm(dim=1, keepdim=True).clamp_min(torch.finfo(change.dtype).tiny)
    changes, images = changes / lengths, images / lengths
    gram = (changes @ changes.T).double()
    weights = torch.linalg.pinv(gram, hermitian=True, rtol=1e-12) @ (changes @ change).double()
    step: Tensor = weights.to(image.dtype) @ images
    return image - step


def _flat(costate: RecordedCostate) -> Tensor:
    """Return all nodes as one real vector, of float32 at least."""
    parts = [torch.view_as_real(node) if node.is_complex() else node for node in costate.nodes]
    flat = torch.cat([part.detach().reshape(-1) for part in parts])
    return flat.float() if flat.dtype in (torch.float16, torch.bfloat16) else flat


def _like(costate: RecordedCostate, flat: Tensor) -> RecordedCostate:
    """Return ``costate`` with the nodes in ``flat``."""
    nodes = []
    for node in costate.nodes:
        count = node.numel() * (2 if node.is_complex() else 1)
        part, flat = flat[:count], flat[count:]
        nodes.append(
            torch.view_as_complex(part.reshape(*node.shape, 2).to(node.real.dtype).contiguous())
            if node.is_complex()
            else part.reshape(node.shape).to(node.dtype)
        )
    return replace(costate, nodes=nodes)
