"""The pace of a fixed grid: every step is accepted, and nothing is read back from the device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from neurode._solution import Status
from neurode._state import number
from neurode.stepping import Interval, Step


def grid_of_steps(t0: Any, t1: Any, steps: int) -> Any:
    """`t0 + k (t1 - t0) / steps`, both ends exact: a list of floats, or a tensor `(steps + 1, ...)`."""
    if isinstance(t0, Tensor) or isinstance(t1, Tensor):
        inner = [t0 + (k / steps) * (t1 - t0) for k in range(1, steps)]
        return [t0, *inner, t1]
    return [t0 + (t1 - t0) * k / steps for k in range(steps)] + [t1]


def grid_of_size(t0: float, t1: float, step_size: float) -> list[float]:
    """`t0 + k step_size` along the span; the last step is shorter where the size does not divide it."""
    span = abs(t1 - t0)
    steps = max(1, math.ceil(span / step_size * (1 - 1e-12)))  # a step shorter by rounding alone is no step
    h = math.copysign(step_size, t1 - t0)
    return [t0 + k * h for k in range(steps)] + [t1]


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
        self.last = len(self.grid) - 1
        self.accepted: Any = True
        self.status: Any = Status.SUCCESS
        self.num_rejected = 0
        self.stopped = False

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
        return False

    @property
    def running(self) -> bool:
        return self.index < self.last and not self.stopped

    @property
    def num_accepted(self) -> int:
        return self.index

    @property
    def interval(self) -> Interval:
        return Interval(self.grid[self.index], self.grid[self.index + 1], self.dtype)

    def judge(self, step: Step) -> None:
        """Accept, and go on to the next point of the grid."""
        self.index += 1

    def restart(self, t: Any) -> None:
        """Go on from `t`, an event inside the step just taken, to the grid's next point."""
        self.grid = list(self.grid)
        self.index -= 1
        self.grid[self.index] = t

    def stop(self, status: Status) -> None:
        """End here."""
        self.stopped, self.status = True, status

    def finish(self, y1: Tensor) -> None:
        """Look once, at the end, whether the state is still finite."""
        if _unchecked(y1):
            return
        if not bool(torch.isfinite(y1.detach()).all()):
            self.status = Status.NON_FINITE


def _unchecked(y: Tensor) -> bool:
    """True where values cannot be read: under `torch.compile` and `vmap`."""
    return torch.compiler.is_compiling() or torch._C._functorch.is_batchedtensor(y)


class RowGridPace:
    """Walks along a grid of every row's own; a row whose grid has ended stands still.

    Args:
        problem: with `grid` a tensor `(points, rows)`.
    """

    can_compact = False
    poisoned = False
    jumps = None
    wasteful = False

    def __init__(self, problem: Any) -> None:
        self.grid, self.dtype = problem.grid, problem.field.time_dtype
        exact = self.grid.detach()
        total = exact.shape[1]
        self.rows, self.whole = torch.arange(total, device=exact.device), True
        self.sign = torch.where(exact[-1] >= exact[0], 1.0, -1.0).to(exact.dtype)
        self.moves = exact[1:] != exact[:-1]
        self.index, self.last = 0, len(exact) - 1 if bool(self.moves.any()) else 0
        self.codes = torch.zeros(total, dtype=torch.int64, device=exact.device)
        self.t_end, self.exact = exact[-1], exact
        self.accepts = self.moves.sum(0)
        self.rejects, self.evaluations = torch.zeros_like(self.accepts), torch.zeros_like(self.accepts)
        self.watch: Any = None
        self.watched = 1

    def begin(self, field: Any, y: Tensor) -> None:
        """A fixed grid needs nothing to begin."""
        return None

    @property
    def running(self) -> bool:
        return self.index < self.last

    @property
    def interval(self) -> Interval:
        return Interval(self.grid[self.index], self.grid[self.index + 1], self.dtype)

    def judge(self, step: Step) -> None:
        """Accept every row that moved."""
        self.tried_from, self.tried = self.exact[self.index], self.exact[self.index + 1]
        self.accepted = self.moves[self.index]
        self.index += 1

    def count(self, calls: int) -> None:
        """Charge the rows that moved with `calls` evaluations of `f`."""
        self.evaluations += self.accepted * calls

    def finish(self, y1: Tensor) -> None:
        """Look once, at the end, which rows are still finite."""
        if not _unchecked(y1):
            gone = ~torch.isfinite(y1.detach()).all(1)
            self.codes = torch.where(gone, Status.NON_FINITE.code, self.codes)
