"""The loop: a composition of sub-steps over a grid."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from odeadv.fields.operator import Cost, Jump, Operator, VectorFunction, clock_dtype, returned
from odeadv.fields.terms import Sum
from odeadv.splitting._grid import Grid, TimeStep
from odeadv.splitting._scheme import Composition, Stage
from odeadv.splitting._substep import Clock, Exact, RungeKutta, SubStep
from odeadv.support.isolation import inside_transform, version

BATCH = 256  # steps whose evaluation times are made at once
WHOLE: tuple[tuple[float, Composition], ...] = ((1.0, (Stage(0, 1.0, 0.0),)),)


class Row(NamedTuple):
    """A `Stage` as the loop needs it; ``own`` is the time on its operator's own clock, where it begins."""

    operator: int
    weight: float
    start: float
    stop: float
    frozen: bool
    own: float


@dataclass
class Stepper:
    """Advances a sum of operators by one step of a scheme.

    Attributes:
        operators: the terms of the field.
        substeps: how each is advanced.
        compositions: the scheme's tables with their factors, numbering ``operators``.
        costs: what each operator cost so far.
    """

    operators: Sequence[Operator]
    substeps: Sequence[SubStep]
    compositions: Sequence[tuple[float, Composition]] = WHOLE
    costs: Sequence[Cost] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.costs:
            self.costs = [Cost() for _ in self.operators]
        self._rows = [(factor, _rows(stages)) for factor, stages in self.compositions]
        # Operators that are the same on every step need not be asked for each of them.
        self._constant = all(operator.constant for operator in self.operators)
        self._prepared = self._methods_to_prepare()

    @property
    def counted(self) -> Sequence[Cost]:
        """The costs of the terms of the field, those within a sum included."""
        first = self.operators[0]
        return first.costs if isinstance(first, Sum) and first.costs is not None else self.costs

    def advance(self, x: Tensor, step: TimeStep) -> Tensor:
        """The state at the end of ``step`` from the state ``x`` at its beginning."""
        if self._constant and len(self._rows) == 1:
            return self._through(x, step, self.operators, self._rows[0][1])
        return self._mixed([factor for factor, _ in self._rows], self._ends(x, step))

    def advance_with(self, others: Sequence[float], x: Tensor, step: TimeStep) -> tuple[Tensor, Tensor]:
        """What `advance` gives, and its difference from the result with the factors ``others`` for the tables."""
        factors = [factor for factor, _ in self._rows]
        ends = self._ends(x, step, every=True)
        differences = [factor - other for factor, other in zip(factors, others, strict=True)]
        return self._mixed(factors, ends), self._mixed(differences, ends)

    def _ends(self, x: Tensor, step: TimeStep, *, every: bool = False) -> list[Tensor | None]:
        """What each table comes to; None for those with factor 0, unless ``every`` one is asked for."""
        local = [operator.on(step.t0, step.t1) for operator in self.operators]
        flowing = [operator for operator in local if not isinstance(operator, Jump)]
        rows = [rows if factor or every else None for factor, rows in self._rows]
        if len(flowing) == len(local):
            return [None if table is None else self._through(x, step, flowing, table) for table in rows]
        return [None if table is None else self._across_jump(x, step, local, table) for table in rows]

    @staticmethod
    def _mixed(factors: Sequence[float], ends: Sequence[Tensor | None]) -> Tensor:
        """The sum of the ``factors`` times ``ends``."""
        acting = [(factor, end) for factor, end in zip(factors, ends, strict=True) if factor and end is not None]
        (factor, end), *others = acting
        total = end if factor == 1.0 else end * factor
        for factor, end in others:
            total = torch.add(total, end, alpha=factor)
        return total

    def states(self, x: Tensor, grid: Grid) -> Iterator[Tensor]:
        """The states at ``t_1 ... t_N`` from ``x`` at ``t_0``, one at a time."""
        if not self._prepared or torch.compiler.is_compiling() or inside_transform():
            for step in grid:
                x = self.advance(x, step)
                yield x
            return
        ((_, rows),) = self._rows
        methods = [self._prepared[row.operator] for row in rows]
        functions = [self.operators[row.operator].f for row in rows]
        weights = [row.weight for row in rows]
        versioned = not torch.is_inference_mode_enabled()
        if versioned and x.is_inference():
            x = x.clone()  # which counts what is written to it, as all states after it do
        euler = versioned and all(method.is_euler for method in methods)
        bound = [
            (method.bound(f, versioned=versioned), w) for method, f, w in zip(methods, functions, weights, strict=True)
        ]
        sizes = iter(grid.sizes)
        for first in range(0, len(grid), BATCH):
            ends = grid.times[first : first + BATCH + 1]
            times, table = _evaluation_times(ends, rows, methods, x)
            before = version(table)
            for row, method in zip(rows, methods, strict=True):
                self.costs[row.operator].evaluations += (len(ends) - 1) * len(method.nodes)
            steps = islice(sizes, len(ends) - 1)
            if euler:
                for end in _euler_states(x, zip(steps, times, strict=True), functions, weights):
                    x = end
                    yield x
            else:
                each = chain.from_iterable(times)
                for h in steps:
                    for advance, weight in bound:
                        x = advance(x, h * weight, each)
                    yield x
            _check_times(table, before)

    def march(self, x: Tensor, grid: Grid) -> Tensor:
        """The state at the end of ``grid``; stages that continue one another across steps are made one.

        Joining is done for exact flows only, where it changes the result by rounding alone: Strang then costs one flow
        of the outer operator a step instead of two.
        """
        if len(grid) < 2 or not self.joins:
            for end in self.states(x, grid):
                x = end
            return x
        ((_, rows),) = self._rows
        outer, head, tail = rows[0].operator, rows[0].weight, rows[-1].weight
        step = grid[0]
        x = self._outer(outer, x, step.t0, step.h * head)
        for step, following in pairwise(grid):
            x = self._through(x, step, self._flowing(step), rows[1:-1])
            x = self._outer(outer, x, step.time(1.0 - tail), step.h * tail + following.h * head)
        step = grid[len(grid) - 1]
        x = self._through(x, step, self._flowing(step), rows[1:-1])
        return self._outer(outer, x, step.time(1.0 - tail), step.h * tail)

    @property
    def joins(self) -> bool:
        """Whether the last stage of a step and the first of the next are the same exact flow."""
        if len(self._rows) > 1 or any(operator.edges for operator in self.operators):
            return False
        ((_, rows),) = self._rows
        first, last = rows[0], rows[-1]
        contiguous = not (first.frozen or last.frozen) and abs(last.own + last.weight - 1.0) < 1e-12
        exact = isinstance(self.substeps[first.operator], Exact) and self.operators[first.operator].flow is not None
        return len(rows) > 1 and first.operator == last.operator and contiguous and exact

    @property
    def explicit(self) -> bool:
        """Whether all sub-steps are explicit Runge-Kutta methods, which are accurate for slopes that are not steep."""
        return all(isinstance(method, RungeKutta) for method in self.substeps)

    def refuse_jump(self, step: TimeStep) -> None:
        """Refuse a step between whose ends there are no states.

        Raises:
            ValueError: if the field jumps there.
        """
        if any(isinstance(operator.on(step.t0, step.t1), Jump) for operator in self.operators):
            raise ValueError(
                f"save_at: the field jumps from {step.t0:g} to {step.t1:g}, where no state is defined in between"
            )

    def velocity(self, x: Tensor, t: float, step: TimeStep) -> Tensor:
        """dx/dt at the time ``t`` of ``step``, on which there is no jump, all operators added up."""
        values = []
        for operator, cost in zip(self.operators, self.costs, strict=True):
            local = operator.on(step.t0, step.t1)
            assert isinstance(local, Operator)
            values.append(local.velocity(t, x, cost))
        return sum(values[1:], start=values[0])

    def _methods_to_prepare(self) -> list[RungeKutta]:
        """The sub-steps, if all that they do on a step but its times and states is known beforehand; none if not."""
        plain = self._constant and all(type(operator).velocity is Operator.velocity for operator in self.operators)
        methods = [method for method in self.substeps if type(method) is RungeKutta]
        return methods if plain and len(self._rows) == 1 and len(methods) == len(self.substeps) else []

    def _flowing(self, step: TimeStep) -> list[Operator]:
        local = [operator.on(step.t0, step.t1) for operator in self.operators]
        return [operator for operator in local if not isinstance(operator, Jump)]

    def _outer(self, i: int, x: Tensor, t: float, h: float) -> Tensor:
        return self.substeps[i].advance(self.operators[i], Clock(t, t + h, t), h, x, self.costs[i])

    def _through(self, x: Tensor, step: TimeStep, local: Sequence[Operator], rows: Sequence[Row]) -> Tensor:
        """A step on which every operator is an ODE."""
        for i, weight, begin, end, frozen, own in rows:
            start = step.time(begin)
            stop = start if frozen else step.time(end)
            origin = start if own == begin and step.own is None else step.own_time(own)
            h = step.h * weight
            x = self.substeps[i].advance(local[i], Clock(start, stop, origin), h, x, self.costs[i])
        return x

    def _across_jump(self, x: Tensor, step: TimeStep, local: Sequence[Operator | Jump], rows: Sequence[Row]) -> Tensor:
        """A jump takes the place of its operator's stages; the others act before it at t0, after it at t1.

        It takes place where its operator would have passed the middle of the step.
        """
        jumped, passed = False, 0.0
        for row in rows:
            operator = local[row.operator]
            cost = self.costs[row.operator]
            if isinstance(operator, Jump):
                passed += row.weight
                if not jumped and passed >= 0.5 - 1e-12:
                    before, jumped = x, True
                    x = operator.across(before, cost)
                    if len(local) > 1:
                        _warn_if_kept(before, x)
            else:
                end = step.t1 if jumped else step.t0
                clock = Clock(end, end, step.own_time(row.own))
                x = self.substeps[row.operator].advance(operator, clock, step.h * row.weight, x, cost)
        return x


