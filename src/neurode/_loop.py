"""The integration loops: one for a joint step, one for rows with steps of their own.

Both read the same way. A stepper proposes a step, the pace accepts or rejects it and says which comes next, the outputs
take what they were asked for. None of the three knows of the others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from neurode import control
from neurode._problem import Problem
from neurode._solution import Status
from neurode._state import hidden
from neurode._times import as_time
from neurode.control import standins
from neurode.output import compact, joint, rows
from neurode.output.estimates import Estimates
from neurode.output.events import Events
from neurode.stepping import COUPLED, Step, stepper


@dataclass(frozen=True)
class Outcome:
    """What an engine returns for a `Problem`: inner states, times, counts and verdicts.

    Attributes:
        y1: state at the end.
        ts, ys: outputs, time first.
        t1: time at the end.
        status: a `Status`, or `(rows,)` codes.
        num_evaluations, num_accepted, num_rejected: ints, or `(rows,)`.
        pieces: the interpolants, where `dense` was asked for.
        num_saved: accepted steps saved per row with `t_eval="steps"`.
        events: what the events recorded.
        estimates: sums over the accepted steps, by name.
        lost: `control.standins.Lost`, or True, where gradients were on and rows, or all of it, failed.
    """

    y1: Tensor
    ts: Tensor
    ys: Tensor
    t1: Any
    status: Any
    num_evaluations: Any
    num_accepted: Any
    num_rejected: Any
    pieces: Any = None
    num_saved: Any = None
    events: Any = ()
    estimates: Any = None
    lost: Any = None


def integrate(problem: Problem) -> Outcome:
    """Solve a problem on the eager engine, recording on PyTorch's tape where gradients are on."""
    outcome = _integrate(problem)
    if not torch.is_grad_enabled() or hidden(outcome.y1):
        return outcome
    gone = standins.failed(outcome.status)
    if gone is None:
        return outcome
    return standins.solve_without(problem, outcome, gone, stepper(problem.method).remembers, _integrate)


def _integrate(problem: Problem) -> Outcome:
    return integrate_rows(problem) if problem.per_row else integrate_joint(problem)


def integrate_joint(problem: Problem) -> Outcome:
    """One step for the whole state."""
    field, y, calls = problem.field, problem.y0, problem.field.num_calls
    stepping = stepper(problem.method)
    pace = control.pace(problem, stepping)
    saver, pieces, sinks = joint.sinks_for(problem, pace)
    events, watch, recorder = joint_events(problem, pace), control.watch(problem), problem.recorder
    coupled = problem.method.kind in COUPLED
    jumps = bool(problem.jump_at) and not coupled
    carry = first_carry(pace, field, y, coupled)
    estimates = Estimates(problem, stepping) if problem.estimates else None
    early = ahead_of_verdict(events, stepping)
    while pace.running:
        if watch is not None:
            watch.before(pace.interval, y)
        step = stepping.step(field, pace.interval, y, carry)
        look = None if early is None else early.look(stepping.piece(field, step)[0])
        pace.judge(step, look)
        if watch is not None:
            watch.after(step, bool(pace.accepted))
        if not pace.accepted:
            carry = step.restart
            continue
        if estimates is not None:
            estimates.joint(step)
        piece: Any = None
        carry, catch = step.carry, None
        if events is not None or (sinks and any(sink.wants(pace.t, step) for sink in sinks)):
            piece, carry = stepping.piece(field, step)
        if events is not None:
            catch = events.scan(piece, look, seen=pace.seen)
        if recorder is not None:
            recorder.joint(step, () if events is None else events.marks, catch)
        if catch is not None:
            step = joint.cut(step, catch)
            pace.catch(catch)
        if sinks:
            joint.write(sinks, pace.t, step, piece)
        y = step.y1
        if catch is not None:
            y, carry = catch.after, None
        elif jumps and pace.jumped:
            carry = None
    pace.finish(y)
    outcome = joint_outcome(problem, pace, y, saver, pieces, field.num_calls - calls)
    outcome = outcome if estimates is None else replace(outcome, estimates=estimates.of(outcome.status))
    return outcome if events is None else replace(outcome, events=events.records(problem.y0))


