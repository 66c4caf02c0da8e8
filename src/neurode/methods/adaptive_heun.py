"""Heun's second-order method with Euler's for the error estimate: order 2(1), two stages, adaptive steps."""

from neurode.methods.tableau import ButcherTableau, exact

adaptive_heun = ButcherTableau(
    name="adaptive_heun",
    order=2,
    a=((), exact("1")),
    b=exact("1/2 1/2"),
    c=exact("0 1"),
    b_error=exact("-1/2 1/2"),
    order_error=1,
    source="K. Heun (1900), Neue Methoden zur approximativen Integration, Z. Math. Phys. 45, 23-38; as a "
    "pair: E. Hairer, S. P. Norsett, G. Wanner (1993), Solving Ordinary Differential Equations I, II.4",
)
