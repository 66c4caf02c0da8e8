"""Every tableau against all its order conditions, in exact arithmetic: solution, estimate, dense output."""

from decimal import Decimal, localcontext
from fractions import Fraction

import pytest

from neurode.methods import METHODS
from neurode.methods.trees import elementary_weights, first_failure

TABLEAUS = [method for method in METHODS.values() if method.kind == "explicit"]
WITH_DENSE = [tableau for tableau in TABLEAUS if tableau.dense is not None]

# What the digits that a source prints allow, relative to the weights. Methods not listed are exact fractions.
SOLUTION = {
    "tsit5": Decimal("1e-30"),
    "verner6": Decimal("1e-22"),
    "verner7": Decimal("1e-22"),
    "verner9": Decimal("1e-22"),
    "dop853": Decimal("1e-28"),
    "dopri8": Decimal("1e-16"),  # fractions that approximate irrational numbers to 1e-17
}
# The error estimate of dop853 is printed with 28 digits.
ERROR = SOLUTION | {"dop853": Decimal("1e-26")}
# The dense output of tsit5 is printed with 17 digits, of dopri8 with 11 correct ones, of dop853 with 30.
DENSE = SOLUTION | {"tsit5": Decimal("1e-15"), "dopri8": Decimal("1e-12"), "dop853": Decimal("1e-25")}


def decimal(number):
    number = Fraction(number)
    return Decimal(number.numerator) / Decimal(number.denominator)


def arithmetic(tableau, tolerances):
    """The tolerance, and what makes numbers for it: exact fractions where the source gives those."""
    tolerance = tolerances.get(tableau.name, 0)
    return tolerance, (decimal if tolerance else Fraction)


def rows_of(tableau, make):
    return [[make(x) for x in row] for row in (*tableau.a, *tableau.extra_a)]


@pytest.fixture(autouse=True)
def precise():
    """Sixty digits, so that rounding is far below what is tested."""
    with localcontext() as context:
        context.prec = 60
        yield


@pytest.mark.parametrize("tableau", TABLEAUS, ids=lambda t: t.name)
def test_row_sums(tableau):
    tolerance, make = arithmetic(tableau, SOLUTION)
    nodes = [make(c) for c in (*tableau.c, *tableau.extra_c)]
    for row, node in zip(rows_of(tableau, make), nodes, strict=True):
        assert abs(sum(row) - node) <= tolerance * max(1, sum(map(abs, row)))


@pytest.mark.parametrize("tableau", TABLEAUS, ids=lambda t: t.name)
def test_order_is_the_declared_one_and_no_more(tableau):
    tolerance, make = arithmetic(tableau, SOLUTION)
    weights = elementary_weights(rows_of(tableau, make), tableau.order + 1)
    b = [make(x) for x in tableau.b]
    assert first_failure(weights, b, tableau.order, tolerance) is None
    tree, residual = first_failure(weights, b, tableau.order + 1, tolerance)
    assert tree.order == tableau.order + 1
    assert residual > 1e-9


@pytest.mark.parametrize("tableau", [t for t in TABLEAUS if t.adaptive], ids=lambda t: t.name)
def test_embedded_order(tableau):
    tolerance, make = arithmetic(tableau, ERROR)
    weights = elementary_weights(rows_of(tableau, make), tableau.order)

    def order_of(row):
        tree, residual = first_failure(weights, [make(x) for x in row], tableau.order, tolerance, power=0)
        assert residual > 1e-9
        return tree.order - 1

    if tableau.b_error2 is None:
        assert order_of(tableau.b_error) == tableau.order_error < tableau.order
    else:
        assert (order_of(tableau.b_error), order_of(tableau.b_error2)) == (5, 3)
        assert tableau.order_error == 7  # err5^2 / err3 ~ h^(6 + 6 - 4)


def dense_columns(tableau, make):
    return [[make(x) for x in column] for column in zip(*tableau.dense, strict=True)]


