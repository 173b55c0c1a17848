"""The fast loop, for Runge-Kutta sub-steps of operators that are the same on every step.

Its states are bit-identical to the states of the readable loop in `_stepper`. It is faster because it makes the times
of all steps at once, and looks up constant values only once. On small states, Python is most of the cost of a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from odeadv.fields.operator import Cost, Operator, VectorFunction, clock_dtype, returned
from odeadv.splitting._grid import Grid, TimeStep
from odeadv.splitting._substep import Clock, RungeKutta
from odeadv.support.isolation import version


class FlatLoop:
    """Computes the states along a grid for a single composition with Runge-Kutta sub-steps.

    Args:
        operators: the terms of the field. Only their function f is called.
        substeps: one Runge-Kutta sub-step per operator.
        stages: the stages of the composition, see `ClockedStage`. They refer to operators by number.
        costs: one counter of evaluations per operator.
    """

    def __init__(
        self,
        operators: Sequence[Operator],
        substeps: Sequence[RungeKutta],
        stages: Sequence[Any],
        costs: Sequence[Cost],
    ) -> None:
        self._stages, self._costs = stages, costs
        self._substeps = [substeps[stage.operator] for stage in stages]
        self._functions = [operators[stage.operator].f for stage in stages]
        self._time_dtype = operators[0].time_dtype

    def states(self, x: Tensor, grid: Grid) -> Iterator[Tensor]:
        """Yield the states at ``t_1 ... t_N``, from the state ``x`` at ``t_0``.

        Raises:
            TypeError, ValueError: if f writes to its state or its time, or returns a tensor that does not fit.
        """
        versioned = not torch.is_inference_mode_enabled()
        if versioned and x.is_inference():
            x = x.clone()  # an inference tensor does not count the writes to it, but its clone does
        times, table = self._evaluation_times(grid.times, x)
        before = version(table)
        for stage, substep in zip(self._stages, self._substeps, strict=True):
            self._costs[stage.operator].evaluations += len(grid) * len(substep.nodes)
        weights = [stage.weight for stage in self._stages]
        if versioned and all(substep.is_euler for substep in self._substeps):
            yield from _euler_states(x, zip(grid.sizes, times, strict=True), self._functions, weights)
        else:
            each = chain.from_iterable(times)
            bound = [
                (substep.bound(f, versioned=versioned), weight)
                for substep, f, weight in zip(self._substeps, self._functions, weights, strict=True)
            ]
            for h in grid.sizes:
                for advance, weight in bound:
                    x = advance(x, h * weight, each)
                yield x
        if before >= 0 and table._version != before:
            # A write would change the time of other evaluations too, because equal times share one tensor.
            raise ValueError("f: modifies the time t in place; return a new tensor and leave t as it is")

    def _evaluation_times(self, ends: Sequence[float], x: Tensor) -> tuple[Iterator[tuple[Tensor, ...]], Tensor]:
        """Return the times of the evaluations of each step between ``ends``, and the tensor that holds all times.

        To make a tensor for a time takes a microsecond, so evaluations at the same time share one tensor.
        """
        nodes = torch.tensor(ends, dtype=torch.float64, device="cpu")
        step = TimeStep(nodes[:-1], nodes[1:], 0.0)  # type: ignore[arg-type]  # one object with the times of all steps
        columns: dict[tuple[float, ...], Tensor] = {}
        order: list[tuple[float, ...]] = []
        for stage, substep in zip(self._stages, self._substeps, strict=True):
            start = step.time(stage.start)
            stop = stage.start if stage.frozen else stage.stop
            clock = Clock(start, start if stage.frozen else step.time(stage.stop), start)
            for node in substep.nodes:
                if node == 0.0 or stop == stage.start:
                    key: tuple[float, ...] = (stage.start,)
                else:
                    key = (stop,) if node == 1.0 else (stage.start, stop, node)
                columns.setdefault(key, clock.at(node))  # type: ignore[arg-type]
                order.append(key)
        table = torch.stack(list(columns.values())).to(x.device, self._time_dtype or clock_dtype(x.dtype))
        distinct = dict(zip(columns, (column.unbind() for column in table), strict=True))
        return zip(*(distinct[key] for key in order)), table  # noqa: B905  # all of one length


def _euler_states(
    x: Tensor,
    steps: Iterable[tuple[float, tuple[Tensor, ...]]],
    functions: Sequence[VectorFunction],
    weights: Sequence[float],
) -> Iterator[Tensor]:
    """Yield the state after each step, if every stage is one step of Euler. Results equal those of `RungeKutta.bound`.

    Args:
        x: the initial state.
        steps: pairs of the size of a step and the times of its evaluations.
        functions: the function f of each stage.
        weights: the duration of each stage in units of the step.
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
