"""The fixed point of the sweeps: Anderson acceleration, Newton's method, coarse grids, and gradients of the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from odeadv.costate._recorded import Costate, RecordedCostate
from odeadv.costate._settings import Converge
from odeadv.splitting import Grid
from odeadv.splitting.interpolation import lagrange
from odeadv.support.isolation import read_value
from odeadv.support.krylov import gmres
from odeadv.support.linearised import Linearised, gradient

GROWTH = 1e8  # a sweep that changes the costate by this factor has diverged
FIRST = 1e-3  # change at which the coarsest grid is left
PATIENCE = 15  # recordings on a coarse grid, after which it is passed over
NEAR = 0.1  # an accelerated step that is larger leads away from the last image
REDUCED = 0.03  # the change on a finer grid is at least that of the difference of two grids, a fourth-order one over 16
POINTS = 6  # nodes of the polynomials between grids


class Recorder(Protocol):
    """Makes one recording."""

    def __call__(self, drive: Costate | None, grid: Grid | None = None, differentiate: bool = False) -> RecordedCostate:
        """Record the costate along the trajectory driven by ``drive`` (None: by f alone), on ``grid`` if given.

        With ``differentiate`` the recording is in the graph of the nodes and states of ``drive``.
        """
        ...


@dataclass
class Level:
    """An iteration on one grid.

    Attributes:
        record: makes a recording on the grid.
        recorded: the last recording.
        rtol: change to reach on the finest grid.
        residuals: relative change of each sweep, on all grids so far.
        secants: pairs of differences of (change, image), which Anderson acceleration combines.
        converged: whether the last change is below the tolerance.
        largest: norm beyond which a costate is out of proportion.
        began: index of the first change of the iteration that began with a recording of its own.
        diverged: change from which the iteration is given up.
        products: cost of the products with linearised sweeps: each counts as much as the sweep.
    """

    record: Recorder
    recorded: RecordedCostate
    rtol: float
    residuals: list[float] = field(default_factory=list)
    secants: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    converged: bool = False
    largest: float = 0.0
    began: int = 0
    diverged: float = GROWTH
    products: int = 0


def fixed_point(record: Recorder, settings: Converge, coarse: Sequence[Grid], finest: Grid | None) -> Level:
    """Iterate u -> the costate recorded on the trajectory driven by u, from the coarsest grid to the finest.

    The iteration on a grid begins with the fixed point of the grid before. If there is none, it begins with a recording
    of its own. If its first change is larger than that of a recording, or if it fails, coarse grids do not resolve the
    problem: the iteration begins again on the finest grid.

    Args:
        record: makes a recording.
        settings: tolerance and method.
        coarse: the grids before the finest, each with every second node of the next one.
        finest: the grid to converge on; None if the first recording finds it.
    """
    iterate = _newton if settings.method == "newton" else _anderson
    level: Level | None = None
    for grid in coarse:
        if level is not None and level.converged:
            level = _prolonged(level, grid)
            iterate(level, settings, level.rtol, REDUCED)
            if not level.converged:
                break
        else:
            level = _begun(record, grid, settings, level)
            iterate(level, replace(settings, most=min(settings.most, PATIENCE)), max(level.rtol, FIRST))
    if level is not None and level.converged:
        assert finest is not None
        level = _prolonged(level, finest)
        iterate(level, settings, level.rtol)
    if level is None or not level.converged:
        level = _begun(record, finest, settings, level)
        iterate(level, settings, level.rtol)
    return level


def _begun(record: Recorder, grid: Grid | None, settings: Converge, before: Level | None) -> Level:
    """Return the iteration on ``grid`` that begins with the recording without a costate."""
    recorded = record(None, grid)
    eps = torch.finfo(recorded.nodes[0].dtype).eps
    first = read_value(_flat(recorded.nodes).norm(), "sweeps: 'converge'")
    level = Level(record, recorded, settings.rtol or eps ** (2.0 / 3.0))
    # A costate larger than the first one by half of all digits is out of proportion: a blow-up, not a solution.
    level.largest = max(first, 1e-300) * eps**-0.5
    if before is not None:
        level.residuals, level.products = before.residuals, before.products
        level.began = len(level.residuals)
    return level


# ---- Anderson acceleration ----


def _anderson(level: Level, settings: Converge, rtol: float, reduced: float = 0.0) -> None:
    """Sweep with Anderson acceleration on the nodes, until the change is below ``rtol``, or ``reduced`` of the first.

    Anderson (1965), J. ACM 12; in the form of Walker & Ni (2011), SIAM J. Numer. Anal. 49.
    """
    recorded = level.recorded
    u = _flat(_driving(recorded, states=False))
    before: tuple[Tensor, Tensor] | None = None
    done = len(level.residuals)
    for _ in range(settings.most - 1):
        level.recorded = level.record(_like(recorded, u), recorded.grid)
        last, recorded = recorded, level.recorded
        image = _flat(_driving(recorded, states=False))
        change = image - u
        if not _noted(level, change, image) < level.diverged:
            level.recorded = last
            return
        if before is not None:
            level.secants.append((change - before[0], image - before[1]))
        level.secants = level.secants[-settings.memory :] if settings.memory else []
        before = change, image
        u = _combined(change, image, level.secants)
        if _settled(level, image, u, max(rtol, reduced * level.residuals[done])):
            level.recorded = _like(recorded, u)  # better than the image, whose change is known
            return


def _noted(level: Level, change: Tensor, image: Tensor) -> float:
    """Note the relative change of a sweep and return it."""
    scale = image.norm().item()
    level.residuals.append(change.norm().item() / scale if scale else change.norm().item())
    return level.residuals[-1]


def _settled(level: Level, image: Tensor, better: Tensor, rtol: float) -> bool:
    """Return whether the last change is small, the costate in proportion, and the accelerated one, ``better``, near it.

    Near eta * I = 1 a small change does not mean that the fixed point is near, or that there is one.
    """
    scale = image.norm().item()
    near = scale <= level.largest and (better - image).norm().item() <= NEAR * scale
    level.converged = level.residuals[-1] <= rtol and near
    return level.converged


def _combined(change: Tensor, image: Tensor, secants: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the combination of swept costates (``image``) that the sweep changes least."""
    if not secants:
        return image
    changes, images = (torch.stack(parts) for parts in zip(*secants, strict=True))
    lengths = changes.norm(dim=1, keepdim=True).clamp_min(torch.finfo(change.dtype).tiny)
    changes, images = changes / lengths, images / lengths
    gram = (changes @ changes.T).double()
    weights = torch.linalg.pinv(gram, hermitian=True, rtol=1e-12) @ (changes @ change).double()
    step: Tensor = weights.to(image.dtype) @ images
    return image - step


