"""Fehlberg's pair RK1(2) with its second-order solution: order 2(1), three stages, adaptive steps."""

from neurode.methods.tableau import ButcherTableau, exact

# Fehlberg continues with the first-order solution, whose weights are the last row, and then the last stage is
# the next step's first. With the second-order solution it is not, so that a step costs three evaluations.
fehlberg2 = ButcherTableau(
    name="fehlberg2",
    order=2,
    a=((), exact("1/2"), exact("1/256 255/256")),
    b=exact("1/512 255/256 1/512"),
    c=exact("0 1/2 1"),
    b_error=exact("-1/512 0 1/512"),
    order_error=1,
    source="E. Fehlberg (1969), Low-order classical Runge-Kutta formulas with stepsize control and their "
    "application to some heat transfer problems, NASA TR R-315",
)
