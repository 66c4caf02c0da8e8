"""Adams methods on a fixed grid: explicit (Adams-Bashforth) and implicit (Adams-Moulton), of any order up to 12."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import comb
from typing import ClassVar

from neurode._errors import InputError

# Higher orders exist, but the interval of stability shrinks by about half with every order: the explicit one ends at
# -2, -1, -6/11, -3/10, ... (Hairer & Wanner 1996, V.1, fig. 1.1), so that 12 is of no practical use and 4 the default.
HIGHEST_ORDER = 12


@cache
def adams_weights(order: int, implicit: bool) -> tuple[Fraction, ...]:
    """Return the exact weights of an Adams method, the newest derivative first.

    With equal steps h, the explicit method of order k is `y[n+1] = y[n] + h sum_j w[j] f[n-j]`, j = 0, ..., k - 1,
    and the implicit one `y[n+1] = y[n] + h sum_j w[j] f[n+1-j]`. They integrate the polynomial through those
    derivatives, whose coefficients in backward differences follow from the generating function
    `-t / ((1 - t) log(1 - t))` (explicit) or `-t / log(1 - t)` (implicit).

    Args:
        order: 1 to 12.
        implicit: whether the derivative at the new time takes part.

    References:
        E. Hairer, S. P. Norsett, G. Wanner (1993), Solving Ordinary Differential Equations I, III.1, eqs. (1.7) and
        (1.11).

    Example:
        >>> [str(w) for w in adams_weights(4, implicit=False)]
        ['55/24', '-59/24', '37/24', '-3/8']
        >>> [str(w) for w in adams_weights(3, implicit=True)]
        ['5/12', '2/3', '-1/12']
    """
    gamma: list[Fraction] = []
    for m in range(order):
        target = Fraction(0 if implicit and m > 0 else 1)
        gamma.append(target - sum((g / (m + 1 - i) for i, g in enumerate(gamma)), Fraction(0)))
    # The m-th backward difference is sum_j (-1)^j binomial(m, j) f[n-j].
    return tuple((-1) ** j * sum(gamma[m] * comb(m, j) for m in range(j, order)) for j in range(order))


@dataclass(frozen=True)
class AdamsFamily:
    """Explicit or implicit Adams methods: order `max_order` once enough derivatives are known.

    Args:
        name: what users type.
        implicit: Adams-Moulton, iterated from an explicit prediction, instead of Adams-Bashforth.
        max_order: 1 to 12; the number of derivatives used. High orders are stable for very small steps only.
        source: author, year, title, and where in it the method is.

    Attributes:
        kind: `"adams"`.
        order: `max_order`.
        num_history: number of derivatives that a step takes from the past, the one at its start included.
        num_evaluations_per_step: 1 explicit; implicit, prediction and one correction (each further iteration: 1).

    Raises:
        InputError: `max_order` is not an integer from 1 to 12.

    Example:
        >>> from neurode.methods import get
        >>> from dataclasses import replace
        >>> replace(get("explicit_adams"), max_order=2).weights()
        (1.5, -0.5)
    """

    name: str
    implicit: bool
    max_order: int = 4
    source: str = ""

    kind: ClassVar[str] = "adams"
    adaptive: ClassVar[bool] = False
    fsal: ClassVar[bool] = False
    order_error: ClassVar[None] = None

    def __post_init__(self) -> None:
        if isinstance(self.max_order, bool) or not isinstance(self.max_order, int):
            raise InputError(
                f"{self.name}: max_order={self.max_order!r} must be an integer, such as max_order=4"
            )
        if not 1 <= self.max_order <= HIGHEST_ORDER:
            raise InputError(
                f"{self.name}: max_order={self.max_order} must be from 1 to {HIGHEST_ORDER}; 4 is the default"
            )

    @property
    def order(self) -> int:
        return self.max_order

    @property
    def num_stages(self) -> int:
        return self.num_evaluations_per_step

    @property
    def num_history(self) -> int:
        return max(1, self.max_order - 1) if self.implicit else self.max_order

    @property
    def num_evaluations_per_step(self) -> int:
        return 2 if self.implicit else 1

    @property
    def dense_order(self) -> int:
        """Cubic Hermite between the grid's points: order 3, or the method's where that is lower."""
        return min(3, self.max_order)

    def weights(self, order: int | None = None) -> tuple[float, ...]:
        """Return the weights of the given order (`max_order` when None), the newest derivative first."""
        return tuple(map(float, adams_weights(self.max_order if order is None else order, self.implicit)))


explicit_adams = AdamsFamily(
    name="explicit_adams",
    implicit=False,
    source="F. Bashforth, J. C. Adams (1883), An attempt to test the theories of capillary action; "
    "E. Hairer, S. P. Norsett, G. Wanner (1993), Solving Ordinary Differential Equations I, III.1",
)

implicit_adams = AdamsFamily(
    name="implicit_adams",
    implicit=True,
    source="F. R. Moulton (1926), New methods in exterior ballistics; "
    "E. Hairer, S. P. Norsett, G. Wanner (1993), Solving Ordinary Differential Equations I, III.1",
)
