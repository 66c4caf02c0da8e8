"""What a reversible solve leaves behind for the way back: its times, 8 bytes a step and row, and its two last states."""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neurode._problem import Problem
from neurode._state import number, real_dtype
from neurode.output.interpolant import fractions, sample
from neurode.output.rows import gather
from neurode.stepping import Step


@dataclass(frozen=True)
class Leg:
    """One step to be undone.

    Attributes:
        t0, t1: its ends, as numbers, or `(rows,)`.
        jumps: whether `f` jumps at them.
        rows: `(rows,)` which rows are present; None for all, and in a joint solve.
        moved: `(rows,)`, True where a row took the step; None where all did.
    """

    t0: Any
    t1: Any
    jumps: tuple[Any, Any]
    rows: Tensor | None = None
    moved: Tensor | None = None

    @property
    def wide(self) -> Tensor | None:
        """`moved` beside states."""
        return None if self.moved is None else self.moved.unsqueeze(1)


class JointTrack:
    """Notes the accepted steps of a joint solve: their ends."""

    def __init__(self, problem: Problem) -> None:
        self.ends = array("d", [number(problem.t0)])
        self.jumps = {float(t) for t in problem.jump_at}
        self.y, self.z = problem.y0, problem.y0

    def joint(self, step: Step, *events: Any) -> None:
        """Note an accepted step."""
        self.ends.append(number(step.interval.t1))
        self.y, self.z = step.y1, step.carry

    def __len__(self) -> int:
        return len(self.ends) - 1

    def backward(self, gone: Tensor | None) -> Iterator[tuple[int, Leg]]:
        """The steps from the last to the first; rows that are `gone` take none."""
        for n in range(len(self) - 1, -1, -1):
            t0, t1 = self.ends[n], self.ends[n + 1]
            yield n, Leg(t0, t1, (t0 in self.jumps, t1 in self.jumps), None, None if gone is None else ~gone)

    def states(self) -> tuple[Tensor, Tensor]:
        """y and z at the end."""
        return self.y, self.z


class RowTrack:
    """Notes the attempts of rows with times of their own: where each row stood after each."""

    def __init__(self, problem: Problem) -> None:
        self.t0 = problem.t0.detach()
        self.y, self.z = problem.y0, problem.y0
        jumps = sorted({float(t) for t in problem.jump_at})
        self.jumps = torch.tensor(jumps, dtype=self.t0.dtype, device=self.t0.device) if jumps else None
        self.attempts: list[tuple[Tensor, Tensor, bool]] = []  # ends, which rows, whether they are all
        self.last: Any = None  # the newest states of the present rows, not yet among all

    def rows(self, pace: Any, step: Step, *events: Any) -> None:
        """Note an attempt."""
        if self.last is not None and self.last[0] is not pace.rows:
            self._put()  # rows have left: what they ended with must not be lost
        self.last = (pace.rows, pace.whole, pace.accepted, step)
        self.attempts.append((torch.where(pace.accepted, pace.tried, pace.tried_from), pace.rows, pace.whole))

    def _put(self) -> None:
        rows, whole, accepted, step = self.last
        moved = accepted.unsqueeze(1)
        y, z = torch.where(moved, step.y1, step.y0), torch.where(moved, step.carry, step.restart)
        self.y, self.z = (y, z) if whole else (self.y.index_copy(0, rows, y), self.z.index_copy(0, rows, z))
        self.last = None

    def states(self) -> tuple[Tensor, Tensor]:
        """y and z of all rows, each where it ended."""
        if self.last is not None:
            self._put()
        return self.y, self.z

    def __len__(self) -> int:
        return len(self.attempts)

    def backward(self, gone: Tensor | None) -> Iterator[tuple[int, Leg]]:
        """The attempts in which a row moved, from the last to the first; rows that are `gone` do not count."""
        for n in range(len(self) - 1, -1, -1):
            end, rows, whole = self.attempts[n]
            start = self._start(n, rows)
            moved = start != end if gone is None else (start != end) & ~gone[rows]
            if not bool(moved.any()):
                continue
            jumps = (
                (False, False) if self.jumps is None else (torch.isin(start, self.jumps), torch.isin(end, self.jumps))
            )
            yield n, Leg(start, end, jumps, None if whole else rows, moved)

    def _start(self, n: int, rows: Tensor) -> Tensor:
        """Where the rows of an attempt stood before it: where the attempt before it left them."""
        if n == 0:
            return self.t0
        start, before, _ = self.attempts[n - 1]
        # Rows only ever leave, so that those of this attempt are among those of the one before, both in order.
        return start if before is rows else start[torch.searchsorted(before, rows)]


# ---- where the gradients of times go


class Total:
    """The gradient of one tensor of times, summed over the steps."""

    def __init__(self, like: Tensor) -> None:
        self.total = torch.zeros_like(like)

    def add(self, place: Any, grad: Tensor) -> None:
        """Add at a place: an index, `...`, or a mask of the rows that count with the index of all of them."""
        if place is ...:
            self.total += grad
        elif isinstance(place, tuple):
            mask, index = place
            index = index[: self.total.ndim]  # output times of all rows alike have one dimension
            self.total.index_put_(index, torch.where(mask, grad, 0.0), accumulate=True)
        else:
            self.total[place] += grad


