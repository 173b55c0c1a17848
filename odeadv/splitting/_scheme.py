"""Compositions as data: a scheme is a table of stages, or a weighted sum of several tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Literal

from odeadv.fields import VectorField
from odeadv.splitting._order import measured_order
from odeadv.support.checks import did_you_mean, shown

#: How the costate is evaluated between nodes; see the argument ``costate`` of `odeadv.solve`.
CostateKind = Literal["linear", "hermite", "exact", "collocation"]


@dataclass(frozen=True)
class Stage:
    """One row of a composition: ``operator`` acts for ``weight`` steps, and its clock starts at ``start``.

    Attributes:
        operator: name of the operator, or its number in the order of the field.
        weight: duration in units of the step. A negative weight runs the operator backward.
        start: time of the clock at the start of the stage, in units of the step, counted from the beginning of the
            step. By default the clock continues from the end of the operator's earlier stages. (The default is NaN
            until a `Scheme` replaces it.)
        frozen: True stops the clock at ``start``, and a sub-step evaluates the operator at this time only. Time then
            belongs to the other operators: dt/dt = 1 is split together with their equations.

    Raises:
        TypeError: if ``weight`` or ``start`` is not a real number. Compositions with complex steps are not supported.

    Example:
        >>> odeadv.schemes.get("lie").stages
        (Stage(operator=0, weight=1.0, start=0.0, frozen=False), Stage(operator=1, weight=1.0, start=1.0, frozen=True))
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
        """Time of the clock at the end of the stage, in units of the step."""
        return self.start if self.frozen else self.start + self.weight


Composition = tuple[Stage, ...]


