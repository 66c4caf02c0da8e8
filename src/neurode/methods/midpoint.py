"""The explicit midpoint rule: order 2, two stages, fixed steps."""

from neurode.methods.tableau import ButcherTableau, exact

midpoint = ButcherTableau(
    name="midpoint",
    order=2,
    a=((), exact("1/2")),
    b=exact("0 1"),
    c=exact("0 1/2"),
    source="C. Runge (1895), Ueber die numerische Aufloesung von Differentialgleichungen, Math. Ann. 46, 167-178",
)
