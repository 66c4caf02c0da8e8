"""Failed rows and the gradients that others share: a failed row's part in the tape is played by something that cannot fail.

What a row reached before it failed stays in the results, as constants: no gradient goes through it. A zero cotangent would
not do, since 0 x NaN in the backward of `f` is NaN, and a weight that all rows share would receive it. So where a tape
records, the solve is repeated with stand-ins in the failed rows, and what those did the first time is laid over the results.
Only failures pay for this.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from neurode._constants import constant, instead
from neurode._field import PerRow, is_per_row
from neurode._solution import Status


@dataclass(frozen=True)
class Reached:
    """The interpolants of a solve, as constants.

    Attributes:
        pieces, ends: of the steps.
    """

    pieces: list[Any]
    ends: list[Any]

    @classmethod
    def of(cls, pieces: Any) -> Reached | None:
        """The interpolants that a solve kept, or None."""
        if pieces is None:
            return None
        still = [p._replace(y0=p.y0.detach(), y1=p.y1.detach(), ks=[k.detach() for k in p.ks]) for p in pieces.pieces]
        return cls(still, list(pieces.ends))


@dataclass(frozen=True)
class Lost:
    """Rows that failed, and the interpolants of what they reached.

    Attributes:
        gone: `(rows,)`, True for those that failed.
        reached: the interpolants of all rows, as constants.
        t0, t1: `(rows,)` ends of the interpolants that gradients go through.
    """

    gone: Tensor
    reached: Any
    t0: Any
    t1: Any


# How far from the largest number a start must be: sums of a step's stages have weights up to some hundred.
ROOM = 1000.0


@dataclass(frozen=True)
class StandIns:
    """Who plays the rows that failed, wherever gradients are computed.

    A row stands still at its own start if it has times of its own and `f` is finite there, so that data that `f` closes over
    stay its own. Any other is played by a good row, with that row's data from `args`.

    Attributes:
        gone: `(rows,)`, True for rows that failed; not all of them.
        swapped: `(rows,)`, True for those that a good row plays.
        y0: inner initial states, constants.
        t0: `(rows,)` where rows have their own times.
    """

    gone: Tensor
    swapped: Tensor
    y0: Tensor
    t0: Any

    @classmethod
    def of(cls, problem: Any, gone: Tensor, history: bool) -> StandIns:
        """For a problem whose rows `gone` failed; `history`: its method remembers derivatives, which a start has not."""
        y0, t0, grid = problem.y0.detach(), problem.t0, problem.grid
        if history or not problem.per_row or not (grid is None or (isinstance(grid, Tensor) and grid.ndim == 2)):
            return cls(gone, gone, y0, t0)
        field, t0 = copy.copy(problem.field), t0.detach()
        field.take(None)
        with torch.no_grad():
            f0 = field(t0.to(field.time_dtype), y0)
        calm = torch.isfinite(ROOM * y0).all(1) & torch.isfinite(ROOM * f0.detach()).all(1)
        return cls(gone, gone & ~calm, y0, t0)

    def states(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """States `(rows, size)` with those of the stand-ins; `rows` are the present ones, None for all."""
        return self._played(x, rows, lambda: _cut(self.y0, rows))

    def times(self, t: Any, rows: Tensor | None = None) -> Any:
        """The same of times `(rows,)` or `(time, rows)`; times of all rows alike stay."""
        if not isinstance(t, Tensor) or t.ndim == 0:
            return t
        start = lambda: _cut(self.t0, rows).to(t.dtype).reshape(-1, *[1] * (t.ndim - 1))
        return self._played(t.movedim(-1, 0), rows, start).movedim(0, -1)

    def _played(self, x: Tensor, rows: Tensor | None, start: Callable[[], Tensor]) -> Tensor:
        gone, swapped = _cut(self.gone, rows), _cut(self.swapped, rows)
        if not bool(gone.any()) or bool(gone.all()):
            return x
        x = instead(x, gone, swapped)
        still = gone & ~swapped
        return torch.where(still.reshape(-1, *[1] * (x.ndim - 1)), start(), x) if bool(still.any()) else x

    def field(self, field: Any) -> Any:
        """The same field with a good row's data from `args` in the rows that a good row plays."""

        def swap(node: Any) -> Any:
            if not is_per_row(node):
                return node
            return PerRow(pytree.tree_map(lambda x: instead(x, self.gone, self.swapped), node.value))

        other = copy.copy(field)
        if field.all_args:
            other.all_args = pytree.tree_map(swap, field.all_args, is_leaf=is_per_row)
        other.take(None)
        return other


