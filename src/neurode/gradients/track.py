"""What a reversible solve leaves behind for the way back: its times, 8 bytes a step and row, and its last states.

Where events change the course, nothing leads back over the event: there the states before it are kept too.
"""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neurode._problem import Problem
from neurode._state import number
from neurode.gradients.record import RowStride, State, Stride
from neurode.stepping import Step


@dataclass(frozen=True)
class Special:
    """A step in which events happened.

    Attributes:
        t1: where it would have ended.
        marks: the events.
        caught: the number of the catch that cut it short, or None.
        lanes: `(rows,)` which rows were caught.
        start: the states before it, of the rows that were caught.
    """

    t1: Any
    marks: tuple[Any, ...]
    caught: int | None = None
    lanes: Tensor | None = None
    start: State | None = None


class Track:
    """The steps of a solve; read like a sequence of strides, which are made when they are asked for."""

    latest: tuple[int, Any] = (-1, None)  # asked for several times while a step is gone back over

    @property
    def strides(self) -> Track:
        """The steps."""
        return self

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, n: int) -> Any:
        if self.latest[0] != n:
            self.latest = n, self._stride(n)
        return self.latest[1]

    def __iter__(self) -> Iterator[Any]:
        return (self[n] for n in range(len(self)))

    def _stride(self, n: int) -> Any:
        raise NotImplementedError


class JointTrack(Track):
    """The steps of a joint solve.

    Attributes:
        catches: the times of the events that changed the course.
        ended: the number of the catch that ended the solve, or -1.
    """

    def __init__(self, problem: Problem) -> None:
        self.ends = array("d", [number(problem.t0)])
        self.jumps = {float(t) for t in problem.jump_at}
        self.last = State(problem.y0, (problem.y0,))
        self.special: dict[int, Special] = {}
        self.catches: list[Tensor] = []
        self.cut: list[int] = []  # the steps that events cut short
        self.ended: Any = -1
        self.intervals: list[Any] = []

    def joint(self, step: Step, marks: tuple[Any, ...], catch: Any) -> None:
        """Note an accepted step, the events in it, and what they changed."""
        n, end = len(self), number(step.interval.t1)
        if marks:
            self.special[n] = Special(end, marks)
        if catch is not None:
            caught, start = len(self.catches), State(step.y0, (step.restart,))
            self.special[n] = Special(end, marks, caught, start=start)
            self.catches.append(catch.t[0])
            self.cut.append(n)
            self.ended = caught if int(catch.ended[0]) >= 0 else -1
            end = float(catch.t[0])
        self.ends.append(end)
        self.last = State(step.y1, (step.carry,)) if catch is None else State(catch.after, (catch.after,))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def _stride(self, n: int) -> Stride:
        special, before = self.special.get(n), self.special.get(n - 1)
        t0, end = self.ends[n], self.ends[n + 1]
        t1 = end if special is None else special.t1
        point = (
            n + 1 - bisect.bisect_left(self.cut, n)
        )  # a step that was cut short has not reached its point of the grid
        return Stride(
            t0, t1, (t0 in self.jumps, t1 in self.jumps), point, end, special.marks if special else (),
            special.caught if special else None, before.caught if before else None,
        )  # fmt: skip

    def states(self) -> State:
        """y and z at the end."""
        return self.last


