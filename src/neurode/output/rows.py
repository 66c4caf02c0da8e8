"""Outputs where every row takes its own steps.

Steps are collected in a window and evaluated together, so that an output costs a few operations a window and not a few a
step. The window is emptied when it is full, when rows leave the batch, and at the end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neurode._state import is_traced, real_dtype
from neurode.output.interpolant import coefficients, horner
from neurode.stepping import Piece

WINDOW = 32  # steps: beyond some 30, the cost of emptying is below a tenth of the steps' own


class Window:
    """Accepted and rejected attempts of the present rows since the window was last emptied.

    Attributes:
        starts, ends: `(steps, rows)` times of what each attempt covered; a rejected one covers nothing.
        pieces: the interpolants.
    """

    def __init__(self) -> None:
        self.starts: list[Tensor] = []
        self.ends: list[Tensor] = []
        self.accepted: list[Tensor] = []
        self.pieces: list[Piece] = []

    def __len__(self) -> int:
        return len(self.pieces)

    def add(self, pace: Any, piece: Piece) -> None:
        self.starts.append(pace.tried_from)
        self.ends.append(torch.where(pace.accepted, pace.tried, pace.tried_from))
        self.accepted.append(pace.accepted)
        self.pieces.append(piece)

    def clear(self) -> None:
        self.__init__()


def gather(pieces: list[Piece], which: Tensor, row: Tensor, times: Tensor, derivative: bool = False) -> Tensor:
    """Evaluate the interpolants `pieces[which]` of the rows `row` at `times`.

    Args:
        pieces: interpolants over the same rows, with the same powers.
        which, row: `(m,)` indices.
        times: `(m,)`.
        derivative: return `dy/dt`.

    Returns:
        `(m, size)`.
    """

    place = which * len(pieces[0].y0) + row

    def pick(tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors).index_select(0, place)

    first = pieces[0]
    dtype = real_dtype(first.y0.dtype)
    t0, t1 = pick([p.interval.t0 for p in pieces]), pick([p.interval.t1 for p in pieces])
    moves = any(map(is_traced, (t0, t1, times)))
    x = ((times - t0) / torch.where(t1 == t0, 1.0, t1 - t0)).to(dtype)
    polynomials = coefficients(pieces).view(len(pieces), -1, *first.y0.shape).transpose(1, 2)
    chosen = polynomials.reshape(-1, *polynomials.shape[2:]).index_select(0, place)
    total = horner(chosen, x, derivative)
    if derivative:
        return total
    value = pick([p.y0 for p in pieces]) + (t1 - t0).to(dtype).unsqueeze(-1) * total
    if moves:
        return value
    return torch.where((x == 1).unsqueeze(-1), pick([p.y1 for p in pieces]), value)


class RowSamples:
    """States at given times, `(time,)` for all rows or `(time, rows)`.

    Args:
        t_eval: the times; may carry a gradient.
        t0, t1: `(rows,)` ends.
        sign: `(rows,)` directions of time.
        y0: inner initial state.
    """

    def __init__(self, t_eval: Tensor, t0: Tensor, t1: Tensor, sign: Tensor, y0: Tensor) -> None:
        self.times = t_eval.unsqueeze(1).expand(-1, len(t0)) if t_eval.ndim == 1 else t_eval
        self.sign = sign
        self.keys = (self.times.detach() * sign).T.contiguous()  # (rows, time), ascending
        self.y0 = y0
        self.index: list[tuple[Tensor, Tensor]] = []
        self.values: list[Tensor] = []
        self.reached = (t0.detach() * sign).clone()
        self.first = self.reached.clone()
        # An output is a time of its own: where it or t0 moves, the first step's interpolant gives an output at t0.
        self.early = (t0 != t1).detach() & (is_traced(self.times) or is_traced(t0))
        row, j = ((self.keys == self.reached.unsqueeze(1)) & ~self.early.unsqueeze(1)).nonzero(as_tuple=True)
        self._write(row, j, y0[row])
        self.reached = torch.where(self.early, torch.nextafter(self.reached, self.reached - 1), self.reached)
        self.waits = bool(self.early.any())

    def _write(self, row: Tensor, j: Tensor, value: Tensor) -> None:
        self.index.append((j, row))
        self.values.append(value)

    def watch(self, pace: Any) -> Tensor:
        """`(rows,)`, True where an accepted step has an output in it."""
        sign = pace.sign
        start, end = (pace.tried_from * sign).unsqueeze(1), (pace.tried * sign).unsqueeze(1)
        if self.waits:  # an output at t0 is the first step's
            first = self.first if pace.whole else self.first.index_select(0, pace.rows)
            start = torch.where(start == first.unsqueeze(1), torch.nextafter(start, start - 1), start)
        keys = self.keys if pace.whole else self.keys.index_select(0, pace.rows)
        low, high = torch.searchsorted(keys, start, right=True), torch.searchsorted(keys, end, right=True)
        return (high > low).squeeze(1) & pace.accepted

    def flush(self, window: Window, rows: Tensor) -> None:
        """Write the outputs that the window's steps cover."""
        sign = self.sign[rows]
        ends = (torch.stack(window.ends) * sign).T.contiguous()
        keys = self.keys[rows]
        which = torch.searchsorted(ends, keys)
        covered = (which < len(window)) & (keys > self.reached[rows].unsqueeze(1))
        row, j = covered.nonzero(as_tuple=True)
        if len(row):
            times = self.times[j, rows[row]]
            self._write(rows[row], j, gather(window.pieces, which[row, j], row, times))
        self.reached[rows] = ends[:, -1]

    def finish(self) -> Tensor:
        """All outputs `(time, rows, size)`; NaN where a row did not come."""
        shape = (self.keys.shape[1], *self.y0.shape)
        empty = torch.full(shape, torch.nan, dtype=self.y0.dtype, device=self.y0.device)
        j, row = (torch.cat(parts) for parts in zip(*self.index, strict=True)) if self.index else (None, None)
        return empty if j is None else empty.index_put((j, row), torch.cat(self.values))


