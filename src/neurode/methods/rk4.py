"""The classical Runge-Kutta method: order 4, four stages, fixed steps."""

from neurode.methods.tableau import ButcherTableau, exact

rk4 = ButcherTableau(
    name="rk4",
    order=4,
    a=(
        (),
        exact("1/2"),
        exact("0 1/2"),
        exact("0 0 1"),
    ),
    b=exact("1/6 1/3 1/3 1/6"),
    c=exact("0 1/2 1/2 1"),
    source="W. Kutta (1901), Beitrag zur naeherungsweisen Integration totaler Differentialgleichungen, Z. "
    "Math. Phys. 46, 435-453",
)
