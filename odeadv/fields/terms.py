"""Special terms of dx/dt: a forcing (time only), a sum, pieces in time, and a costate before its recording."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from odeadv.fields._span import MovingSpan
from odeadv.fields.operator import Cost, Jump, Kept, Newton, Operator, Slopes, leading, same_shape

ALL = frozenset(("f", "flow", "solve"))


class Forcing(Operator):
    """A term that depends on time only, dx/dt = scale * value(t). A sub-step of a forcing is a quadrature rule.

    Args:
        value: ``value(t)`` returns a tensor of the shape of the state. ``t`` is a float. It is a 0-d tensor only if
            the time of another solver requires a gradient, for example in torchdiffeq's adaptive methods.
        scale: a factor, or a tensor of factors, see `leading`. A number is not multiplied into ``value`` in advance,
            which saves a pass over the tensor.
        on: ``on(t0, t1)`` returns ``value`` for the step from t0 to t1; by default ``value`` itself is used.
        source: the object that ``value`` evaluates, such as a recorded costate. Code that gets the field can read it.
    """

    def __init__(
        self,
        value: Callable[[float], Tensor],
        *,
        scale: float | Tensor = 1.0,
        on: Callable[[float, float], Callable[[float], Tensor]] | None = None,
        source: object = None,
    ) -> None:
        self.value, self.scale, self._on = value, 1.0, on
        if isinstance(scale, Tensor):
            factor = scale
            self.value = _times(factor, value)
            self._on = on and (lambda t0, t1: _times(factor, on(t0, t1)))
        else:
            self.scale = scale
        self.source = source
        super().__init__(partial(_forced, self.value, self.scale), modules=(value,))

    @property
    def abilities(self) -> frozenset[str]:
        """All three functions, see `Operator.abilities`: every sub-step of a forcing is a quadrature rule."""
        return ALL

    @property
    def constant(self) -> bool:
        """See `Operator.constant`."""
        return self._on is None

    def on(self, t0: float, t1: float) -> Forcing:
        """Return the forcing for the step from ``t0`` to ``t1``."""
        if self._on is None:
            return self
        local = copy.copy(self)  # `__init__` is avoided, because this runs on every step
        local.value, local._on = self._on(t0, t1), None
        local.f = partial(_forced, local.value, self.scale)  # a method would be a cycle that keeps `value` in memory
        return local

    def velocity(self, t: float, x: Tensor, cost: Cost) -> Tensor:
        """Return the forcing at ``t``. The time is a float, so it keeps its full precision.

        Args:
            t: the time.
            x: the state; only its shape is used.
            cost: counts the evaluation.
        """
        cost.evaluated()
        return self.scale * same_shape("costate", self.value(t), x)

    def widened(self, narrow: torch.dtype) -> Forcing:
        """Return the forcing itself for any ``narrow``, because it does not depend on the state."""
        return self

    def timed(self, span: MovingSpan) -> Forcing:
        """See `Operator.timed`."""

        def with_gradient(value: Callable[..., Tensor]) -> Callable[[float], Tensor]:
            return lambda t: value(span(torch.as_tensor(t, dtype=torch.float64)))

        on = self._on
        return Forcing(
            with_gradient(self.value),
            scale=self.scale * span.rate,
            on=on and (lambda t0, t1: with_gradient(on(t0, t1))),
            source=self.source,
        )


def _forced(value: Callable[[float], Tensor], scale: float, t: Tensor, x: Tensor) -> Tensor:
    # torchdiffeq keeps its step sizes in the autograd graph. The gradient of a solve is correct only if the time is in
    # the graph too, because both parts cancel.
    return scale * value(t if t.requires_grad else float(t.detach()))  # type: ignore[arg-type]


def _times(factor: Tensor, value: Callable[[float], Tensor]) -> Callable[[float], Tensor]:
    return lambda t: leading(factor, value(t))


class Unrecorded(Operator):
    """The term eta * dL/dx(t) before the costate has been recorded."""

    def __init__(self) -> None:
        super().__init__(self._refuse)

    @property
    def abilities(self) -> frozenset[str]:
        """All three functions. The recording replaces this term by a `Forcing`, which has all of them."""
        return ALL

    @property
    def acts(self) -> bool:
        """False, because the costate has not been recorded; see `Operator.acts`."""
        return False

    def widened(self, narrow: torch.dtype) -> Unrecorded:
        """Return the term itself, because it is never evaluated."""
        return self

    def timed(self, span: MovingSpan) -> Unrecorded:
        """Return the term itself, because it is never evaluated."""
        return self

    @staticmethod
    def _refuse(t: Tensor, x: Tensor) -> Tensor:
        raise TypeError(
            "field: dL/dx(t) of an AdversarialField is not known before a costate is recorded, so it is not a function "
            "of (t, x); use odeadv.solve(field, ...), or give another solver "
            "odeadv.driven(field, x0, t_span, steps=...) or field.driven_by(solution.costate)"
        )


class Sum(Operator):
    """The sum of several operators as one operator.

    It makes a field a term of another field, and it is the operator of a field that is solved without splitting.

    Args:
        operators: the terms.
        names: names of the terms.
        costs: one counter per term. Without them, an evaluation of the sum counts as one evaluation.
    """

    def __init__(
        self, operators: Sequence[Operator], names: Sequence[str] = (), costs: Sequence[Cost] | None = None
    ) -> None:
        super().__init__(
            lambda t, x: sum((op(t, x) for op in operators[1:]), start=operators[0](t, x)),
            solve=_common_newton(operators),
            modules=operators,
            reversible=all(operator.reversible for operator in operators),
        )
        self.operators = tuple(operators)
        self.names = tuple(names)
        self.costs = costs
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
        """Return the sum of the operators for the step from ``t0`` to ``t1``.

        Raises:
            ValueError: if one of the operators is a `Jump` on this step.
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
        return Sum(parts, self.names, self.costs)

    def velocity(self, t: float, x: Tensor, cost: Cost) -> Tensor:
        """Return the sum of the velocities of all terms."""
        if self.costs is None:
            cost.evaluated()
        costs = [Cost() for _ in self.operators] if self.costs is None else self.costs
        held = Slopes(cost)  # two terms may return the same buffer
        for operator, own in zip(self.operators, costs, strict=True):
            own.watch = cost.watch
            held.add(operator.velocity(t, x, own))
        values = held.done()
        return sum(values[1:], start=values[0])

    def implicit(self, t: float, c: float, b: Tensor, cost: Cost, kept: Kept | None = None) -> Tensor:
        """See `Operator.implicit`. If all terms except one are forcings, the solver of this one term is used."""
        costs = [cost] * len(self.operators) if self.costs is None else self.costs
        terms = list(zip(self.operators, costs, strict=True))
        free = [(term, own) for term, own in terms if not isinstance(term, Forcing)]
        if len(free) != 1:
            return super().implicit(t, c, b, cost, kept)
        for term, own in terms:
            if isinstance(term, Forcing):
                b = torch.add(b, term.velocity(t, b, own), alpha=c)
        ((term, own),) = free
        return term.implicit(t, c, b, own, kept)

    def timed(self, span: MovingSpan) -> Sum:
        """See `Operator.timed`."""
        return Sum([operator.timed(span) for operator in self.operators], self.names, self.costs)

    def with_time_dtype(self, dtype: torch.dtype) -> Sum:
        """See `Operator.with_time_dtype`."""
        return Sum([operator.with_time_dtype(dtype) for operator in self.operators], self.names, self.costs)

    def widened(self, narrow: torch.dtype) -> Sum:
        """See `Operator.widened`."""
        return Sum([operator.widened(narrow) for operator in self.operators], self.names, self.costs)


