"""The Adams weights: exact for polynomials, and those that the literature prints."""

import dataclasses
from fractions import Fraction

import pytest

from neurode.methods import get
from neurode.methods.adams import adams_weights


@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("order", range(1, 13))
def test_exact_for_polynomials_of_the_order_and_no_more(order, implicit):
    """With f = t^k the step from 0 to 1 adds 1 / (k + 1); derivatives are at 1 (implicit), 0, -1, -2, ..."""
    nodes = [Fraction(implicit - j) for j in range(order)]
    weights = adams_weights(order, implicit)
    assert len(weights) == order
    for k in range(order):
        assert sum(w * t**k for w, t in zip(weights, nodes, strict=True)) == Fraction(1, k + 1)
    assert sum(w * t**order for w, t in zip(weights, nodes, strict=True)) != Fraction(1, order + 1)


def test_printed_weights():
    """Hairer, Norsett & Wanner (1993), III.1, eqs. (1.5) and (1.9)."""
    assert adams_weights(4, implicit=False) == tuple(Fraction(n, 24) for n in (55, -59, 37, -9))
    assert adams_weights(4, implicit=True) == tuple(Fraction(n, 24) for n in (9, 19, -5, 1))


def test_family():
    explicit, implicit = get("explicit_adams"), get("implicit_adams")
    assert (explicit.order, explicit.num_history, explicit.num_evaluations_per_step) == (4, 4, 1)
    assert (implicit.order, implicit.num_history, implicit.num_evaluations_per_step) == (4, 3, 2)
    assert explicit.weights(2) == (1.5, -0.5)
    assert implicit.weights(1) == (1.0,)
    assert dataclasses.replace(explicit, max_order=2).dense_order == 2


@pytest.mark.parametrize("wrong", [0, 13, 4.0, True])
def test_refused_orders(wrong):
    with pytest.raises(ValueError, match="max_order"):
        dataclasses.replace(get("explicit_adams"), max_order=wrong)
