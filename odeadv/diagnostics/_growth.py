"""Growth of a difference between two states: a bound for each layer, and the growth of one given difference."""

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
    """Spectral norms of the Jacobians of the layers on the unperturbed trajectory, estimated from below.

    The whole batch is one state. Without batch statistics the norm is the norm of the most sensitive example.

    Attributes:
        ts: times at the beginnings of the layers.
        velocity: ||J||_2 of the Jacobian J = df/dx, one per layer; NaN for a jump.
        layer: ||I + h J||_2 of the layer as an Euler step of size h, one per layer; for a jump, the norm of the
            Jacobian of its map.
        bound: product of ``layer``. If the estimates were exact, no small difference could grow by more. They are lower
            bounds, within the tolerance if all have ``converged``.
        converged: True for each layer with a singular value within the tolerance.
    """

    ts: list[float]
    velocity: list[float]
    layer: list[float]
    bound: float
    converged: list[bool]

    heading: ClassVar[str] = "Lipschitz estimates"
    reading: ClassVar[str] = (
        "The largest factor by which a layer stretches a small difference, estimated from below; the product would "
        "bound the whole network if the estimates were exact."
    )

    def summary(self) -> dict[str, float]:
        """Return the most important numbers of the result, by name."""
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
    """Estimate local Lipschitz constants of f and of each layer, by power iteration on J^T J with J = df/dx.

    Args:
        field: any field. For an `AdversarialField` the perturbation is left out.
        x0: as for `odeadv.solve`.
        t_span: as for `odeadv.solve`.
        dt: as for `odeadv.solve`.
        steps: as for `odeadv.solve`.
        substep: as for `odeadv.solve`. For a network give ``**net.solve_options``.
        rtol: relative accuracy of the eigenvalue of J^T J at which the iteration stops.
        most: largest number of iterations per layer.
        generator: source of the random starting directions; by default a generator with seed 0.

    Raises:
        TypeError, ValueError: if an argument does not fit, before the solve starts. The message names the argument.
        SolveError: if the solve fails.
    """
    check_iteration(rtol, most)
    trajectory = walk(posed(field, x0, t_span, dt, steps), substep)
    return lipschitz_of(trajectory, rtol=rtol, most=most, generator=generator)


def lipschitz_of(
    trajectory: Trajectory, *, rtol: float = 1e-2, most: int = 50, generator: torch.Generator | None = None
) -> Lipschitz:
    """Return the result of `lipschitz` for an unperturbed trajectory."""
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
    """Return the spectral norm of the Jacobian J of ``inner`` (of I + h J if ``h`` is given), and True if converged."""

    def squared(v: Tensor) -> Tensor:
        if h is None:
            return inner.vjp(inner.jvp(v))
        image = v + h * inner.jvp(v)
        return image + h * inner.vjp(image)

    found = largest(squared, start, rtol=rtol, most=most)
    return math.sqrt(found.modulus), found.converged


@dataclass(frozen=True)
class Growth(Result):
    """The size of a difference dx_n of two states after each layer n, relative to its size at the beginning.

    Attributes:
        ts: times of the N + 1 nodes.
        ratios: ||dx_n|| / ||dx_0||, one per node; the first is 1.
        relative: ||dx_n|| / ||x_n|| divided by ||dx_0|| / ||x_0||. Changes in the scale of the state cancel.
        size: ||dx_0||; 1 for an infinitesimal difference.
        linear: True if dx is infinitesimal, False if it is the difference to the state ``start``.
    """

    ts: list[float]
    ratios: list[float]
    relative: list[float]
    size: float
    linear: bool

    heading: ClassVar[str] = "Growth of a difference in the input"
    reading: ClassVar[str] = (
        "The size of a difference in the initial state after each layer; the product above bounds it if its "
        "estimates are exact."
    )

    def summary(self) -> dict[str, float]:
        """Return the most important numbers of the result, by name."""
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
        field: any field. For an `AdversarialField` the perturbation is left out.
        x0: as for `odeadv.solve`.
        t_span: as for `odeadv.solve`.
        dt: as for `odeadv.solve`.
        steps: as for `odeadv.solve`.
        substep: as for `odeadv.solve`. For a network give ``**net.solve_options``.
        direction: direction of an infinitesimal difference of the initial states. A Jacobian-vector product through the
            solve propagates it. If neither ``direction`` nor ``start`` is given, the direction is random.
        start: a second initial state, such as ``net.stem(attacked_images)``. The field is solved from both states.
        scheme: as for `odeadv.solve`. It is used for a field with several operators only.
        generator: source of the random direction; by default a generator with seed 0.

    Raises:
        TypeError, ValueError: if an argument does not fit. The message names the argument.
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
    """Return the result of `growth` for ``field``, which must contain its problem."""
    if substep is None and isinstance(field, AdversarialField):
        substep = "euler"  # the default of an `AdversarialField`; the default of a plain field depends on the scheme
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