def _cut(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


def failed(status: Any) -> Tensor | bool | None:
    """`(rows,)`, True for rows that failed, or True for a joint solve that did; None where nothing failed."""
    if not isinstance(status, Tensor):
        return True if status.failed else None
    gone = status > Status.TERMINATED.code
    return gone if bool(gone.any()) else None


def solve_without(
    problem: Any, outcome: Any, gone: Tensor | bool, history: bool, integrate: Callable[[Any], Any]
) -> Any:
    """Repeat a solve so that the failed rows touch no gradient.

    Args:
        problem: the problem.
        outcome: what the first solve returned.
        gone: as `failed` returns it.
        history: whether the method remembers derivatives.
        integrate: the engine.

    Returns:
        The outcome of the first solve, with states whose gradients come from the second.
    """
    if not isinstance(gone, Tensor) or bool(gone.all()):
        return _nothing_left(problem, outcome)
    stand = StandIns.of(problem, gone, history)
    field = stand.field(problem.field)
    # `(time,)` holds for all rows, also where there happen to be as many times as rows.
    wide_outputs = isinstance(problem.t_eval, Tensor) and problem.t_eval.ndim == 2
    times = {name: stand.times(getattr(problem, name)) for name in ("t0", "t1", "grid")}
    again = integrate(
        replace(
            problem, field=field, y0=stand.states(problem.y0), **times,
            t_eval=stand.times(problem.t_eval) if wide_outputs else problem.t_eval,
        )
    )  # fmt: skip
    problem.field.num_calls = field.num_calls
    lay = lambda first, second: _lay(gone, first, second)
    events = tuple(
        replace(b, t=lay(a.t, b.t), y=lay(a.y, b.y), count=torch.where(gone, a.count, b.count))
        for a, b in zip(outcome.events, again.events, strict=True)
    )
    first, second = outcome.estimates, again.estimates
    estimates = second and {name: torch.where(gone, first[name].detach(), second[name]) for name in second}
    saved = None if outcome.num_saved is None else torch.where(gone, outcome.num_saved, again.num_saved)
    lost = None if again.pieces is None else Lost(gone, Reached.of(outcome.pieces), times["t0"], again.t1)
    return replace(
        outcome, y1=torch.where(gone[:, None], outcome.y1.detach(), again.y1),
        ys=lay(outcome.ys, again.ys), ts=_output_times(problem, outcome, again, lay),
        t1=torch.where(gone, _still_time(outcome.t1), again.t1), events=events, pieces=again.pieces, estimates=estimates,
        num_saved=saved, lost=lost,
    )  # fmt: skip


def _output_times(problem: Any, outcome: Any, again: Any, lay: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The times of the outputs: the user's own, or those that each row stepped to."""
    if isinstance(problem.t_eval, Tensor):
        return outcome.ts
    return again.ts if again.ts.ndim == 1 else lay(outcome.ts, again.ts)


def reached(problem: Any, ys: Tensor, gone: Tensor | None = None) -> Tensor:
    """Outputs of a solve in which rows failed: what they reached, and NaN from there on.

    Args:
        problem: the problem.
        ys: outputs, time first.
        gone: `(rows,)`, True for rows that failed; None for a joint solve.
    """
    ys = _with_starts(problem, ys, gone)
    if gone is None:
        return ys
    lost = (~torch.isfinite(ys.detach()).all(-1)).cumsum(0) > 0
    return torch.where((lost & gone).unsqueeze(-1), torch.nan, ys)


def _with_starts(problem: Any, ys: Tensor, gone: Tensor | None) -> Tensor:
    """Outputs of failed rows at t0, also those that wait for a first step where that was never taken."""
    times = problem.t_eval
    if not isinstance(times, Tensor):
        return ys
    times = times.detach() if gone is None or times.ndim == 2 else times.detach().unsqueeze(1)
    here = torch.as_tensor(problem.t0, device=ys.device).detach() == times
    here = here if gone is None else here & gone
    return torch.where(here.reshape(*here.shape, *[1] * (ys.ndim - here.ndim)), problem.y0.detach(), ys)


def _still_time(t: Any) -> Any:
    return t.detach() if isinstance(t, Tensor) else t


def _lay(gone: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The failed rows of the first solve, as constants, over the second: `(time, rows, ...)`, of any lengths."""
    length = max(len(first), len(second))

    def longer(x: Tensor) -> Tensor:
        missing = length - len(x)
        return torch.cat([x, x.new_full((missing, *x.shape[1:]), torch.nan)]) if missing else x

    return torch.where(gone.reshape(-1, *[1] * (first.ndim - 2)), longer(first.detach()), longer(second))


def _nothing_left(problem: Any, outcome: Any) -> Any:
    """A solve that failed whole: what it reached, as constants on a graph through which nothing flows."""
    still = lambda x: constant(x, outcome.y1, problem.y0)
    events = tuple(replace(e, t=e.t.detach(), y=still(e.y) if isinstance(e.y, Tensor) else e.y) for e in outcome.events)
    estimates = outcome.estimates and {name: value.detach() for name, value in outcome.estimates.items()}
    return replace(
        outcome, y1=still(outcome.y1), ys=still(outcome.ys), events=events, estimates=estimates,
        ts=outcome.ts if isinstance(problem.t_eval, Tensor) else outcome.ts.detach(), t1=_still_time(outcome.t1),
        pieces=Reached.of(outcome.pieces), lost=True,
    )  # fmt: skip
