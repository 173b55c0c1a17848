"""What a solve counts and learns about each of its functions."""

from __future__ import annotations

import torch
from torch import Tensor

from odeadv.support.isolation import inside_transform


class Cost:
    """The cost of one operator in one run, and what the run has learned about its function.

    Attributes:
        evaluations: evaluations of the right-hand side, the flow or the map.
        vjps: vector-Jacobian products.
        jvps: Jacobian-vector products.
        solves: equations of implicit stages that were solved, or not.
        iterations: Newton's iterations for them; none if the operator solves them directly.
        unsolved: equations on which Newton's iteration failed.
        watch: compare the state before and after each call, see `watched`.
        reuses: whether the function returns memory that it returned before; None if that is not known yet.
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
        """Add what ``other`` has counted."""
        self.evaluations += other.evaluations
        self.vjps += other.vjps
        self.jvps += other.jvps
        self.solves += other.solves
        self.iterations += other.iterations
        self.unsolved += other.unsolved

    def evaluated(self) -> None:
        """Count one evaluation. Tracing by torch.compile is not counted, since the graph would depend on the count."""
        if not torch.compiler.is_compiling():
            self.evaluations += 1


class Slopes:
    """Several results of one operator that are held at the same time.

    A function may return the same memory every time: ``torch.neg(x, out=buffer)``, a replayed CUDA graph, a bridge to
    C++. Its earlier results are then overwritten by the later ones. In the first step of a run all results are copied
    and their memory is compared; from then on they are copied only if the function reuses its memory.
    """

    def __init__(self, cost: Cost) -> None:
        self.values: list[Tensor] = []
        self._cost = cost
        self._copy = cost.reuses is not False and not torch.compiler.is_compiling() and not inside_transform()
        self._given: list[Tensor] = []

    def add(self, value: Tensor) -> None:
        """Hold ``value``, or a copy of it."""
        if not self._copy:
            self.values.append(value)
            return
        place = value.untyped_storage().data_ptr()
        # The earlier results are kept alive, so equal addresses mean shared memory and not memory that was freed.
        if place and any(place == other.untyped_storage().data_ptr() for other in self._given):
            self._cost.reuses = True
        self._given.append(value)
        self.values.append(value.clone())

    def done(self) -> list[Tensor]:
        """Return the values; the function counts as one that reuses no memory if none was shared."""
        if self._copy and self._cost.reuses is None and len(self._given) > 1:
            self._cost.reuses = False
        return self.values
