"""Measure the order of a composition in high precision."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from typing import Any

_SIZE = 3  # size of the state: up to order 9, accidental identities do not hold for commutators of random 3x3 matrices
_FLOOR = 1e-13  # smaller errors are due to coefficients that are rounded to float64
_HALVINGS = 8  # the smallest step is 2**-8, which is small enough for the leading error of a first-order scheme


@functools.lru_cache(maxsize=128)
def measured_order(compositions: Sequence[tuple[float, Sequence[Any]]], digits: int) -> float:
    """Return the order of a scheme's ``compositions`` with exact sub-flows; see `Scheme.measure_order`."""
    import mpmath

    names = list(dict.fromkeys(stage.operator for _, stages in compositions for stage in stages))
    number = {name: i for i, name in enumerate(sorted(names) if isinstance(names[0], int) else names)}
    tables = [
        (factor, [(number[s.operator], s.weight, s.start, s.frozen) for s in stages]) for factor, stages in compositions
    ]
    with mpmath.workdps(digits):
        problem = _LinearProblem(len(names))
        errors = [problem.error(tables, mpmath.mpf(1) / 2)]
        while errors[-1] > _FLOOR and len(errors) < _HALVINGS:
            errors.append(problem.error(tables, mpmath.mpf(2) ** -(len(errors) + 1)))
        large = [error for error in errors if error > _FLOOR]
        return float(mpmath.log(large[-2] / large[-1], 2)) - 1.0 if len(large) > 1 else math.inf


class _LinearProblem:
    """dx/dt = sum_p (M_p x + t b_p) with random matrices M_p and vectors b_p, as linear systems of (x, t, 1)."""

    def __init__(self, operators: int) -> None:
        import mpmath

        draw = random.Random(operators)  # a separate generator gives the same problem every time
        self._mp = mpmath
        self._matrices = [self._random(draw) for _ in range(operators)]

    def _random(self, draw: random.Random) -> Any:
        matrix = self._mp.zeros(_SIZE + 2)
        for row in range(_SIZE):
            for column in range(_SIZE + 1):
                matrix[row, column] = self._mp.mpf(draw.uniform(-1, 1))
        return matrix

    def error(self, compositions: Sequence[tuple[float, Sequence[tuple[int, float, float, bool]]]], h: Any) -> Any:
        """Return the error of one step of size ``h`` from x = (1, ..., 1) at t = 0."""
        total = self._mp.zeros(_SIZE, 1)
        for factor, stages in compositions:
            y = self._start()
            for operator, weight, start, frozen in stages:
                y[_SIZE] = h * start
                y = self._flow([self._matrices[operator]], 0 if frozen else 1, h * weight) * y
            total += factor * y[:_SIZE, 0]
        exact = self._flow(self._matrices, 1, h) * self._start()
        return self._mp.norm(total - exact[:_SIZE, 0])

    def _start(self) -> Any:
        return self._mp.matrix([1] * _SIZE + [0, 1])

    def _flow(self, matrices: Sequence[Any], rate: int, h: Any) -> Any:
        """Return the exponential of h times the sum of ``matrices``, with a clock that runs at ``rate``."""
        generator = sum(matrices[1:], start=matrices[0].copy())
        generator[_SIZE, _SIZE + 1] = rate
        generator *= h
        term = total = self._mp.eye(_SIZE + 2)
        k = 0
        while self._mp.mnorm(term, 1) > self._mp.eps:
            k += 1
            term = term * generator / k
            total = total + term
        return total
