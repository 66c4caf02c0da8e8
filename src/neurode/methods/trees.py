"""Rooted trees: the order conditions of Runge-Kutta methods, one condition a tree, for any order.

A method with coefficients `a, b` has order p when for every rooted tree t with at most p vertices
`sum_i b_i phi_i(t) = 1 / gamma(t)`, where `phi_i` multiplies `sum_j a_ij phi_j(child)` over the children of
the root and `gamma` is the density of the tree. Everything here works on exact fractions and on floats alike.

References:
    J. C. Butcher (1963), Coefficients for the study of Runge-Kutta integration processes, J. Austral. Math.
        Soc. 3.
    E. Hairer, S. P. Norsett, G. Wanner (1993), Solving Ordinary Differential Equations I, section II.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from operator import mul
from typing import Any, NamedTuple


class Tree(NamedTuple):
    """A rooted tree: its number of vertices, its density gamma, and the positions of its root's subtrees."""

    order: int
    density: int
    children: tuple[int, ...]


@cache
def rooted_trees(order: int) -> tuple[Tree, ...]:
    """List every rooted tree with at most `order` vertices, smaller trees first.

    The list for order p starts with the list for p - 1, so that `children` are positions valid in both. There
    are 1, 1, 2, 4, 9, 20, 48, 115, 286 trees with 1, ..., 9 vertices.

    Example:
        >>> len(rooted_trees(5)), rooted_trees(3)[-1]
        (17, Tree(order=3, density=3, children=(0, 0)))
    """
    if order == 1:
        return (Tree(1, 1, ()),)
    smaller = rooted_trees(order - 1)
    new = []
    for children in _forests(smaller, order - 1, len(smaller) - 1):
        density = order
        for child in children:
            density *= smaller[child].density
        new.append(Tree(order, density, children))
    return smaller + tuple(new)


def _forests(trees: tuple[Tree, ...], vertices: int, largest: int) -> list[tuple[int, ...]]:
    """Multisets of trees with so many vertices in all and no position above `largest`, as falling tuples."""
    if vertices == 0:
        return [()]
    found: list[tuple[int, ...]] = []
    for position in range(largest, -1, -1):
        if trees[position].order <= vertices:
            for rest in _forests(trees, vertices - trees[position].order, position):
                found.append((position, *rest))
    return found


def elementary_weights(a: Sequence[Sequence[Any]], order: int) -> list[tuple[Any, ...]]:
    """Return `phi_i(t)` for each stage i and each tree t of `rooted_trees(order)`.

    Args:
        a: strictly lower triangular coefficients; row i holds i entries.
        order: largest number of vertices, at least 1.

    Returns:
        One tuple of `len(a)` numbers a tree, in the order of `rooted_trees(order)`.
    """
    ones = (1,) * len(a)
    weights: list[tuple[Any, ...]] = []
    grafted: list[tuple[Any, ...]] = []  # sum_j a_ij phi_j(t): the tree on a new stem
    for tree in rooted_trees(order):
        phi = ones
        for child in tree.children:
            phi = tuple(map(mul, phi, grafted[child]))
        weights.append(phi)
        if tree.order < order:
            grafted.append(tuple(sum(map(mul, row, phi)) for row in a))
    return weights


def first_failure(
    weights: Sequence[Sequence[Any]],
    row: Sequence[Any],
    order: int,
    tolerance: Any = 0,
    power: int | None = None,
) -> tuple[Tree, Any] | None:
    """Return the smallest tree whose order condition a row of weights misses, and by how much; None if none.

    Args:
        weights: `phi` from `elementary_weights`, for at least `order`.
        row: the weights `b_i` to be tested.
        order: largest number of vertices to test.
        tolerance: residual to be let pass, relative to `max(1, sum_i |b_i|)`; 0 for exact fractions.
        power: None tests `sum b phi = 1 / gamma` for all trees. A number tests a coefficient of
            `theta**power` in a dense output, which must be `1 / gamma` for trees with that many vertices and
            zero for all others (0: zero for all, as an error estimate has it).
    """
    allowed = tolerance * max(1, sum(map(abs, row))) if tolerance else 0
    for tree, phi in zip(rooted_trees(order), weights, strict=False):
        total = sum(map(mul, row, phi))
        if power is None or power == tree.order:
            residual = abs(total * tree.density - 1) / tree.density
        else:
            residual = abs(total)
        if not residual <= allowed:
            return tree, residual
    return None