def first_carry(pace: Any, field: Any, y: Tensor, coupled: bool) -> Any:
    """What the first step starts from besides the state: the derivative there, where choosing the step has evaluated it."""
    derivative = pace.begin(field, y) if pace.running else None
    return None if coupled else derivative


def joint_events(problem: Problem, pace: Any) -> Events | None:
    """The event search of a joint solve, which is one lane."""
    if not problem.events:
        return None
    ends = torch.tensor([pace.t0, pace.t1], dtype=time_dtype(problem.y0.device), device=problem.y0.device)
    return Events(problem, ends[:1], (ends[1:] - ends[:1]).abs())


def ahead_of_verdict(events: Events | None, stepping: Any) -> Events | None:
    """The events, if they look through an attempt before it is judged: they do where its interpolant costs no evaluation."""
    return None if stepping.dense_costs else events


def joint_outcome(problem: Problem, pace: Any, y: Tensor, saver: Any, pieces: Any, calls: int) -> Outcome:
    """Collect what a joint solve has to show."""
    if isinstance(problem.t_eval, str):
        ts = torch.stack([_time(t, problem) for t in saver.times])
        ys = saver.finish(problem.y0)
    elif saver is not None:
        ts, ys = problem.t_eval, saver.finish(problem.y0)
    else:
        end = pace.end_time if pace.status is Status.TERMINATED else problem.t1
        ts, ys = _time(end, problem).unsqueeze(0), y.unsqueeze(0)
    if problem.layout.batched:
        return _with_row_status(problem, pace, y, ts, ys, pieces, calls)
    if pace.status.failed:
        gone = torch.ones((), dtype=torch.bool, device=y.device)
        y = torch.where(gone, torch.nan, y)
        ys = torch.where(gone, torch.nan, ys) if saver is None else standins.reached(problem, ys)
    saved = None if not isinstance(problem.t_eval, str) else len(saver.times)
    counts = (calls, pace.num_accepted, pace.num_rejected)
    return Outcome(y, ts, ys, end_time(problem, pace.status, pace.end_time), pace.status, *counts, pieces, saved)


def _time(t: Any, problem: Problem) -> Tensor:
    return as_time(t, time_dtype(problem.y0.device), problem.y0.device)


def end_time(problem: Problem, status: Any, reached: Any) -> Any:
    """Where a solve ended: the user's own t1, with the gradient that it may have, wherever that was reached."""
    if not isinstance(status, Tensor):
        return problem.t1 if status is Status.SUCCESS else reached
    return torch.where(status == Status.SUCCESS.code, torch.as_tensor(problem.t1, dtype=reached.dtype), reached)


def time_dtype(device: torch.device) -> torch.dtype:
    """The dtype of times: float64, except on devices that have none."""
    return torch.float32 if device.type == "mps" else torch.float64


def _with_row_status(
    problem: Problem, pace: Any, y: Tensor, ts: Tensor, ys: Tensor, pieces: Any, calls: int
) -> Outcome:
    """A grid shared by all rows: look once, at the end, which rows stayed finite."""
    rows = torch.zeros(y.shape[0], dtype=torch.int64, device=y.device)
    codes = rows
    if pace.status is Status.NON_FINITE:
        gone = ~torch.isfinite(y.detach()).all(1)
        codes = torch.where(gone, Status.NON_FINITE.code, rows)
        y, ys = torch.where(gone[:, None], torch.nan, y), standins.reached(problem, ys, gone)
    counts = (rows + calls, rows + pace.num_accepted, rows.clone())
    saved = None if not isinstance(problem.t_eval, str) else rows + pace.num_accepted + 1
    end = end_time(problem, codes, torch.full_like(rows, pace.t, dtype=time_dtype(y.device)))
    return Outcome(y, ts, ys, end, codes, *counts, pieces, saved)


