"""Butcher tableaus: checks of the coefficients, and the order by the conditions of rooted trees."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_MOST = 8  # higher orders are not tested: order 8 alone has 115 conditions, and lower orders have 85 together
_ROUNDED = 1e-9  # tolerance, because published coefficients are rounded to ten digits or more

Tree = tuple[Any, ...]  # a rooted tree is the sorted tuple of the subtrees at its root


@dataclass(frozen=True)
class Tableau:
    """A Runge-Kutta method with s stages that are computed one after the other.

    Attributes:
        name: name of the method in messages.
        order: order of accuracy.
        nodes: s numbers c_i.
        matrix: s rows of numbers a_ij.
        weights: s numbers b_i.
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
        """Check the shape of the matrix, and drop the zeros that the method does not use."""
        raise NotImplementedError

    def measure_order(self) -> int:
        """Return the order on general problems, at most 8, by the conditions of rooted trees.

        A method has order p if b . g(tree) = 1 / gamma(tree) for all rooted trees of at most p nodes. Here b are the
        weights, g(tree) is the vector of elementary weights, and gamma(tree) is the density of the tree. Source:
        Hairer, Norsett & Wanner (1993), Solving ODEs I, theorem II.2.13.
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
    """Yield the trees that have one node more than ``tree``."""
    yield tuple(sorted((*tree, ())))
    for i, child in enumerate(tree):
        for larger in _grown(child):
            yield tuple(sorted((*tree[:i], larger, *tree[i + 1 :])))


def _size(tree: Tree) -> int:
    return 1 + sum(map(_size, tree))


def _density(tree: Tree) -> int:
    """Return the density gamma of ``tree``: its number of nodes times the densities of the subtrees at its root."""
    return _size(tree) * math.prod(map(_density, tree))


def _elementary(tree: Tree, matrix: Sequence[Sequence[float]]) -> list[float]:
    """Return the elementary weight g_i of ``tree`` for each stage i.

    g_i is a product over the subtrees at the root. The factor of a subtree is sum_j a_ij g_j, with the entries a_ij of
    ``matrix`` and the elementary weights g_j of the subtree. Source: Hairer, Norsett & Wanner (1993), Solving ODEs I,
    II.2.
    """
    found = [1.0] * len(matrix)
    for child in tree:
        inner = _elementary(child, matrix)
        for i, row in enumerate(matrix):
            found[i] *= sum(a * g for a, g in zip(row, inner, strict=False))
    return found
