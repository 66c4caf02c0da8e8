"""Kutta's 3/8 rule: order 4, four stages, smaller error constants than `rk4`, fixed steps."""

from neurode.methods.tableau import ButcherTableau, exact

rk4_38 = ButcherTableau(
    name="rk4_38",
    order=4,
    a=(
        (),
        exact("1/3"),
        exact("-1/3 1"),
        exact("1 -1 1"),
    ),
    b=exact("1/8 3/8 3/8 1/8"),
    c=exact("0 1/3 2/3 1"),
    source="W. Kutta (1901), Beitrag zur naeherungsweisen Integration totaler Differentialgleichungen, Z. "
    "Math. Phys. 46, 435-453",
)