# ---- Newton's method ----


def _newton(level: Level, settings: Converge, rtol: float, reduced: float = 0.0) -> None:
    """Solve u = Phi(u), where Phi is a sweep, by Newton's method with GMRES.

    The unknown is all that drives: the nodes, and the states that a cubic or exact costate takes its slopes from. The
    products of the last linearisation are kept as secants. A finer grid begins with them, as long as each step reduces
    the change tenfold, and has a linearisation of its own only if that is not enough.
    """
    w = _flat(_driving(level.recorded))
    size = _flat(_driving(level.recorded, states=False)).numel()
    done, known, before = len(level.residuals), bool(level.secants), 1.0
    halved: tuple[Tensor, Tensor, float] | None = None  # where a step began, the step, and the change there
    for _ in range(settings.most - 1):
        with torch.enable_grad():
            sweep = Linearised(partial(_image, level, level.recorded), w)
        change = sweep.value - w
        residual, size_of_change = _noted(level, change[:size], sweep.value[:size]), float(change.norm())
        better = _combined(change, sweep.value, level.secants) if residual < GROWTH else sweep.value
        settled = _settled(level, sweep.value[:size], better[:size], max(rtol, reduced * level.residuals[done]))
        if halved is not None and not settled and not size_of_change < halved[2]:
            begin, step, least = halved
            halved, w = (begin, 0.5 * step, least), begin + 0.5 * step
            continue
        if not residual < level.diverged:
            return
        known = known and residual <= 0.1 * before
        if settled or known:
            w, before = better, residual
        if settled:
            level.recorded = _like(level.recorded, w)
            return
        if not known:
            # The error of the next iterate is of the order of the square of this one: more digits are wasted.
            inner = max(min(0.01, residual), 0.1 * rtol / residual)
            level.secants = []
            step, solved, products = gmres(partial(_without_sweep, level, sweep), change, rtol=inner, most=120)
            level.products += (products + 1) * level.recorded.work
            if not solved:
                return
            halved, w = (w, step, size_of_change), w + step


def _image(level: Level, last: RecordedCostate, w: Tensor) -> Tensor:
    recorded = level.record(_like(last, w), last.grid, differentiate=True)
    image = _flat(_driving(recorded))
    level.recorded = replace(_like(recorded, image.detach()), differentiate=False)
    return image


def _without_sweep(level: Level, sweep: Linearised, v: Tensor) -> Tensor:
    """Return (1 - dPhi/du) v, and keep it."""
    image = sweep.jvp(v)
    level.secants.append((image - v, image))
    return v - image


# ---- from grid to grid ----


