"""The pace of an adaptive solve in which every row takes its own steps: times, steps and verdicts are `(rows,)` tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neurode._solution import Status
from neurode.control.adaptive import scaled_error, two_estimates
from neurode.control.first_step import first_step
from neurode.stepping import Interval, Step

RUNNING = -1  # the code of a row that has not ended
LOG = 256  # attempts whose masks are kept before they are summed


class RowPace:
    """Chooses, accepts and rejects the steps of all rows at once.

    Rows that have ended, and rows whose attempt is being taken back, get intervals of length zero.

    Attributes:
        running: whether any row still moves.
        interval: the next attempt, ends `(rows,)`.
        accepted: `(rows,)` verdicts on the last attempt.
        rows: `(rows,)` indices of the present rows in the original batch.
        codes: `(all rows,)` `Status.code`s, RUNNING where a row has not ended.
    """

    can_compact = True

    def __init__(self, problem: Any, stepper: Any) -> None:
        self.problem, self.stepper = problem, stepper
        total, device = problem.y0.shape[0], problem.y0.device
        self.rows = torch.arange(total, device=device)
        self.whole = True
        self.t0, self.t1 = problem.t0, problem.t1
        self.start = problem.t0  # carries gradients of time where they are asked for
        self.t, self.end_exact = problem.t0.detach(), problem.t1.detach()
        self.sign = torch.where(self.end_exact >= self.t, 1.0, -1.0).to(self.t.dtype)
        self.forward = bool((self.sign > 0).all())
        self.goal = self.end_exact  # where a row goes to: the end, or, once it has ended, where it stands
        self.rtol, self.atol = problem.rtol, problem.atol
        self.k = problem.method.order_error + 1.0
        # The shortest step: ten times the distance between floats at the span's larger end (as SciPy's `RungeKutta`).
        self.tiny = 10 * torch.finfo(self.t.dtype).eps * torch.maximum(self.t.abs(), self.end_exact.abs())
        self.live = self.t != self.end_exact
        self.codes = torch.where(self.live, RUNNING, Status.SUCCESS.code)
        self.t_end = self.end_exact.clone()
        self.h = torch.zeros_like(self.t)
        ones = torch.ones_like(self.t)
        self.history: tuple[Tensor, ...] = (ones,) * problem.controller.memory
        self.held = torch.zeros_like(self.live)
        self.finite = torch.ones_like(self.live)
        self.running, self.accepted, self.attempts = bool(self.live.any()), torch.zeros_like(self.live), 0
        self.counts = torch.zeros(3, total, dtype=torch.int64, device=device)  # evaluations, accepted, rejected
        self.log: list[tuple[Tensor, Tensor, int]] = []
        self.num_live = int(self.live.sum())
        self.watch: Any = None  # a function of the pace, set by the loop: its true elements are counted in `watched`
        self.watched, self.poisoned = False, False
        self.seen: Any = None  # what was read beside the last verdicts
        self.taped = torch.is_grad_enabled()
        stops = [float(s) for s in (*problem.step_at, *problem.jump_at)]
        self.stops = torch.tensor(sorted(set(stops)), dtype=self.t.dtype, device=device) if stops else None
        jumps = sorted({float(s) for s in problem.jump_at})
        self.jumps = torch.tensor(jumps, dtype=self.t.dtype, device=device) if jumps else None
        self.jumped = False  # whether `f` jumps where some row is now, so that derivatives known there are void

    # ---- the beginning

    def begin(self, field: Any, y: Tensor) -> Tensor:
        """Evaluate `f` at the start and choose every row's first step."""
        calls = field.num_calls
        (time,) = Interval(self.start, self.start, field.time_dtype).times((0.0,), y, field.time_dtype)
        f0 = field(time, y)
        with torch.no_grad():
            bad = self.live & ~(torch.isfinite(f0.detach()) & torch.isfinite(y.detach())).all(1)
            self._first_step(field, y.detach(), f0.detach())
            self.h = torch.where(torch.isfinite(self.h), self.h, torch.zeros_like(self.h))
            self.log.append((self.live, torch.ones_like(self.live), field.num_calls - calls))
            self.poisoned = bool(bad.any())
            if self.poisoned:
                self._end_rows(bad, Status.NON_FINITE.code)
            self.count_rows()
            self.counts[1:] = 0  # evaluations there were, steps not yet
            self._propose()
        return f0

    def _first_step(self, field: Any, y: Tensor, f0: Tensor) -> None:
        problem = self.problem
        longest = (self.end_exact - self.t).abs()
        if problem.first_step is not None:
            given = torch.as_tensor(problem.first_step, dtype=self.t.dtype, device=y.device)
            self.h = torch.minimum(given.expand_as(self.t), longest)
            return

        def evaluate(h: Tensor) -> Tensor:
            target = self.t + self.sign * h.to(self.t.dtype)
            step = Interval(self.t, target, field.time_dtype)
            return field(target.to(field.time_dtype), y + step.h * f0).detach()  # of its tangent too

        scale = self.atol + self.rtol * y.abs()
        h = first_step(evaluate, self._norm, f0, y, scale, self.k)
        self.h = torch.minimum(h, longest)

    def _norm(self, x: Tensor) -> Tensor:
        return self.problem.norm(x).to(self.t.dtype)

    # ---- one step

    def _propose(self) -> None:
        """Turn the wanted lengths into intervals that end on the goal or on a time to be hit."""
        problem = self.problem
        if problem.min_step or problem.max_step != float("inf"):
            self.h = self.h.clamp(problem.min_step, problem.max_step)
        target = self.goal if self.stops is None else self._next_stop()
        remaining = target - self.t
        h = self.h if self.forward else self.h * self.sign
        far = remaining if self.forward else remaining * self.sign
        self.cut = None if self.stops is None else far < self.h
        self.end = torch.where(self.h * problem.controller.stretch >= far, target, self.t + h)
        with torch.set_grad_enabled(self.start.requires_grad or self.t1.requires_grad):
            self.interval = self._interval(self.start, self.t, self.end)

    def _interval(self, start: Tensor, t: Tensor, end: Tensor) -> Interval:
        jumps = (False, False) if self.jumps is None else (torch.isin(t, self.jumps), torch.isin(end, self.jumps))
        return Interval(start, self._exact_end(end), self.problem.field.time_dtype, *jumps)

    @property
    def length(self) -> Tensor:
        """How long the present attempt is, positive."""
        length = self.end - self.t
        return length if self.forward else length.abs()

    def _exact_end(self, end: Tensor) -> Tensor:
        """`end`; where that is the end of the span, the user's own t1, which may carry a gradient."""
        return torch.where(end == self.end_exact, self.t1, end) if self.t1.requires_grad else end

    def _next_stop(self) -> Tensor:
        assert self.stops is not None
        ahead = (self.stops - self.t.unsqueeze(-1)) * self.sign.unsqueeze(-1)
        distance = torch.where(ahead > 0, ahead, torch.inf).amin(-1)
        beyond = distance >= (self.goal - self.t) * self.sign
        index = torch.where(ahead > 0, ahead, torch.inf).argmin(-1)
        return torch.where(beyond, self.goal, self.stops[index])

    @property
    def clean_interval(self) -> Interval:
        """The attempt just judged, with the rows whose result was not finite standing still.

        Under a tape, the step is taken again over it: a rejected NaN gets a zero cotangent, but 0 x NaN in the backward
        of `f` would reach every gradient that the rows share.
        """
        with torch.no_grad():
            still = torch.where(self.finite, self.tried, self.tried_from)
        return self._interval(self.tried_start, self.tried_from, still)

    @torch.no_grad()
    def judge(self, step: Step, look: Any = None) -> None:
        """Accept or reject every row's attempt and choose its next.

        Args:
            step: the attempt.
            look: what else to read with the verdicts, `look.flags(accepted)`; it comes to lie in `seen`.
        """
        ratio = self._ratio(step).nan_to_num(nan=torch.inf, posinf=torch.inf)
        self.finite = ratio < torch.inf
        self.tried, self.tried_from, self.tried_start, self.tried_live = self.end, self.t, self.start, self.live
        problem, length = self.problem, self.length
        ok = ratio <= 1
        if problem.min_step:
            ok |= self.finite & (torch.minimum(length, self.h) <= problem.min_step)
        self.accepted = accepted = ok & self.live
        self._resize(ratio, length, accepted)
        self.attempts += 1
        self.t = torch.where(accepted, self.end, self.t)
        if self.start.requires_grad:
            with torch.enable_grad():  # rows keep their own t0 until their first step is accepted
                self.start = torch.where(accepted, self.end, self.start)
        else:
            self.start = self.t
        self._read(look)
        if self.running:
            self._propose()

    def _resize(self, ratio: Tensor, length: Tensor, accepted: Tensor) -> None:
        """The lengths of the next attempts."""
        controller = self.problem.controller
        grown = length * controller.grow(ratio, self.history, self.k, self.held)
        if controller.retain and self.cut is not None:
            grown = torch.where(self.cut, torch.maximum(grown, self.h), grown)
        self.h = torch.where(accepted, grown, length * controller.shrink(ratio, self.k))
        kept = controller.remember(ratio, self.history)
        self.history = tuple(torch.where(accepted, n, o) for n, o in zip(kept, self.history, strict=True))
        self.held = ~accepted

    def _read(self, look: Any) -> None:
        """The one host read of a step: whether rows end, `f` jumps, all was finite, and what is watched for came."""
        ending = (self.t == self.goal) | (self.held & (self.h <= self.tiny))
        ending &= self.live
        wanted = [ending]
        if self.jumps is not None:
            wanted.append(torch.isin(self.t, self.jumps))
        if self.taped:
            wanted.append(~self.finite & self.live)
        if self.watch:
            wanted.append(self.watch(self))
        flags = torch.stack([mask.any() for mask in wanted])
        count = len(wanted)
        numbers = (flags if look is None else torch.cat([flags, look.flags(self.accepted)])).tolist()
        numbers, self.seen = numbers[:count], None if look is None else numbers[count:]
        self.jumped = self.jumps is not None and numbers[1]
        self.poisoned = self.taped and numbers[1 + (self.jumps is not None)]
        self.watched = bool(self.watch) and numbers[-1]
        if numbers[0]:
            stuck = torch.where(self.finite, Status.UNDERFLOW.code, Status.NON_FINITE.code)
            self._end_rows(ending, torch.where(self.accepted, Status.SUCCESS.code, stuck))
        if self.attempts >= self.problem.max_steps and self.running:
            self._end_rows(self.live, Status.MAX_STEPS.code)

    def _ratio(self, step: Step) -> Tensor:
        y0, y1 = step.y0.detach(), step.y1.detach()
        ratios = [self._norm(scaled_error(self, e.detach(), y0, y1)) for e in self.stepper.errors(step)]
        return ratios[0] if len(ratios) == 1 else two_estimates(ratios[0], ratios[1])

    def count(self, calls: int) -> None:
        """Charge the rows that moved in the last attempt with `calls` evaluations of `f`."""
        self.log.append((self.tried_live, self.accepted, calls))
        if len(self.log) >= LOG:
            self.count_rows()

    def count_rows(self) -> None:
        """Add the logged attempts to the counts of the original batch."""
        if not self.log:
            return
        live = torch.stack([entry[0] for entry in self.log])
        accepted = torch.stack([entry[1] for entry in self.log])
        calls = torch.tensor([entry[2] for entry in self.log], device=live.device)
        accepted = accepted & live
        new = torch.stack([(live * calls[:, None]).sum(0), accepted.sum(0), (live & ~accepted).sum(0)])
        self.counts.index_add_(1, self.rows, new)
        self.log.clear()

    @property
    def evaluations(self) -> Tensor:
        return self.counts[0]

    @property
    def accepts(self) -> Tensor:
        return self.counts[1]

    @property
    def rejects(self) -> Tensor:
        return self.counts[2]

    def _end_rows(self, which: Tensor, code: Any) -> None:
        """Rows end here, with a status' code: they stand still from now on."""
        self.codes[self.rows] = torch.where(which, code, self.codes[self.rows])
        with torch.set_grad_enabled(self.t_end.requires_grad):  # an event's time keeps its gradient
            self.t_end = self.t_end.index_copy(0, self.rows, torch.where(which, self.t, self.t_end[self.rows]))
        self.live = self.live & ~which
        self.goal = torch.where(which, self.t, self.goal)
        self.num_live = int(self.live.sum())
        self.running = self.num_live > 0

    @torch.no_grad()
    def catch(self, catch: Any) -> None:
        """Rows go on from an event inside the step just taken, or end there."""
        lanes, exact = catch.lanes, catch.t.detach()
        self.t = torch.where(lanes, exact, self.t)
        if self.start.requires_grad or catch.t.requires_grad:
            with torch.enable_grad():
                self.start = torch.where(lanes, catch.t, self.start)
        else:
            self.start = self.t
        self.tried = torch.where(lanes, exact, self.tried)
        self.h = torch.where(lanes, torch.minimum(self.h, catch.gap), self.h)  # do not step over what accumulates
        self.goal = torch.where(lanes, self.end_exact, self.goal)
        self.live = self.live | lanes  # a row may have reached its end in this step, behind the event
        self.codes[self.rows] = torch.where(lanes, RUNNING, self.codes[self.rows])
        here = lanes & (self.t == self.end_exact) & (catch.ended < 0)  # an event at the very end of the span
        self._end_rows(here | (lanes & (catch.ended >= 0)), torch.where(here, Status.SUCCESS.code, catch.ended))
        with torch.enable_grad():
            ended = lanes & (catch.ended >= 0)
            here = torch.where(ended, catch.t, self.t_end[self.rows])
            self.t_end = here if self.whole else self.t_end.index_copy(0, self.rows, here)
        if self.running:
            self._propose()

    # ---- leaving rows behind

    @property
    def wasteful(self) -> bool:
        """True where at least a quarter of the present rows have ended, and at least eight of them."""
        ended = len(self.rows) - self.num_live
        return ended >= 8 and 4 * ended >= len(self.rows)

    def compact(self, keep: Tensor) -> None:
        """Go on with the rows `keep` (indices into the present ones) alone."""
        self.count_rows()
        take = lambda x: x.index_select(0, keep)
        self.rows, self.whole = take(self.rows), False
        same = self.start is self.t
        self.t, self.end_exact, self.goal, self.h = map(take, (self.t, self.end_exact, self.goal, self.h))
        self.sign, self.tiny = take(self.sign), take(self.tiny)
        self.start = self.t if same else take(self.start)
        self.t1 = take(self.t1)
        self.live, self.held, self.accepted = map(take, (self.live, self.held, self.accepted))
        self.history = tuple(map(take, self.history))
        self.rtol, self.atol = (_rows_of(tol, keep) for tol in (self.rtol, self.atol))
        with torch.no_grad():
            self._propose()

    def finish(self, y1: Tensor) -> None:
        """Every accepted state had a finite error: only the counts are left to close."""
        self.count_rows()


def _rows_of(tolerance: Any, keep: Tensor) -> Any:
    """A tolerance cut to rows, where it has rows."""
    if isinstance(tolerance, Tensor) and tolerance.ndim and tolerance.shape[0] > 1:
        return tolerance.index_select(0, keep)
    return tolerance
