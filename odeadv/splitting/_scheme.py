"""Compositions as data: a scheme is a table of stages, or a weighted sum of such tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Literal

from odeadv.fields import VectorField
from odeadv.support.checks import did_you_mean

CostateKind = Literal["linear", "hermite", "exact"]


@dataclass(frozen=True)
class Stage:
    """One row of a composition: ``operator`` acts for ``weight`` steps, its clock starting at ``start``.

    Attributes:
        operator: name of the operator, or its number in the field's order.
        weight: how long it acts, in units of the step; negative means backward.
        start: where its clock starts, in units of the step from the step's beginning; if not given, where the
            operator's earlier stages left it (NaN until a `Scheme` fills it in).
        frozen: the clock stands still at ``start`` instead of running with the operator. Time is then carried by the
            other operators, as when dt/dt = 1 is split along with them; a sub-step evaluates at ``start`` only.

    Raises:
        TypeError: if ``weight`` or ``start`` is not a real number, as in compositions with complex steps.
    """

    operator: int | str
    weight: float
    start: float = math.nan
    frozen: bool = False

    def __post_init__(self) -> None:
        given: dict[str, object] = {"weight": self.weight, "start": self.start}
        for name, value in given.items():
            if not isinstance(value, Real):
                hint = "; for high orders without backward steps see odeadv.schemes.extrapolated_strang"
                raise TypeError(
                    f"{name}: got {value!r}, expected a real number{hint if isinstance(value, complex) else ''}"
                )

    @property
    def stop(self) -> float:
        """Where the clock stands at the end of the stage."""
        return self.start if self.frozen else self.start + self.weight


Composition = tuple[Stage, ...]


@dataclass(frozen=True, repr=False)
class Scheme:
    """A splitting scheme: which operator acts, for how long, at what time. How it is advanced is the sub-step's.

    ``Scheme("mine", (Stage("reaction", 0.5), Stage("diffusion", 1.0), Stage("reaction", 0.5)), 2, "notes")`` is for
    fields with operators of these names; with numbers instead of names, a scheme is for any field of so many.

    Attributes:
        name: what it is called.
        stages: the table, in the order in which the stages act on the state. A mixture has none of its own:
            ``compositions`` are the tables of either kind.
        order: order of the composition with exact sub-flows; sub-steps of lower order lower it.
        source: where it is from.
        costate: the costate evaluation the scheme is defined with, if it is part of its definition.
        mixture: for averaged and extrapolated schemes, pairs of a factor and a table: the step's result is the sum
            of the factors times what the tables come to, each from the same state.
        embedded: other factors for the tables of a mixture, with which they come to a result of ``embedded_order``:
            the difference of the two estimates the error of a step at no cost. A table of factor 0 that only serves
            the estimate is not run in fixed steps.
        embedded_order: order of that other result.

    Raises:
        ValueError: with both stages and a mixture, or neither; with names for some operators and numbers for others;
            for a frozen stage without a start; or if ``embedded`` has not one factor a table.
    """

    name: str
    stages: Composition
    order: int
    source: str
    costate: CostateKind | None = None
    mixture: tuple[tuple[float, Composition], ...] = ()
    embedded: tuple[float, ...] = ()
    embedded_order: int = 0

    def __post_init__(self) -> None:
        if bool(self.stages) == bool(self.mixture):
            raise ValueError(f"stages: {self.name!r} needs either stages or a mixture of them, not both or none")
        object.__setattr__(self, "stages", _timed(self.name, self.stages))
        mixture = tuple((factor, _timed(self.name, stages)) for factor, stages in self.mixture)
        object.__setattr__(self, "mixture", mixture)
        object.__setattr__(self, "embedded", tuple(self.embedded))
        if self.embedded and (len(self.embedded) != len(mixture) or self.embedded_order < 1):
            raise ValueError(
                f"embedded, embedded_order: got {len(self.embedded)} factors of order {self.embedded_order} for the "
                f"{len(mixture)} tables of the mixture {self.name!r}, expected one a table, and an order above 0"
            )
        if len({isinstance(operator, str) for operator in self._keys()}) > 1:
            raise ValueError(f"stages: {self.name!r} has names for some operators and numbers for others, expected one")

    @property
    def compositions(self) -> tuple[tuple[float, Composition], ...]:
        """The tables with their factors: one table of factor 1, unless the scheme is a mixture."""
        return self.mixture or ((1.0, self.stages),)

    @property
    def operators(self) -> int:
        """How many operators it splits."""
        keys = self._keys()
        return len(keys) if isinstance(keys[0], str) else 1 + max(int(key) for key in keys)

    @property
    def symmetric(self) -> bool:
        """Whether it is palindromic, that is its own adjoint: Phi(-h) o Phi(h) = identity with exact sub-flows."""
        return not self.mixture and all(
            a.operator == b.operator
            and a.frozen == b.frozen
            and math.isclose(a.weight, b.weight, abs_tol=1e-14)
            and math.isclose(a.start, b.start, abs_tol=1e-14)
            for a, b in zip(self.stages, self.adjoint().stages, strict=True)
        )

    @property
    def goes_back(self) -> tuple[int | str, ...]:
        """The operators that some stage runs backward, which diffusion and other irreversible ones do not stand."""
        back = {stage.operator for _, stages in self.compositions for stage in stages if stage.weight < 0}
        return tuple(sorted(back))  # all names, or all numbers

    def freezes(self, operator: int | str) -> bool:
        """Whether the clock of ``operator`` stands still in all of its stages."""
        return all(s.frozen for _, stages in self.compositions for s in stages if s.operator == operator)

    def adjoint(self) -> Scheme:
        """The adjoint Phi*(h) = Phi(-h)^{-1}: the stages in reverse, their clocks reflected in the step.

        For a mixture, the mixture of the tables' adjoints, which has the same order but is not the inverse.
        """
        name = self.name.removesuffix("*") if self.name.endswith("*") else self.name + "*"
        mixture = tuple((factor, _reflected(stages)) for factor, stages in self.mixture)
        return replace(self, name=name, stages=_reflected(self.stages), mixture=mixture)

    def check(self) -> None:
        """Verify that every operator acts for one step in all, and that factors sum to 1.

        Raises:
            ValueError: naming the operator whose weights do not sum to 1.
        """
        if not math.isclose(math.fsum(factor for factor, _ in self.compositions), 1.0, abs_tol=1e-12):
            raise ValueError(f"scheme: the factors of the mixture {self.name!r} do not sum to 1")
        if self.embedded and not math.isclose(math.fsum(self.embedded), 1.0, abs_tol=1e-12):
            raise ValueError(f"scheme: the embedded factors of {self.name!r} do not sum to 1")
        if any(isinstance(key, int) and key < 0 for key in self._keys()):
            raise ValueError(f"scheme: {self.name!r} has a stage of a negative operator, expected 0 or more")
        named = isinstance(self._keys()[0], str)
        for _, stages in self.compositions:
            for operator in self._keys() if named else range(self.operators):
                total = math.fsum(stage.weight for stage in stages if stage.operator == operator)
                if not math.isclose(total, 1.0, abs_tol=1e-12):
                    raise ValueError(
                        f"scheme: the weights of operator {operator!r} in {self.name!r} sum to {total!r}, expected 1"
                    )

    def numbered(self, names: Sequence[str]) -> Scheme:
        """The same scheme with its operators numbered as in ``names``, if it has names for them.

        Args:
            names: the operators of a field, in its order.

        Raises:
            ValueError: if the two do not have the same operators.
        """
        keys = self._keys()
        if isinstance(keys[0], int):
            if self.operators != len(names):
                raise ValueError(
                    f"scheme: {self.name!r} splits {self.operators} operators, the field has {len(names)} "
                    f"({', '.join(names)})"
                )
            return self
        has = f"the field has {', '.join(map(repr, names))}"
        for key in keys:
            if key not in names:
                raise ValueError(f"scheme: {self.name!r} has a stage of {key!r}, but {has}{did_you_mean(key, names)}")
        for name in names:
            if name not in keys:
                raise ValueError(f"scheme: {self.name!r} has no stage of {name!r}, but {has}")
        number = {name: n for n, name in enumerate(names)}
        tables = [
            tuple(replace(stage, operator=number[str(stage.operator)]) for stage in stages)
            for _, stages in self.compositions
        ]
        if self.mixture:
            factors = [factor for factor, _ in self.mixture]
            return replace(self, mixture=tuple(zip(factors, tables, strict=True)))
        return replace(self, stages=tables[0])

    def table(self, field: VectorField | Sequence[str] | None = None) -> str:
        """The scheme as a table of text, as `print` shows it.

        Args:
            field: the field it is to split, or names of operators, for the names to stand in place of numbers.

        Raises:
            ValueError: if the scheme is not for such a field.
        """
        names = None if field is None else list(field.operators) if isinstance(field, VectorField) else list(field)
        scheme = self if names is None else self.numbered(names)
        rows = [f"{self.name}: order {self.order}{', symmetric' if self.symmetric else ''} ({self.source})"]
        width = max(8, *(len(name) for name in names or map(str, self._keys())))
        for factor, stages in scheme.compositions:
            rows += [f"{factor:+.10g} times" if self.mixture else "", f"{'operator':<{width}}        weight   clock"]
            for stage in stages:
                clock = f"{stage.start:.10g}" if stage.frozen else f"{stage.start:.10g} -> {stage.stop:.10g}"
                operator = stage.operator if names is None else names[int(stage.operator)]
                rows.append(f"{operator!s:<{width}} {stage.weight:>13.10g}   {clock}")
        return "\n".join(row for row in rows if row)

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        tables = (
            f"a mixture of {len(self.mixture)} tables, see .compositions"
            if self.mixture
            else f"{len(self.stages)} stages"
        )
        return f"Scheme({self.name!r}, order {self.order}, {self.operators} operators, {tables})"

    def _keys(self) -> list[int | str]:
        """The operators that have stages, in the order in which they first act."""
        return list(dict.fromkeys(stage.operator for _, stages in self.compositions for stage in stages))


def _timed(name: str, stages: Iterable[Stage]) -> Composition:
    """``stages`` with the starts that are not given: on each operator's own clock."""
    acted: dict[int | str, float] = {}
    result = []
    for stage in stages:
        if math.isnan(stage.start):
            if stage.frozen:
                raise ValueError(f"start: a stage of {stage.operator!r} in {name!r} is frozen and needs one")
            stage = replace(stage, start=acted.get(stage.operator, 0.0))
        acted[stage.operator] = acted.get(stage.operator, 0.0) + stage.weight
        result.append(stage)
    return tuple(result)