def _warn_if_kept(before: Tensor, after: Tensor) -> None:
    """Warn if a jump keeps the shape of the state while another operator acts."""
    if before.shape == after.shape and before.dtype == after.dtype:
        warnings.warn(
            f"Jump: got a map that keeps the state's shape, {tuple(after.shape)}, expected one that changes it. The "
            "other operators act before and after the jump, so this is another method than a step x + f(x) (Eq. "
            "8); for such a step use odeadv.fields.Residual(map)",
            stacklevel=2,
        )


def _euler_states(
    x: Tensor,
    steps: Iterable[tuple[float, tuple[Tensor, ...]]],
    functions: Sequence[VectorFunction],
    weights: Sequence[float],
) -> Iterator[Tensor]:
    """The states after each of ``steps`` (its size, the times of its evaluations), every stage one step of Euler.

    What `RungeKutta.bound` does, with nothing looked up or called that the result does not need.
    """
    parts = list(zip(functions, weights, strict=True))
    dtype, shape = x.dtype, x.shape
    for h, moments in steps:
        for (f, weight), t in zip(parts, moments):  # noqa: B905  # strict costs a fifth of a microsecond
            before = x._version
            value = f(t, x)
            if not (
                isinstance(value, Tensor) and x._version == before and value.dtype is dtype and value.shape == shape
            ):
                value = returned(value, x, before)
            x = x.add(value, alpha=h * weight)
        yield x


