"""Accepted steps as a solve notes them, and how one is taken again for its derivative."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neurode._state import number, real_dtype
from neurode.control import standins
from neurode.gradients.checkpoints import Checkpoints
from neurode.output.interpolant import fractions, sample
from neurode.output.rows import gather
from neurode.stepping import Interval, stepper


@dataclass(frozen=True)
class Stride:
    """One accepted step of a joint solve: its ends, and whether `f` jumps there."""

    t0: float
    t1: float
    jumps: tuple[Any, Any]


@dataclass(frozen=True)
class RowStride:
    """One attempt of rows with times of their own: those that were not accepted stand still in it."""

    t0: Tensor
    t1: Tensor
    accepted: Tensor
    rows: Tensor
    whole: bool
    jumps: tuple[Any, Any]


class Recorder:
    """Notes the steps of a solve, and keeps its states as `Checkpoints` says.

    Args:
        y0: inner initial state.
        limit: states that may be kept; None keeps all.
    """

    def __init__(self, y0: Tensor, limit: int | None) -> None:
        self.strides: list[Any] = []
        self.states = Checkpoints(limit)
        self.full = y0 if limit is not None else None  # all rows, those that have left included
        self.limit = limit

    def joint(self, step: Any) -> None:
        """Note an accepted step."""
        n, interval = len(self.strides), step.interval
        if self.states.wants(n):
            self.states.keep(n, step.y0)
        self.strides.append(
            Stride(number(interval.t0), number(interval.t1), (interval.after_jump, interval.before_jump))
        )

    def rows(self, pace: Any, step: Any) -> None:
        """Note an attempt of rows."""
        n, interval = len(self.strides), step.interval
        accepted = pace.accepted
        end = torch.where(accepted, pace.tried, pace.tried_from)
        jumps = (interval.after_jump, interval.before_jump)
        stride = RowStride(pace.tried_from, end, accepted, pace.rows, pace.whole, jumps)
        if self.limit is None:
            self.states.keep(n, step.y0)
        else:
            assert self.full is not None
            if self.states.wants(n):
                self.states.keep(n, self.full)
            self.full = put(self.full, stride, torch.where(accepted.unsqueeze(1), step.y1, step.y0))
        self.strides.append(stride)


def put(full: Tensor, stride: RowStride, y: Tensor) -> Tensor:
    """The states of all rows, those present in a stride replaced."""
    return y if stride.whole else full.index_copy(0, stride.rows, y)


class JointReplay:
    """Takes the steps of a joint solve again.

    Attributes:
        moving: which of the times of the solve need a gradient.
    """

    def __init__(self, problem: Any, strides: list[Stride], times: Any, gone: Tensor | None) -> None:
        self.problem, self.strides, self.times, self.gone = problem, strides, times, gone
        self.stepper = stepper(problem.method)
        self.reached = bool(strides) and strides[-1].t1 == number(problem.t1)
        self.outputs = JointOutputs(problem, strides) if isinstance(problem.t_eval, Tensor) else None

    def state(self, n: int, kept: Tensor) -> Tensor:
        """The state before step n as it is to be stepped from."""
        return kept if self.gone is None else standins._instead(kept, self.gone)

    def advance(self, n: int, y: Tensor, inputs: Any) -> Tensor:
        """The state after step n, without a tape."""
        stride, field = self.strides[n], inputs.field
        interval = Interval(stride.t0, stride.t1, field.time_dtype, *stride.jumps)
        return self.stepper.step(field, interval, y, None).y1

    def take(
        self, n: int, y: Tensor, inputs: Any, stages: Any, times: Any
    ) -> tuple[list[Tensor], list[Any], list[Any]]:
        """Step n on the tape.

        Args:
            n: which step.
            y: state before it.
            inputs: the field, and what it depends on.
            stages: what to evaluate in its place, or None.
            times: the times that need a gradient.

        Returns:
            The state after it and the outputs in it; where in the outputs they stand; and the times that were read: pairs of
            a leaf and where its gradient goes.
        """
        stride, leaves = self.strides[n], []
        if self.gone is not None:
            inputs.take(None)
        field = stages or inputs.field
        ends: list[Any] = [stride.t0, stride.t1]
        places = (("grid", n), ("grid", n + 1)) if times.grid is not None else (("t0", ...), ("t1", ...))
        for i, (name, place) in enumerate(places):
            wanted = times.grid is not None or (n == 0 if i == 0 else n == len(self.strides) - 1 and self.reached)
            if wanted and getattr(times, name) is not None:
                ends[i] = torch.tensor(ends[i], dtype=times.dtype, device=y.device, requires_grad=True)
                leaves.append((ends[i], name, place))
        interval = Interval(ends[0], ends[1], field.time_dtype, *stride.jumps)
        step = self.stepper.step(field, interval, y, None)
        if self.outputs is None:
            return [step.y1], [], leaves
        values, index = self.outputs.take(n, step, self.stepper, field, times, leaves)
        return [step.y1, *values], index, leaves


class JointOutputs:
    """Which outputs lie in which step, and their values there."""

    def __init__(self, problem: Any, strides: list[Stride]) -> None:
        self.sign = 1.0 if number(problem.t1) >= number(problem.t0) else -1.0
        self.times = problem.t_eval.detach()
        self.keys = [self.sign * t for t in self.times.tolist()]
        self.moving = problem.t_eval.requires_grad
        self.start = 0 if self.moving else bisect.bisect_right(self.keys, self.sign * number(problem.t0))
        marks = [bisect.bisect_right(self.keys, self.sign * s.t1) for s in strides]
        self.bounds = [self.start, *marks]

    def take(self, n: int, step: Any, stepping: Any, field: Any, times: Any, leaves: list[Any]) -> Any:
        """Outputs of step n, and the slices of `ys` that they fill."""
        a, b = self.bounds[n], self.bounds[n + 1]
        if b <= a:
            return [], []
        end = self.sign * number(step.interval.t1)
        inside = b if self.moving else bisect.bisect_left(self.keys, end, a, b)
        if inside > a and isinstance(step.interval.h, Tensor):
            inside = b  # as the solve does where its ends move: all through the interpolant
        values, index = [], []
        if inside > a:
            piece, _ = stepping.piece(field, step)
            at = self.times[a:inside]
            if times.t_eval is not None:
                at = at.clone().requires_grad_()
                leaves.append((at, "t_eval", slice(a, inside)))
            values.append(sample(piece, fractions(piece, at, real_dtype(step.y0.dtype))))
            index.append(slice(a, inside))
        if b > inside:
            values.append(step.y1.expand(b - inside, *step.y1.shape))
            index.append(slice(inside, b))
        return values, index


class RowReplay:
    """Takes the steps of rows with times of their own again."""

    def __init__(self, problem: Any, strides: list[RowStride], times: Any, gone: Tensor | None) -> None:
        self.problem, self.strides, self.gone = problem, strides, gone
        self.stepper = stepper(problem.method)
        self.t0, self.t1 = problem.t0.detach(), problem.t1.detach()
        self.at = problem.t_eval.detach() if isinstance(problem.t_eval, Tensor) else None
        if self.at is not None and self.at.ndim == 1:
            self.at = self.at.unsqueeze(1).expand(-1, len(self.t0))
        self.sign = torch.where(self.t1 >= self.t0, 1.0, -1.0).to(self.t0.dtype)
        self.moving = self.at is not None and problem.t_eval.requires_grad

    def _interval(self, stride: RowStride, ends: Any, field: Any) -> Interval:
        return Interval(ends[0], ends[1], field.time_dtype, *stride.jumps)

    def state(self, n: int, kept: Tensor) -> Tensor:
        """The present rows' states before step n; a row that became NaN is played by one that moves."""
        stride = self.strides[n]
        y = kept if stride.whole or len(kept) == len(stride.rows) else kept.index_select(0, stride.rows)
        return self._instead(stride, y)

    def _instead(self, stride: RowStride, x: Tensor) -> Tensor:
        if self.gone is None:
            return x
        gone = self.gone[stride.rows]
        return standins._instead(x, gone) if bool(gone.any()) and not bool(gone.all()) else x

    def advance(self, n: int, full: Tensor, inputs: Any) -> Tensor:
        """The states of all rows after step n, without a tape."""
        stride = self.strides[n]
        y = self._instead(stride, full if stride.whole else full.index_select(0, stride.rows))
        inputs.take(None if stride.whole else stride.rows)
        field = inputs.field
        step = self.stepper.step(field, self._interval(stride, (stride.t0, stride.t1), field), y, None)
        return put(full, stride, torch.where(stride.accepted.unsqueeze(1), step.y1, y))

    def take(
        self, n: int, y: Tensor, inputs: Any, stages: Any, times: Any
    ) -> tuple[list[Tensor], list[Any], list[Any]]:
        """Step n on the tape; see `JointReplay.take`."""
        stride, leaves = self.strides[n], []
        inputs.take(None if stride.whole else stride.rows)
        field = stages or inputs.field
        ends = [self._instead(stride, stride.t0), self._instead(stride, stride.t1)]
        for i, name in enumerate(("t0", "t1")):
            if times.grid is None and getattr(times, name) is None:
                continue
            ends[i] = ends[i].clone().requires_grad_()
            leaves.append((ends[i], *self._destination(n, i, name, times)))
        step = self.stepper.step(field, self._interval(stride, ends, field), y, None)
        if self.at is None:
            return [step.y1], [], leaves
        values, index = self._outputs(n, stride, step, field, times, leaves)
        return [step.y1, *values], index, leaves

    def _destination(self, n: int, end: int, name: str, times: Any) -> tuple[str, Any]:
        """Where the gradient of one end of a step goes, and whether it counts: rows that begin, or end, here."""
        stride = self.strides[n]
        if times.grid is not None:
            point = torch.full_like(stride.rows, min(n + end, len(times.grid) - 1))
            return "grid", (stride.accepted, (point, stride.rows))
        here = stride.t0 == self.t0[stride.rows] if end == 0 else stride.t1 == self.t1[stride.rows]
        return name, (here & stride.accepted, (stride.rows,))

    def _outputs(self, n: int, stride: RowStride, step: Any, field: Any, times: Any, leaves: list[Any]) -> Any:
        assert self.at is not None
        sign = self.sign[stride.rows]
        keys = (self.at if stride.whole else self.at.index_select(1, stride.rows)) * sign
        low, high = stride.t0 * sign, stride.t1 * sign
        inside = (keys > low) & (keys <= high) & stride.accepted
        if self.moving:
            inside |= (keys == low) & (stride.t0 == self.t0[stride.rows]) & stride.accepted
        j, row = inside.nonzero(as_tuple=True)
        if not len(j):
            return [], []
        piece, _ = self.stepper.piece(field, step)
        at = self.at[j, stride.rows[row]]
        if times.t_eval is not None:
            at = at.clone().requires_grad_()
            leaves.append((at, "t_eval", (torch.ones_like(j, dtype=torch.bool), (j, stride.rows[row]))))
        values = gather([piece], torch.zeros_like(row), row, at)
        return [values], [(j, stride.rows[row])]