def merged(stages: Iterable[Stage]) -> Composition:
    """The stages with neighbours of the same operator made one, where the clock runs on from one to the other."""
    result: list[Stage] = []
    for stage in stages:
        last = result[-1] if result else None
        if last and _continues(last, stage):
            result[-1] = replace(last, weight=last.weight + stage.weight)
        else:
            result.append(stage)
    return tuple(result)


def _continues(first: Stage, second: Stage) -> bool:
    return (
        first.operator == second.operator
        and not (first.frozen or second.frozen)
        and math.isclose(first.stop, second.start, abs_tol=1e-12)
    )


def _reflected(stages: Composition) -> Composition:
    return tuple(replace(stage, start=1.0 - stage.stop) for stage in reversed(stages))


def repeated(stages: Composition, weights: Sequence[float]) -> Composition:
    """``stages`` several times over, for ``weights`` parts of the step one after the other, neighbours merged."""
    result: list[Stage] = []
    begin = 0.0
    for weight in weights:
        result += [replace(s, weight=weight * s.weight, start=begin + weight * s.start) for s in stages]
        begin += weight
    return merged(result)


def alternating(first: int, weights: Sequence[float]) -> Composition:
    """Operators 0 and 1 in turn, from ``first`` on, for ``weights``, each on its own clock."""
    acted = [0.0, 0.0]
    result: list[Stage] = []
    for i, weight in enumerate(weights):
        operator = (first + i) % 2
        result.append(Stage(operator, weight, acted[operator]))
        acted[operator] += weight
    return tuple(result)
