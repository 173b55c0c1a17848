"""Compositions as data: a scheme is a table of stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

CostateKind = Literal["linear", "hermite", "exact"]


@dataclass(frozen=True)
class Stage:
    """One row of a composition: ``operator`` acts for ``weight`` steps, its clock starting at ``start``.

    Attributes:
        operator: number of the operator, in the field's order.
        weight: how long it acts, in units of the step.
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


@dataclass(frozen=True)
class Scheme:
    """A splitting scheme: which operator acts, for how long, at what time. How it is advanced is the sub-step's.

    Attributes:
        name: what it is called.
        stages: the table, in the order in which the stages act on the state.
        order: order of the composition with exact sub-flows; sub-steps of lower order lower it.
        source: where it is from.
        costate: the costate evaluation the scheme is defined with, if it is part of its definition.
    """

    name: str
    stages: tuple[Stage, ...]
    order: int
    source: str
    costate: CostateKind | None = None

    @property
    def operators(self) -> int:
        """How many operators it splits."""
        return 1 + max(stage.operator for stage in self.stages)

    @property
    def symmetric(self) -> bool:
        """Whether it is palindromic, that is its own adjoint: Phi(-h) o Phi(h) = identity with exact sub-flows."""
        mirrored = self.adjoint().stages
        return all(
            a.operator == b.operator
            and a.frozen == b.frozen
            and math.isclose(a.weight, b.weight, abs_tol=1e-14)
            and math.isclose(a.start, b.start, abs_tol=1e-14)
            for a, b in zip(self.stages, mirrored, strict=True)
        )

    def adjoint(self) -> Scheme:
        """The adjoint Phi*(h) = Phi(-h)^{-1}: the stages in reverse, their clocks reflected in the step."""
        stages = tuple(replace(stage, start=1.0 - stage.stop) for stage in reversed(self.stages))
        name = self.name.removesuffix("*") if self.name.endswith("*") else self.name + "*"
        return replace(self, name=name, stages=stages)

    def check(self) -> None:
        """Verify that every operator acts for one step in all.

        Raises:
            ValueError: naming the operator whose weights do not sum to 1.
        """
        for operator in range(self.operators):
            total = math.fsum(stage.weight for stage in self.stages if stage.operator == operator)
            if not math.isclose(total, 1.0, abs_tol=1e-12):
                raise ValueError(
                    f"scheme: the weights of operator {operator} in {self.name!r} sum to {total!r}, expected 1"
                )

    def restricted_to(self, active: Sequence[int]) -> tuple[Stage, ...]:
        """The stages of the operators in ``active`` only, renumbered, neighbours of the same operator merged.

        An operator that is left alone acts in one stage of weight exactly 1, so that a field whose other terms
        vanish is advanced bit for bit as if it had never been split.
        """
        if len(active) == 1:
            return (Stage(0, 1.0, 0.0),)
        number = {operator: i for i, operator in enumerate(active)}
        merged: list[Stage] = []
        for stage in (replace(s, operator=number[s.operator]) for s in self.stages if s.operator in number):
            last = merged[-1] if merged else None
            if last and len(active) < self.operators and _continues(last, stage):
                merged[-1] = replace(last, weight=last.weight + stage.weight)
            else:
                merged.append(stage)
        return tuple(merged)

    def __str__(self) -> str:
        rows = [f"{self.name}: order {self.order}{', symmetric' if self.symmetric else ''} ({self.source})"]
        rows += ["operator        weight   clock"]
        for stage in self.stages:
            clock = f"{stage.start:g}" if stage.frozen else f"{stage.start:g} -> {stage.stop:g}"
            rows.append(f"{stage.operator:<8d} {stage.weight:>13.10g}   {clock}")
        return "\n".join(rows)


def _continues(first: Stage, second: Stage) -> bool:
    return first.operator == second.operator and not (first.frozen or second.frozen)
