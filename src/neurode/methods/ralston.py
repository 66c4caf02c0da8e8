"""Ralston's method: order 2, two stages with the smallest bound on the truncation error, fixed steps."""

from neurode.methods.tableau import ButcherTableau, exact

ralston = ButcherTableau(
    name="ralston",
    order=2,
    a=((), exact("2/3")),
    b=exact("1/4 3/4"),
    c=exact("0 2/3"),
    source="A. Ralston (1962), Runge-Kutta methods with minimum error bounds, Math. Comp. 16, 431-437",
)
