"""Butcher tableaus: their checks, and their order by the conditions of rooted trees."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_MOST = 8  # orders above this are not told apart: 115 conditions of order 8 follow 85 of lower orders
_ROUNDED = 1e-9  # published coefficients are rounded to ten digits or more

Tree = tuple[Any, ...]  # a rooted tree is the sorted tuple of the trees that hang from its root


@dataclass(frozen=True)
class Tableau:
    """A Runge-Kutta method with stages that are solved one after the other.

    Attributes:
        name: shown in messages.
        order: order of accuracy.
        nodes: c_i, s numbers.
        matrix: a_ij, s rows.
        weights: b_i, s numbers.
    """

    name: str
    order: float
    nodes: tuple[float, ...]
    matrix: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", tuple(self.nodes))
        object.__setattr__(self, "weights", tuple(self.weights))
        object.__setattr__(self, "matrix", tuple(map(tuple, self.matrix)))
        count = len(self.nodes)
        if len(self.weights) != count or not math.isclose(math.fsum(self.weights), 1.0, abs_tol=_ROUNDED):
            raise ValueError(f"weights: got {self.weights} for {count} nodes, expected as many, with the sum 1")
        self._check_rows()
        for node, row in zip(self.nodes, self.matrix, strict=True):
            if not math.isclose(math.fsum(row), node, abs_tol=_ROUNDED):
                raise ValueError(
                    f"matrix: got the row {row} with the sum {math.fsum(row):g}, expected its node, {node:g}"
                )

    def _check_rows(self) -> None:
        """Check the shape of the matrix, and drop what it need not have."""
        raise NotImplementedError

    def measure_order(self) -> int:
        """Return the order on general problems, up to 8, by the conditions of rooted trees.

        Hairer, Norsett & Wanner (1993), Solving ODEs I, theorem II.2.13: order p needs b . g(tree) = 1 / gamma(tree)
        for all rooted trees of at most p nodes.
        """
        return _order(self.matrix, self.weights)


@functools.lru_cache(maxsize=64)
def _order(matrix: Sequence[Sequence[float]], weights: Sequence[float]) -> int:
    trees: set[Tree] = {()}
    for order in range(1, _MOST + 1):
        for tree in trees:
            total = math.fsum(b * g for b, g in zip(weights, _elementary(tree, matrix), strict=True))
            if abs(total - 1.0 / _density(tree)) > _ROUNDED:
                return order - 1
        trees = {larger for tree in trees for larger in _grown(tree)}
    return _MOST


def _grown(tree: Tree) -> Iterator[Tree]:
    """Yield the trees with one node more."""
    yield tuple(sorted((*tree, ())))
    for i, child in enumerate(tree):
        for larger in _grown(child):
            yield tuple(sorted((*tree[:i], larger, *tree[i + 1 :])))


def _size(tree: Tree) -> int:
    return 1 + sum(map(_size, tree))


def _density(tree: Tree) -> int:
    """Return gamma: the size of the tree times the densities of the trees at its root."""
    return _size(tree) * math.prod(map(_density, tree))


def _elementary(tree: Tree, matrix: Sequence[Sequence[float]]) -> list[float]:
    """Return the elementary weight g_i of ``tree`` for each stage i.

    It is the product over the subtrees at the root of sum_j a_ij g_j, with the subtree's g_j and ``matrix`` a. Source:
    Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, II.2.
    """
    found = [1.0] * len(matrix)
    for child in tree:
        inner = _elementary(child, matrix)
        for i, row in enumerate(matrix):
            found[i] *= sum(a * g for a, g in zip(row, inner, strict=False))
    return found