class RowSteps:
    """The initial state and the state after every accepted step, row by row."""

    def __init__(self, t0: Tensor, y0: Tensor) -> None:
        self.y0, self.t0 = y0, t0
        self.count = torch.ones(len(y0), dtype=torch.int64, device=y0.device)
        rows = torch.arange(len(y0), device=y0.device)
        self.index = [(torch.zeros_like(rows), rows)]
        self.times, self.values = [t0], [y0]

    def flush(self, window: Window, rows: Tensor) -> None:
        accepted = torch.stack(window.accepted)
        position = accepted.long().cumsum(0) - 1 + self.count[rows]
        step, row = accepted.nonzero(as_tuple=True)
        self.index.append((position[step, row], rows[row]))
        self.times.append(torch.stack(window.ends)[step, row])
        self.values.append(torch.stack([p.y1 for p in window.pieces])[step, row])
        self.count[rows] += accepted.long().sum(0)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Times `(most steps + 1, rows)` and states, NaN behind a row's last."""
        j, row = (torch.cat(parts) for parts in zip(*self.index, strict=True))
        length = int(self.count.max()) if len(self.count) else 0
        ts = torch.full((length, len(self.y0)), torch.nan, dtype=self.t0.dtype, device=self.y0.device)
        ys = torch.full((length, *self.y0.shape), torch.nan, dtype=self.y0.dtype, device=self.y0.device)
        return ts.index_put((j, row), torch.cat(self.times)), ys.index_put((j, row), torch.cat(self.values))


class RowPieces:
    """Keeps all windows, for a continuous solution."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.ends: list[Tensor] = []

    def watch(self, pace: Any) -> Tensor:
        return pace.accepted

    def flush(self, window: Window, rows: Tensor) -> None:
        self.pieces += window.pieces
        self.ends += window.ends


class RowOutputs:
    """All outputs of one solve with rows."""

    def __init__(self, problem: Any, pace: Any, stepper: Any) -> None:
        self.field, self.stepper = problem.field, stepper
        self.window = Window()
        self.saver: Any = None
        if isinstance(problem.t_eval, str):
            self.saver = RowSteps(problem.t0.detach(), problem.y0)
        elif problem.t_eval is not None:
            self.saver = RowSamples(problem.t_eval, problem.t0, problem.t1, pace.sign, problem.y0)
        self.pieces = RowPieces() if problem.dense else None
        self.sinks = [sink for sink in (self.saver, self.pieces) if sink is not None]
        watches = [sink.watch for sink in self.sinks if hasattr(sink, "watch")]
        self.need, self.events = bool(watches), bool(problem.events)
        if watches and stepper.dense_costs:
            pace.watch = watches[-1]

    def piece(self, pace: Any, step: Any) -> tuple[Piece, Any]:
        """The interpolant of a judged attempt where anything needs it, and the carry to go on from."""
        if self.events or (self.need and (pace.watched or not self.stepper.dense_costs)):
            return self.stepper.piece(self.field, step)
        return Piece(step.interval, step.y0, step.y1, step.ks, ()), step.carry

    def take(self, pace: Any, piece: Piece) -> None:
        """Take one judged attempt."""
        if self.sinks and (piece.powers or not self.need):
            self.window.add(pace, piece)
        if len(self.window) >= WINDOW:
            self.flush(pace.rows)

    def flush(self, rows: Tensor) -> None:
        """Empty the window."""
        if len(self.window):
            for sink in self.sinks:
                sink.flush(self.window, rows)
            self.window.clear()
