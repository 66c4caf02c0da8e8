"""Functions of the outputs: auxiliary values of the vector field, and statistics kept in place of states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from neurode._constants import constant, instead
from neurode._errors import InputError
from neurode._state import Layout, real_dtype


def along(
    call: Callable[[Tensor, Any], Any], ts: Tensor, ys: Any, y0: Any, t0: Any, layout: Layout, failed: Any
) -> Any:
    """`call(t, y)` at every output, stacked, time first.

    Where a solve did not come (behind a terminal event, in a failed row), `call` sees a good initial state in the place of
    NaN, so that no gradient is spoiled, and the result is NaN. What failed rows reached is evaluated apart: constants.

    Args:
        call: gets `t` 0-d, or `(rows, 1, ..., 1)` with rows, and the state as the user has it.
        ts: `(time,)` or `(time, rows)`.
        ys: states, time first.
        y0, t0: the start.
        layout: of the state.
        failed: `(rows,)`, True for rows that failed, or True for a joint solve that did; or None.
    """
    leaves, spec = pytree.tree_flatten(ys)
    start, moment = pytree.tree_leaves(y0), torch.as_tensor(t0, dtype=ts.dtype, device=ts.device)
    rows = start[0].shape[:1] if layout.batched else torch.Size()
    moment = moment.expand(rows)
    mixed = isinstance(failed, Tensor) and not bool(failed.all())
    if mixed:  # the start of a failed row may be what it failed of
        start, moment = [instead(part, failed) for part in start], instead(moment, failed)
    results: list[list[Tensor]] = []
    tree = spec

    def evaluate(t: Tensor, parts: list[Tensor], absent: Tensor) -> list[Any]:
        nonlocal tree
        parts = [torch.where(_wide(absent, part), first, part) for part, first in zip(parts, start, strict=True)]
        t = torch.where(absent, moment, t).to(real_dtype(layout.dtype))
        t = t.reshape(-1, *layout.time_shape) if layout.batched else t
        values, tree = pytree.tree_flatten(call(t, pytree.tree_unflatten(parts, spec)))
        return values

    for i in range(max(len(ts), 1)):
        parts = [leaf[i] for leaf in leaves] if len(ts) else start
        t = ts[i].expand(rows) if len(ts) else moment
        gone = ~torch.isfinite(t.detach())
        for part in parts:
            finite = torch.isfinite(part.detach())
            rows_are_numbers = layout.batched and finite.ndim == 1
            finite = finite if rows_are_numbers else finite.flatten(1).all(1) if layout.batched else finite.all()
            gone = gone | ~finite
        if failed is None:
            results.append([_masked(value, gone) for value in evaluate(t, parts, gone)])
            continue
        with torch.no_grad():
            shown = [_masked(value, gone) for value in evaluate(t, parts, gone)]
        if mixed:
            values = [_masked(value, gone) for value in evaluate(t, parts, gone | failed)]
            if not all(
                _by_row(x, gone) for x in shown
            ):  # a statistic of all rows has the gradients of those that did not fail
                shown = [_masked(value, gone) for value in evaluate(t, parts, gone)]
            shown = [_laid(failed, a, b) for a, b in zip(shown, values, strict=True)]
        else:
            shown = [constant(x, leaves[0], *start) if x.is_floating_point() or x.is_complex() else x for x in shown]
        results.append(shown)
    stacked = [
        torch.stack(column) if len(ts) else column[0].new_empty((0, *column[0].shape)) for column in zip(*results)
    ]
    return pytree.tree_unflatten(stacked, tree)


def _by_row(value: Tensor, rows: Tensor) -> bool:
    return bool(rows.ndim and value.ndim and value.shape[0] == len(rows))


def _laid(failed: Tensor, known: Tensor, value: Tensor) -> Tensor:
    """What rows that failed reached, as constants, over the values of the others; a statistic of all rows as it is known."""
    return torch.where(_wide(failed, known), known.detach(), value) if _by_row(known, failed) else known


def _wide(mask: Tensor, like: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *[1] * (like.ndim - mask.ndim))


def _masked(value: Any, gone: Tensor) -> Tensor:
    """NaN where nothing was solved; a statistic over all rows is NaN where any row is."""
    try:
        value = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"a function of the outputs (save=, or the aux of f) returned a {type(value).__name__}; it must return numbers or"
            " tensors, alone or in a pytree."
        ) from error
    if not (value.is_floating_point() or value.is_complex()):
        return value
    return torch.where(_wide(gone, value) if _by_row(value, gone) else gone.any(), torch.nan, value)
