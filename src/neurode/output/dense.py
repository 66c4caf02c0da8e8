"""The continuous solution of a whole solve: which step holds a time, and its polynomial there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from neurode._constants import constant
from neurode._errors import InputError
from neurode._state import Layout, real_dtype, unreadable
from neurode.output.interpolant import coefficients, fractions, horner, sample
from neurode.output.rows import gather
from neurode.stepping import Interval, Piece


def _as_times(t: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    try:
        return torch.as_tensor(t, dtype=dtype, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"solution(t) got {t!r}; it takes a number or a tensor of times, such as solution(0.5)."
        ) from error


def _read(t: Any, low: Tensor, high: Tensor, device: torch.device, rows: bool = False) -> Tensor:
    """A query as a float64 tensor, refused where it leaves the solved span."""
    t = _as_times(t, low.dtype, device)
    if unreadable(t) or unreadable(low):
        return t
    exact = t.detach()
    inside = (exact >= torch.minimum(low, high)) & (exact <= torch.maximum(low, high))
    if not bool(inside.all()):
        exact, low, high = torch.broadcast_tensors(exact, low, high)
        at = tuple((~inside.expand_as(exact)).nonzero()[0].tolist())
        worst, low, high = (x[at].item() for x in (exact, low, high))
        whose = f"the solution of row {at[-1]}" if rows else "the solution"
        raise InputError(
            f"{whose} is known between t = {low:g} and t = {high:g}; asked at {worst:g}. A dense output does not extrapolate:"
            f" solve over a longer t_span{', or ask each row at times of its own' if rows else ''}."
        )
    return t


class JointDense:
    """`solution(t)` of a joint solve."""

    def __init__(self, layout: Layout, y0: Tensor, t0: float, pieces: Any) -> None:
        self.layout, self.y0, self.t0 = layout, y0, t0
        self.pieces, self.ends = pieces.pieces, pieces.ends
        self.t1 = self.ends[-1] if self.ends else t0
        self.sign = 1.0 if self.t1 >= t0 else -1.0
        self.keys = torch.tensor([self.sign * t for t in self.ends], dtype=torch.float64)

    def __call__(self, t: Any, derivative: bool = False) -> Any:
        bounds = torch.tensor([self.t0, self.t1], dtype=torch.float64, device=self.y0.device)
        t = _read(t, bounds[0], bounds[1], self.y0.device)
        flat = t.reshape(-1)
        if not self.pieces:
            values = self.y0.expand(len(flat), *self.y0.shape)
            values = torch.zeros_like(values) if derivative else values
        else:
            values = self._evaluate(flat, derivative)
        return self.layout.unpack(values.reshape(t.shape + self.y0.shape), lead=t.ndim)

    def _evaluate(self, t: Tensor, derivative: bool) -> Tensor:
        index = torch.searchsorted(self.keys, self.sign * t.detach().cpu()).clamp_max(len(self.pieces) - 1)
        if unreadable(t) or unreadable(self.y0):
            return self._gathered(t, index, derivative)
        order = torch.argsort(index, stable=True)
        used, counts = torch.unique_consecutive(index[order], return_counts=True)
        parts, dtype = [], real_dtype(self.y0.dtype)
        for i, times in zip(used.tolist(), t[order].split(counts.tolist()), strict=True):
            piece = self.pieces[i]
            parts.append(sample(piece, fractions(piece, times, dtype), derivative))
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return torch.cat(parts)[back.to(self.y0.device)] if parts else self.y0.new_empty((0, *self.y0.shape))

    def _gathered(self, t: Tensor, index: Tensor, derivative: bool) -> Tensor:
        """The same without a look at which pieces are asked for: a polynomial is copied for each time."""
        pieces, like = self.pieces, self.y0
        dtype, index = real_dtype(like.dtype), index.to(like.device)
        t0, t1 = (
            torch.stack([torch.as_tensor(end, dtype=t.dtype, device=like.device) for end in ends])[index]
            for ends in zip(*((p.interval.t0, p.interval.t1) for p in pieces), strict=True)
        )
        x, h = ((t - t0) / (t1 - t0)).to(dtype), (t1 - t0).to(dtype)
        total = horner(coefficients(pieces)[index], x, derivative).reshape(len(t), *like.shape)
        if derivative:
            return total
        return torch.stack([p.y0 for p in pieces])[index] + h.reshape(-1, *[1] * like.ndim) * total


@dataclass(frozen=True)
class SharedPieces:
    """The pieces of a grid that all rows share, as pieces of each row's own.

    Attributes:
        pieces: interpolants with ends `(rows,)`.
        ends: `(rows,)` ends.
    """

    pieces: list[Piece]
    ends: list[Tensor]

    @classmethod
    def of(cls, pieces: Any, rows: int, dtype: torch.dtype, device: torch.device) -> SharedPieces:
        """Spread the times of joint pieces over the rows."""

        def spread(t: Any) -> Tensor:
            return torch.as_tensor(t, dtype=dtype, device=device).expand(rows)

        wide = []
        for piece in pieces.pieces:
            t0, t1 = spread(piece.interval.t0), spread(piece.interval.t1)
            wide.append(piece._replace(interval=Interval(t0, t1, real_dtype(piece.y0.dtype))))
        return cls(wide, [spread(end) for end in pieces.ends])


class RowDense:
    """`solution(t)` where every row took its own steps; the last dimension of `t` counts rows, or `t` is a number."""

    def __init__(self, layout: Layout, y0: Tensor, t0: Tensor, t1: Tensor, sign: Tensor, pieces: Any) -> None:
        self.layout, self.y0, self.t0, self.t1, self.sign = layout, y0, t0.detach(), t1.detach(), sign
        self.pieces = pieces.pieces
        self.ends = (torch.stack(pieces.ends) * sign).T.contiguous() if self.pieces else None

    def __call__(self, t: Any, derivative: bool = False) -> Any:
        t = _as_times(t, self.t0.dtype, self.y0.device)
        rows, shape = len(self.t0), tuple(t.shape)
        if shape and shape[-1] != rows:
            raise InputError(f"t has shape {shape}; with batch_dim=0 its last dimension must be {rows} rows.")
        t = _read(t, self.t0, self.t1, self.y0.device, rows=True)
        lead = t.shape[:-1]
        times = t.expand(rows).reshape(1, rows) if t.ndim == 0 else t.reshape(-1, rows)
        values = self._evaluate(times, derivative)
        return self.layout.unpack(values.reshape(lead + self.y0.shape), lead=len(lead))

    def _evaluate(self, times: Tensor, derivative: bool) -> Tensor:
        if self.ends is None:
            flat = self.y0.expand(len(times), *self.y0.shape)
            return torch.zeros_like(flat) if derivative else flat
        keys = (times.detach() * self.sign).T.contiguous()
        which = torch.searchsorted(self.ends, keys).clamp_max(len(self.pieces) - 1)
        which = self._skip_empty(which)
        row = torch.arange(len(self.t0), device=times.device).unsqueeze(1).expand_as(which)
        values = gather(self.pieces, which.reshape(-1), row.reshape(-1), times.T.reshape(-1), derivative)
        still = (self.t0 == self.t1).unsqueeze(1).expand_as(which).reshape(-1, 1)
        start = self.y0[row.reshape(-1)]
        values = torch.where(still, torch.zeros_like(start) if derivative else start, values)
        return values.reshape(*which.shape, -1).transpose(0, 1)

    def _skip_empty(self, which: Tensor) -> Tensor:
        """A query at t0 may meet attempts that covered nothing: go to the first that covers something."""
        assert self.ends is not None
        start = (self.t0 * self.sign).unsqueeze(1)
        first = (self.ends > start).long().argmax(1, keepdim=True)
        return torch.maximum(which, first)


@dataclass(frozen=True)
class WhollyLost:
    """`solution(t)` of a solve that failed whole: what it reached, as constants.

    Attributes:
        reached: the continuous solution.
        y0: the initial state, which gets a zero gradient.
    """

    reached: Any
    y0: Tensor

    def __call__(self, t: Any, derivative: bool = False) -> Any:
        with torch.no_grad():
            values = self.reached(t, derivative)
        given = [t] if isinstance(t, Tensor) else []
        return pytree.tree_map(lambda x: constant(x, self.y0, self.y0, *given), values)


class PartlyLost(RowDense):
    """`solution(t)` where rows failed: what they reached as constants, and the others' interpolants with their gradients.

    Args:
        reached: of all rows, as they were.
        played: the same with good rows in the place of those that failed.
        gone: `(rows,)`, True for these.
    """

    def __init__(self, reached: RowDense, played: RowDense, gone: Tensor) -> None:
        self.layout, self.y0, self.t0, self.t1 = reached.layout, reached.y0, reached.t0, reached.t1
        self.reached, self.played, self.gone = reached, played, gone

    def _evaluate(self, times: Tensor, derivative: bool) -> Tensor:
        values = self.played._evaluate(torch.where(self.gone, self.played.t0, times), derivative)
        with torch.no_grad():
            reached = self.reached._evaluate(times, derivative)
        return torch.where(self.gone.unsqueeze(1), reached, values)
