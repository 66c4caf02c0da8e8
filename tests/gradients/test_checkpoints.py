"""Checkpoints: at most k states live, all steps come back in order, and little more is taken again than must be."""

from __future__ import annotations

import functools
import itertools
from math import comb

import pytest

from neurode.gradients.checkpoints import Checkpoints


class Counted:
    """A state that knows how many of its kind live."""

    living = 0

    def __init__(self, n: int) -> None:
        self.n = n
        Counted.living += 1

    def __del__(self) -> None:
        Counted.living -= 1


def go_back(limit: int, steps: int) -> tuple[int, int]:
    """Record and reverse; returns the most states that lived at once, and how many steps were taken again."""
    Counted.living = 0
    states, most, again, seen = Checkpoints(limit), 0, 0, []
    state = Counted(0)
    for n in range(steps):
        if states.wants(n):
            states.keep(n, state)
        state = Counted(n + 1)
        most = max(most, Counted.living)
    del state

    def advance(n: int, state: Counted) -> Counted:
        nonlocal most, again
        assert n == state.n
        again += 1
        after = Counted(n + 1)
        most = max(most, Counted.living)
        return after

    def back(n: int, state: Counted) -> None:
        assert n == state.n
        seen.append(n)

    states.reverse(steps, advance, back)
    assert seen == list(reversed(range(steps)))
    return most, again


@functools.cache
def fewest(steps: int, places: int) -> int:
    """The fewest advances with which a stretch of known length can be gone back, tried out."""
    if steps <= 1:
        return 0
    if places == 1:
        return steps * (steps - 1) // 2
    return min(m + fewest(steps - m, places - 1) + fewest(m, places) for m in range(1, steps))


def optimum(steps: int, places: int) -> int:
    """The same in closed form (Griewank & Walther 2000): `r n - C(s + r, r - 1)`, r the repetitions that are needed."""
    r = 0
    while comb(places + r, places) < steps:
        r += 1
    return r * steps - comb(places + r, r - 1) if r else 0


def test_the_closed_form_is_what_trying_out_finds() -> None:
    for steps, places in itertools.product(range(1, 50), range(1, 6)):
        assert optimum(steps, places) == fewest(steps, places)


@pytest.mark.parametrize("places", [1, 2, 3, 5, 8])
def test_a_stretch_of_known_length_is_gone_back_with_the_least_work(places: int) -> None:
    states = Checkpoints(places)
    for steps in range(1, 130):
        again = 0

        def advance(n: int, state: int) -> int:
            nonlocal again
            again += 1
            return state + 1

        states._stretch(0, steps, 0, places - 1, advance, lambda n, state: None)
        assert again == optimum(steps, places)


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 7, 16, 50])
def test_at_most_k_states_live_and_work_stays_near_the_optimum(limit: int) -> None:
    """Of an unknown number of steps; the one state above k is that from which a step is just being taken."""
    for steps in (1, 2, 3, 5, 17, 44, 67, 100, 157, 331, 640 if limit > 2 else 200, 1327 if limit > 8 else 150):
        most, again = go_back(limit, steps)
        assert most <= limit + 2  # k kept, one that a step starts from and one that it ends in
        # All steps: the solve, those taken again, and each once on the tape. The solve is the optimum's first advance.
        known = max(0, optimum(steps, limit) - (steps - 1))
        assert again + 2 * steps <= 1.35 * (known + 2 * steps)
    if limit >= 2:
        assert go_back(limit, limit)[1] == 0  # as many places as steps: nothing is taken again
