"""Butcher tableaus of explicit Runge-Kutta methods: pure numbers that check and explain themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar

from neurode._errors import InputError
from neurode.methods.trees import elementary_weights, first_failure

Floats = tuple[float, ...]
Rows = tuple[Floats, ...]
Terms = tuple[tuple[int, float], ...]

# Residuals of conditions evaluated in double precision, relative to the size of their terms. Tableaus that
# are published as 16-digit decimals reach 1e-15; a wrong digit anywhere a user would make one shows at 1e-10
# or more.
TOLERANCE = 1e-12
# There are 7,813 rooted trees with at most 12 vertices, checked in a tenth of a second; they triple with each
# further order.
HIGHEST_CHECKED_ORDER = 12
# The interpolant through y0, f0, y1, f1 (Hairer, Norsett & Wanner 1993, II.6, eq. 6.7).
HERMITE_ORDER = 3

# What is given, exact, and the floats derived from it.
ROWS = (("b", "B"), ("c", "C"), ("b_error", "E"), ("b_error2", "E2"), ("extra_c", "extra_C"))
MATRICES = (("a", "A"), ("dense", "P"), ("extra_a", "extra_A"))


def exact(numbers: str) -> tuple[Fraction, ...]:
    """Read a row of exact numbers, separated by blanks: fractions `44/45`, integers, decimals of any length.

    Example:
        >>> exact("1/5 0 -0.25")
        (Fraction(1, 5), Fraction(0, 1), Fraction(-1, 4))
    """
    return tuple(Fraction(number) for number in numbers.split())


def _terms(row: Floats) -> Terms:
    """The weights of a row that are not zero, each with its place."""
    return tuple((i, w) for i, w in enumerate(row) if w)


@dataclass(frozen=True)
class ButcherTableau:
    """An explicit Runge-Kutta method as its numbers, checked on construction.

    A step from `(t, y)` of size `h` evaluates `k_i = f(t + c_i h, y + h sum_j a_ij k_j)` and moves to
    `y + h sum_i b_i k_i`. Construction fails unless the row sums, the order conditions of the declared order
    (every rooted tree), the error estimate and the dense output hold; what can be derived is derived.

    Args:
        name: what users type.
        order: order p of the solution, at least 1.
        a: one row a stage, row i with i numbers; the first row is empty. A method whose last stage is
            evaluated at the new point (FSAL) has that stage as its last row, equal to `b`.
        b: weights of the solution, one a stage (0 for an FSAL stage).
        c: abscissae, one a stage; `c[i]` is the sum of row i.
        b_error: weights `b - b_hat` of the error estimate, one a stage; None for a method of fixed steps.
        b_error2: weights of a second estimate; the two combine to `err**2 / sqrt(err**2 + 0.01 err2**2)`.
        order_error: order of the embedded solution, so that `1 / (order_error + 1)` is the controller's
            exponent; derived when None. For two estimates it is the order that their combination behaves as.
        dense: `P[i][j]`, with `y(t + theta h) = y + h sum_i k_i sum_j P[i][j] theta**(j + 1)`, one row a
            stage, then one row an extra stage; None for the cubic Hermite interpolant.
        extra_a: rows of stages evaluated only for dense output; row i has `len(a) + i` numbers.
        extra_c: their abscissae.
        dense_order: order q of the dense output: over one step its error is `O(h**(q + 1))`. Derived when 0.
        source: author, year, title, and where in it the numbers are.
        reuse_last: start the next step from the last stage's derivative although that is `f` at another state near the
            new one: one evaluation less a step, the order kept where that state is good to it. For adaptive
            methods whose last stage lies at the end of the step.

    Attributes:
        kind: `"explicit"`.
        adaptive: whether there is an error estimate.
        fsal: whether the last stage is `f` at the new point, and so the first stage of the next step.
        terms, last_terms: which stages enter every stage behind the first, and the solution, and with which weights.
        num_stages: number of rows, an FSAL stage included.
        num_evaluations_per_step: evaluations of `f` that a step costs: one less than the stages when FSAL.
        num_dense_evaluations: further evaluations in a step that needs dense output.
        end_stage: the position, extra stages included, of the stage that is `f` at the new point; None if
            there is none. It is the last stage when FSAL, and an extra stage in some dense outputs.
        dense_continuous_derivative: whether the dense output's derivative equals `f` at both ends of every
            step.
        A, B, C, E, E2, P, extra_A, extra_C: the same numbers as tuples of Python floats.

    Raises:
        InputError: a length is wrong or a condition fails; the message names it.

    References:
        E. Hairer, S. P. Norsett, G. Wanner (1993), Solving Ordinary Differential Equations I, chapter II.

    Example:
        A method of one's own, and what is derived from its numbers (Heun's second-order method with Euler's
        method for the error estimate):

        >>> from neurode.methods import ButcherTableau
        >>> mine = ButcherTableau(
        ...     name="mine", order=2, a=[[], [1]], b=[1 / 2, 1 / 2], c=[0, 1], b_error=[-1 / 2, 1 / 2],
        ...     source="K. Heun (1900)",
        ... )
        >>> mine.order_error, mine.fsal, mine.num_evaluations_per_step, mine.dense_order
        (1, False, 2, 2)
        >>> ButcherTableau(name="wrong", order=3, a=[[], [1]], b=[1 / 2, 1 / 2], c=[0, 1], source="")
        Traceback (most recent call last):
        neurode._errors.InputError: tableau 'wrong': declared order 3, but a condition of order 3 (the \
rooted tree of density 6) is missed by 0.17; check `a` and `b`, or declare `order=2`
    """

    name: str
    order: int
    a: Sequence[Sequence[Any]]
    b: Sequence[Any]
    c: Sequence[Any]
    b_error: Sequence[Any] | None = None
    b_error2: Sequence[Any] | None = None
    order_error: int | None = None
    dense: Sequence[Sequence[Any]] | None = None
    extra_a: Sequence[Sequence[Any]] = ()
    extra_c: Sequence[Any] = ()
    dense_order: int = 0
    source: str = ""
    reuse_last: bool = False

    kind: ClassVar[str] = "explicit"
    adaptive: bool = field(init=False, repr=False, compare=False)
    fsal: bool = field(init=False, repr=False, compare=False)
    terms: tuple[Terms, ...] = field(init=False, repr=False, compare=False)
    last_terms: Terms = field(init=False, repr=False, compare=False)
    num_stages: int = field(init=False, repr=False, compare=False)
    num_evaluations_per_step: int = field(init=False, repr=False, compare=False)
    num_dense_evaluations: int = field(init=False, repr=False, compare=False)
    end_stage: int | None = field(init=False, repr=False, compare=False)
    dense_continuous_derivative: bool = field(init=False, repr=False, compare=False)
    A: Rows = field(init=False, repr=False, compare=False)
    B: Floats = field(init=False, repr=False, compare=False)
    C: Floats = field(init=False, repr=False, compare=False)
    E: Floats | None = field(init=False, repr=False, compare=False)
    E2: Floats | None = field(init=False, repr=False, compare=False)
    P: Rows | None = field(init=False, repr=False, compare=False)
    extra_A: Rows = field(init=False, repr=False, compare=False)
    extra_C: Floats = field(init=False, repr=False, compare=False)
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._freeze()
        self._check_lengths()
        self._derive_stages()
        self._check_row_sums()
        weights = self._check_order()
        self._derive_error_order(weights)
        self._derive_dense(weights)

    def __hash__(self) -> int:
        return self._hash

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _refuse(self, problem: str) -> InputError:
        return InputError(f"tableau {self.name!r}: {problem}")

    def _freeze(self) -> None:
        """Turn what was given into tuples, and derive the floats that the solver computes with."""
        for name, twin in ROWS:
            given = getattr(self, name)
            row = None if given is None else tuple(given)
            self._set(**{name: row, twin: None if row is None else self._floats(name, row)})
        for name, twin in MATRICES:
            given = getattr(self, name)
            rows = None if given is None else tuple(map(tuple, given))
            twins = None if rows is None else tuple(self._floats(name, row) for row in rows)
            self._set(**{name: rows, twin: twins})
        # Numbers only: hashes of strings and of None differ between processes, and this one travels in
        # pickles.
        self._set(_hash=hash((self.order, self.A, self.B, self.C, self.E or (), self.P or ())))

    def _floats(self, name: str, row: tuple[Any, ...]) -> Floats:
        try:
            return tuple(map(float, row))
        except (TypeError, ValueError):
            raise self._refuse(f"`{name}` needs numbers (floats, integers or fractions), got {row}") from None

    def _check_lengths(self) -> None:
        num = len(self.a)
        if not isinstance(self.order, int) or self.order < 1 or num < 1:
            raise self._refuse(
                f"needs an integer order >= 1 and at least one stage, got order={self.order!r} and {num} rows in `a`"
            )
        for i, row in enumerate((*self.a, *self.extra_a)):
            if len(row) != i:
                raise self._refuse(f"row {i} of `a` (then `extra_a`) needs {i} numbers, got {len(row)}: {row}")
        for name in ("b", "c", "b_error", "b_error2"):
            row = getattr(self, name)
            if row is not None and len(row) != num:
                raise self._refuse(f"`{name}` needs {num} numbers, one for each row of `a`, got {len(row)}")
        if len(self.extra_c) != len(self.extra_a):
            raise self._refuse(f"`extra_c` needs {len(self.extra_a)} numbers, got {len(self.extra_c)}")
        if self.dense is None:
            if self.extra_a:
                raise self._refuse("`extra_a` is for dense output; give `dense` too")
            return
        if len(self.dense) != num + len(self.extra_a):
            raise self._refuse(f"`dense` needs {num + len(self.extra_a)} rows, one a stage, got {len(self.dense)}")
        if len(set(map(len, self.dense))) != 1 or not self.dense[0]:
            raise self._refuse("`dense` needs rows of the same length, one number for each power of theta")

    def _derive_stages(self) -> None:
        num = len(self.a)
        rows, nodes = (*self.a, *self.extra_a), (*self.c, *self.extra_c)
        weights = (*self.b, *[0] * len(self.extra_a))
        ends = [i for i in range(1, len(rows)) if nodes[i] == 1 and rows[i] == weights[:i] and not any(weights[i:])]
        fsal = num - 1 in ends
        if self.reuse_last and nodes[num - 1] != 1:
            raise self._refuse("`reuse_last` needs a last stage at the end of the step, c[-1] = 1")
        self._set(
            adaptive=self.b_error is not None,
            fsal=fsal,
            end_stage=ends[0] if ends else None,
            terms=tuple(map(_terms, self.A[1:])),
            last_terms=_terms(self.B),
            num_stages=num,
            num_evaluations_per_step=num - 1 if fsal or self.reuse_last else num,
            num_dense_evaluations=len(self.extra_a)
            if self.dense is not None
            else int(not fsal and not self.reuse_last),
        )

    def _check_row_sums(self) -> None:
        for i, (row, node) in enumerate(zip(self.A + self.extra_A, self.C + self.extra_C, strict=True)):
            if not abs(sum(row) - node) <= TOLERANCE * max(1.0, sum(map(abs, row))):
                raise self._refuse(
                    f"row {i} of `a` sums to {sum(row):.15g}, but c[{i}] is {node:.15g}; they must be equal"
                )

    def _check_order(self) -> list[Floats]:
        """Check `b` against every rooted tree, and return all stages' weights for the checks that follow."""
        if self.order > HIGHEST_CHECKED_ORDER:
            raise self._refuse(f"order {self.order} is beyond {HIGHEST_CHECKED_ORDER}, the highest that can be checked")
        weights = elementary_weights(self.A + self.extra_A, self.order)
        failure = first_failure(weights, self.B, self.order, TOLERANCE)
        if failure is not None:
            tree, residual = failure
            raise self._refuse(
                f"declared order {self.order}, but a condition of order {tree.order} (the rooted tree of "
                f"density {tree.density}) is missed by {residual:.2g}; check `a` and `b`, or declare "
                f"`order={tree.order - 1}`"
            )
        return weights

    def _order_of(self, weights: list[Floats], row: Floats, power: int) -> int:
        """Return the largest order, at most the declared one, whose conditions a row of weights meets."""
        failure = first_failure(weights, row, self.order, TOLERANCE, power)
        return self.order if failure is None else failure[0].order - 1

    def _derive_error_order(self, weights: list[Floats]) -> None:
        if self.E is None:
            if self.order_error is not None or self.E2 is not None:
                raise self._refuse("`order_error` and `b_error2` belong to an error estimate; give `b_error` too")
            return
        derived = self._order_of(weights, self.E, power=0)
        if derived == 0 or not any(self.E):
            raise self._refuse(f"`b_error` must sum to 0 and not vanish, got the sum {sum(self.E):.2g}")
        if self.E2 is not None:
            # err ~ h^(p + 1), err2 ~ h^(p2 + 1), p2 < p: the combination behaves as err^2 / err2.
            derived = 2 * derived - self._order_of(weights, self.E2, power=0)
        if self.order_error not in (None, derived):
            raise self._refuse(f"declared order_error {self.order_error}, but `b_error` belongs to order {derived}")
        self._set(order_error=derived)

    def _derive_dense(self, weights: list[Floats]) -> None:
        if self.P is None:
            derived = min(HERMITE_ORDER, self.order)
            self._set(dense_continuous_derivative=True)
        else:
            self._check_dense_ends(self.P)
            columns = list(zip(*self.P, strict=True))
            orders = [self._order_of(weights, column, power=j + 1) for j, column in enumerate(columns)]
            derived = min(len(columns), *orders)
        if self.dense_order not in (0, derived):
            raise self._refuse(f"declared dense_order {self.dense_order}, but the dense output has order {derived}")
        self._set(dense_order=derived)

    def _check_dense_ends(self, P: Rows) -> None:
        """Check that the dense output ends at the step's end, and whether its derivative is `f` there."""
        ends = self.B + (0.0,) * len(self.extra_A)
        for i, (row, end) in enumerate(zip(P, ends, strict=True)):
            if not abs(sum(row) - end) <= TOLERANCE * max(1.0, sum(map(abs, row))):
                raise self._refuse(f"row {i} of `dense` sums to {sum(row):.15g}, but must give b[{i}] = {end:.15g}")
        starts = all(row[0] == (i == 0) for i, row in enumerate(P))
        slopes = [sum((j + 1) * x for j, x in enumerate(row)) for row in P]
        scale = max(1.0, max(abs(x) * len(row) for row in P for x in row))
        end = self.end_stage
        ends_well = end is not None and all(
            abs(slope - (i == end)) <= TOLERANCE * scale for i, slope in enumerate(slopes)
        )
        self._set(dense_continuous_derivative=starts and ends_well)
