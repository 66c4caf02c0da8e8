"""The pace of a fixed grid: every step is accepted, and nothing is read back from the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from neurode._solution import Status
from neurode._state import all_finite, hidden, number, unreadable
from neurode.stepping import Interval, Step, stamped


class FloatGrid(list[float]):
    """A grid of plain floats, not to be changed: the same one serves all solves on the same span.

    Attributes:
        over: `over(t0, t1)` makes the grid of the same rule for another span.
    """

    def __init__(self, points: Iterable[float], over: Callable[[float, float], FloatGrid]) -> None:
        super().__init__(points)
        self.over = over
        self.kept: dict[Any, tuple[tuple[Tensor, ...], list[Interval]]] = {}

    @cached_property
    def tensor(self) -> Tensor:
        """The grid in float64."""
        return torch.tensor(self, dtype=torch.float64)

    def first(self, nodes: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> list[Interval]:
        """Its first steps with the times of their stages, made once and kept: they cost a short solve what 20 stages do."""
        key = (nodes, dtype, device)
        if key in self.kept:
            times, intervals = self.kept[key]
            # An `f` may have changed a time in place, or asked for its gradient (`t.requires_grad_()`).
            if times[0]._version == 0 and not any(t.requires_grad for t in times):
                return intervals
        with torch.inference_mode(False):
            points = self[: BLOCK + 1]
            times, intervals = stamped(zip(points, points[1:]), nodes, dtype, device)
        if type(times[0]) is Tensor and not unreadable(times[0]):
            self.kept[key] = times, intervals
        return intervals


def grid_of_steps(t0: Any, t1: Any, steps: int) -> Any:
    """`t0 + k (t1 - t0) / steps`, both ends exact: a list of floats, or a tensor `(steps + 1, ...)`."""
    if isinstance(t0, Tensor) or isinstance(t1, Tensor):
        inner = [t0 + (k / steps) * (t1 - t0) for k in range(1, steps)]
        return [t0, *inner, t1]
    return _floats_of_steps(t0, t1, steps)


@lru_cache(maxsize=8)
def _floats_of_steps(t0: float, t1: float, steps: int) -> FloatGrid:
    points = [t0 + (t1 - t0) * k / steps for k in range(steps)]
    return FloatGrid([*points, t1], partial(grid_of_steps, steps=steps))


@lru_cache(maxsize=8)
def grid_of_size(t0: float, t1: float, step_size: float) -> FloatGrid:
    """`t0 + k step_size` along the span; the last step is shorter where the size does not divide it."""
    span = abs(t1 - t0)
    steps = max(1, math.ceil(span / step_size * (1 - 1e-12)))  # a step shorter by rounding alone is no step
    h = math.copysign(step_size, t1 - t0)
    points = [t0 + k * h for k in range(steps)]
    return FloatGrid([*points, t1], partial(grid_of_size, step_size=step_size))


BLOCK = 64  # steps whose times are made in one operation


class FixedPace:
    """Walks along a grid.

    Attributes:
        running: whether a step remains.
        interval: the next step's interval.
        accepted: True, or `(rows,)` where a row's own grid has ended before others'.
    """

    def __init__(self, problem: Any) -> None:
        self.grid = problem.grid
        self.dtype = problem.field.time_dtype
        self.problem = problem
        self.index = 0
        self.last = len(self.grid) - 1 if self._moves() else 0
        self.accepted: Any = True
        self.status: Any = Status.SUCCESS
        self.num_rejected = self.accepts = 0
        self.jumps = set(problem.jump_at)
        self.ahead: list[Interval] = []  # the next steps' intervals, the first at the end
        self.running = True
        self.seen: Any = None  # nothing is read
        self._go_on()

    def _moves(self) -> bool:
        """Whether the span has a length; a span that a transform follows is taken to have one."""
        ends = (self.grid[0], self.grid[-1])
        if any(isinstance(t, Tensor) and unreadable(t) for t in ends):
            return True
        return number(ends[0]) != number(ends[1])

    def begin(self, field: Any, y: Tensor) -> None:
        """A fixed grid needs nothing to begin."""
        return None

    @property
    def t0(self) -> float:
        return number(self.problem.t0)

    @property
    def t1(self) -> float:
        return number(self.problem.t1)

    @property
    def t(self) -> float:
        """The time reached."""
        return number(self.grid[self.index])

    @property
    def jumped(self) -> bool:
        """True where `f` jumps at the present time, so that a derivative known there is void."""
        return bool(self.jumps) and self.t in self.jumps

    @property
    def num_accepted(self) -> int:
        return self.accepts + self.index

    def _go_on(self) -> None:
        """Set the next interval, where there is one."""
        self.running = self.index < self.last
        if self.running:
            if not self.ahead:
                self.ahead = self._block()[::-1]
            self.interval = self.ahead.pop()

    def _block(self) -> list[Interval]:
        """The next intervals; where their times are plain numbers, those of all stages are made together."""
        nodes, jumps, device = getattr(self.problem.method, "C", None), self.jumps, self.problem.y0.device
        plain = nodes is not None and not jumps
        if plain and self.index == 0 and isinstance(self.grid, FloatGrid) and not torch.compiler.is_compiling():
            return self.grid.first(nodes, self.dtype, device)
        points = self.grid[self.index : min(self.index + BLOCK, self.last) + 1]
        if plain and not any(isinstance(t, Tensor) for t in points):
            return stamped(zip(points, points[1:]), nodes, self.dtype, device)[1]
        return [self._between(t0, t1) for t0, t1 in zip(points[:-1], points[1:], strict=True)]

    def _between(self, t0: Any, t1: Any) -> Interval:
        if not self.jumps:
            return Interval(t0, t1, self.dtype)
        return Interval(t0, t1, self.dtype, number(t0) in self.jumps, number(t1) in self.jumps)

    def judge(self, step: Step, look: Any = None) -> None:
        """Accept, and go on to the next point of the grid, without a host read."""
        self.index += 1
        if self.ahead:
            self.interval = self.ahead.pop()
        else:
            self._go_on()

    def catch(self, catch: Any) -> None:
        """Go on from an event inside the step just taken to the grid's next point, or end there."""
        if self.running:
            self.ahead.append(self.interval)  # comes after what is left of this step
        t = catch.t[0] if catch.t.requires_grad else float(catch.t[0])
        self.accepts, self.index, self.running = self.accepts + 1, self.index - 1, True
        self.grid = list(self.grid)
        self.grid[self.index] = t
        self.interval = self._between(t, self.grid[self.index + 1])
        if int(catch.ended[0]) >= 0:
            self.stop(list(Status)[int(catch.ended[0])])

    @property
    def end_time(self) -> Any:
        """Where the solve ended, with the gradient of an event's time."""
        return self.grid[self.index]

    def stop(self, status: Status) -> None:
        """End here."""
        self.running, self.status = False, status

    def finish(self, y1: Tensor) -> None:
        """Look once, at the end, whether the state is still finite."""
        if hidden(y1):
            return
        if not all_finite(y1):
            self.status = Status.NON_FINITE


