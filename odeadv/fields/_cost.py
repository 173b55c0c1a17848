"""The number of evaluations per operator, and whether its function reuses memory."""

from __future__ import annotations

import torch
from torch import Tensor

from odeadv.support.isolation import inside_transform


class Cost:
    """The cost of one operator in one run, and whether its function reuses memory.

    Attributes:
        evaluations: number of evaluations of the right-hand side, the flow or the map.
        vjps: number of vector-Jacobian products.
        jvps: number of Jacobian-vector products.
        solves: number of equations of implicit stages, solved and unsolved.
        iterations: number of Newton iterations for these equations; 0 if the operator has a direct solver.
        unsolved: number of equations for which Newton's iteration failed.
        watch: True compares the state before and after each call, see `watched`.
        reuses: True if the function returns the same memory again; None if this is not known yet.
    """

    __slots__ = ("evaluations", "iterations", "jvps", "reuses", "solves", "unsolved", "vjps", "watch")

    def __init__(self) -> None:
        self.evaluations = 0
        self.vjps = 0
        self.jvps = 0
        self.solves = 0
        self.iterations = 0
        self.unsolved = 0
        self.watch = False
        self.reuses: bool | None = None

    def include(self, other: Cost) -> None:
        """Add the counts of ``other``."""
        self.evaluations += other.evaluations
        self.vjps += other.vjps
        self.jvps += other.jvps
        self.solves += other.solves
        self.iterations += other.iterations
        self.unsolved += other.unsolved

    def evaluated(self) -> None:
        """Count one evaluation, except during tracing by torch.compile, because the graph would depend on the count."""
        if not torch.compiler.is_compiling():
            self.evaluations += 1


class Slopes:
    """Several results of one operator that are needed at the same time.

    A function may return the same memory every time: ``torch.neg(x, out=buffer)``, a replayed CUDA graph, a bridge to
    C++. Each result then overwrites the earlier results. In the first step of a run all results are copied, and their
    memory addresses are compared. In later steps they are copied only if the function reuses its memory.
    """

    def __init__(self, cost: Cost) -> None:
        self.values: list[Tensor] = []
        self._cost = cost
        self._copy = cost.reuses is not False and not torch.compiler.is_compiling() and not inside_transform()
        self._given: list[Tensor] = []

    def add(self, value: Tensor) -> None:
        """Append ``value``, or a copy if the function may reuse its memory."""
        if not self._copy:
            self.values.append(value)
            return
        place = value.untyped_storage().data_ptr()
        # The earlier results are still alive, so equal addresses mean shared memory, and not memory that was freed.
        if place and any(place == other.untyped_storage().data_ptr() for other in self._given):
            self._cost.reuses = True
        self._given.append(value)
        self.values.append(value.clone())

    def done(self) -> list[Tensor]:
        """Return all values. If none of them share memory, note in the cost that the function does not reuse memory."""
        if self._copy and self._cost.reuses is None and len(self._given) > 1:
            self._cost.reuses = False
        return self.values
