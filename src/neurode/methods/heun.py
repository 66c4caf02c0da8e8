"""Heun's second-order method, the explicit trapezoidal rule: order 2, two stages, fixed steps."""

from neurode.methods.tableau import ButcherTableau, exact

heun = ButcherTableau(
    name="heun",
    order=2,
    a=((), exact("1")),
    b=exact("1/2 1/2"),
    c=exact("0 1"),
    source="K. Heun (1900), Neue Methoden zur approximativen Integration, Z. Math. Phys. 45, 23-38",
)
