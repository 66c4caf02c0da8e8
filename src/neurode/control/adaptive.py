"""The pace of an adaptive joint solve: one error norm, one step, times as Python floats."""

from __future__ import annotations

import bisect
import math
from typing import Any

import torch
from torch import Tensor

from neurode._solution import Status
from neurode._state import number
from neurode.control.first_step import first_step
from neurode.stepping import Interval, Step


def scaled_error(problem: Any, error: Tensor, y0: Tensor, y1: Tensor) -> Tensor:
    """`error / (atol + rtol max(|y0|, |y1|))`."""
    size = torch.maximum(y0.abs(), y1.abs())
    return error / (problem.atol + problem.rtol * size)


def two_estimates(r5: Any, r3: Any) -> Any:
    """DOP853's combination of its two estimates (Hairer, Norsett & Wanner 1993, II.10)."""
    if isinstance(r5, Tensor):
        return r5 * r5 / (r5 * r5 + 0.01 * r3 * r3).sqrt().clamp_min(1e-30)
    return r5 * r5 / max(math.sqrt(r5 * r5 + 0.01 * r3 * r3), 1e-30)


def resolution(t: float, span: float) -> float:
    """The shortest step at `t`: ten times the distance to the next float64 (as SciPy's `RungeKutta`).

    Around t = 0, where floats are dense, the span sets the scale instead.
    """
    return 10 * math.ulp(max(abs(t), math.ulp(span)))


