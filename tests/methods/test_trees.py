"""Rooted trees, counted and evaluated against published tables."""

from fractions import Fraction

import pytest

from neurode.methods.trees import elementary_weights, first_failure, rooted_trees


def test_counts_are_those_of_the_literature():
    """OEIS A000081: 1, 1, 2, 4, 9, 20, 48, 115, 286, 719 rooted trees."""
    sizes = [tree.order for tree in rooted_trees(10)]
    assert [sizes.count(order) for order in range(1, 11)] == [1, 1, 2, 4, 9, 20, 48, 115, 286, 719]


def test_trees_are_distinct_and_refer_to_smaller_ones():
    trees = rooted_trees(8)
    assert len({tree.children for tree in trees}) == len(trees)
    for position, tree in enumerate(trees):
        assert all(child < position for child in tree.children)
        assert tree.order == 1 + sum(trees[child].order for child in tree.children)


def test_densities_are_those_of_the_literature():
    """The eight trees with at most four vertices (Hairer, Norsett & Wanner 1993, table II.2.1)."""
    assert [tree.order for tree in rooted_trees(4)] == [1, 2, 3, 3, 4, 4, 4, 4]
    assert sorted(tree.density for tree in rooted_trees(4)) == [1, 2, 3, 4, 6, 8, 12, 24]


def test_weights_by_hand():
    """Kutta's rule of order 4: phi of the tall tree with three vertices is a c, of the bushy one c^2."""
    half = Fraction(1, 2)
    a = ((), (half,), (0, half), (0, 0, 1))
    weights = dict(zip(rooted_trees(3), elementary_weights(a, 3), strict=True))
    by_density = {tree.density: phi for tree, phi in weights.items()}
    assert by_density[6] == (0, 0, half**2, half)
    assert by_density[3] == (0, half**2, half**2, 1)


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_one_wrong_weight_is_found(wrong):
    half = Fraction(1, 2)
    weights = elementary_weights(((), (half,), (0, 1)), 2)
    right = [Fraction(0), Fraction(1), Fraction(0)]
    assert first_failure(weights, right, 2) is None
    broken = [b + Fraction(1, 10**30) * (i == wrong) for i, b in enumerate(right)]
    failure = first_failure(weights, broken, 2)
    assert failure is not None
    assert failure[1] == Fraction(1, 10**30)