@dataclass(frozen=True, repr=False)
class Scheme:
    """A splitting scheme: a table of the operators that act, their durations and their times.

    The sub-step is chosen separately: it is the method that advances an operator over one stage.

    ``Scheme("mine", (Stage("reaction", 0.5), Stage("diffusion", 1.0), Stage("reaction", 0.5)), 2, "notes")`` is for
    fields with operators of these names. A scheme with numbers instead of names is for all fields with the same number
    of operators.

    Attributes:
        name: name of the scheme.
        stages: the table, in the order in which the stages act on the state; empty for a mixture. ``compositions``
            holds the tables of both kinds of schemes.
        order: order of the composition with exact sub-flows. Sub-steps of lower order lower the order of the result.
            `measure_order` measures the order.
        source: reference of the scheme; it is only shown.
        costate: the costate evaluation, if it is part of the definition of the scheme.
        mixture: for averaged and extrapolated schemes, pairs of a factor and a table. Each table starts from the same
            state. The result of the step is the sum of factor times result over all tables.

    Raises:
        ValueError: if both stages and a mixture are given, or neither of them. Also if some operators have names and
            others have numbers, or if a frozen stage lacks its start.

    Example:
        >>> S = odeadv.Stage
        >>> scheme = odeadv.Scheme("mine", (S("a", 0.5), S("b", 1.0), S("a", 0.5)), order=2, source="notes")
        >>> round(scheme.measure_order())
        2
    """

    name: str
    stages: Composition
    order: int
    source: str = ""
    costate: CostateKind | None = None
    mixture: tuple[tuple[float, Composition], ...] = ()

    def __post_init__(self) -> None:
        if bool(self.stages) == bool(self.mixture):
            raise ValueError(f"stages: {self.name!r} needs either stages or a mixture of them, not both or none")
        object.__setattr__(self, "stages", _timed(self.name, self.stages))
        mixture = tuple((factor, _timed(self.name, stages)) for factor, stages in self.mixture)
        object.__setattr__(self, "mixture", mixture)
        if len({isinstance(operator, str) for operator in self._keys()}) > 1:
            raise ValueError(f"stages: {self.name!r} has names for some operators and numbers for others, expected one")

    @property
    def compositions(self) -> tuple[tuple[float, Composition], ...]:
        """The tables with their factors. A scheme that is not a mixture is one table with the factor 1."""
        return self.mixture or ((1.0, self.stages),)

    @property
    def operators(self) -> int:
        """The number of operators of the scheme."""
        keys = self._keys()
        return len(keys) if isinstance(keys[0], str) else 1 + max(int(key) for key in keys)

    @property
    def symmetric(self) -> bool:
        """True if the scheme Phi equals its adjoint, so that Phi(-h) o Phi(h) = identity with exact sub-flows."""
        return not self.mixture and all(
            a.operator == b.operator
            and a.frozen == b.frozen
            and math.isclose(a.weight, b.weight, abs_tol=1e-14)
            and math.isclose(a.start, b.start, abs_tol=1e-14)
            for a, b in zip(self.stages, self.adjoint().stages, strict=True)
        )

    @property
    def goes_back(self) -> tuple[int | str, ...]:
        """The operators that a stage runs backward. They must not be irreversible."""
        back = {stage.operator for _, stages in self.compositions for stage in stages if stage.weight < 0}
        return tuple(sorted(back))  # the operators are either all names or all numbers

    @property
    def reach(self) -> tuple[float, float]:
        """The earliest and latest time of all clocks, in units of the step: (0, 1) if f is evaluated inside the step.

        With negative weights the clocks may leave the step. The first step of a solve, from ``t0``, then evaluates f at
        ``t0 + reach[0] * h``. The last step, to ``t1``, evaluates f at ``t1 + (reach[1] - 1) * h``. Both times are
        outside the span.
        """
        clocks = [clock for _, stages in self.compositions for s in stages for clock in (s.start, s.stop)]
        return min(0.0, *clocks), max(1.0, *clocks)

    def freezes(self, operator: int | str) -> bool:
        """Return True if the clock of ``operator`` is frozen in all of its stages."""
        return all(s.frozen for _, stages in self.compositions for s in stages if s.operator == operator)

    def adjoint(self) -> Scheme:
        """Return the adjoint Phi*(h) = Phi(-h)^{-1}: the stages in reverse order, with each time s replaced by 1 - s.

        For a mixture, return the mixture of the adjoint tables. It has the same order, but is not the inverse.
        """
        name = self.name.removesuffix("*") if self.name.endswith("*") else self.name + "*"
        mixture = tuple((factor, _reflected(stages)) for factor, stages in self.mixture)
        return replace(self, name=name, stages=_reflected(self.stages), mixture=mixture)

    def check(self) -> None:
        """Check that the weights of each operator sum to 1, and that the factors of a mixture sum to 1.

        Raises:
            ValueError: if a sum differs from 1 (the message names the operator), or an operator number is negative.
        """
        if not math.isclose(math.fsum(factor for factor, _ in self.compositions), 1.0, abs_tol=1e-12):
            raise ValueError(f"scheme: the factors of the mixture {self.name!r} do not sum to 1")
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
        """Return the same scheme with names replaced by numbers, the positions in ``names``.

        Args:
            names: names of the operators of a field, in the order of the field.

        Raises:
            ValueError: if the scheme and the field do not have the same operators.
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
        remedy = "; name the stages after the operators, or number them from 0"
        for key in keys:
            if key not in names:
                hint = did_you_mean(key, names) or remedy
                raise ValueError(f"scheme: {self.name!r} has a stage of {key!r}, but {has}{hint}")
        for name in names:
            if name not in keys:
                raise ValueError(f"scheme: {self.name!r} lacks a stage of {name!r}, but {has}")
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
        """Return the scheme as a table of text. `print` shows the same table.

        Args:
            field: the field to be split, or names of operators. The table then shows names instead of numbers.

        Raises:
            ValueError: if the scheme and the field do not have the same operators.
        """
        names = None if field is None else list(field.operators) if isinstance(field, VectorField) else list(field)
        scheme = self if names is None else self.numbered(names)
        source = f" ({self.source})" if self.source else ""
        rows = [f"{self.name}: order {self.order}{', symmetric' if self.symmetric else ''}{source}"]
        width = max(8, *(len(name) for name in names or map(str, self._keys())))
        for factor, stages in scheme.compositions:
            rows += [f"{factor:+.10g} times" if self.mixture else "", f"{'operator':<{width}}        weight   clock"]
            for stage in stages:
                clock = f"{stage.start:.10g}" if stage.frozen else f"{stage.start:.10g} -> {stage.stop:.10g}"
                operator = stage.operator if names is None else names[int(stage.operator)]
                rows.append(f"{operator!s:<{width}} {stage.weight:>13.10g}   {clock}")
        return "\n".join(row for row in rows if row)

    def measure_order(self, digits: int = 40) -> float:
        """Measure the order of the composition with exact sub-flows, in ``digits`` decimal digits.

        One step of size h and one step of size h/2 are compared with the exact solution of a linear problem,
        dx/dt = sum_p (M_p x + t b_p). Its random matrices M_p do not commute. It depends on time, so the clocks are
        tested too. The order is log2 of the ratio of the two errors, minus 1.

        Returns:
            The order; infinity if the scheme is exact.

        Example:
            >>> round(odeadv.schemes.get("yoshida4").measure_order())
            4
        """
        return measured_order(self.compositions, digits)

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
        """Return the names or numbers of the operators that have stages, in the order of their first stages."""
        return list(dict.fromkeys(stage.operator for _, stages in self.compositions for stage in stages))


def _timed(name: str, stages: Iterable[Stage]) -> Composition:
    """Return ``stages`` with every missing start filled in, so that it continues the operator's own clock."""
    acted: dict[int | str, float] = {}
    result = []
    for stage in stages:
        if not isinstance(stage, Stage):
            raise TypeError(f"stages: got {shown(stage)} in {name!r}, expected odeadv.Stage(operator, weight)")
        if math.isnan(stage.start):
            if stage.frozen:
                raise ValueError(f"start: a stage of {stage.operator!r} in {name!r} is frozen and needs one")
            stage = replace(stage, start=acted.get(stage.operator, 0.0))
        acted[stage.operator] = acted.get(stage.operator, 0.0) + stage.weight
        result.append(stage)
    return tuple(result)


def merged(stages: Iterable[Stage]) -> Composition:
    """Return the stages after merging neighbours that have the same operator and a continuous clock."""
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
    """Return ``stages`` once per part of the step, with neighbours merged. ``weights`` are the sizes of the parts.

    Args:
        stages: the stages of one full step.
        weights: sizes of the parts as fractions of the step. Their sum is 1 for a consistent scheme; a negative part
            runs backward.
    """
    result: list[Stage] = []
    begin = 0.0
    for weight in weights:
        result += [replace(s, weight=weight * s.weight, start=begin + weight * s.start) for s in stages]
        begin += weight
    return merged(result)


def alternating(first: int, weights: Sequence[float]) -> Composition:
    """Return stages with durations ``weights`` of operators 0 and 1 in turn, from ``first`` on, on their own clocks.

    Args:
        first: number of the operator of the first stage, 0 or 1.
        weights: duration of each stage as a fraction of the step. For a consistent scheme, the weights of each operator
            have the sum 1.
    """
    acted = [0.0, 0.0]
    result: list[Stage] = []
    for i, weight in enumerate(weights):
        operator = (first + i) % 2
        result.append(Stage(operator, weight, acted[operator]))
        acted[operator] += weight
    return tuple(result)
