"""`Operator`, one term of dx/dt, `Jump`, a map between two times, and the checks of a user's functions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from odeadv.support.discovery import modules_of
from odeadv.support.isolation import check_unmodified, inside_transform, is_wrapped, version

VectorFunction = Callable[[Tensor, Tensor], Tensor]
Flow = Callable[[Tensor, Tensor, Tensor], Tensor]

NARROW = (torch.float16, torch.bfloat16)
_CLOCKS = {torch.float64: torch.float64, torch.complex128: torch.float64}


def clock_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the times that f is given with a state of ``dtype``: its real dtype, but at least float32.

    In the state's own dtype a time can be joined to the state (``torch.cat``) without changing its dtype. 16 bits are
    too few for a time: bfloat16 has 8 of them, three digits.
    """
    return _CLOCKS.get(dtype, torch.float32)


def as_time(value: float | Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the time ``value`` as a 0-d tensor on the device of the state ``like``; a tensor is returned as it is."""
    if isinstance(value, Tensor):
        return value
    return torch.scalar_tensor(value, dtype=dtype or clock_dtype(like.dtype), device=like.device)


def same_shape(name: str, value: object, x: Tensor) -> Tensor:
    """Return ``value``, the result of the user's function ``name``, if it fits the state ``x``.

    Raises:
        TypeError: if it is not a tensor, or has a dtype that would change the state's.
        ValueError: if its shape differs.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: returned {type(value).__name__}, expected a tensor of shape {tuple(x.shape)}")
    if value.shape != x.shape:
        raise ValueError(
            f"{name}: returned shape {tuple(value.shape)} for a state of shape {tuple(x.shape)}, expected the same"
        )
    if value.dtype != x.dtype and x.dtype not in NARROW:
        # A state of 16 bits may be promoted, as autocast does. Any other state would change its dtype on the way.
        promoted = torch.promote_types(value.dtype, x.dtype)
        if promoted != x.dtype:
            raise TypeError(
                f"{name}: returned {value.dtype} for a state of {x.dtype}; convert x0 to {promoted}, or the result to "
                f"{x.dtype}"
            )
    return value


def checked(f: VectorFunction, t: Tensor, x: Tensor) -> Tensor:
    """Return ``f(t, x)``. Not for torch.compile, see `version`.

    Raises:
        TypeError, ValueError: if f writes to ``x``, or its result does not fit ``x``.
    """
    if is_wrapped(x):
        before = version(x)
        return returned(f(t, x), x, before)
    before = -1 if x.is_inference() else x._version
    value = f(t, x)
    # The body of `returned`, written out: Python calls are most of the cost of a step on small states.
    if before >= 0 and x._version != before:
        check_unmodified("f", x, before)
    if isinstance(value, Tensor) and value.dtype is x.dtype and value.shape == x.shape:
        return value
    return same_shape("f", value, x)


def returned(value: object, x: Tensor, before: int) -> Tensor:
    """Return ``value``, which f returned for ``x`` when `version` was ``before``; raises as `checked`."""
    check_unmodified("f", x, before)
    return same_shape("f", value, x)


def watched(name: str, function: Callable[[], Tensor], x: Tensor) -> Tensor:
    """Return ``function()`` after comparing the values of the state ``x`` before and after the call.

    `version` does not see a write through ``x.data`` or through a NumPy array that shares the memory. This does, at
    the price of a copy, so the loops call it on one step out of many.

    Raises:
        ValueError: if the function ``name`` has written to ``x``.
    """
    before = x.detach().clone()
    value = function()
    now = x.detach()
    try:
        written = not torch.equal(now, before) and bool(((now != before) & ~(now.isnan() & before.isnan())).any())
    except RuntimeError:  # a fake tensor does not have values
        written = False
    if written:
        raise ValueError(
            f"{name}: modifies the state in place (through x.data or a NumPy array?); return a new tensor and leave x "
            "as it is"
        )
    return value


class Cost:
    """The cost of one operator in one run, and what the run has learned about its function.

    Attributes:
        evaluations: evaluations of the right-hand side, the flow or the map.
        vjps: vector-Jacobian products.
        watch: compare the state before and after each call, see `watched`.
        reuses: whether the function returns memory that it returned before; None if that is not known yet.
    """

    __slots__ = ("evaluations", "reuses", "vjps", "watch")

    def __init__(self) -> None:
        self.evaluations = 0
        self.vjps = 0
        self.watch = False
        self.reuses: bool | None = None

    def evaluated(self) -> None:
        """Count one evaluation. Tracing by torch.compile is not counted, since the graph would depend on the count."""
        if not torch.compiler.is_compiling():
            self.evaluations += 1


class Slopes:
    """Several results of one operator that are held at the same time.

    A function may return the same memory every time: ``torch.neg(x, out=buffer)``, a replayed CUDA graph, a bridge to
    C++. Its earlier results are then overwritten by the later ones. In the first step of a run all results are copied
    and their memory is compared; from then on they are copied only if the function reuses its memory.
    """

    def __init__(self, cost: Cost) -> None:
        self.values: list[Tensor] = []
        self._cost = cost
        self._copy = cost.reuses is not False and not torch.compiler.is_compiling() and not inside_transform()
        self._given: list[Tensor] = []

    def add(self, value: Tensor) -> None:
        """Hold ``value``, or a copy of it."""
        if not self._copy:
            self.values.append(value)
            return
        place = value.untyped_storage().data_ptr()
        # The earlier results are kept alive, so equal addresses mean shared memory and not memory that was freed.
        if place and any(place == other.untyped_storage().data_ptr() for other in self._given):
            self._cost.reuses = True
        self._given.append(value)
        self.values.append(value.clone())

    def done(self) -> list[Tensor]:
        """Return the values; the function counts as one that reuses no memory if none was shared."""
        if self._copy and self._cost.reuses is None and len(self._given) > 1:
            self._cost.reuses = False
        return self.values


class Operator:
    """One term of a vector field, dx/dt = f(t, x), with its exact flow if that is known.

    Args:
        f: ``f(t, x)``, with ``t`` a 0-d tensor and ``x`` the state. f must not write to either. It returns a tensor of
            the shape of ``x``.
        flow: ``flow(t, dt, x)``, the exact solution at ``t + dt`` of dx/dt = f from ``x`` at time ``t``. ``t`` and
            ``dt`` are 0-d tensors, and ``dt`` may be negative. The sub-step ``"exact"`` uses it.
        modules: modules that ``f`` or ``flow`` runs, so that a recording pass can protect their buffers. A module, a
            bound method of one, and modules that a function closes over or names globally are found without this.
        reversible: False for diffusion and other operators that cannot be run backward in time. A scheme with negative
            weights for such an operator gives a warning.

    Raises:
        TypeError: if ``f`` or ``flow`` is not callable.

    Example:
        >>> decay = odeadv.Operator(lambda t, x: -x, flow=lambda t, dt, x: x * torch.exp(-dt))
    """

    pieces: Sequence[Operator | Jump] = ()
    edges: Sequence[float] = ()
    time_dtype: torch.dtype | None = None  # of the times that f and flow are given; None: see `clock_dtype`

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
        """True if the operator can be evaluated; only a costate that has not been recorded cannot."""
        return True

    @property
    def constant(self) -> bool:
        """True if `on` returns the operator itself for every step."""
        return True

    @property
    def jumps(self) -> tuple[tuple[float, float], ...]:
        """The intervals on which the state jumps."""
        return ()

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        """Evaluate dx/dt at time ``t`` and state ``x``."""
        return self.f(t, x)

    def on(self, t0: float, t1: float) -> Operator | Jump:
        """Return the operator as it is on the step from ``t0`` to ``t1``: itself, unless it is `Piecewise`."""
        return self

    def velocity(self, t: float, x: Tensor, cost: Cost) -> Tensor:
        """Evaluate dx/dt for the solver: counted, and checked to fit the state."""
        if torch.compiler.is_compiling():
            return same_shape("f", self.f(as_time(t, x, self.time_dtype), x), x)
        cost.evaluations += 1
        if cost.watch:
            return watched("f", lambda: checked(self.f, as_time(t, x, self.time_dtype), x), x)
        return checked(self.f, as_time(t, x, self.time_dtype), x)

    def with_time_dtype(self, dtype: torch.dtype) -> Operator:
        """Return the same operator, whose functions are given times of ``dtype``."""
        other = copy.copy(self)
        other.time_dtype = dtype
        return other

    def widened(self, narrow: torch.dtype) -> Operator:
        """Return the same operator for a state kept in float32, whose functions are given it in ``narrow``."""
        f, flow = self.f, self.flow

        def wide_flow(t: Tensor, dt: Tensor, x: Tensor) -> Tensor:
            assert flow is not None
            y = x.to(narrow)
            return same_shape("flow", flow(t, dt, y), y).to(x.dtype)

        other = Operator(
            lambda t, x: checked(f, t, x.to(narrow)).to(x.dtype),
            flow=wide_flow if flow else None,
            modules=self.modules,
            reversible=self.reversible,
        )
        other.time_dtype = self.time_dtype
        return other

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
        """Return the state at the end of the interval, counted."""
        cost.evaluated()
        before = version(x)
        end = watched("map", lambda: self.map(x), x) if cost.watch else self.map(x)
        check_unmodified("map", x, before)
        return end
