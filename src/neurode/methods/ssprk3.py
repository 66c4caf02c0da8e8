"""Shu and Osher's strong-stability-preserving method: order 3, three stages, fixed steps."""

from neurode.methods.tableau import ButcherTableau, exact

ssprk3 = ButcherTableau(
    name="ssprk3",
    order=3,
    a=((), exact("1"), exact("1/4 1/4")),
    b=exact("1/6 1/6 2/3"),
    c=exact("0 1 1/2"),
    source="C.-W. Shu, S. Osher (1988), Efficient implementation of essentially non-oscillatory "
    "shock-capturing schemes, J. Comput. Phys. 77, 439-471, eq. (2.18)",
)