class RowTrack(Track):
    """The attempts of rows with times of their own."""

    def __init__(self, problem: Problem) -> None:
        self.t0 = problem.t0.detach()
        self.full = State(problem.y0, (problem.y0,))
        jumps = sorted({float(t) for t in problem.jump_at})
        self.jumps = torch.tensor(jumps, dtype=self.t0.dtype, device=self.t0.device) if jumps else None
        self.attempts: list[tuple[Tensor, Tensor, bool]] = []  # ends, which rows, whether they are all
        self.last: Any = None  # the newest states of the present rows, not yet among all
        self.special: dict[int, Special] = {}
        self.catches: list[Tensor] = []
        self.ended: Any = -1
        self.intervals: list[Any] = []
        self.resumed = torch.full_like(self.t0, -1, dtype=torch.int64)  # the catch that each row starts from
        self.behind = torch.zeros_like(self.resumed)  # how many attempts did not reach their point of the grid
        self.after_catches: dict[int, tuple[Tensor, Tensor]] = {}  # the same two for attempts behind the first catch

    def rows(self, pace: Any, step: Step, marks: tuple[Any, ...], catch: Any) -> None:
        """Note an attempt, the events in it, and what they changed."""
        n, accepted, rows = len(self), pace.accepted, pace.rows
        if self.last is not None and self.last[0] is not rows:
            self._put()  # rows have left: what they ended with must not be lost
        self.last = (rows, pace.whole, accepted, step, catch)
        end = torch.where(accepted, pace.tried, pace.tried_from)
        if self.catches:
            self.after_catches[n] = (self.resumed[rows], self.behind[rows])
            self.resumed = self.resumed.index_copy(0, rows, torch.where(accepted, -1, self.resumed[rows]))
        if marks:
            self.special[n] = Special(end, marks)
        if catch is not None:
            end = self._catch(n, rows, step, end, marks, catch)
        self.attempts.append((end, rows, pace.whole))

    def _catch(self, n: int, rows: Tensor, step: Step, end: Tensor, marks: Any, catch: Any) -> Tensor:
        """Note what events changed; returns where the rows went on from."""
        lanes, caught = catch.lanes, len(self.catches)
        self.special[n] = Special(end, marks, caught, lanes, State(step.y0[lanes], (step.restart[lanes],)))
        self.catches.append(torch.zeros_like(self.t0).index_copy(0, rows, catch.t))
        self.resumed = self.resumed.index_copy(0, rows, torch.where(lanes, caught, self.resumed[rows]))
        self.behind = self.behind.index_add(0, rows, lanes.long())
        ended = torch.full_like(self.resumed, -1) if caught == 0 else self.ended
        self.ended = ended.index_copy(0, rows, torch.where(lanes & (catch.ended >= 0), caught, ended[rows]))
        return torch.where(lanes, catch.t, end)

    def _put(self) -> None:
        rows, whole, accepted, step, catch = self.last
        moved = accepted.unsqueeze(1)
        y, z = torch.where(moved, step.y1, step.y0), torch.where(moved, step.carry, step.restart)
        if catch is not None:
            y, z = (torch.where(catch.lanes.unsqueeze(1), catch.after, x) for x in (y, z))
        full = self.full
        self.full = (
            State(y, (z,)) if whole else State(full.y.index_copy(0, rows, y), (full.past[0].index_copy(0, rows, z),))
        )
        self.last = None

    def states(self) -> State:
        """y and z of all rows, each where it ended."""
        if self.last is not None:
            self._put()
        return self.full

    def __len__(self) -> int:
        return len(self.attempts)

    def _stride(self, n: int) -> RowStride:
        end, rows, whole = self.attempts[n]
        special, start = self.special.get(n), self._start(n, rows)
        t1 = end if special is None else special.t1
        jumps = (False, False) if self.jumps is None else (torch.isin(start, self.jumps), torch.isin(t1, self.jumps))
        resumed, behind = self.after_catches.get(n, (torch.full_like(rows, -1), 0))
        return RowStride(
            start, t1, start != t1, rows, whole, jumps, torch.full_like(rows, n + 1) - behind, end, resumed,
            special.marks if special else (), special.caught if special else None,
        )  # fmt: skip

    def _start(self, n: int, rows: Tensor) -> Tensor:
        """Where the rows of an attempt stood before it: where the attempt before it left them."""
        if n == 0:
            return self.t0
        start, before, _ = self.attempts[n - 1]
        # Rows only ever leave, so that those of this attempt are among those of the one before, both in order.
        return start if before is rows else start[torch.searchsorted(before, rows)]


__all__ = ["JointTrack", "RowTrack", "Special"]
