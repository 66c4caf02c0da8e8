"""Failed rows and the gradients that others share: a failed row's part in the tape is played by a good row.

A row that became NaN gets a zero cotangent, but 0 x NaN in the backward of `f` is NaN, and a weight that all rows share would
receive it. So where a tape records, the solve is repeated with a good row's data in the failed rows, and the results there
are overwritten by NaN. Only failures pay for this.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from neurode._field import PerRow, is_per_row


def solve_without(problem: Any, outcome: Any, gone: Tensor, integrate: Callable[[Any], Any]) -> Any:
    """Repeat a solve so that the failed rows touch no gradient.

    Args:
        problem: the problem.
        outcome: what the first solve returned.
        gone: `(rows,)`, True where a row became NaN.
        integrate: the engine.

    Returns:
        The outcome of the first solve, with states whose gradients come from the second.
    """
    if bool(gone.all()):
        nothing = problem.y0 * torch.zeros_like(problem.y0)  # a graph, through which nothing flows
        y1 = torch.where(gone[:, None], torch.nan, torch.where(gone[:, None], 0.0, nothing))
        ys = torch.where(gone[:, None], torch.nan, torch.zeros_like(outcome.ys)) + torch.where(
            gone[:, None], 0.0, nothing
        )
        return replace(outcome, y1=y1, ys=ys)
    field = _field_of(problem.field, gone)
    # `(time,)` holds for all rows, also where there happen to be as many times as rows.
    wide_outputs = isinstance(problem.t_eval, Tensor) and problem.t_eval.ndim == 2
    again = integrate(
        replace(
            problem, field=field, y0=_instead(problem.y0, gone), t0=_times(problem.t0, gone), t1=_times(problem.t1, gone),
            grid=_times(problem.grid, gone), t_eval=_times(problem.t_eval, gone) if wide_outputs else problem.t_eval,
        )
    )  # fmt: skip
    problem.field.num_calls = field.num_calls
    wide = gone[:, None]
    events = tuple(_masked(record, gone) for record in again.events)
    estimates = again.estimates and {k: torch.where(gone, torch.nan, v) for k, v in again.estimates.items()}
    return replace(
        outcome, y1=torch.where(wide, torch.nan, again.y1), ys=torch.where(wide, torch.nan, again.ys), events=events,
        pieces=again.pieces, estimates=estimates, ts=again.ts, t1=torch.where(gone, outcome.t1, again.t1),
    )  # fmt: skip


def _instead(x: Tensor, gone: Tensor) -> Tensor:
    """Rows of `x`, with the first good row's values, as constants, in the failed ones."""
    good = int((~gone).nonzero()[0])
    mask = gone.reshape(-1, *[1] * (x.ndim - 1))
    return torch.where(mask, x[good].detach(), x)


def _times(t: Any, gone: Tensor) -> Any:
    """Times of rows, `(rows,)` or `(time, rows)`; times of all rows alike stay."""
    if not isinstance(t, Tensor) or t.ndim == 0:
        return t
    return _instead(t.movedim(-1, 0), gone).movedim(0, -1)


def _field_of(field: Any, gone: Tensor) -> Any:
    """The same field with a good row's data in the failed rows of `args`."""

    def swap(node: Any) -> Any:
        return PerRow(pytree.tree_map(lambda x: _instead(x, gone), node.value)) if is_per_row(node) else node

    other = copy.copy(field)
    if field.all_args:
        other.all_args = pytree.tree_map(swap, field.all_args, is_leaf=is_per_row)
    other.take(None)
    return other


def _masked(record: Any, gone: Tensor) -> Any:
    """An event record without what the stand-ins did."""

    def mask(y: Tensor) -> Tensor:
        return torch.where(gone.reshape(-1, *[1] * (y.ndim - 2)), torch.nan, y)

    return replace(record, t=torch.where(gone, torch.nan, record.t), y=pytree.tree_map(mask, record.y))
