"""The accepted steps of a solve, as it notes them for those who go back over them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neurode._state import number
from neurode.gradients.checkpoints import Checkpoints


class Stride(NamedTuple):
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


class State(NamedTuple):
    """What a step starts from: the state, and the derivatives that a multistep method remembers, or a coupling's second state."""

    y: Tensor
    past: tuple[Tensor, ...] = ()


class Recorder:
    """Notes the steps of a solve, and keeps its states as `Checkpoints` says.

    Args:
        y0: inner initial state.
        limit: states that may be kept; None keeps all.
        history: whether the method remembers derivatives.
        coupled: whether its carry is a second state.
        dense: whether the interpolants are kept, which are told by their intervals.

    Attributes:
        strides: the steps.
        catches: the times of the events that changed the course, `()` or `(all rows,)` each.
        ended: the number of the catch that ended the solve (a row), -1 for none.
    """

    def __init__(self, y0: Tensor, limit: int | None, history: bool, coupled: bool, dense: bool) -> None:
        self.strides: list[Any] = []
        self.states = Checkpoints(limit)
        self.full = State(y0, (y0,) if coupled else ())  # all rows, those that have left included
        self.limit, self.history, self.coupled, self.dense = limit, history, coupled, dense
        self.intervals: list[Any] = []
        self.catches: list[Tensor] = []
        self.ended: Any = -1
        self.point: Any = 0
        self.resumed: Any = None

    def _past(self, step: Any) -> tuple[Tensor, ...]:
        if self.coupled:
            return (step.restart,)
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
        if catch is not None:
            stride = self._caught(stride, catch)
        self._keep(n, stride, step, catch)
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

    def _keep(self, n: int, stride: RowStride, step: Any, catch: Any) -> None:
        if self.limit is None:
            self.states.keep(n, State(step.y0, self._past(step)))
            return
        if self.states.wants(n):
            self.states.keep(n, self.full if self.coupled else State(self.full.y, self._past(step)))
        pairs = [(step.y0, step.y1), *([(step.restart, step.carry)] if self.coupled else [])]
        after = [torch.where(stride.accepted.unsqueeze(1), new, old) for old, new in pairs]
        if catch is not None:
            after = [torch.where(catch.lanes.unsqueeze(1), catch.after, x) for x in after]
        y, *past = (put(x, stride, new) for x, new in zip((self.full.y, *self.full.past), after, strict=True))
        self.full = State(y, tuple(past))


def put(full: Tensor, stride: RowStride, y: Tensor) -> Tensor:
    """The states of all rows, those present in a stride replaced."""
    return y if stride.whole else full.index_copy(0, stride.rows, y)
