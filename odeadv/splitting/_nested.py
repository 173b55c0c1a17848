"""A sub-step that is itself a splitting: for an operator that is a field of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from odeadv.fields.operator import Cost, Operator
from odeadv.fields.terms import Sum
from odeadv.splitting import schemes
from odeadv.splitting._grid import TimeStep
from odeadv.splitting._scheme import Scheme
from odeadv.splitting._stepper import Stepper
from odeadv.splitting._substep import Clock, SubStep, get_substep
from odeadv.support.checks import integer


@dataclass(frozen=True)
class Nested:
    """A sub-step for an operator that is itself a `SplitField`: it is split in turn.

    Attributes:
        scheme: name or `Scheme` for the inner operators.
        substep: one sub-step for all inner operators, or a dict by their names.
        steps: number of equal inner steps per stage.

    Raises:
        TypeError: if ``steps`` is not an integer.
        ValueError: if ``steps`` is below 1, or the scheme is inconsistent.
    """

    scheme: str | Scheme = "strang"
    substep: str | SubStep | Mapping[str, str | SubStep] = "midpoint"
    steps: int = 1

    def __post_init__(self) -> None:
        integer("steps", self.steps)
        if isinstance(self.scheme, Scheme):
            self.scheme.check()

    @property
    def name(self) -> str:
        """The name shown in messages."""
        return f"nested {self.scheme if isinstance(self.scheme, str) else self.scheme.name}"

    @property
    def order(self) -> float:
        """The lowest order of the inner scheme and sub-steps."""
        inner = list(self.substep.values()) if isinstance(self.substep, Mapping) else [self.substep]
        order = schemes.get(self.scheme).order if isinstance(self.scheme, str) else self.scheme.order
        return min([order, *(get_substep(substep).order for substep in inner)])

    def of(self, operator: Operator) -> Nested:
        """Return the same with a sub-step for every term of ``operator``; the default is ``"midpoint"``.

        Raises:
            ValueError: if the operator is not a sum, or ``substep`` names an operator that it does not have.
        """
        terms, chosen = self._chosen(operator)
        return replace(
            self,
            substep={
                name: method.of(term) if isinstance(method, Nested) else method
                for (name, method), term in zip(chosen.items(), terms.operators, strict=True)
            },
        )

    def _chosen(self, operator: Operator) -> tuple[Sum, dict[str, SubStep]]:
        """Return the operator as a sum, and the sub-step of each of its terms; raises as `of`."""
        if not isinstance(operator, Sum):
            raise ValueError("substep: Nested is for an operator that is a SplitField of at least two operators")
        names = operator.names
        given = self.substep if isinstance(self.substep, Mapping) else dict.fromkeys(names, self.substep)
        unknown = [name for name in given if name not in names]
        if unknown:
            raise ValueError(
                f"substep: no inner operator is called {unknown[0]!r}; it has {', '.join(map(repr, names))}"
            )
        return operator, {name: get_substep(given.get(name, "midpoint")) for name in names}

    def runs_back(self, operator: Sum) -> list[str]:
        """Return the names of the irreversible terms of ``operator`` that run backward."""
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
        return scheme.numbered(operator.names)

    def advance(self, operator: Operator, clock: Clock, h: float, x: Tensor, cost: Cost) -> Tensor:
        """See `SubStep.advance`; raises as `of`."""
        terms, chosen = self._chosen(operator)
        inner = [Cost() for _ in chosen]
        for own in inner:
            own.watch = cost.watch
        stepper = Stepper(terms.operators, list(chosen.values()), self._table(terms).compositions, inner)
        running = clock.stop - clock.start
        for k in range(self.steps):
            begin = clock.start + running * (k / self.steps)
            end = clock.stop if k == self.steps - 1 else clock.start + running * ((k + 1) / self.steps)
            x = stepper.advance(x, TimeStep(begin, end, h / self.steps, clock.own + k * h / self.steps))
        for own in inner:
            cost.include(own)
        return x