class RowGridPace:
    """Walks along a grid of every row's own; a row whose grid has ended stands still.

    Args:
        problem: with `grid` a tensor `(points, rows)`.
    """

    can_compact = False
    poisoned = False
    wasteful = False

    def __init__(self, problem: Any) -> None:
        self.grid, self.dtype = problem.grid, problem.field.time_dtype
        self.jumps = torch.tensor(problem.jump_at, dtype=self.grid.dtype, device=self.grid.device)
        self.jumped = bool(
            problem.jump_at
        )  # without looking where: a derivative known at a step's end is not carried on
        self.exact = self.grid.detach()
        device = self.exact.device
        points, total = self.exact.shape
        self.rows, self.whole = torch.arange(total, device=device), True
        self.sign = torch.where(self.exact[-1] >= self.exact[0], 1.0, -1.0).to(self.exact.dtype)
        self.next = torch.ones(total, dtype=torch.int64, device=device)  # the grid point that each row goes to
        self.start, self.t = self.grid[0], self.exact[0]
        self.attempts = points - 1 if bool((self.exact[1:] != self.exact[:-1]).any()) else 0
        self.live = torch.ones(total, dtype=torch.bool, device=device)
        self.codes = torch.zeros(total, dtype=torch.int64, device=device)
        self.t_end = self.grid[-1]
        self.accepts = torch.zeros_like(self.codes)
        self.rejects, self.evaluations = torch.zeros_like(self.codes), torch.zeros_like(self.codes)
        self.watch: Any = None
        self.watched = 1
        self.seen: Any = None  # nothing is read
        self._propose()

    def _propose(self) -> None:
        inside = self.live & (self.next < len(self.grid))
        point = self.next.clamp_max(len(self.grid) - 1).unsqueeze(0)
        self.end = torch.where(inside, self.grid.gather(0, point)[0], self.start)

    def begin(self, field: Any, y: Tensor) -> None:
        """A fixed grid needs nothing to begin."""
        return None

    @property
    def running(self) -> bool:
        return self.attempts > 0

    @property
    def interval(self) -> Interval:
        if not self.jumped:
            return Interval(self.start, self.end, self.dtype)
        after, before = (torch.isin(t.detach(), self.jumps) for t in (self.start, self.end))
        return Interval(self.start, self.end, self.dtype, after, before)

    def judge(self, step: Step, look: Any = None) -> None:
        """Accept every row that moved, without a host read."""
        self.tried_from, self.tried = self.t, self.end.detach()
        self.accepted = self.tried != self.tried_from
        self.accepts = self.accepts + self.accepted
        self.start, self.t, self.next = self.end, self.tried, self.next + 1
        self.attempts -= 1
        self._propose()

    def catch(self, catch: Any) -> None:
        """Rows go on from an event inside the step just taken to the grid's next point, or end there."""
        lanes = catch.lanes
        self.start = torch.where(lanes, catch.t, self.start)
        self.t = self.start.detach()
        self.tried = torch.where(lanes, self.t, self.tried)
        self.next = torch.where(lanes, self.next - 1, self.next)
        ended = lanes & (catch.ended >= 0)
        self.codes = torch.where(ended, catch.ended, self.codes)
        self.t_end = torch.where(ended, catch.t, self.t_end)
        self.live = self.live & ~ended
        self.attempts += 1  # rows that were caught have one more step to take than the rest
        self._propose()

    def count(self, calls: int) -> None:
        """Charge the rows that moved with `calls` evaluations of `f`."""
        self.evaluations = self.evaluations + self.accepted * calls

    def finish(self, y1: Tensor) -> None:
        """Look once, at the end, which rows are still finite."""
        if not hidden(y1):
            gone = ~torch.isfinite(y1.detach()).all(1)
            self.codes = torch.where(gone, Status.NON_FINITE.code, self.codes)
