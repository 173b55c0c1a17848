"""What the layers do to a difference of states: bounds layer by layer, and the growth of one difference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from odeadv.diagnostics._linear import Linearised, check_iteration, largest, random_like
from odeadv.diagnostics._path import AnyField, Path, norm, quotient, walk
from odeadv.diagnostics._result import Result, median, style
from odeadv.fields import AdversarialField, Jump, VectorField, as_field
from odeadv.solver import solve
from odeadv.splitting import Scheme
from odeadv.support.isolation import differentiating

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Lipschitz(Result):
    """Spectral norms of the layers' Jacobians at the states of the unperturbed trajectory, estimated from below.

    The batch is one state: without batch statistics the norm is that of the most sensitive example.

    Attributes:
        ts: times of the layers' beginnings.
        velocity: ||J||_2 of f, one a layer; NaN at a jump.
        layer: ||I + h J||_2, of the layer as a step of Euler; of its map at a jump.
        bound: product of ``layer``: but for errors of the estimates, no small difference grows by more in such steps.
        converged: whether the iterations of a layer ended with a singular value within the tolerance.
    """

    ts: list[float]
    velocity: list[float]
    layer: list[float]
    bound: float
    converged: list[bool]

    heading: ClassVar[str] = "Lipschitz estimates"
    reading: ClassVar[str] = (
        "By how much a layer can stretch a small difference; the product bounds what the whole network does."
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
    """Local Lipschitz constants of f and of each layer, by power iteration on J^T J from products with J.

    Args:
        field: any field; of an `AdversarialField` the unperturbed part.
        x0: see `odeadv.solve`.
        t_span: see `odeadv.solve`.
        dt: see `odeadv.solve`.
        steps: see `odeadv.solve`.
        substep: see `odeadv.solve`; for a network give ``**net.solve_options``.
        rtol: stop when an eigenvalue of J^T J is known to be as close as this, relatively.
        most: iterations a layer at the most.
        generator: of the starting directions; one of seed 0 if not given.

    Raises:
        TypeError, ValueError: naming the argument that does not fit, before anything is solved.
        SolveError: if the solve fails.
    """
    check_iteration(rtol, most)
    path = walk(field, x0, t_span, dt=dt, steps=steps, substep=substep)
    return lipschitz_of(path, rtol=rtol, most=most, generator=generator)


def lipschitz_of(
    path: Path, *, rtol: float = 1e-2, most: int = 50, generator: torch.Generator | None = None
) -> Lipschitz:
    """Spectral norms along an unperturbed path."""
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    velocities, layers, converged = [], [], []
    for layer in path.layers():
        with path.quiet(grad=True):
            jumps = isinstance(layer.piece, Jump)
            inner = Linearised(layer.map if jumps else layer.velocity, layer.x)
            start = random_like(layer.x, generator)
            plain, sure = _spectral(inner, start, None, rtol, most)
            whole, also = (plain, sure) if jumps else _spectral(inner, start, layer.step.h, rtol, most)
        velocities.append(math.nan if jumps else plain)
        layers.append(whole)
        converged.append(sure and also)
    return Lipschitz(path.ts[:-1], velocities, layers, math.prod(layers), converged)


def _spectral(inner: Linearised, start: Tensor, h: float | None, rtol: float, most: int) -> tuple[float, bool]:
    """||J||_2, or ||I + h J||_2 if ``h`` is given."""

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
        ratios: ||dx_n|| / ||dx_0||, one a node; the first is 1.
        relative: (||dx_n|| / ||x_n||) over the same at the beginning: free of changes of scale and of size.
        size: ||dx_0||; 1 for an infinitesimal direction.
        linear: whether dx is infinitesimal, a direction, or the difference to a given start.
    """

    ts: list[float]
    ratios: list[float]
    relative: list[float]
    size: float
    linear: bool

    heading: ClassVar[str] = "Growth of a difference in the input"
    reading: ClassVar[str] = "What a difference in the initial state has become by the layer, beside the bound above."

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
    scheme: str | Scheme = "strang",
    generator: torch.Generator | None = None,
) -> Growth:
    """How a difference in the initial state grows through the layers of the unperturbed field.

    Args:
        field: any field; of an `AdversarialField` the unperturbed part.
        x0: see `odeadv.solve`.
        t_span: see `odeadv.solve`.
        dt: see `odeadv.solve`.
        steps: see `odeadv.solve`.
        substep: see `odeadv.solve`; for a network give ``**net.solve_options``.
        direction: dx_0 of an infinitesimal difference, propagated by a Jacobian-vector product through the solve;
            if neither it nor ``start`` is given, a random one.
        start: another initial state instead, solved from as well, such as ``net.stem(attacked_images)``.
        scheme: for a field of several operators.
        generator: of the random direction; one of seed 0 if not given.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
        SolveError: if a solve fails.
    """
    if direction is not None and start is not None:
        raise ValueError("direction, start: got both, expected one of the two")
    whole = _plain(as_field(field))
    field_substep = substep.get("f", "euler") if isinstance(substep, Mapping) and len(whole.operators) == 1 else substep
    reference = walk(whole, x0, t_span, dt=dt, steps=steps, substep=field_substep, scheme=scheme)
    return growth_of(
        reference,
        t_span,
        direction=direction,
        start=start,
        dt=dt,
        steps=steps,
        substep=field_substep,
        scheme=scheme,
        generator=generator,
    )


def growth_of(
    reference: Path,
    t_span: tuple[float, float] | None,
    *,
    direction: Tensor | None,
    start: Tensor | None,
    dt: float | None,
    steps: int | None,
    substep: Any,
    scheme: str | Scheme,
    generator: torch.Generator | None,
) -> Growth:
    """`growth` beside a path of a field without perturbation."""
    x0, field = reference.states[0], reference.field
    for name, value in (("direction", direction), ("start", start)):
        if value is not None and (value.shape != x0.shape or value.dtype != x0.dtype):
            raise ValueError(
                f"{name}: got {value.dtype} of shape {tuple(value.shape)}, expected {x0.dtype} of shape "
                f"{tuple(x0.shape)}, those of the initial state"
            )
    options: dict[str, Any] = {"dt": dt, "steps": steps, "substep": substep, "scheme": scheme}
    if start is not None:
        other = walk(field, start.detach(), t_span, **options).states
        moved = [y - x for x, y in zip(reference.states, other, strict=True)]
    else:
        v = random_like(x0, generator) if direction is None else direction.detach()
        if norm(v) == 0.0:
            raise ValueError("direction: got zeros, expected a direction")

        def nodes(x: Tensor) -> Tensor:
            return torch.cat([y.reshape(-1) for y in solve(field, x, t_span, save_at="steps", **options).xs])

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
    """``field`` without its costate."""
    return VectorField({"f": field.f}, field.problem) if isinstance(field, AdversarialField) else field
