"""Heun's third-order method: order 3, three stages, fixed steps."""

from neurode.methods.tableau import ButcherTableau, exact

heun3 = ButcherTableau(
    name="heun3",
    order=3,
    a=((), exact("1/3"), exact("0 2/3")),
    b=exact("1/4 0 3/4"),
    c=exact("0 1/3 2/3"),
    source="K. Heun (1900), Neue Methoden zur approximativen Integration, Z. Math. Phys. 45, 23-38",
)
