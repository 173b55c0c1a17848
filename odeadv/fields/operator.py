"""One term of the right-hand side: `Operator`, and its piecewise and state-independent forms."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from odeadv.support.isolation import modules_of

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


def version(x: Tensor) -> int:
    """How often ``x`` has been written to; -1 in inference mode and under torch.compile, where it is not known."""
    if torch.compiler.is_compiling():
        return -1
    while _wrapped(x):  # within a torch.func transform: the tensor of the values knows
        x = torch._C._functorch.get_unwrapped(x)
    return -1 if x.is_inference() else x._version


_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def check_unmodified(name: str, x: Tensor, before: int) -> None:
    """Refuse a user's function ``name`` that wrote to the state ``x``, whose old value is still needed.

    Raises:
        ValueError: if the `version` of ``x`` is not ``before`` any more.
    """
    if before >= 0 and version(x) != before:
        raise ValueError(f"{name}: modifies the state in place; return a new tensor (for a module, inplace=False)")


def checked(f: VectorFunction, t: Tensor, x: Tensor) -> Tensor:
    """``f(t, x)``, refused if it writes to ``x`` or is not of its shape; not for torch.compile, see `version`."""
    if _wrapped(x):
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


class Tally:
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

    def velocity(self, t: float, x: Tensor, tally: Tally) -> Tensor:
        """Evaluate dx/dt for the solver: counted, and checked to have the shape of the state."""
        if torch.compiler.is_compiling():
            return same_shape("f", self.f(as_time(t, x), x), x)
        tally.evaluations += 1
        return checked(self.f, as_time(t, x), x)


class Forcing(Operator):
    """A term that depends on time only, dx/dt = scale * value(t): sub-steps of it are quadrature.

    Args:
        value: ``value(t)`` with ``t`` a float, returning a tensor of the state's shape at that time.
        scale: a factor, kept apart so that it costs no pass over the tensor.
        on: gives ``value`` restricted to a step, ``on(t0, t1)``; ``value`` itself if not given.
    """

    def __init__(
        self,
        value: Callable[[float], Tensor],
        *,
        scale: float = 1.0,
        on: Callable[[float, float], Callable[[float], Tensor]] | None = None,
    ) -> None:
        super().__init__(self._at, modules=modules_of(value))
        self.value = value
        self.scale = scale
        self._on = on

    @property
    def constant(self) -> bool:
        """See `Operator.constant`."""
        return self._on is None

    def on(self, t0: float, t1: float) -> Forcing:
        """The forcing on one step."""
        if self._on is None:
            return self
        local = copy.copy(self)  # what `__init__` looks up is the same on every step
        local.value, local._on, local.f = self._on(t0, t1), None, local._at
        return local

    def velocity(self, t: float, x: Tensor, tally: Tally) -> Tensor:
        """The forcing at ``t``, at full precision of the time."""
        tally.evaluated()
        return self.scale * same_shape("costate", self.value(t), x)

    def _at(self, t: Tensor, x: Tensor) -> Tensor:
        return self.scale * self.value(float(t.detach()))


class Unrecorded(Operator):
    """Stands for eta * dL/dx(t) until the costate has been recorded."""

    def __init__(self) -> None:
        super().__init__(self._refuse)

    @property
    def acts(self) -> bool:
        """False."""
        return False

    @staticmethod
    def _refuse(t: Tensor, x: Tensor) -> Tensor:
        raise TypeError(
            "field: dL/dx(t) of an AdversarialField is not known before a costate is recorded; use "
            "odeadv.solve(field, ...). In another solver, give the field its t_span and steps (or dt) and start at "
            "t_span[0], or use odeadv.driven(field, x0, t_span, steps=...) or field.driven_by(solution.costate)"
        )


class Sum(Operator):
    """Several operators as one: a field as a term of another, or one that is solved without splitting it.

    Args:
        operators: the terms.
        names: their names.
        tallies: where the evaluations of each are counted; without them, an evaluation of the sum counts as one.
    """

    def __init__(
        self, operators: Sequence[Operator], names: Sequence[str] = (), tallies: Sequence[Tally] | None = None
    ) -> None:
        super().__init__(
            lambda t, x: sum((op(t, x) for op in operators[1:]), start=operators[0](t, x)),
            modules=modules_of(*operators),
            reversible=all(operator.reversible for operator in operators),
        )
        self.operators = tuple(operators)
        self.names = tuple(names)
        self.tallies = tallies
        self.edges = tuple(sorted({edge for operator in operators for edge in operator.edges}))

    @property
    def constant(self) -> bool:
        """See `Operator.constant`."""
        return all(operator.constant for operator in self.operators)

    @property
    def jumps(self) -> tuple[tuple[float, float], ...]:
        """See `Operator.jumps`."""
        return tuple(jump for operator in self.operators for jump in operator.jumps)

    def on(self, t0: float, t1: float) -> Sum:
        """The sum of the operators as they are on the step.

        Raises:
            ValueError: where one of them jumps.
        """
        if self.constant:
            return self
        parts = []
        for operator in self.operators:
            part = operator.on(t0, t1)
            if isinstance(part, Jump):
                raise ValueError(
                    f"scheme: the field jumps from {t0:g} to {t1:g}, so it cannot be solved un-split; use a splitting "
                    "scheme such as 'lie' or 'strang'"
                )
            parts.append(part)
        return Sum(parts, self.names, self.tallies)

    def velocity(self, t: float, x: Tensor, tally: Tally) -> Tensor:
        """All velocities added up."""
        if self.tallies is None:
            tally.evaluated()
        tallies = [Tally() for _ in self.operators] if self.tallies is None else self.tallies
        values = [op.velocity(t, x, own) for op, own in zip(self.operators, tallies, strict=True)]
        return sum(values[1:], start=values[0])


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

    def across(self, x: Tensor, tally: Tally) -> Tensor:
        """The state at the end of the interval, counted."""
        tally.evaluated()
        before = version(x)
        end = self.map(x)
        check_unmodified("map", x, before)
        return end


class Piecewise(Operator):
    """Different operators on consecutive intervals of time: the form of a residual network, one block a unit of time.

    The piece that acts on a step is chosen by the step's interval, never by rounding an evaluation time, so a
    sub-step that evaluates at the end of an interval still sees the piece of that interval. Steps must not
    straddle two pieces; on a `Jump` the whole interval is one step.

    Args:
        pieces: `Operator` or `Jump`, one an interval.
        edges: increasing times, one more than pieces: piece ``i`` acts on ``[edges[i], edges[i + 1]]``.

    Raises:
        ValueError: if the numbers do not match or ``edges`` do not increase.
    """

    def __init__(self, pieces: Sequence[Operator | Jump], edges: Sequence[float]) -> None:
        self.pieces = tuple(pieces)
        self.edges = tuple(float(edge) for edge in edges)
        if len(self.edges) != len(self.pieces) + 1 or not self.pieces:
            raise ValueError(
                f"edges: got {len(self.edges)} times for {len(self.pieces)} pieces, expected one time more than pieces"
            )
        if any(b <= a for a, b in pairwise(self.edges)):
            raise ValueError(f"edges: got {self.edges}, expected increasing times")
        super().__init__(self._evaluate, modules=modules_of(*self.pieces))

    @property
    def constant(self) -> bool:
        """See `Operator.constant`."""
        return False

    @property
    def jumps(self) -> tuple[tuple[float, float], ...]:
        """The intervals on which the state jumps."""
        return tuple(
            (self.edges[i], self.edges[i + 1]) for i, piece in enumerate(self.pieces) if isinstance(piece, Jump)
        )

    def on(self, t0: float, t1: float) -> Operator | Jump:
        """The piece of the interval that contains the step from ``t0`` to ``t1``."""
        low, high = min(t0, t1), max(t0, t1)
        index = bisect_right(self.edges, 0.5 * (low + high)) - 1
        slack = 1e-9 * max(1.0, abs(low), abs(high))
        if not 0 <= index < len(self.pieces) or low < self.edges[index] - slack or high > self.edges[index + 1] + slack:
            raise ValueError(
                f"dt: the step from {t0:g} to {t1:g} does not lie within one piece of the field, whose edges are at "
                f"{_few(self.edges)}; choose dt so that steps end on the edges"
            )
        piece = self.pieces[index]
        whole = abs(low - self.edges[index]) <= slack and abs(high - self.edges[index + 1]) <= slack
        if isinstance(piece, Jump) and not (whole and t1 > t0):
            raise ValueError(
                f"dt: the step from {t0:g} to {t1:g} lies within the jump from {self.edges[index]:g} to "
                f"{self.edges[index + 1]:g}; a jump is one forward step over its whole interval"
            )
        return piece

    def _evaluate(self, t: Tensor, x: Tensor) -> Tensor:
        index = min(max(bisect_right(self.edges, float(t)) - 1, 0), len(self.pieces) - 1)
        piece = self.pieces[index]
        if isinstance(piece, Jump):
            raise ValueError(f"t: {float(t):g} lies on a jump of the field, which has no velocity there")
        return piece(t, x)


def _few(values: Sequence[float], most: int = 4) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:most])
    return f"{shown}, ..., {values[-1]:g}" if len(values) > most else shown
