"""Which states to keep when at most k may be: chosen while the steps come, their number unknown, and used to go back."""

from __future__ import annotations

from collections.abc import Callable
from math import comb
from typing import Any


class Checkpoints:
    """Keeps the states before some steps, evenly spread, at most `limit` of them.

    On the way forward every `stride`-th state is kept; when there is no place left, every other one is dropped and the stride
    doubles, so that no step is taken again before the number of steps is known. On the way back, each stretch between two
    of them is gone through by binomial checkpointing with the places that have become free.

    Args:
        limit: states that may be kept; None keeps all.

    References:
        A. Griewank, A. Walther (2000), Algorithm 799: revolve, ACM TOMS 26(1).
        P. Stumm, A. Walther (2010), New algorithms for optimal online checkpointing, SIAM J. Sci. Comput. 32(2).
    """

    def __init__(self, limit: int | None) -> None:
        self.limit, self.stride = limit, 1
        self.kept: dict[int, Any] = {}

    def wants(self, n: int) -> bool:
        """Whether the state before step `n` is to be kept."""
        return n % self.stride == 0

    def keep(self, n: int, state: Any) -> None:
        """Keep the state before step `n`."""
        if self.limit is not None and len(self.kept) >= self.limit:
            self.stride *= 2
            self.kept = {i: s for i, s in self.kept.items() if i % self.stride == 0}
            if not self.wants(n):
                return
        self.kept[n] = state

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
            if free < 1:  # no place: from the start again for every step
                here = state
                for n in range(start, end - 1):
                    here = advance(n, here)
                back(end - 1, here)
                end -= 1
                continue
            middle = start + split(end - start, free)
            here = state
            for n in range(start, middle):
                here = advance(n, here)
            self._stretch(middle, end, here, free - 1, advance, back)
            end = middle
        if end > start:
            back(start, state)


def split(length: int, free: int) -> int:
    """Where binomial checkpointing puts its next state: after how many of `length` steps, with `free` places left.

    With s places and r repetitions of a step at most, C(s + r, s) steps can be gone back; the split leaves as many steps
    behind it as s - 1 places can do with r repetitions, and before it what s places can do with r - 1.
    """
    places, repeats = free + 1, 1  # the state at the start has a place too
    while comb(places + repeats, places) < length:
        repeats += 1
    before = comb(places + repeats - 1, places)
    return max(1, min(length - 1, before))
