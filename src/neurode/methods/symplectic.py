"""Symplectic splitting methods for separable systems `dq/dt = g(t, p)`, `dp/dt = f(t, q)`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, ClassVar

from neurode._errors import InputError
from neurode.methods.trees import rooted_trees

# The conditions are sums of a few products of numbers below 2, so that rounding leaves 1e-15.
TOLERANCE = 1e-13


@dataclass(frozen=True)
class SymplecticTableau:
    """A composition of kicks of p and drifts of q, checked on construction.

    A step of size h from `(q, p)` at t does, for each i in turn: `p += h kick[i] dp(t + kick_times[i] h, q)`,
    then `q += h drift[i] dq(t + drift_times[i] h, p)`. A zero is skipped. Times follow the variable that the
    function sees: a kick sees q, which has drifted so far; a drift sees p, which has been kicked so far.

    Args:
        name: what users type.
        order: order p, checked by the order conditions of partitioned Runge-Kutta methods.
        kick: weights of the kicks of p; they sum to 1.
        drift: weights of the drifts of q, as many; they sum to 1.
        source: author, year, title, and where in it the numbers are.

    Attributes:
        kind: `"symplectic"`.
        kick_times: for each kick, the time into the step that its function is given, over h.
        drift_times: the same for each drift.
        num_evaluations_per_step: evaluations of `f`: one for each kick and drift that is not zero, less one
            when the last kick's `dp` serves the next step's first (same q, same time).
        fsal: whether it does so: the method begins and ends with a kick.
        dense_order: 3 or the order where that is lower, the order of cubic Hermite interpolation.

    Raises:
        InputError: lengths differ or an order condition fails.

    References:
        E. Hairer, C. Lubich, G. Wanner (2006), Geometric Numerical Integration, II.5 and III.2.

    Example:
        >>> from neurode.methods import get
        >>> leapfrog = get("leapfrog")
        >>> leapfrog.kick, leapfrog.drift, leapfrog.order
        ((0.5, 0.5), (1.0, 0.0), 2)
    """

    name: str
    order: int
    kick: Sequence[Any]
    drift: Sequence[Any]
    source: str = ""

    kind: ClassVar[str] = "symplectic"
    adaptive: ClassVar[bool] = False
    order_error: ClassVar[None] = None
    kick_times: tuple[float, ...] = field(init=False, repr=False, compare=False)
    drift_times: tuple[float, ...] = field(init=False, repr=False, compare=False)
    num_stages: int = field(init=False, repr=False, compare=False)
    num_evaluations_per_step: int = field(init=False, repr=False, compare=False)
    fsal: bool = field(init=False, repr=False, compare=False)
    dense_order: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        kick, drift = tuple(map(float, self.kick)), tuple(map(float, self.drift))
        if len(kick) != len(drift) or not kick:
            raise InputError(
                f"{self.name}: `kick` has {len(kick)} numbers and `drift` {len(drift)}; give both as many, "
                "at least one, with a zero where there is no kick or drift"
            )
        self._set(
            kick=kick,
            drift=drift,
            kick_times=tuple(accumulate((0.0, *drift[:-1]))),
            drift_times=tuple(accumulate(kick)),
            num_stages=len(kick),
        )
        self._check_order()
        fsal = kick[0] != 0.0 and drift[-1] == 0.0
        count = sum(weight != 0.0 for weight in kick + drift)
        self._set(fsal=fsal, num_evaluations_per_step=count - fsal, dense_order=min(3, self.order))

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _check_order(self) -> None:
        """Check the conditions of all rooted trees with p and q in turn, either of them at the root."""
        kick, drift = self.kick, self.drift
        num = len(kick)
        seen_by_kick: list[list[float]] = []  # at kick i, what q holds of a tree whose root is a drift
        seen_by_drift: list[list[float]] = []  # at drift i, what p holds of a tree whose root is a kick
        for tree in rooted_trees(self.order):
            kicked, drifted = [1.0] * num, [1.0] * num
            for child in tree.children:
                kicked = [x * y for x, y in zip(kicked, seen_by_kick[child], strict=True)]
                drifted = [x * y for x, y in zip(drifted, seen_by_drift[child], strict=True)]
            p_holds = list(accumulate(w * x for w, x in zip(kick, kicked, strict=True)))
            q_holds = list(accumulate(w * x for w, x in zip(drift, drifted, strict=True)))
            for variable, total in (("p", p_holds[-1]), ("q", q_holds[-1])):
                gap = abs(total - 1 / tree.density)
                if not gap <= TOLERANCE:
                    raise InputError(
                        f"{self.name}: declared order {self.order}, but a condition of order {tree.order} "
                        f"for {variable} is missed by {gap:.2g}; check `kick` and `drift`, or declare "
                        f"order={tree.order - 1}"
                    )
            seen_by_kick.append([0.0, *q_holds[:-1]])
            seen_by_drift.append(p_holds)


leapfrog = SymplecticTableau(
    name="leapfrog",
    order=2,
    kick=(1 / 2, 1 / 2),
    drift=(1, 0),
    source="L. Verlet (1967), Computer experiments on classical fluids I, Phys. Rev. 159, 98-103; "
    "kick-drift-kick form: E. Hairer, C. Lubich, G. Wanner (2003), Geometric numerical integration "
    "illustrated by the Stoermer-Verlet method, Acta Numerica 12, 399-450",
)

# Yoshida (1990): three leapfrogs, of lengths OUTER, INNER, OUTER.
OUTER = 1 / (2 - 2 ** (1 / 3))
INNER = -(2 ** (1 / 3)) / (2 - 2 ** (1 / 3))

yoshida4 = SymplecticTableau(
    name="yoshida4",
    order=4,
    kick=(OUTER / 2, (OUTER + INNER) / 2, (INNER + OUTER) / 2, OUTER / 2),
    drift=(OUTER, INNER, OUTER, 0),
    source="H. Yoshida (1990), Construction of higher order symplectic integrators, Phys. Lett. A 150, 262-268",
)