def integrate_rows(problem: Problem) -> Outcome:
    """Every row its own step; rows that have ended leave where `problem.compact` allows it."""
    field, y = problem.field, problem.y0
    stepping = stepper(problem.method)
    pace = control.pace(problem, stepping)
    outputs = rows.RowOutputs(problem, pace, stepping)
    final = Final(problem.y0)
    events = Events(problem, problem.t0.detach(), (problem.t1 - problem.t0).detach().abs()) if problem.events else None
    coupled = problem.method.kind in COUPLED
    carry = first_carry(pace, field, y, coupled)
    estimates = Estimates(problem, stepping) if problem.estimates else None
    may_compact = problem.compact is not False and not problem.dense and pace.can_compact
    early = ahead_of_verdict(events, stepping)
    while pace.running:
        calls = field.num_calls
        step = stepping.step(field, pace.interval, y, carry)
        look = None if early is None else early.look(stepping.piece(field, step)[0])
        pace.judge(step, look)
        if pace.poisoned and torch.is_grad_enabled():
            step = stepping.step(field, pace.clean_interval, y, carry)
        piece, ahead = outputs.piece(pace, step)
        catch = None if events is None else events.scan(piece, look, pace.accepted, pace.seen)
        if problem.recorder is not None:
            problem.recorder.rows(pace, step, () if events is None else events.marks, catch)
        if catch is not None:
            pace.catch(catch)
            piece = piece._replace(y1=torch.where(catch.lanes[:, None], catch.before, piece.y1))
        outputs.take(pace, piece)
        if estimates is not None:
            estimates.rows(pace, step)
        pace.count(field.num_calls - calls)
        y, carry = advance(pace.accepted, step, ahead, y)
        if catch is not None:
            caught = catch.lanes[:, None]
            carry = torch.where(caught, catch.after, carry) if coupled else None
            y = torch.where(caught, catch.after, y)
        if pace.jumped and not coupled:
            carry = None
        if may_compact and pace.running and pace.wasteful:
            keep = pace.live.nonzero().squeeze(1)
            may_compact = compact.safe(problem, pace, y, keep)
            if may_compact:
                outputs.flush(pace.rows)
                final.put(pace.rows, y)
                y, carry = y[keep], None if carry is None else carry[keep]
                pace.compact(keep)
                if events is not None:
                    events.compact(keep)
                field.take(pace.rows)
    outputs.flush(pace.rows)
    final.put(pace.rows, y)
    pace.finish(final.y)
    field.take(None)
    outcome = rows_outcome(problem, pace, outputs, final.y)
    outcome = outcome if estimates is None else replace(outcome, estimates=estimates.of(outcome.status))
    return outcome if events is None else replace(outcome, events=events.records(problem.y0))


def advance(accepted: Tensor, step: Step, ahead: Any, y: Tensor) -> tuple[Tensor, Any]:
    """State and carry of all rows after a judged attempt."""
    mask = accepted.unsqueeze(1)
    # A history on a grid needs no mask: its rows are never rejected, and one that stands still has ended.
    carry = torch.where(mask, ahead, step.restart) if isinstance(ahead, Tensor) else ahead
    return torch.where(mask, step.y1, y), carry


class Final:
    """The last state of every row, filled as rows leave."""

    def __init__(self, y0: Tensor) -> None:
        self.y, self.untouched = y0, True

    def put(self, index: Tensor, y: Tensor) -> None:
        """Set the rows `index`."""
        self.y = y if self.untouched and len(index) == len(self.y) else self.y.index_copy(0, index, y)
        self.untouched = False


def rows_outcome(problem: Problem, pace: Any, outputs: Any, y: Tensor) -> Outcome:
    """Collect what a solve with rows has to show; failed rows are NaN and get a zero gradient."""
    gone = pace.codes > Status.TERMINATED.code
    failures = bool(gone.any())
    if failures:
        y = torch.where(gone.unsqueeze(1), torch.nan, y)
    saved = None
    if isinstance(problem.t_eval, str):
        (ts, ys), saved = outputs.saver.finish(), outputs.saver.count
    elif outputs.saver is not None:
        ts, ys = problem.t_eval, outputs.saver.finish()
    else:
        ends = torch.where(pace.codes == Status.TERMINATED.code, pace.t_end, problem.t1)
        ts, ys = ends.unsqueeze(0), y.unsqueeze(0)
    if failures:
        ys = standins.reached(problem, ys, gone)
    counts = (pace.evaluations, pace.accepts, pace.rejects)
    return Outcome(y, ts, ys, end_time(problem, pace.codes, pace.t_end), pace.codes, *counts, outputs.pieces, saved)
