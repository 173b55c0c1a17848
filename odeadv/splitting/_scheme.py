"""Compositions as data: a scheme is a table of stages, or a weighted sum of such tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

CostateKind = Literal["linear", "hermite", "exact"]


@dataclass(frozen=True)
class Stage:
    """One row of a composition: ``operator`` acts for ``weight`` steps, its clock starting at ``start``.

    Attributes:
        operator: number of the operator, in the field's order.
        weight: how long it acts, in units of the step; negative means backward.
        start: where its clock starts, in units of the step from the step's beginning.
        frozen: the clock stands still at ``start`` instead of running with the operator. Time is then carried by the
            other operators, as when dt/dt = 1 is split along with them; a sub-step evaluates at ``start`` only.
    """

    operator: int
    weight: float
    start: float
    frozen: bool = False

    @property
    def stop(self) -> float:
        """Where the clock stands at the end of the stage."""
        return self.start if self.frozen else self.start + self.weight


Composition = tuple[Stage, ...]


@dataclass(frozen=True)
class Scheme:
    """A splitting scheme: which operator acts, for how long, at what time. How it is advanced is the sub-step's.

    Attributes:
        name: what it is called.
        stages: the table, in the order in which the stages act on the state; empty for a mixture.
        order: order of the composition with exact sub-flows; sub-steps of lower order lower it.
        source: where it is from.
        costate: the costate evaluation the scheme is defined with, if it is part of its definition.
        mixture: for averaged and extrapolated schemes, pairs of a factor and a table: the step's result is the sum
            of the factors times what the tables come to, each from the same state.
    """

    name: str
    stages: Composition
    order: int
    source: str
    costate: CostateKind | None = None
    mixture: tuple[tuple[float, Composition], ...] = ()

    def __post_init__(self) -> None:
        if bool(self.stages) == bool(self.mixture):
            raise ValueError(f"stages: {self.name!r} needs either stages or a mixture of them, not both or none")

    @property
    def compositions(self) -> tuple[tuple[float, Composition], ...]:
        """The tables with their factors: one table of factor 1, unless the scheme is a mixture."""
        return self.mixture or ((1.0, self.stages),)

    @property
    def operators(self) -> int:
        """How many operators it splits."""
        return 1 + max(stage.operator for _, stages in self.compositions for stage in stages)

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
    def goes_back(self) -> tuple[int, ...]:
        """The operators that some stage runs backward, which diffusion and other irreversible ones do not stand."""
        back = {stage.operator for _, stages in self.compositions for stage in stages if stage.weight < 0}
        return tuple(sorted(back))

    def freezes(self, operator: int) -> bool:
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
        if any(stage.operator < 0 for _, stages in self.compositions for stage in stages):
            raise ValueError(f"scheme: {self.name!r} has a stage of a negative operator, expected 0 or more")
        for _, stages in self.compositions:
            for operator in range(self.operators):
                total = math.fsum(stage.weight for stage in stages if stage.operator == operator)
                if not math.isclose(total, 1.0, abs_tol=1e-12):
                    raise ValueError(
                        f"scheme: the weights of operator {operator} in {self.name!r} sum to {total!r}, expected 1"
                    )

    def __str__(self) -> str:
        rows = [f"{self.name}: order {self.order}{', symmetric' if self.symmetric else ''} ({self.source})"]
        for factor, stages in self.compositions:
            rows += [f"{factor:+.10g} times" if self.mixture else "", "operator        weight   clock"]
            for stage in stages:
                clock = f"{stage.start:.10g}" if stage.frozen else f"{stage.start:.10g} -> {stage.stop:.10g}"
                rows.append(f"{stage.operator:<8d} {stage.weight:>13.10g}   {clock}")
        return "\n".join(row for row in rows if row)


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
