"""A sub-step that is itself a splitting: for an operator that is a field of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from odeadv.fields._operator import Operator, Sum, Tally
from odeadv.splitting import _registry as schemes
from odeadv.splitting._grid import Step
from odeadv.splitting._integrate import Stepper
from odeadv.splitting._scheme import Scheme
from odeadv.splitting._substep import Clock, SubStep, get_substep


@dataclass(frozen=True)
class Nested:
    """Advances an operator that is a `SplitField` by splitting it in turn.

    Attributes:
        scheme: name or `Scheme` for the inner operators.
        substep: how each of them is advanced: one for all, or a dict by their names.
        steps: equal inner steps a stage.

    Raises:
        ValueError: if ``steps`` is not a whole number from 1 on, or the scheme is inconsistent.
    """

    scheme: str | Scheme = "strang"
    substep: str | SubStep | Mapping[str, str | SubStep] = "midpoint"
    steps: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps: got {self.steps!r}, expected a whole number, at least 1")
        if isinstance(self.scheme, Scheme):
            self.scheme.check()

    @property
    def name(self) -> str:
        """What the sub-step is called."""
        return f"nested {self.scheme if isinstance(self.scheme, str) else self.scheme.name}"

    @property
    def order(self) -> float:
        """The lowest order of the inner scheme and sub-steps."""
        inner = list(self.substep.values()) if isinstance(self.substep, Mapping) else [self.substep]
        order = schemes.get(self.scheme).order if isinstance(self.scheme, str) else self.scheme.order
        return min([order, *(get_substep(substep).order for substep in inner)])

    def advance(self, operator: Operator, clock: Clock, h: float, x: Tensor, tally: Tally) -> Tensor:
        """See `SubStep.advance`.

        Raises:
            ValueError: if the operator is not a sum, or ``substep`` names an operator that it does not have.
        """
        if not isinstance(operator, Sum):
            raise ValueError("substep: Nested is for an operator that is a SplitField of at least two operators")
        names = operator.names
        if isinstance(self.substep, Mapping):
            unknown = [name for name in self.substep if name not in names]
            if unknown:
                raise ValueError(
                    f"substep: no inner operator is called {unknown[0]!r}; it has {', '.join(map(repr, names))}"
                )
            substeps = [get_substep(self.substep.get(name, "midpoint")) for name in names]
        else:
            substeps = [get_substep(self.substep)] * len(names)
        scheme = schemes.get(self.scheme, len(names)) if isinstance(self.scheme, str) else self.scheme
        scheme = scheme.numbered(names)
        stepper = Stepper(operator.operators, substeps, scheme.compositions, [tally] * len(names))
        running = clock.stop - clock.start
        for k in range(self.steps):
            begin = clock.start + running * (k / self.steps)
            end = clock.stop if k == self.steps - 1 else clock.start + running * ((k + 1) / self.steps)
            x = stepper.advance(x, Step(begin, end, h / self.steps, clock.own + k * h / self.steps))
        return x