@pytest.mark.parametrize("tableau", WITH_DENSE, ids=lambda t: t.name)
def test_dense_order_for_every_theta(tableau):
    """The weights are polynomials in theta, so equal coefficients mean equality for every theta."""
    tolerance, make = arithmetic(tableau, DENSE)
    weights = elementary_weights(rows_of(tableau, make), tableau.dense_order + 1)
    columns = dense_columns(tableau, make)
    assert len(columns) >= tableau.dense_order
    for j, column in enumerate(columns):
        assert first_failure(weights, column, tableau.dense_order, tolerance, power=j + 1) is None
    if len(columns) > tableau.dense_order:  # of too low a degree for one order more otherwise
        higher = [
            first_failure(weights, column, tableau.dense_order + 1, tolerance, power=j + 1)
            for j, column in enumerate(columns)
        ]
        assert max(residual for _, residual in filter(None, higher)) > 1e-7


@pytest.mark.parametrize("tableau", WITH_DENSE, ids=lambda t: t.name)
def test_dense_ends(tableau):
    """It starts at y0 with slope f0 and ends at y1 with slope f1, in every method with one of its own."""
    tolerance, make = arithmetic(tableau, DENSE)
    rows = [[make(x) for x in row] for row in tableau.dense]
    ends = [make(x) for x in (*tableau.b, *[0] * len(tableau.extra_a))]
    scale = max(1, max(abs(x) for row in rows for x in row))
    for row, end in zip(rows, ends, strict=True):
        assert abs(sum(row) - end) <= tolerance * scale
    assert [row[0] for row in rows] == [int(i == 0) for i in range(len(rows))]
    assert tableau.dense_continuous_derivative
    all_rows, all_nodes = (*tableau.a, *tableau.extra_a), (*tableau.c, *tableau.extra_c)
    assert all_nodes[tableau.end_stage] == 1
    assert list(map(float, all_rows[tableau.end_stage])) == list(map(float, ends))[: tableau.end_stage]
    for i, row in enumerate(rows):
        slope = sum((j + 1) * x for j, x in enumerate(row))
        assert abs(slope - (i == tableau.end_stage)) <= 10 * tolerance * scale


@pytest.mark.parametrize("tableau", [t for t in TABLEAUS if t.dense is None], ids=lambda t: t.name)
def test_hermite_order(tableau):
    """Cubic Hermite as a continuous method whose last stage is f1: its order over one step is min(3, p)."""
    make = Fraction
    rows, b = rows_of(tableau, make), [make(x) for x in tableau.b]
    if not tableau.fsal:
        rows, b = [*rows, b], [*b, Fraction(0)]
    num = len(rows)
    start, end = (
        [Fraction(int(i == 0)) for i in range(num)],
        [Fraction(int(i == num - 1)) for i in range(num)],
    )
    columns = [
        start,
        [3 * x - 2 * f - g for x, f, g in zip(b, start, end, strict=True)],
        [-2 * x + f + g for x, f, g in zip(b, start, end, strict=True)],
    ]
    weights = elementary_weights(rows, tableau.dense_order + 1)

    def order_holds(order):
        if order > len(columns):
            return False
        return all(first_failure(weights, c, order, power=j + 1) is None for j, c in enumerate(columns))

    assert tableau.dense_order == min(3, tableau.order)
    assert order_holds(tableau.dense_order)
    assert not order_holds(tableau.dense_order + 1)


@pytest.mark.parametrize("tableau", TABLEAUS, ids=lambda t: t.name)
def test_floats_are_the_nearest_to_the_exact_numbers(tableau):
    for given, derived in (
        (tableau.a, tableau.A),
        (tableau.extra_a, tableau.extra_A),
        (tableau.dense, tableau.P),
    ):
        assert (derived is None) == (given is None)
        for row, floats in zip(given or (), derived or (), strict=True):
            assert floats == tuple(float(Fraction(x)) for x in row)
            assert all(type(x) is float for x in floats)
    assert tuple(map(float, tableau.b)) == tableau.B
    assert tuple(map(float, tableau.c)) == tableau.C
