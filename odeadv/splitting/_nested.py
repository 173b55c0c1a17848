"""Sub-steps that take several inner steps: repeated sub-steps, or a splitting of an operator that is a field."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from odeadv.fields.operator import Cost, Operator
from odeadv.fields.terms import Forcing, Sum, Unrecorded
from odeadv.splitting import schemes
from odeadv.splitting._grid import TimeStep
from odeadv.splitting._scheme import Scheme
from odeadv.splitting._stepper import Stepper
from odeadv.splitting._substep import Clock, SubStep, get_substep, is_substep
from odeadv.support.checks import integer


@dataclass(frozen=True)
class Nested:
    """A sub-step that takes several equal inner steps, with any sub-step or with a splitting of the operator.

    ``Nested("rk4", steps=10)`` takes 10 inner steps for an operator that is faster than the others.
    ``Nested("strang")`` splits an operator that is itself a `SplitField`.

    Attributes:
        scheme: a sub-step or its name, for any operator. Or a scheme or its name, for a `SplitField`.
        substep: with a scheme, one sub-step for all inner operators, or a dict of operator name to sub-step; by default
            ``"midpoint"``.
        steps: number of equal inner steps per stage.

    Raises:
        TypeError: if ``steps`` is not an integer.
        ValueError: if ``steps`` is below 1, the scheme is inconsistent, or ``substep`` is given with a sub-step.

    Example:
        >>> field = odeadv.SplitField(slow=lambda t, x: -x, fast=lambda t, x: 40 * torch.cos(40 * t) * x)
        >>> cycled = {"slow": "rk4", "fast": odeadv.Nested("rk4", steps=10)}
        >>> odeadv.solve(field, torch.ones(2), (0.0, 1.0), steps=20, substep=cycled).xs[-1]
        tensor([0.7750, 0.7750])
    """

    scheme: str | Scheme | SubStep = "strang"
    substep: str | SubStep | Mapping[str, str | SubStep] | None = None
    steps: int = 1

    def __post_init__(self) -> None:
        integer("steps", self.steps)
        if isinstance(self.scheme, Scheme):
            self.scheme.check()
        if self.whole is not None and self.substep is not None:
            raise ValueError(f"substep: got {self.substep!r} next to {self.whole.name!r}, which does not split")

    @cached_property
    def whole(self) -> SubStep | None:
        """The sub-step that is repeated, or None for a splitting."""
        return get_substep(self.scheme) if is_substep(self.scheme) else None  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        """The name of the sub-step in messages."""
        inner = self.whole or self.scheme
        return f"nested {inner if isinstance(inner, str) else inner.name}"

    @property
    def order(self) -> float:
        """The order of the sub-step, or the lowest order of the inner scheme and sub-steps."""
        if self.whole is not None:
            return self.whole.order
        given = "midpoint" if self.substep is None else self.substep
        inner = list(given.values()) if isinstance(given, Mapping) else [given]
        scheme = schemes.get(self.scheme) if isinstance(self.scheme, str) else self.scheme
        return min([scheme.order, *(get_substep(substep).order for substep in inner)])

    @property
    def needs(self) -> frozenset[str]:
        """The functions that the repeated sub-step needs, see `SubStep`."""
        return getattr(self.whole, "needs", frozenset())

    def of(self, operator: Operator) -> Nested:
        """Return the same `Nested` with a sub-step for every term of ``operator``; the default is ``"midpoint"``.

        Raises:
            ValueError: if a scheme is nested and ``operator`` is not a sum, or ``substep`` names a term that
                ``operator`` does not have.
        """
        if self.whole is not None:
            inner = self.whole.of(operator) if isinstance(self.whole, Nested) else self.whole
            return replace(self, scheme=inner)
        if isinstance(operator, Forcing | Unrecorded):
            return self
        terms, chosen = self._chosen(operator)
        return replace(
            self,
            substep={
                name: method.of(term) if isinstance(method, Nested) else method
                for (name, method), term in zip(chosen.items(), terms.operators, strict=True)
            },
        )

    def _chosen(self, operator: Operator) -> tuple[Sum, dict[str, SubStep]]:
        """Return the operator as a sum, and the sub-step of each of its terms. The errors are those of `of`."""
        if not isinstance(operator, Sum):
            raise ValueError(
                "substep: Nested with a scheme is for an operator that is a SplitField of at least two operators; "
                "Nested('rk4', steps=10) repeats a sub-step of any operator"
            )
        names = operator.names
        given = self.substep if isinstance(self.substep, Mapping) else dict.fromkeys(names, self.substep or "midpoint")
        unknown = [name for name in given if name not in names]
        if unknown:
            raise ValueError(
                f"substep: no inner operator is called {unknown[0]!r}; it has {', '.join(map(repr, names))}"
            )
        return operator, {name: get_substep(given.get(name, "midpoint")) for name in names}

    def runs_back(self, operator: Sum) -> list[str]:
        """Return the names of the irreversible terms of ``operator`` that the scheme runs backward."""
        if self.whole is not None:
            return []
        back = {int(i) for i in self._table(operator).goes_back}
        found = []
        for i, (name, term) in enumerate(zip(operator.names, operator.operators, strict=True)):
            method = self.substep.get(name) if isinstance(self.substep, Mapping) else self.substep
            if i in back and not term.reversible:
                found.append(name)
            elif isinstance(method, Nested) and isinstance(term, Sum):
                found += method.runs_back(term)
        return found

    def _table(self, operator: Sum) -> Scheme:
        scheme = schemes.get(self.scheme, len(operator.names)) if isinstance(self.scheme, str) else self.scheme
        assert isinstance(scheme, Scheme)
        return scheme.numbered(operator.names)

    def advance(self, operator: Operator, clock: Clock, h: float, x: Tensor, cost: Cost) -> Tensor:
        """See `SubStep.advance`. The errors are those of `of`."""
        if self.whole is not None:
            for step in self._inner_steps(clock, h):
                assert step.own is not None
                x = self.whole.advance(operator, Clock(step.t0, step.t1, step.own), step.h, x, cost)
            return x
        terms, chosen = self._chosen(operator)
        inner = [Cost() for _ in chosen]
        for own in inner:
            own.watch = cost.watch
        stepper = Stepper(terms.operators, list(chosen.values()), self._table(terms).compositions, inner)
        for step in self._inner_steps(clock, h):
            x = stepper.advance(x, step)
        for own in inner:
            cost.include(own)
        return x

    def _inner_steps(self, clock: Clock, h: float) -> Iterator[TimeStep]:
        running = clock.stop - clock.start
        for k in range(self.steps):
            begin = clock.start + running * (k / self.steps)
            end = clock.stop if k == self.steps - 1 else clock.start + running * ((k + 1) / self.steps)
            yield TimeStep(begin, end, h / self.steps, clock.own + k * h / self.steps)