def _evaluation_times(
    ends: Sequence[float], rows: Sequence[Row], methods: Sequence[RungeKutta], x: Tensor
) -> tuple[Iterator[tuple[Tensor, ...]], Tensor]:
    """For each step between ``ends`` the times at which ``methods`` evaluate, in their order; the tensor they are of.

    A tensor for a time costs a microsecond: evaluations at the same times share theirs.
    """
    nodes = torch.tensor(ends, dtype=torch.float64, device="cpu")
    step = TimeStep(nodes[:-1], nodes[1:], 0.0)  # type: ignore[arg-type]  # all steps as one, by the same arithmetic
    columns: dict[tuple[float, ...], Tensor] = {}
    order: list[tuple[float, ...]] = []
    for row, method in zip(rows, methods, strict=True):
        start = step.time(row.start)
        stop = row.start if row.frozen else row.stop
        clock = Clock(start, start if row.frozen else step.time(row.stop), start)
        for node in method.nodes:
            key = (
                (row.start,)
                if node == 0.0 or stop == row.start
                else (stop,)
                if node == 1.0
                else (row.start, stop, node)
            )
            columns.setdefault(key, clock.at(node))  # type: ignore[arg-type]
            order.append(key)
    table = torch.stack(list(columns.values())).to(x.device, clock_dtype(x.dtype))
    distinct = dict(zip(columns, (column.unbind() for column in table), strict=True))
    return zip(*(distinct[key] for key in order)), table  # noqa: B905  # of one length, all of them


def _check_times(table: Tensor, before: int) -> None:
    """Refuse a field that has written to a time: other evaluations, of other operators too, are given the same tensor.

    Raises:
        ValueError: if the `version` of ``table`` is not ``before`` any more.
    """
    if before >= 0 and table._version != before:
        raise ValueError("f: modifies the time t in place; return a new tensor and leave t as it is")


def _rows(stages: Composition) -> list[Row]:
    """The stages with the time on each operator's own clock, the sum of its earlier weights."""
    acted: dict[int, float] = {}
    rows = []
    for stage in stages:
        i = stage.operator
        if isinstance(i, str):
            raise TypeError(f"compositions: got a stage of {i!r}, expected numbers; see Scheme.numbered")
        own = acted.get(i, 0.0)
        rows.append(Row(i, stage.weight, stage.start, stage.stop, stage.frozen, own))
        acted[i] = own + stage.weight
    return rows
