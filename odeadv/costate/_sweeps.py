"""How often the costate is recorded: once, several times, or until it is that of its own trajectory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from odeadv.costate._record import record
from odeadv.costate._recorded import Costate, RecordedCostate, SummedCostate
from odeadv.fields import AdversarialField, VectorField
from odeadv.splitting import CostateKind, Grid, Stepper
from odeadv.support.checks import integer, number
from odeadv.support.isolation import read_value

GROWTH = 1e8


@dataclass(frozen=True)
class Converge:
    """Sweep until the recorded costate is the one that drives the trajectory: the fixed point of Eq. 7.

    The fixed point solves the two-point boundary-value problem dx/dt = f + eta a, da/dt = -(df/dx)^T a. Plain sweeps
    contract by about eta * I (spec: I the growth of the costate's effect over the span) and diverge from
    eta * I = 1 on; Anderson acceleration reaches fixed points beyond, where they exist and ``memory`` is at least the
    number of directions that do not contract. They are then stationary points of the control problem but no limits of
    sweeps. Near eta * I = 1 there is none; iterates that grow out of proportion are not taken for one.

    Attributes:
        rtol: stop when the change of a sweep, relative to the costate, is below this; by default the two-thirds power
            of the dtype's rounding unit (4e-11 in float64, 2e-5 in float32).
        most: recordings at the most.
        memory: sweeps that Anderson acceleration combines; 0 for plain sweeps (Picard iteration).

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
    """Which recordings a solve makes.

    Attributes:
        passes: how many, if the number is fixed.
        adding: drive by the sum of all recordings so far (``ascent``), instead of the last (``sweeps``).
        converge: sweep until convergence instead.
    """

    passes: int = 1
    adding: bool = False
    converge: Converge | None = None


@dataclass
class Sweeping:
    """Makes recordings, each on a trajectory driven by those before.

    Attributes:
        field: the field whose costate is recorded.
        x0: initial state.
        grid: makes the nodes of a recording, for the field that it runs along.
        stepper: makes what advances a field.
        kind: evaluation between nodes.
        differentiate: keep recordings in the autograd graph.
        counted: called with the stepper and the drive of each recording, for the statistics.
        residuals: relative change of each sweep, when they are to converge.
    """

    field: AdversarialField
    x0: Tensor
    grid: Callable[[VectorField], Grid]
    stepper: Callable[[VectorField], Stepper]
    kind: CostateKind
    differentiate: bool
    counted: Callable[[Stepper, Costate | None], None]
    checkpoints: int | None = None
    residuals: list[float] = dataclasses.field(default_factory=list)
    converged: bool = True

    def run(self, plan: Recordings) -> Costate:
        """The costate that ``plan`` comes to."""
        if plan.converge is not None:
            return self._converge(plan.converge)
        parts: list[RecordedCostate] = []
        drive: Costate | None = None
        for _ in range(plan.passes):
            parts.append(self._record(drive))
            drive = SummedCostate(tuple(parts)) if plan.adding and len(parts) > 1 else parts[-1]
        assert drive is not None
        return drive

    def _record(self, drive: Costate | None, grid: Grid | None = None) -> RecordedCostate:
        along = self.field if drive is None else self.field.driven_by(drive)
        stepper = self.stepper(along)
        result = record(
            self.field,
            self.x0,
            self.grid(along) if grid is None else grid,
            stepper,
            kind=self.kind,
            differentiate=self.differentiate,
            checkpoints=self.checkpoints,
        )
        self.counted(stepper, drive)
        return result

    def _converge(self, settings: Converge) -> RecordedCostate:
        """Fixed-point iteration on the nodes, accelerated: u -> the costate recorded on the trajectory driven by u."""
        recorded = self._record(None)
        image = _flat(recorded)
        eps = torch.finfo(recorded.nodes[0].dtype).eps
        rtol, out_of_proportion = settings.rtol or eps ** (2.0 / 3.0), eps**-0.5
        u, first = image, read_value(image.norm(), "sweeps: 'converge'")
        history: list[tuple[Tensor, Tensor]] = []
        self.converged = False
        while len(self.residuals) + 1 < settings.most:
            last, recorded = recorded, self._record(_like(recorded, u), recorded.grid)
            image = _flat(recorded)
            change = image - u
            scale = image.norm().item()
            residual = change.norm().item() / scale if scale else change.norm().item()
            self.residuals.append(residual)
            if not residual < GROWTH:
                return last
            if residual <= rtol and scale <= max(first, 1e-300) * out_of_proportion:
                self.converged = True
                break
            history = [*history, (change, image)][-settings.memory - 1 :]
            u = _anderson(history)
        return recorded


def _anderson(history: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The next iterate from the last (residual, image) pairs: the combination of images of the smallest residual.

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
    """All nodes as one real vector, of float32 at least."""
    parts = [torch.view_as_real(node) if node.is_complex() else node for node in costate.nodes]
    flat = torch.cat([part.detach().reshape(-1) for part in parts])
    return flat.float() if flat.dtype in (torch.float16, torch.bfloat16) else flat


def _like(costate: RecordedCostate, flat: Tensor) -> RecordedCostate:
    """``costate`` with the nodes in ``flat``."""
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
