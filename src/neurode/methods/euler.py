"""Euler's method: order 1, one stage, fixed steps."""

from neurode.methods.tableau import ButcherTableau, exact

euler = ButcherTableau(
    name="euler",
    order=1,
    a=((),),
    b=exact("1"),
    c=exact("0"),
    source="L. Euler (1768), Institutionum calculi integralis, vol. 1, section II, ch. VII",
)
