"""What a tableau derives, what it refuses and how it says so."""

import copy
import dataclasses
import pickle
from fractions import Fraction

import pytest

from neurode.methods import ButcherTableau, get
from neurode.methods.tableau import exact

HEUN = {
    "name": "mine",
    "order": 2,
    "a": [[], [1.0]],
    "b": [0.5, 0.5],
    "c": [0.0, 1.0],
    "source": "K. Heun (1900)",
}
BOSH3 = {
    "name": "mine",
    "order": 3,
    "a": [[], [1 / 2], [0, 3 / 4], [2 / 9, 1 / 3, 4 / 9]],
    "b": [2 / 9, 1 / 3, 4 / 9, 0],
    "c": [0, 1 / 2, 3 / 4, 1],
    "b_error": [-5 / 72, 1 / 12, 1 / 9, -1 / 8],
}


def test_derived_facts_of_a_users_own_method():
    mine = ButcherTableau(**BOSH3)
    assert (mine.adaptive, mine.fsal, mine.end_stage) == (True, True, 3)
    assert (mine.num_stages, mine.num_evaluations_per_step, mine.num_dense_evaluations) == (4, 3, 0)
    assert (mine.order_error, mine.dense_order) == (2, 3)
    assert mine.A == get("bosh3").A
    assert get(mine) is mine


def test_without_the_last_stage_the_same_weights_are_not_fsal():
    shorter = ButcherTableau(**BOSH3 | {"a": BOSH3["a"][:3], "b": BOSH3["b"][:3], "c": BOSH3["c"][:3], "b_error": None})
    assert (shorter.fsal, shorter.end_stage, shorter.adaptive) == (False, None, False)
    assert (shorter.num_evaluations_per_step, shorter.num_dense_evaluations) == (3, 1)


def test_equal_last_node_is_not_fsal():
    """The last stage of Heun's method is evaluated at t1, but not at y1."""
    assert not ButcherTableau(**HEUN).fsal


def test_it_is_a_value():
    mine = ButcherTableau(**HEUN)
    assert mine == ButcherTableau(**HEUN)
    assert hash(mine) == hash(ButcherTableau(**HEUN))
    assert mine != get("heun")
    for twin in (pickle.loads(pickle.dumps(mine)), copy.deepcopy(mine)):
        assert twin == mine
        assert hash(twin) == hash(mine)
        assert twin.B == mine.B
    with pytest.raises(dataclasses.FrozenInstanceError):
        mine.order = 3


def test_replace_derives_again():
    adaptive = dataclasses.replace(ButcherTableau(**HEUN), b_error=(-0.5, 0.5))
    assert adaptive.adaptive
    assert adaptive.order_error == 1


def test_exact_reads_fractions_and_long_decimals():
    assert exact("1/3 -2 0.1") == (Fraction(1, 3), Fraction(-2), Fraction(1, 10))


REFUSED = [
    (HEUN, {"order": 3}, "condition of order 3 .* missed by 0.17; .* `order=2`"),
    (HEUN, {"order": 0}, "integer order >= 1"),
    (HEUN, {"order": 2.0}, "integer order >= 1"),
    (HEUN, {"order": 40}, "order 40 is beyond"),
    (HEUN, {"a": [], "b": [], "c": []}, "at least one stage"),
    (HEUN, {"a": [[1.0]], "b": [1.0], "c": [0.0]}, r"row 0 of `a` .* needs 0 numbers, got 1"),
    (HEUN, {"b": [0.5, 0.25, 0.25]}, "`b` needs 2 numbers, one for each row of `a`, got 3"),
    (HEUN, {"c": [0.0]}, "`c` needs 2 numbers"),
    (HEUN, {"c": [0.0, 0.9]}, r"row 1 of `a` sums to 1, but c\[1\] is 0.9"),
    (HEUN, {"b": [0.5, 0.5 + 1e-9]}, "condition of order 1"),
    (HEUN, {"b": [0.5, float("nan")]}, "condition of order 1"),
    (HEUN, {"b": [0.5, "half"]}, "`b` needs numbers"),
    (HEUN, {"b_error": [0.5, 0.5]}, "`b_error` must sum to 0 and not vanish"),
    (HEUN, {"b_error": [0.0, 0.0]}, "`b_error` must sum to 0 and not vanish"),
    (
        HEUN,
        {"b_error": [0.5, -0.5], "order_error": 2},
        "declared order_error 2, but `b_error` belongs to order 1",
    ),
    (HEUN, {"order_error": 1}, "give `b_error` too"),
    (HEUN, {"b_error2": [0.5, -0.5]}, "give `b_error` too"),
    (HEUN, {"extra_a": [[0.25, 0.25]], "extra_c": [0.5]}, "give `dense` too"),
    (HEUN, {"extra_c": [0.5]}, "`extra_c` needs 0 numbers, got 1"),
    (HEUN, {"dense": [[1.0, -0.5]]}, "`dense` needs 2 rows"),
    (HEUN, {"dense": [[1.0, -0.5], [0.5]]}, "rows of the same length"),
    (HEUN, {"dense": [[1.0, -0.5], [0.0, 0.4]]}, r"row 1 of `dense` sums to 0.4, but must give b\[1\] = 0.5"),
    (HEUN, {"dense": [[1.0, -0.5], [0.0, 0.5]], "dense_order": 3}, "declared dense_order 3, .* has order 2"),
    (HEUN, {"dense_order": 3}, "declared dense_order 3, .* has order 2"),
    (BOSH3, {"order": 4}, "condition of order 4"),
    (BOSH3, {"order_error": 3}, "belongs to order 2"),
]


@pytest.mark.parametrize(("good", "change", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_refuses(good, change, message):
    ButcherTableau(**good)
    with pytest.raises(ValueError, match=f"tableau 'mine': .*{message}"):
        ButcherTableau(**good | change)


@pytest.mark.parametrize("name", ["rk4", "dopri5", "tsit5", "verner6", "verner7", "verner9", "dopri8", "dop853"])
def test_one_wrong_digit_is_found(name):
    """A typo of 1e-5 in any row, its sum kept, does not pass (verner9 hardly depends on its third)."""
    good = get(name)
    for i, row in enumerate(good.a):
        used = [j for j, x in enumerate(row) if x]
        if len(used) < 2 or not any(good.b[i:]):
            continue
        typo = list(row)
        typo[used[0]] = typo[used[0]] + Fraction(1, 10**5)
        typo[used[1]] = typo[used[1]] - Fraction(1, 10**5)
        rows = [typo if k == i else other for k, other in enumerate(good.a)]
        numbers = {f.name: getattr(good, f.name) for f in dataclasses.fields(good) if f.init}
        with pytest.raises(ValueError, match=f"tableau {name!r}: declared"):
            ButcherTableau(**numbers | {"a": rows})
