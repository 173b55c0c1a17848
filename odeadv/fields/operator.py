"""One term of the right-hand side: `Operator`, and its piecewise and state-independent forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from odeadv.support.discovery import modules_of
from odeadv.support.isolation import check_unmodified, is_wrapped, version

VectorFunction = Callable[[Tensor, Tensor], Tensor]
Flow = Callable[[Tensor, Tensor, Tensor], Tensor]


_CLOCKS = {torch.float64: torch.float64, torch.complex128: torch.float64}


def clock_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of times beside a state of ``dtype``: its real type, but at least float32."""
    return _CLOCKS.get(dtype, torch.float32)


def as_time(value: float | Tensor, like: Tensor) -> Tensor:
    """The time ``value`` as a 0-d tensor on the device of the state ``like``; a tensor as it is."""
    if isinstance(value, Tensor):
        return value
    return torch.scalar_tensor(value, dtype=clock_dtype(like.dtype), device=like.device)


def same_shape(name: str, value: object, x: Tensor) -> Tensor:
    """``value``, what the user's function ``name`` returned, if it is a tensor of the shape of the state ``x``.

    Raises:
        TypeError: if it is not a tensor, or of a dtype that would change the state's.
        ValueError: if its shape differs.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: returned {type(value).__name__}, expected a tensor of shape {tuple(x.shape)}")
    if value.shape != x.shape:
        raise ValueError(
            f"{name}: returned shape {tuple(value.shape)} for a state of shape {tuple(x.shape)}, expected the same"
        )
    if value.dtype != x.dtype and x.dtype not in (torch.float16, torch.bfloat16):
        # A state of low precision may be promoted, as autocast does; any other would change its dtype on the way.
        promoted = torch.promote_types(value.dtype, x.dtype)
        if promoted != x.dtype:
            raise TypeError(
                f"{name}: returned {value.dtype} for a state of {x.dtype}; convert x0 to {promoted}, or the result to "
                f"{x.dtype}"
            )
    return value


def checked(f: VectorFunction, t: Tensor, x: Tensor) -> Tensor:
    """``f(t, x)``, refused if it writes to ``x`` or is not of its shape; not for torch.compile, see `version`."""
    if is_wrapped(x):
        before = version(x)
        return returned(f(t, x), x, before)
    before = -1 if x.is_inference() else x._version
    value = f(t, x)
    # What `returned` does, written out: calls are most of what a step costs.
    if before >= 0 and x._version != before:
        check_unmodified("f", x, before)
    if isinstance(value, Tensor) and value.dtype is x.dtype and value.shape == x.shape:
        return value
    return same_shape("f", value, x)


def returned(value: object, x: Tensor, before: int) -> Tensor:
    """``value``, what f returned for ``x`` of that `version`, refused as `checked` does."""
    check_unmodified("f", x, before)
    return same_shape("f", value, x)


class Cost:
    """Counts what one operator cost: evaluations of its right-hand side, and vector-Jacobian products."""

    __slots__ = ("evaluations", "vjps")

    def __init__(self) -> None:
        self.evaluations = 0
        self.vjps = 0

    def evaluated(self) -> None:
        """Count one evaluation (but not the tracing of one by torch.compile, whose graph would depend on the count)."""
        if not torch.compiler.is_compiling():
            self.evaluations += 1


class Operator:
    """One term of a vector field, dx/dt = f(t, x), with its exact flow if that is known.

    Args:
        f: ``f(t, x)``, with ``t`` a 0-d tensor and ``x`` the state, neither of which it may write to; returns a tensor
            of the shape of ``x``.
        flow: ``flow(t, dt, x)``, the exact solution at ``t + dt`` of dx/dt = f from ``x`` at time ``t``; ``t`` and
            ``dt`` are 0-d tensors and ``dt`` may be negative. Used by the sub-step ``"exact"``.
        modules: modules that ``f`` or ``flow`` runs, so that a recording pass can protect their buffers. A module, a
            bound method of one, and what a function closes over or names globally are found without being named.
        reversible: False for diffusion and the like, which cannot be run backward; a scheme with negative weights
            for it then gives a warning.

    Raises:
        TypeError: if ``f`` or ``flow`` is not callable.
    """

    pieces: Sequence[Operator | Jump] = ()
    edges: Sequence[float] = ()

    def __init__(
        self,
        f: VectorFunction,
        *,
        flow: Flow | None = None,
        modules: Sequence[nn.Module] = (),
        reversible: bool = True,
    ) -> None:
        if not callable(f):
            raise TypeError(f"f: got {type(f).__name__}, expected a callable f(t, x) returning dx/dt")
        if flow is not None and not callable(flow):
            raise TypeError(f"flow: got {type(flow).__name__}, expected a callable flow(t, dt, x) or None")
        self.f = f
        self.flow = flow
        self.reversible = reversible
        self.modules: tuple[nn.Module, ...] = modules_of(f, flow, *modules)

    @property
    def acts(self) -> bool:
        """Whether the operator can be evaluated; only a costate that has not been recorded cannot."""
        return True

    @property
    def constant(self) -> bool:
        """Whether `on` gives the operator itself on every step."""
        return True

    @property
    def jumps(self) -> tuple[tuple[float, float], ...]:
        """The intervals on which the state jumps."""
        return ()

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        """Evaluate dx/dt at time ``t`` and state ``x``."""
        return self.f(t, x)

    def on(self, t0: float, t1: float) -> Operator | Jump:
        """The operator as it is on the step from ``t0`` to ``t1``: itself, unless it is `Piecewise`."""
        return self

    def velocity(self, t: float, x: Tensor, cost: Cost) -> Tensor:
        """Evaluate dx/dt for the solver: counted, and checked to have the shape of the state."""
        if torch.compiler.is_compiling():
            return same_shape("f", self.f(as_time(t, x), x), x)
        cost.evaluations += 1
        return checked(self.f, as_time(t, x), x)

    def euler(self, t: float, h: float, x: Tensor, cost: Cost) -> Tensor:
        """Return x + h f(t, x), one step of Euler."""
        return torch.add(x, self.velocity(t, x, cost), alpha=h)


class Jump:
    """A map that takes the state from one end of an interval to the other, where no ODE step can (shapes change).

    Args:
        map: ``map(x)``, the state at the end of the interval.
        modules: modules that ``map`` runs.
    """

    def __init__(self, map: Callable[[Tensor], Tensor], *, modules: Sequence[nn.Module] = ()) -> None:
        if not callable(map):
            raise TypeError(f"map: got {type(map).__name__}, expected a callable map(x)")
        self.map = map
        self.modules = modules_of(map, *modules)

    def across(self, x: Tensor, cost: Cost) -> Tensor:
        """The state at the end of the interval, counted."""
        cost.evaluated()
        before = version(x)
        end = self.map(x)
        check_unmodified("map", x, before)
        return end
