"""The accepted steps of a solve, as it notes them for those who go back over them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from neurode._state import number
from neurode.gradients.checkpoints import Checkpoints


@dataclass(frozen=True)
class Stride:
    """One accepted step of a joint solve.

    Attributes:
        t0, t1: its ends.
        end: where the solve went on from: t1, or the time of an event that changed the course.
        jumps: whether `f` jumps at the ends.
        point: which point of a grid t1 is.
        marks: the events in it.
        caught: the number of the catch that ended it, or None.
        resumed: the number of the catch that it starts from, or None.
    """

    t0: float
    t1: float
    jumps: tuple[Any, Any]
    point: int
    end: float
    marks: tuple[Any, ...] = ()
    caught: int | None = None
    resumed: int | None = None


@dataclass(frozen=True)
class RowStride:
    """One attempt of rows with times of their own: those that were not accepted stand still in it.

    Attributes:
        t0, t1, end, jumps, marks, caught: as in `Stride`, `(rows,)` where they are times.
        point: `(rows,)` which point of a grid t1 is.
        accepted: `(rows,)`.
        rows: `(rows,)` indices of the present rows in the batch.
        whole: whether these are all.
        resumed: `(rows,)` number of the catch that a row starts from, -1 for none.
    """

    t0: Tensor
    t1: Tensor
    accepted: Tensor
    rows: Tensor
    whole: bool
    jumps: tuple[Any, Any]
    point: Tensor
    end: Tensor
    resumed: Any = None
    marks: tuple[Any, ...] = ()
    caught: int | None = None


@dataclass(frozen=True)
class State:
    """What a step starts from: the state, and the derivatives that a multistep method remembers."""

    y: Tensor
    past: tuple[Tensor, ...] = ()


class Recorder:
    """Notes the steps of a solve, and keeps its states as `Checkpoints` says.

    Args:
        y0: inner initial state.
        limit: states that may be kept; None keeps all.
        history: whether the method remembers derivatives.
        dense: whether the interpolants are kept, which are told by their intervals.

    Attributes:
        strides: the steps.
        catches: the times of the events that changed the course, `()` or `(all rows,)` each.
        ended: the number of the catch that ended the solve (a row), -1 for none.
    """

    def __init__(self, y0: Tensor, limit: int | None, history: bool, dense: bool) -> None:
        self.strides: list[Any] = []
        self.states = Checkpoints(limit)
        self.full = y0 if limit is not None else None  # all rows, those that have left included
        self.limit, self.history, self.dense = limit, history, dense
        self.intervals: list[Any] = []
        self.catches: list[Tensor] = []
        self.ended: Any = -1
        self.point: Any = 0
        self.resumed: Any = None

    def _past(self, step: Any) -> tuple[Tensor, ...]:
        return step.restart.ks if self.history else ()

    def joint(self, step: Any, marks: tuple[Any, ...], catch: Any) -> None:
        """Note an accepted step, the events in it, and what they changed."""
        n, interval = len(self.strides), step.interval
        if self.states.wants(n):
            self.states.keep(n, State(step.y0, self._past(step)))
        if self.dense:
            self.intervals.append(interval)
        t0, t1 = number(interval.t0), number(interval.t1)
        caught, end, resumed = None, t1, self.resumed
        self.point += 1
        point = self.point
        if catch is not None:
            caught, end = len(self.catches), float(catch.t[0])
            self.catches.append(catch.t[0])
            self.point -= 1
            self.ended = caught if int(catch.ended[0]) >= 0 else -1
        self.resumed = caught
        jumps = (interval.after_jump, interval.before_jump)
        self.strides.append(Stride(t0, t1, jumps, point, end, marks, caught, resumed))

    def rows(self, pace: Any, step: Any, marks: tuple[Any, ...], catch: Any) -> None:
        """Note an attempt of rows."""
        n, accepted = len(self.strides), pace.accepted
        if self.dense:
            self.intervals.append(step.interval)
        if self.resumed is None:
            self.resumed = torch.full_like(pace.rows, -1)
            self.point, self.ended = torch.zeros_like(pace.rows), torch.full_like(pace.rows, -1)
        self.point = self.point + 1
        t1 = torch.where(accepted, pace.tried, pace.tried_from)
        stride = RowStride(
            pace.tried_from, t1, accepted, pace.rows, pace.whole, (step.interval.after_jump, step.interval.before_jump),
            self.point[pace.rows], t1, self.resumed[pace.rows], marks,
        )  # fmt: skip
        self.resumed = self.resumed.index_copy(0, pace.rows, torch.where(accepted, -1, stride.resumed))
        after = torch.where(accepted.unsqueeze(1), step.y1, step.y0)
        if catch is not None:
            stride = self._caught(stride, catch)
            after = torch.where(catch.lanes.unsqueeze(1), catch.after, after)
        self._keep(n, stride, step, after)
        self.strides.append(stride)

    def _caught(self, stride: RowStride, catch: Any) -> RowStride:
        """The same attempt, which events have cut short in some rows."""
        rows, lanes, number_ = stride.rows, catch.lanes, len(self.catches)
        self.catches.append(torch.zeros_like(self.resumed, dtype=catch.t.dtype).index_copy(0, rows, catch.t))
        self.point = self.point.index_add(0, rows, -lanes.long())
        self.resumed = self.resumed.index_copy(0, rows, torch.where(lanes, number_, self.resumed[rows]))
        ended = lanes & (catch.ended >= 0)
        self.ended = self.ended.index_copy(0, rows, torch.where(ended, number_, self.ended[rows]))
        return replace(stride, end=torch.where(lanes, catch.t, stride.t1), caught=number_)

    def _keep(self, n: int, stride: RowStride, step: Any, after: Tensor) -> None:
        if self.limit is None:
            self.states.keep(n, State(step.y0, self._past(step)))
            return
        assert self.full is not None
        if self.states.wants(n):
            self.states.keep(n, State(self.full, self._past(step)))
        self.full = put(self.full, stride, after)


def put(full: Tensor, stride: RowStride, y: Tensor) -> Tensor:
    """The states of all rows, those present in a stride replaced."""
    return y if stride.whole else full.index_copy(0, stride.rows, y)