def _common_newton(operators: Sequence[Operator]) -> Newton:
    """Return the `Newton` that all terms except forcings have in common, or the default if they differ."""
    found = {operator.solver for operator in operators if not isinstance(operator, Forcing | Unrecorded)}
    only = found.pop() if len(found) == 1 else None
    return only if isinstance(only, Newton) else Newton()


class Piecewise(Operator):
    """Different operators on consecutive intervals of time, such as a residual network with one block per unit of time.

    The interval that contains the step determines the piece. The evaluation time does not, so rounding of the time does
    not matter. An evaluation at the end of an interval still uses the piece of this interval. Each step must lie within
    one interval. A `Jump` is one step over its whole interval.

    Args:
        pieces: one `Operator` or `Jump` per interval.
        edges: increasing times, one more than ``pieces``. Piece ``i`` is used on ``[edges[i], edges[i + 1]]``.

    Raises:
        ValueError: if the numbers do not match or ``edges`` do not increase.

    Example:
        >>> grow, decay = odeadv.Operator(lambda t, x: x), odeadv.Operator(lambda t, x: -x)
        >>> switched = odeadv.Piecewise([grow, decay], edges=[0.0, 0.5, 2.0])
        >>> odeadv.solve(switched, torch.ones(2), (0.0, 2.0), dt=0.1, substep="rk4").xs[-1]
        tensor([0.3679, 0.3679])
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
        super().__init__(self._evaluate, modules=self.pieces)

    @property
    def abilities(self) -> frozenset[str]:
        """The names of the functions that all pieces have. Jumps are left out, because they do not need these."""
        return ALL.intersection(*(piece.abilities for piece in self.pieces if isinstance(piece, Operator)))

    @property
    def constant(self) -> bool:
        """See `Operator.constant`."""
        return False

    @property
    def jumps(self) -> tuple[tuple[float, float], ...]:
        """The time intervals on which a `Jump` maps the state."""
        return tuple(
            (self.edges[i], self.edges[i + 1]) for i, piece in enumerate(self.pieces) if isinstance(piece, Jump)
        )

    def on(self, t0: float, t1: float) -> Operator | Jump:
        """Return the piece of the interval that contains the step from ``t0`` to ``t1``.

        Raises:
            ValueError: if the step does not lie within one interval, or is only a part of a jump.
        """
        low, high = min(t0, t1), max(t0, t1)
        index = bisect_right(self.edges, 0.5 * (low + high)) - 1
        slack = 1e-9 * max(1.0, abs(low), abs(high))  # ends of steps are sums of step sizes, which have rounding errors
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

    def with_time_dtype(self, dtype: torch.dtype) -> Piecewise:
        """See `Operator.with_time_dtype`."""
        pieces = [piece if isinstance(piece, Jump) else piece.with_time_dtype(dtype) for piece in self.pieces]
        return Piecewise(pieces, self.edges)

    def _evaluate(self, t: Tensor, x: Tensor) -> Tensor:
        time = float(t.detach())
        piece = self.pieces[min(max(bisect_right(self.edges, time) - 1, 0), len(self.pieces) - 1)]
        if isinstance(piece, Jump):
            raise ValueError(f"t: {time:g} lies on a jump of the field, whose velocity is not defined there")
        return piece(t, x)


def _few(values: Sequence[float], most: int = 4) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:most])
    return f"{shown}, ..., {values[-1]:g}" if len(values) > most else shown
