"""Which states to keep when at most k may be: chosen while the steps come, their number unknown, and used to go back."""

from __future__ import annotations

from collections.abc import Callable
from math import comb
from typing import Any


class Checkpoints:
    """Keeps the states before some steps, at most `limit` of them, so that few steps have to be taken again.

    On the way forward the newest state is always kept. Once all places are taken, a state that lies between others of
    higher rank gives its place up; where there is none, the newest moves on, and rises in rank (Wang et al. 2009). So the
    states stand, whenever the solve happens to end, nearly as binomial checkpointing would have put them had the number of
    steps been known. On the way back it is known, and each stretch between two states is gone through by binomial
    checkpointing itself, with the places that have become free.

    The steps taken in all, in the solve, again and on the tape, are at most 1.35 times as many as they would have to be were
    their number known before (a test goes through k = 1 to 50).

    Args:
        limit: states that may be kept; None keeps all.

    References:
        A. Griewank, A. Walther (2000), Algorithm 799: revolve, ACM TOMS 26(1).
        Q. Wang, P. Moin, G. Iaccarino (2009), Minimal repetition dynamic checkpointing algorithm for unsteady adjoint
        calculation, SIAM J. Sci. Comput. 31(4).
        P. Stumm, A. Walther (2010), New algorithms for optimal online checkpointing, SIAM J. Sci. Comput. 32(2).
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.kept: dict[int, Any] = {}
        self.ranks: dict[int, int] = {}  # of all states kept but the first, in the order of their steps

    def wants(self, n: int) -> bool:
        """Whether the state before step `n` is to be kept."""
        return self.limit != 1 or n == 0

    def keep(self, n: int, state: Any) -> None:
        """Keep the state before step `n`, and drop another where there is no place left."""
        rank = 0
        if self.limit is not None and len(self.kept) >= self.limit:
            dropped = self._dispensable()
            if dropped is None:
                dropped, rank = n - 1, self.ranks[n - 1] + 1
            del self.kept[dropped], self.ranks[dropped]
        self.kept[n] = state
        if n and self.limit is not None:
            self.ranks[n] = rank

    def _dispensable(self) -> int | None:
        """The last state that has one of higher rank behind it."""
        highest = -1
        for n in reversed(self.ranks):
            if self.ranks[n] < highest:
                return n
            highest = self.ranks[n]
        return None

    def for_another_pass(self) -> dict[int, Any]:
        """What a second backward pass over the same graph starts from: the first state alone where places are counted,
        since the places of the others are filled anew on the way back."""
        return dict(self.kept) if self.limit is None else {n: state for n, state in self.kept.items() if n == 0}

    def reverse(self, steps: int, advance: Callable[[int, Any], Any], back: Callable[[int, Any], None]) -> None:
        """Call `back(n, state before n)` for n = steps - 1, ..., 0.

        Args:
            steps: number of steps.
            advance: `advance(n, state)`, the state after step n.
            back: what to do with a step.
        """
        end = steps
        for start in sorted(self.kept, reverse=True):
            state = self.kept.pop(start)
            free = (self.limit or 0) - len(self.kept) - 1
            self._stretch(start, end, state, free, advance, back)
            end = start

    def _stretch(self, start: int, end: int, state: Any, free: int, advance: Any, back: Any) -> None:
        """Go back through the steps `start .. end - 1` with `free` places besides the one that `state` has."""
        while end - start > 1:
            middle = start + split(end - start, free) if free > 0 else end - 1
            here = state
            for n in range(start, middle):
                here = advance(n, here)
            self._stretch(middle, end, here, free - 1, advance, back)
            del here
            end = middle
        if end > start:
            back(start, state)


def split(length: int, free: int) -> int:
    """Where binomial checkpointing puts its next state: after how many of `length` steps, with `free` places left.

    With s places (that of the start is one) and no step taken more than r times, C(s + r, s) steps can be gone back. The
    least work is done by any split that leaves so many steps behind it that s - 1 places do with r, and more than they could
    with fewer; and before it as many as s places do with r - 1, and more than with fewer (Griewank & Walther 2000).
    """
    places, repeats = free + 1, 1
    while comb(places + repeats, places) < length:
        repeats += 1
    before = min(comb(places + repeats - 1, places), length - comb(places + repeats - 2, places - 1))
    return max(1, min(length - 1, before))
