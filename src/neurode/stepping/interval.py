"""The interval `(t0, t1)` of one step. Steps are intervals, never `t += h`, so that time does not drift."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from neurode._state import cached_tensor


def places(t0: float, t1: float, nodes: tuple[float, ...]) -> list[float]:
    """`t0 + c (t1 - t0)` for every node c, both ends exact."""
    return [t0 if c == 0.0 else t1 if c == 1.0 else t0 + c * (t1 - t0) for c in nodes]


@cached_tensor(maxsize=64)
def _column(nodes: tuple[float, ...], dtype: torch.dtype, device: torch.device, ndim: int) -> Tensor:
    """Nodes as a column that broadcasts against times of rows."""
    return torch.tensor(nodes, dtype=dtype, device=device).reshape(-1, *[1] * ndim)


class Interval:
    """One step's interval, in one of three kinds of time.

    * Python floats: a joint solve; nothing about time needs a gradient. The fastest kind.
    * 0-d tensors: a joint solve in which a gradient reaches an end of this interval.
    * tensors `(rows,)`: rows with times of their own.

    Attributes:
        t0, t1: the ends.
        h: the length, as what multiplies a derivative: a float, a 0-d tensor or `(rows, 1)`, in the state's real dtype.
        after_jump, before_jump: True (or `(rows,)`) where `f` jumps at that end and must be seen from inside.
        stamps: nodes, and the times at them, where a whole grid's were made at once.
    """

    __slots__ = ("after_jump", "before_jump", "h", "stamps", "t0", "t1")

    def __init__(
        self,
        t0: Any,
        t1: Any,
        dtype: torch.dtype,
        after_jump: bool | Tensor = False,
        before_jump: bool | Tensor = False,
        stamps: tuple[tuple[float, ...], tuple[Tensor, ...]] | None = None,
    ) -> None:
        self.t0, self.t1, self.stamps = t0, t1, stamps
        h = t1 - t0
        if isinstance(h, Tensor):
            h = h.to(dtype)
            if h.ndim:
                h = h.unsqueeze(-1)
        self.h = h
        self.after_jump, self.before_jump = after_jump, before_jump

    def times(self, nodes: tuple[float, ...], like: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The times `t0 + c (t1 - t0)` for every node c, as `f` gets them: 0-d or `(rows,)`, of `dtype`."""
        if self.stamps is not None and self.stamps[0] is nodes:
            return self.stamps[1]
        t0, t1 = self.t0, self.t1
        if isinstance(self.h, float):
            values = places(t0, t1, nodes)
            stacked = torch.tensor(values, dtype=dtype, device=like.device)
            if not (self.after_jump or self.before_jump):
                return stacked.unbind()
            return tuple(self._inside(t, c, t1 > t0) for t, c in zip(stacked.unbind(), nodes, strict=True))
        span = torch.as_tensor(t1 - t0, device=like.device)
        inner = _column(nodes, span.dtype, span.device, span.ndim)
        stacked = torch.addcmul(torch.as_tensor(t0, dtype=span.dtype, device=span.device), inner, span).to(dtype)
        ends = {0.0: t0, 1.0: t1}  # exactly: rounding must not put the last stage beside t1
        times = tuple(
            torch.as_tensor(ends[c], dtype=dtype, device=like.device) if c in ends else t
            for c, t in zip(nodes, stacked.unbind(), strict=True)
        )
        if isinstance(self.after_jump, Tensor) or isinstance(self.before_jump, Tensor):
            times = tuple(self._rows_inside(t, c, span > 0) for t, c in zip(times, nodes, strict=True))
        return times

    def _rows_inside(self, t: Tensor, c: float, forward: Tensor) -> Tensor:
        """The same as `_inside`, for the rows whose `f` jumps at that end."""
        if c not in (0.0, 1.0):
            return t
        mask = torch.as_tensor(self.after_jump if c == 0.0 else self.before_jump)
        target = torch.where(forward == (c == 0.0), torch.inf, -torch.inf).to(t.dtype)
        return torch.where(mask, torch.nextafter(t.detach(), target), t)

    def _inside(self, t: Tensor, c: float, forward: bool) -> Tensor:
        """A time at which `f` jumps, moved by one floating-point number into the interval."""
        inward = float("inf") if forward else float("-inf")
        if c == 0.0 and self.after_jump:
            return torch.nextafter(t, torch.full_like(t, inward))
        if c == 1.0 and self.before_jump:
            return torch.nextafter(t, torch.full_like(t, -inward))
        return t

    def fraction(self, t: Any) -> Any:
        """Where `t` lies in the interval, 0 at t0 and 1 at t1."""
        return (t - self.t0) / (self.t1 - self.t0)


def stamped(
    ends: Iterable[tuple[float, float]], nodes: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[tuple[Tensor, ...], list[Interval]]:
    """The intervals between plain numbers, and the times of all their stages, made in one operation.

    Args:
        ends: of the intervals.
        nodes: of the stages.
        dtype, device: of the times.
    """
    steps = list(ends)
    whole = torch.tensor([t for t0, t1 in steps for t in places(t0, t1, nodes)], dtype=dtype, device=device)
    times, size = whole.unbind(), len(nodes)
    stamps = [(nodes, times[i : i + size]) for i in range(0, len(times), size)]
    return times, [Interval(t0, t1, dtype, stamps=stamp) for (t0, t1), stamp in zip(steps, stamps, strict=True)]
