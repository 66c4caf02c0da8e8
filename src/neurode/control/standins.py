"""Failed rows and the gradients that others share: a failed row's part in the tape is played by a good row.

What a row reached before it failed stays in the results, as constants: no gradient goes through it. A zero cotangent would
not do, since 0 x NaN in the backward of `f` is NaN, and a weight that all rows share would receive it. So where a tape
records, the solve is repeated with a good row's data in the failed rows, and what those did the first time is laid over the
results. Only failures pay for this.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

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


def failed(status: Any) -> Tensor | bool | None:
    """`(rows,)`, True for rows that failed, or True for a joint solve that did; None where nothing failed."""
    if not isinstance(status, Tensor):
        return True if status.failed else None
    gone = status > Status.TERMINATED.code
    return gone if bool(gone.any()) else None


def solve_without(problem: Any, outcome: Any, gone: Tensor | bool, integrate: Callable[[Any], Any]) -> Any:
    """Repeat a solve so that the failed rows touch no gradient.

    Args:
        problem: the problem.
        outcome: what the first solve returned.
        gone: as `failed` returns it.
        integrate: the engine.

    Returns:
        The outcome of the first solve, with states whose gradients come from the second.
    """
    if not isinstance(gone, Tensor) or bool(gone.all()):
        return _nothing_left(problem, outcome)
    field = _field_of(problem.field, gone)
    # `(time,)` holds for all rows, also where there happen to be as many times as rows.
    wide_outputs = isinstance(problem.t_eval, Tensor) and problem.t_eval.ndim == 2
    times = {name: _times(getattr(problem, name), gone) for name in ("t0", "t1", "grid")}
    again = integrate(
        replace(
            problem, field=field, y0=_instead(problem.y0, gone), **times,
            t_eval=_times(problem.t_eval, gone) if wide_outputs else problem.t_eval,
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
        outcome, y1=torch.where(gone[:, None], outcome.y1.detach(), again.y1), ys=lay(outcome.ys, again.ys),
        ts=again.ts if again.ts.ndim == 1 else lay(outcome.ts, again.ts), t1=torch.where(gone, outcome.t1, again.t1),
        events=events, pieces=again.pieces, estimates=estimates, num_saved=saved, lost=lost,
    )  # fmt: skip


def _lay(gone: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The failed rows of the first solve, as constants, over the second: `(time, rows, ...)`, of any lengths."""
    length = max(len(first), len(second))

    def longer(x: Tensor) -> Tensor:
        missing = length - len(x)
        return torch.cat([x, x.new_full((missing, *x.shape[1:]), torch.nan)]) if missing else x

    return torch.where(gone.reshape(-1, *[1] * (first.ndim - 2)), longer(first.detach()), longer(second))


def _nothing_left(problem: Any, outcome: Any) -> Any:
    """A solve that failed whole: what it reached, as constants on a graph through which nothing flows."""
    still = lambda x: _Still.apply(x.detach(), problem.y0, outcome.y1)
    events = tuple(replace(e, t=e.t.detach(), y=still(e.y) if isinstance(e.y, Tensor) else e.y) for e in outcome.events)
    estimates = outcome.estimates and {name: value.detach() for name, value in outcome.estimates.items()}
    t1 = outcome.t1.detach() if isinstance(outcome.t1, Tensor) else outcome.t1
    return replace(
        outcome, y1=still(outcome.y1), ys=still(outcome.ys), ts=outcome.ts.detach(), t1=t1, events=events,
        pieces=Reached.of(outcome.pieces), estimates=estimates,
    )  # fmt: skip


class _Still(torch.autograd.Function):
    """A constant that knows what it was computed from, so that `backward()` goes through it and brings nothing."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y0: Tensor, y1: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.shape = inputs[1].shape
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, grads[0].new_zeros(ctx.shape), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return torch.zeros_like(ctx.saved_tensors[0])


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
