"""The strict form of an initial value problem: checked once by `_solve`, trusted by everything below."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from neurode._field import Field
from neurode._state import Layout


@dataclass(frozen=True)
class Problem:
    """An initial value problem and everything that was decided about how to solve it.

    Times are Python floats in a joint solve, unless a gradient reaches them, and float64 tensors `(rows,)` where rows
    have their own.

    Attributes:
        field: the vector field on the inner state.
        layout: how the user's state lies in the inner one.
        y0: inner initial state, `(rows, size)` with rows.
        t0, t1: the span.
        method: the numbers of the method (a tableau).
        grid: times of a fixed grid, from t0 to t1, or None for an adaptive method.
        rtol, atol: numbers, or tensors that broadcast against `y0`.
        norm: `norm(inner error ratio) -> 0-d or (rows,)`.
        controller: step size controller of an adaptive method.
        first_step, min_step, max_step: bounds in units of time; None for the automatic first step.
        step_at, jump_at: times to be hit exactly, and hit with `f` evaluated afresh behind them; sorted along time.
        t_eval: output times; `"steps"`; or None for the end alone.
        events: event functions.
        dense: keep what a continuous solution needs.
        save: what to keep of a state, or None for all of it.
        max_steps: attempted steps at most.
        max_events: records kept of each event (per row).
        compact: whether rows that are done may leave the batch (None: where a probe shows that it is safe).
        callbacks: functions called at steps, by name.
        recorder: what notes accepted steps for a gradient strategy that goes back over them.
        estimates: names of the estimates to sum over the accepted steps, see `output/estimates.py`.
        memory: bytes that may be kept for the backward pass; None where the user did not say.
        ticket: what a call like the one that this problem was read from will be known by; None where there is no such.
        retape: whether a derivative that a strategy does not give is computed by solving again on PyTorch's tape.
    """

    field: Field
    layout: Layout
    y0: Tensor
    t0: Any
    t1: Any
    method: Any
    grid: Any = None
    rtol: Any = 1e-4
    atol: Any = 1e-6
    norm: Callable[[Tensor], Tensor] | None = None
    controller: Any = None
    first_step: Any = None
    min_step: float = 0.0
    max_step: float = float("inf")
    step_at: Sequence[float] = ()
    jump_at: Sequence[float] = ()
    t_eval: Any = None
    events: tuple[Any, ...] = ()
    dense: bool = False
    save: Callable[..., Any] | None = None
    max_steps: int = 100_000
    max_events: int = 1024
    compact: bool | None = None
    callbacks: Any = None
    ticket: Any = None
    recorder: Any = None
    estimates: tuple[str, ...] = ()
    memory: int | None = None
    retape: bool = False

    def at(self, **values: Any) -> Problem:
        """The same problem with other values, quickly: they are of the kind of those that they replace."""
        made = object.__new__(Problem)
        made.__dict__.update(self.__dict__, **values)
        return made

    @property
    def rows(self) -> int | None:
        """Number of rows, or None in a joint solve."""
        return self.y0.shape[0] if self.layout.batched else None

    @property
    def per_row(self) -> bool:
        """Whether rows have times of their own: always with adaptive steps, with a fixed grid where spans differ."""
        return self.layout.batched and isinstance(self.t0, Tensor) and self.t0.ndim == 1
