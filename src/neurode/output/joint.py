"""Outputs of a joint solve. Each sink says whether it wants an accepted step's interpolant, and takes what it needs."""

from __future__ import annotations

import bisect
from typing import Any

import torch
from torch import Tensor

from neurode._state import is_traced, real_dtype
from neurode.output.interpolant import coefficients, fractions, horner
from neurode.stepping import Interval, Piece, Step

WINDOW = 32  # steps whose outputs are evaluated together
SMALL = 16_384  # elements of a state up to which that pays; beyond, the copies cost more than the operations


class Samples:
    """States at given times.

    Args:
        t_eval: `(time,)` tensor, ordered along the integration; may carry a gradient.
        t0: start of the span.
        y0: inner initial state.
        sign: direction of time.
        early: whether the first step's interpolant gives an output at t0. An output is a time of its own: where it, or the
            end of a step that it lies on, moves, it is not simply the state there.
    """

    def __init__(self, t_eval: Tensor, t0: float, y0: Tensor, sign: float, early: bool) -> None:
        self.times = t_eval.detach().tolist()
        self.moving = t_eval if is_traced(t_eval) else None
        self.keys = [sign * t for t in self.times]
        self.sign = sign
        self.dtype = real_dtype(y0.dtype)
        self.next = 0
        self.values: list[Tensor] = []
        self.window: list[tuple[Piece, int, int]] = []  # pieces, and which outputs lie in them
        self.depth = WINDOW if y0.numel() <= SMALL else 1
        if not early:
            self._at(t0, y0)

    def _at(self, t: float, y: Tensor) -> None:
        end = bisect.bisect_right(self.keys, self.sign * t)
        if end > self.next:
            self.flush()
            self.values.append(y.expand(end - self.next, *y.shape))
            self.next = end

    def flush(self) -> None:
        """Evaluate the outputs of the steps in the window together."""
        if not self.window:
            return
        pieces = [piece for piece, _, _ in self.window]
        counts = [end - start for _, start, end in self.window]
        x = torch.cat([fractions(p, self._source[a:b], self.dtype) for p, a, b in self.window])
        y0 = pieces[0].y0
        which = torch.repeat_interleave(torch.arange(len(pieces)), torch.tensor(counts)).to(y0.device)
        total = horner(coefficients(pieces)[which], x).reshape(len(x), *y0.shape)
        start = torch.stack([p.y0 for p in pieces])[which]
        lengths = [torch.as_tensor(p.interval.h, dtype=self.dtype, device=y0.device) for p in pieces]
        h = torch.stack(lengths)[which].reshape(-1, *[1] * y0.ndim)
        self.values.append(torch.addcmul(start, h.to(total.dtype), total))
        self.window.clear()

    @property
    def _source(self) -> Any:
        return self.times if self.moving is None else self.moving

    def wants(self, t: float, step: Step) -> bool:
        """Whether an output lies up to the new time `t` and is not simply the new state."""
        if self.next == len(self.keys):
            return False
        key = self.keys[self.next]
        return key <= self.sign * t if self._moves(step) else key < self.sign * t

    def _moves(self, step: Step) -> bool:
        return self.moving is not None or isinstance(step.interval.h, Tensor)

    def take(self, t: float, step: Step, piece: Piece | None) -> None:
        """Write the outputs of one accepted step that ends at `t`."""
        if piece is not None:
            cut = bisect.bisect_right if self._moves(step) else bisect.bisect_left
            end = cut(self.keys, self.sign * t)
            if end > self.next:
                self.window.append((piece, self.next, end))
                self.next = end
                if len(self.window) >= self.depth:
                    self.flush()
        self._at(t, step.y1)

    def finish(self, y0: Tensor) -> Tensor:
        """All outputs `(time, *state.shape)`; NaN where the solve did not come."""
        self.flush()
        missing = len(self.keys) - self.next
        if missing:
            nan = torch.full((missing, *y0.shape), torch.nan, dtype=y0.dtype, device=y0.device)
            self.values.append(nan)
        if not self.values:
            return y0.new_empty((0, *y0.shape))
        return self.values[0] if len(self.values) == 1 else torch.cat(self.values)


class AcceptedSteps:
    """The initial state and the state after every accepted step."""

    def __init__(self, t0: Any, y0: Tensor) -> None:
        self.times: list[Any] = [t0]
        self.values = [y0]

    def wants(self, t: float, step: Step) -> bool:
        return False

    def take(self, t: float, step: Step, piece: Piece | None) -> None:
        self.times.append(step.interval.t1)
        self.values.append(step.y1)

    def finish(self, y0: Tensor) -> Tensor:
        return torch.stack(self.values)


class Pieces:
    """Keeps the interpolant of every accepted step."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.ends: list[float] = []

    def wants(self, t: float, step: Step) -> bool:
        return True

    def take(self, t: float, step: Step, piece: Piece | None) -> None:
        assert piece is not None
        self.pieces.append(piece)
        self.ends.append(t)


def sinks_for(problem: Any, pace: Any) -> tuple[Any, Pieces | None, list[Any]]:
    """The sinks that a problem asks for: what fills `ys` (or None), what keeps the pieces (or None), and all of them."""
    saver: Any = None
    if isinstance(problem.t_eval, str):
        saver = AcceptedSteps(problem.t0, problem.y0)
    elif problem.t_eval is not None:
        t0, t1 = pace.t0, pace.t1
        sign = 1.0 if t1 >= t0 else -1.0
        early = t0 != t1 and (is_traced(problem.t_eval) or isinstance(problem.t0, Tensor))
        saver = Samples(problem.t_eval, t0, problem.y0, sign, early)
    pieces = Pieces() if problem.dense else None
    return saver, pieces, [sink for sink in (saver, pieces) if sink is not None]


def write(sinks: list[Any], t: float, step: Step, piece: Piece | None) -> None:
    """Hand an accepted step that ends at `t` to all sinks."""
    for sink in sinks:
        sink.take(t, step, piece)


def cut(step: Step, catch: Any) -> Step:
    """A step that ends at the event inside it."""
    t = catch.t[0] if catch.t.requires_grad else float(catch.t[0])
    y1 = catch.before
    interval = Interval(step.interval.t0, t, real_dtype(y1.dtype))
    return step._replace(interval=interval, y1=y1)