def coarser(grid: Grid, least: int) -> list[Grid]:
    """Return the grids with every second node of the next one, the coarsest of at least ``least`` steps first.

    Args:
        grid: the finest grid, which is not returned.
        least: the smallest number of steps of a grid.
    """
    grids: list[Grid] = []
    while len(grid) % 2 == 0 and len(grid) >= 2 * least:
        grid = Grid(grid.times[::2], grid.h and 2.0 * grid.h)
        grids.insert(0, grid)
    return grids


def _prolonged(level: Level, grid: Grid) -> Level:
    """Return the iteration of ``level`` on the finer ``grid``, by polynomials through its nodes."""
    recorded = level.recorded
    weights = _between_nodes(recorded.grid.times, grid.times).to(recorded.nodes[0].device)

    def finer(values: Sequence[Tensor]) -> Sequence[Tensor]:
        if not values:
            return values
        stacked = torch.stack(list(values)).detach()
        return list(torch.tensordot(weights.to(stacked.dtype), stacked, 1))

    def finer_flat(flat: Tensor) -> Tensor:
        each = flat.reshape(-1, weights.shape[1], _flat(recorded.nodes[:1]).numel())  # nodes, and states if they drive
        return (weights.to(flat.dtype) @ each).reshape(-1)

    fine = replace(recorded, grid=grid, nodes=finer(recorded.nodes), states=finer(recorded.states))
    secants = [(finer_flat(change), finer_flat(image)) for change, image in level.secants]
    return replace(level, recorded=fine, secants=secants, converged=False, diverged=level.residuals[level.began])


def _between_nodes(coarse: Sequence[float], fine: Sequence[float]) -> Tensor:
    """Return the matrix that interpolates from ``coarse`` to ``fine``, which has every second node in common."""
    rows = torch.zeros(len(fine), len(coarse), dtype=torch.float64)
    count = min(POINTS, len(coarse))
    for i, t in enumerate(fine):
        if i % 2 == 0:
            rows[i, i // 2] = 1.0
            continue
        first = min(max(i // 2 - count // 2 + 1, 0), len(coarse) - count)
        near = slice(first, first + count)
        rows[i, near] = torch.tensor(lagrange(coarse[near], t), dtype=torch.float64)
    return rows


# ---- gradients ----


def attached(level: Level, rtol: float) -> RecordedCostate:
    """Return the fixed point with its gradient, by the implicit function theorem.

    One more sweep is in the graph of all that it depends on. Its gradient g is replaced by the solution of
    (1 - (dPhi/du)^T) g' = g.
    """
    last = level.recorded
    u = _flat(_driving(last)).detach().requires_grad_()
    recorded = level.record(_like(last, u), last.grid, differentiate=True)
    image = _flat(_driving(recorded))

    def solve(g: Tensor) -> Tensor:
        with torch.enable_grad():
            found, solved, _ = gmres(lambda v: v - gradient(image, u, v), g, rtol=rtol)
        if not solved:
            raise RuntimeError(
                "sweeps: 'converge' has a fixed point near which sweeps are singular (eta * I = 1), so its gradient "
                "cannot be computed; take another eta"
            )
        return found

    return _like(recorded, WithGradient.apply(image, solve))


class WithGradient(torch.autograd.Function):
    """The identity, whose gradient goes through ``solve``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.solve = solve
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():  # create_graph=True; `once_differentiable` would let a part of it through
            raise RuntimeError(
                "differentiate_costate: got a second derivative through a converged costate, expected a first one"
            )
        return ctx.solve(g), None


# ---- costates as vectors ----


def _driving(costate: RecordedCostate, states: bool = True) -> list[Tensor]:
    """Return the tensors that a costate drives with."""
    own = costate.states if states and costate.kind != "linear" else ()
    return [*costate.nodes, *costate.leaving.values(), *own]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return ``tensors`` as one real vector, of float32 at least."""
    parts = [torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in tensors]
    flat = torch.cat([part.reshape(-1) for part in parts])
    return flat.float() if flat.dtype in (torch.float16, torch.bfloat16) else flat


def _like(costate: RecordedCostate, flat: Tensor) -> RecordedCostate:
    """Return ``costate`` with the tensors of `_driving` in ``flat``; its own states if ``flat`` ends before them."""
    values = []
    for like in _driving(costate):
        if not len(flat):
            break
        count = like.numel() * (2 if like.is_complex() else 1)
        part, flat = flat[:count], flat[count:]
        if like.is_complex():
            part = torch.view_as_complex(part.reshape(*like.shape, 2).to(like.real.dtype).contiguous())
        values.append(part.reshape(like.shape).to(like.dtype))
    first, second = len(costate.nodes), len(costate.nodes) + len(costate.leaving)
    leaving = dict(zip(costate.leaving, values[first:second], strict=True))
    return replace(costate, nodes=values[:first], leaving=leaving, states=values[second:] or costate.states)