class JointTimes:
    """The moving times of a joint solve: which ends of steps they are, and which outputs lie in which step.

    Args:
        problem: the problem.
        track: its steps.
        totals: of t0, t1, the grid and the output times; None for those that do not move.
        dtype: of times.
    """

    def __init__(
        self, problem: Problem, track: JointTrack, totals: dict[str, Total | None], dtype: torch.dtype
    ) -> None:
        self.problem, self.totals, self.dtype = problem, totals, dtype
        self.last = len(track) - 1
        self.t1 = number(problem.t1)
        if isinstance(problem.t_eval, Tensor):
            self._place_outputs(problem, track)

    def _place_outputs(self, problem: Problem, track: JointTrack) -> None:
        self.sign = 1.0 if self.t1 >= track.ends[0] else -1.0
        self.at = problem.t_eval.detach()
        self.keys = [self.sign * t for t in self.at.tolist()]
        self.moving = problem.t_eval.requires_grad
        self.start = 0 if self.moving else bisect.bisect_right(self.keys, self.sign * track.ends[0])
        self.bounds = [self.start, *(bisect.bisect_right(self.keys, self.sign * t) for t in track.ends[1:])]

    def ends(self, n: int, leg: Leg) -> tuple[list[Any], list[Any]]:
        """The ends of a step, and those of them that are leaves, each with where its gradient goes."""
        ends, leaves = [leg.t0, leg.t1], []
        for i in range(2):
            if self.totals["grid"] is not None:
                name, place = "grid", n + i
            else:
                name, place = ("t0", "t1")[i], ...
                if self.totals[name] is None or (n != self.last or leg.t1 != self.t1 if i else n != 0):
                    continue
            ends[i] = torch.tensor(ends[i], dtype=self.dtype, device=self.problem.y0.device, requires_grad=True)
            leaves.append((ends[i], name, place))
        return ends, leaves

    def outputs(self, n: int, leg: Leg, step: Step, stepping: Any, field: Any, leaves: list[Any]) -> Any:
        """The outputs in a step, and where among all they stand."""
        a, b = self.bounds[n], self.bounds[n + 1]
        if b <= a:
            return [], []
        inside = b if self.moving else bisect.bisect_left(self.keys, self.sign * leg.t1, a, b)
        if inside > a and isinstance(step.interval.h, Tensor):
            inside = b  # as the solve does where its ends move: all through the interpolant
        values, places = [], []
        if inside > a:
            at = self.at[a:inside]
            if self.totals["t_eval"] is not None:
                at = at.clone().requires_grad_()
                leaves.append((at, "t_eval", slice(a, inside)))
            piece, _ = stepping.piece(field, step)
            values.append(sample(piece, fractions(piece, at, real_dtype(step.y0.dtype))))
            places.append(slice(a, inside))
        if b > inside:
            values.append(step.y1.expand(b - inside, *step.y1.shape))
            places.append(slice(inside, b))
        return values, places

    def at_start(self, grad_ys: Tensor) -> Any:
        """The gradient of the outputs that are the initial state itself."""
        return grad_ys[: self.start].sum(0) if self.start else 0.0


class RowTimes:
    """The same where rows have times of their own."""

    def __init__(self, problem: Problem, track: RowTrack, totals: dict[str, Total | None], dtype: torch.dtype) -> None:
        self.totals = totals
        self.t0, self.t1 = problem.t0.detach(), problem.t1.detach()
        self.moving, self.at = False, None
        if isinstance(problem.t_eval, Tensor):
            self.at, self.moving = problem.t_eval.detach(), problem.t_eval.requires_grad
            self.at = self.at.unsqueeze(1).expand(-1, len(self.t0)) if self.at.ndim == 1 else self.at
        self.sign = torch.where(self.t1 >= self.t0, 1.0, -1.0).to(self.t0.dtype)
        self.all = torch.arange(len(self.t0), device=self.t0.device)

    def ends(self, n: int, leg: Leg) -> tuple[list[Any], list[Any]]:
        """See `JointTimes.ends`."""
        ends, leaves = [leg.t0, leg.t1], []
        rows, grid = self.all if leg.rows is None else leg.rows, self.totals["grid"]
        for i, name in enumerate(("t0", "t1")):
            if grid is not None:
                point = torch.full_like(rows, min(n + i, len(grid.total) - 1))
                name, place = "grid", (leg.moved, (point, rows))
            elif self.totals[name] is not None:
                own = (self.t0, self.t1)[i][rows]
                place = (leg.moved & (ends[i] == own), (rows,))  # rows that begin, or end, here
            else:
                continue
            ends[i] = ends[i].clone().requires_grad_()
            leaves.append((ends[i], name, place))
        return ends, leaves

    def outputs(self, n: int, leg: Leg, step: Step, stepping: Any, field: Any, leaves: list[Any]) -> Any:
        """See `JointTimes.outputs`."""
        assert self.at is not None
        rows = self.all if leg.rows is None else leg.rows
        sign = self.sign[rows]
        keys, low, high = self.at[:, rows] * sign, leg.t0 * sign, leg.t1 * sign
        inside = (keys > low) & (keys <= high) & leg.moved
        if self.moving:
            inside |= (keys == low) & (leg.t0 == self.t0[rows]) & leg.moved
        j, row = inside.nonzero(as_tuple=True)
        if not len(j):
            return [], []
        at, place = self.at[j, rows[row]], (j, rows[row])
        if self.totals["t_eval"] is not None:
            at = at.clone().requires_grad_()
            leaves.append((at, "t_eval", (torch.ones_like(j, dtype=torch.bool), place)))
        piece, _ = stepping.piece(field, step)
        return [gather([piece], torch.zeros_like(row), row, at)], [place]

    def at_start(self, grad_ys: Tensor) -> Any:
        """See `JointTimes.at_start`."""
        if self.moving:
            return 0.0
        return torch.where((self.at == self.t0).unsqueeze(-1), grad_ys, 0.0).sum(0)


__all__ = ["JointTimes", "JointTrack", "Leg", "RowTimes", "RowTrack", "Total"]
