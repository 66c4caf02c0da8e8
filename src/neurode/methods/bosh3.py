"""Bogacki and Shampine's pair: order 3(2), four stages, FSAL, cubic Hermite dense output."""

from neurode.methods.tableau import ButcherTableau, exact

bosh3 = ButcherTableau(
    name="bosh3",
    order=3,
    a=(
        (),
        exact("1/2"),
        exact("0 3/4"),
        exact("2/9 1/3 4/9"),
    ),
    b=exact("2/9 1/3 4/9 0"),
    c=exact("0 1/2 3/4 1"),
    b_error=exact("-5/72 1/12 1/9 -1/8"),
    order_error=2,
    dense_order=3,
    source="P. Bogacki, L. F. Shampine (1989), A 3(2) pair of Runge-Kutta formulas, Appl. Math. Lett. 2, 321-325",
)