class JointPace:
    """Chooses, accepts and rejects the steps of a joint solve.

    Attributes:
        running: whether the end is not reached and nothing failed.
        interval: the next attempt.
        accepted: the verdict on the last attempt.
        status: how it went so far.
        num_accepted, num_rejected: counts.
    """

    def __init__(self, problem: Any, stepper: Any) -> None:
        self.problem, self.stepper = problem, stepper
        self.t0, self.t1 = number(problem.t0), number(problem.t1)
        self.sign = 1.0 if self.t1 >= self.t0 else -1.0
        self.t, self.start = self.t0, problem.t0  # `start` carries a gradient of time where one is asked for
        self.h = 0.0
        self.k = problem.method.order_error + 1.0
        self.history: tuple[float, ...] = ()
        self.held = False
        self.running, self.accepted, self.status = self.t0 != self.t1, False, Status.SUCCESS
        self.num_accepted = self.num_rejected = 0
        self.stops = sorted({*map(float, problem.step_at), *map(float, problem.jump_at)}, reverse=self.sign < 0)
        self.jumps = {float(t) for t in problem.jump_at}
        self.finite = True
        self.seen: Any = None  # what was read beside the last error ratio

    def begin(self, field: Any, y: Tensor) -> Tensor:
        """Evaluate `f` at the start and choose the first step.

        Returns:
            The derivative at the start.
        """
        (time,) = self._span(self.t0, self.t1, self.start).times((0.0,), y, field.time_dtype)
        f0 = field(time, y)
        with torch.no_grad():
            self.h = self._first_step(field, y.detach(), f0.detach())
        if not math.isfinite(self.h):
            self.stop(Status.NON_FINITE)
        self._propose()
        return f0

    def _first_step(self, field: Any, y: Tensor, f0: Tensor) -> float:
        if not bool(torch.isfinite(f0).all()):
            return math.nan
        if self.problem.first_step is not None:
            return float(self.problem.first_step)

        def evaluate(h: float) -> Tensor:
            target = self.t0 + self.sign * h
            (time,) = Interval(target, target, field.time_dtype).times((0.0,), y, field.time_dtype)
            return field(time, torch.add(y, f0, alpha=self.sign * h))

        scale = self.problem.atol + self.problem.rtol * y.abs()
        h = first_step(evaluate, lambda x: float(self.problem.norm(x)), f0, y, scale, self.k)
        return min(h, abs(self.t1 - self.t0))

    def _span(self, t0: float, t1: float, start: Any = None) -> Interval:
        end = self.problem.t1 if t1 == self.t1 else t1
        jumps = self.jumps
        return Interval(t0 if start is None else start, end, self.problem.field.time_dtype, t0 in jumps, t1 in jumps)

    def _propose(self) -> None:
        """Turn the wanted length into an interval that ends on the end or on a time to be hit."""
        problem = self.problem
        self.h = min(max(self.h, problem.min_step), problem.max_step)
        target = self._next_stop()
        remaining = (target - self.t) * self.sign
        self.cut = remaining < self.h
        if self.h * problem.controller.stretch >= remaining:
            end = target
        else:
            end = self.t + self.sign * self.h
        if self.running and self.h < resolution(self.t, abs(self.t1 - self.t0)) and end != target:
            self.stop(Status.UNDERFLOW if self.finite else Status.NON_FINITE)
        self.end = end
        self.interval = self._span(self.t, end, self.start)

    def _next_stop(self) -> float:
        if not self.stops:
            return self.t1
        keys = [self.sign * s for s in self.stops]
        index = bisect.bisect_right(keys, self.sign * self.t)
        if index == len(keys) or keys[index] >= self.sign * self.t1:
            return self.t1
        return self.stops[index]

    def judge(self, step: Step, look: Any = None) -> None:
        """Read the error ratio (the one host read of a step), accept or reject, choose the next interval.

        Args:
            step: the attempt.
            look: what else to read with it, `look.flags(None)`; it comes to lie in `seen`.
        """
        ratio, self.seen = self._read(step, look)
        self.finite = math.isfinite(ratio)
        length = abs(self.end - self.t)
        problem = self.problem
        self.accepted = ratio <= 1.0 or (self.finite and min(length, self.h) <= problem.min_step)
        if self.accepted:
            self._advance(ratio, length)
        else:
            self.num_rejected += 1
            factor = problem.controller.shrink(ratio, self.k) if self.finite else problem.controller.min_factor
            self.h = length * factor
            self.held = True
        if self.running and self.num_accepted + self.num_rejected >= problem.max_steps:
            self.stop(Status.MAX_STEPS)
        if self.running:
            self._propose()

    def _advance(self, ratio: float, length: float) -> None:
        controller = self.problem.controller
        grown = length * controller.grow(ratio, self.history, self.k, self.held)
        self.h = max(grown, self.h) if self.cut and controller.retain else grown
        self.history, self.held = controller.remember(ratio, self.history), False
        self.num_accepted += 1
        self.t = self.start = self.end
        self.running = self.end != self.t1

    @property
    def jumped(self) -> bool:
        """True where `f` jumps at the present time, so that a derivative known there is void."""
        return self.t in self.jumps

    def _read(self, step: Step, look: Any) -> tuple[float, Any]:
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self._read(step, look)
        y0, y1, norm = step.y0.detach(), step.y1.detach(), self.problem.norm
        ratios = [norm(scaled_error(self.problem, e, y0, y1)) for e in self.stepper.errors(step)]
        count, seen = len(ratios), None
        if look is None:
            numbers = [float(ratios[0])] if count == 1 else torch.stack(ratios).tolist()
        else:
            flags = look.flags(None)
            numbers = torch.cat([torch.stack(ratios), flags.to(ratios[0].dtype)]).tolist()
            seen = numbers[count:]
        return (numbers[0] if count == 1 else two_estimates(*numbers[:count])), seen

    def catch(self, catch: Any) -> None:
        """Go on from an event inside the step just taken, or end there."""
        t = catch.t[0]
        self.t, self.start = number(t), t if t.requires_grad else number(t)
        self.h = min(self.h, float(catch.gap[0]))  # events that accumulate must not be stepped over
        self.running = self.t != self.t1
        self._propose()
        if int(catch.ended[0]) >= 0:
            self.stop(list(Status)[int(catch.ended[0])])

    @property
    def end_time(self) -> Any:
        """Where the solve ended, with the gradient of an event's time."""
        return self.start

    def stop(self, status: Status) -> None:
        """End here."""
        self.running, self.status = False, status

    def finish(self, y1: Tensor) -> None:
        """Nothing to look at: every accepted state had a finite error."""
