"""Differences of states: a bound on their growth in each layer, and the growth of one difference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from odeadv.diagnostics._linear import check_iteration, largest, random_like
from odeadv.diagnostics._result import Result, median, style
from odeadv.diagnostics._trajectory import AnyField, Trajectory, norm, posed, quotient, walk
from odeadv.fields import AdversarialField, Jump, VectorField
from odeadv.solver import solve
from odeadv.splitting import Scheme
from odeadv.support.isolation import differentiating
from odeadv.support.linearised import Linearised

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Lipschitz(Result):
    """Spectral norms of the layers' Jacobians at the states of the unperturbed trajectory, estimated from below.

    The batch is one state: without batch statistics the norm is that of the most sensitive example.

    Attributes:
        ts: times of the layers' beginnings.
        velocity: ||J||_2 of f, one per layer; NaN at a jump.
        layer: ||I + h J||_2 of the layer as a step of Euler, one per layer; at a jump, the norm of its map.
        bound: product of ``layer``. Apart from errors of the estimates, no small difference grows by more.
        converged: for each layer, whether the singular value is within the tolerance.
    """

    ts: list[float]
    velocity: list[float]
    layer: list[float]
    bound: float
    converged: list[bool]

    heading: ClassVar[str] = "Lipschitz estimates"
    reading: ClassVar[str] = (
        "The largest factor by which a layer stretches a small difference; the product bounds the whole network."
    )

    def summary(self) -> dict[str, float]:
        """Return the few numbers that tell most."""
        return {
            "median of a layer": median(self.layer),
            "largest": max(self.layer),
            "product": self.bound,
            "layers whose estimate has not converged": float(self.converged.count(False)),
        }

    def _draw(self, axes: Axes, label: str) -> None:
        axes.plot(self.ts, self.layer, marker=".", label=f"{label} $\\|I + h J\\|$".strip())
        if not label:
            axes.plot(self.ts, self.velocity, marker=".", label="$\\|J\\|$")
        style(axes, x="t (layer)", y="spectral norm", title="Lipschitz estimates of the layers", log=True)


def lipschitz(
    field: AnyField,
    x0: Tensor | None = None,
    t_span: tuple[float, float] | None = None,
    *,
    dt: float | None = None,
    steps: int | None = None,
    substep: Any = None,
    rtol: float = 1e-2,
    most: int = 50,
    generator: torch.Generator | None = None,
) -> Lipschitz:
    """Estimate local Lipschitz constants of f and of each layer, by power iteration on J^T J from products with J.

    Args:
        field: any field; an `AdversarialField` is taken without its perturbation.
        x0: see `odeadv.solve`.
        t_span: see `odeadv.solve`.
        dt: see `odeadv.solve`.
        steps: see `odeadv.solve`.
        substep: see `odeadv.solve`; for a network give ``**net.solve_options``.
        rtol: stop if an eigenvalue of J^T J is known to this relative accuracy.
        most: largest number of iterations per layer.
        generator: source of the starting directions; seed 0 if not given.

    Raises:
        TypeError, ValueError: naming the argument that does not fit, before anything is solved.
        SolveError: if the solve fails.
    """
    check_iteration(rtol, most)
    trajectory = walk(posed(field, x0, t_span, dt, steps), substep)
    return lipschitz_of(trajectory, rtol=rtol, most=most, generator=generator)


def lipschitz_of(
    trajectory: Trajectory, *, rtol: float = 1e-2, most: int = 50, generator: torch.Generator | None = None
) -> Lipschitz:
    """Estimate spectral norms along an unperturbed trajectory."""
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    velocities, layers, converged = [], [], []
    for layer in trajectory.layers():
        with trajectory.quiet(grad=True):
            jumps = isinstance(layer.piece, Jump)
            inner = Linearised(layer.map if jumps else layer.velocity, layer.x)
            start = random_like(layer.x, generator)
            plain, sure = _spectral(inner, start, None, rtol, most)
            whole, also = (plain, sure) if jumps else _spectral(inner, start, layer.step.h, rtol, most)
        velocities.append(math.nan if jumps else plain)
        layers.append(whole)
        converged.append(sure and also)
    return Lipschitz(trajectory.ts[:-1], velocities, layers, math.prod(layers), converged)


def _spectral(inner: Linearised, start: Tensor, h: float | None, rtol: float, most: int) -> tuple[float, bool]:
    """Return ||J||_2, or ||I + h J||_2 if ``h`` is given, and whether it has converged."""

    def squared(v: Tensor) -> Tensor:
        if h is None:
            return inner.vjp(inner.jvp(v))
        image = v + h * inner.jvp(v)
        return image + h * inner.vjp(image)

    found = largest(squared, start, rtol=rtol, most=most)
    return math.sqrt(found.modulus), found.converged


@dataclass(frozen=True)
class Growth(Result):
    """The size of a difference of states through the layers, relative to its size at the beginning.

    Attributes:
        ts: times of the N + 1 nodes.
        ratios: ||dx_n|| / ||dx_0||, one per node; the first is 1.
        relative: ||dx_n|| / ||x_n|| divided by its value at the beginning, which is free of changes of scale.
        size: ||dx_0||; 1 for an infinitesimal direction.
        linear: True if dx is an infinitesimal direction, False if it is the difference to a given start.
    """

    ts: list[float]
    ratios: list[float]
    relative: list[float]
    size: float
    linear: bool

    heading: ClassVar[str] = "Growth of a difference in the input"
    reading: ClassVar[str] = (
        "The size of a difference in the initial state after each layer; the product above bounds it."
    )

    def summary(self) -> dict[str, float]:
        """Return the few numbers that tell most."""
        return {
            "growth to the end": self.ratios[-1],
            "largest": max(self.ratios),
            "relative to the state, to the end": self.relative[-1],
        }

    def _draw(self, axes: Axes, label: str) -> None:
        axes.plot(self.ts, self.ratios, marker=".", label=label)
        style(
            axes, x="t (layer)", y="$\\|\\delta x_n\\| / \\|\\delta x_0\\|$", title="Growth of a difference", log=True
        )


def growth(
    field: AnyField,
    x0: Tensor | None = None,
    t_span: tuple[float, float] | None = None,
    *,
    direction: Tensor | None = None,
    start: Tensor | None = None,
    dt: float | None = None,
    steps: int | None = None,
    substep: Any = None,
    scheme: str | Scheme | None = None,
    generator: torch.Generator | None = None,
) -> Growth:
    """Follow the growth of a difference in the initial state through the layers of the unperturbed field.

    Args:
        field: any field; an `AdversarialField` is taken without its perturbation.
        x0: see `odeadv.solve`.
        t_span: see `odeadv.solve`.
        dt: see `odeadv.solve`.
        steps: see `odeadv.solve`.
        substep: see `odeadv.solve`; for a network give ``**net.solve_options``.
        direction: dx_0 of an infinitesimal difference, propagated by a Jacobian-vector product through the solve. If
            neither ``direction`` nor ``start`` is given, a random one is drawn.
        start: another initial state instead, such as ``net.stem(attacked_images)``; it is solved from as well.
        scheme: see `odeadv.solve`; it matters for a field of several operators.
        generator: source of the random direction; seed 0 if not given.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
        SolveError: if a solve fails.
    """
    if direction is not None and start is not None:
        raise ValueError("direction, start: got both, expected one of the two")
    whole = posed(field, x0, t_span, dt, steps)
    return growth_of(whole, substep, direction=direction, start=start, scheme=scheme, generator=generator)


def growth_of(
    field: VectorField,
    substep: Any,
    *,
    direction: Tensor | None = None,
    start: Tensor | None = None,
    scheme: str | Scheme | None = None,
    generator: torch.Generator | None = None,
) -> Growth:
    """Follow a difference in ``field``, which carries its problem; see `growth`."""
    if substep is None and isinstance(field, AdversarialField):
        substep = "euler"  # its default; a plain field, which it becomes here, has one of the order of the scheme
    field = _plain(field)
    if isinstance(substep, Mapping) and len(field.operators) == 1:
        substep = substep.get("f", "euler")
    reference = walk(field, substep, scheme=scheme)
    x0 = reference.states[0]
    for name, value in (("direction", direction), ("start", start)):
        if value is not None and (value.shape != x0.shape or value.dtype != x0.dtype):
            raise ValueError(
                f"{name}: got {value.dtype} of shape {tuple(value.shape)}, expected {x0.dtype} of shape "
                f"{tuple(x0.shape)}, those of the initial state"
            )
    if start is not None:
        other = walk(posed(field, start.detach()), substep, scheme=scheme).states
        moved = [y - x for x, y in zip(reference.states, other, strict=True)]
    else:
        v = random_like(x0, generator) if direction is None else direction.detach()
        if norm(v) == 0.0:
            raise ValueError("direction: got zeros, expected a direction")

        def nodes(x: Tensor) -> Tensor:
            steps = solve(field, x, scheme=scheme, substep=substep, save_at="steps").xs
            return torch.cat([y.reshape(-1) for y in steps])

        with differentiating(field.modules, x0.device):
            flat = Linearised(nodes, x0).jvp(v / norm(v))
        parts = torch.split(flat, [x.numel() for x in reference.states])
        moved = [part.reshape(x.shape) for part, x in zip(parts, reference.states, strict=True)]
    sizes = [norm(dx) for dx in moved]
    if sizes[0] == 0.0:
        raise ValueError("start: got the initial state itself, expected another")
    shares = [quotient(size, norm(x)) for size, x in zip(sizes, reference.states, strict=True)]
    return Growth(
        ts=reference.ts,
        ratios=[size / sizes[0] for size in sizes],
        relative=[quotient(share, shares[0]) for share in shares],
        size=sizes[0],
        linear=start is None,
    )


def _plain(field: VectorField) -> VectorField:
    """Return ``field`` without its costate."""
    return VectorField({"f": field.f}, field.problem) if isinstance(field, AdversarialField) else field
