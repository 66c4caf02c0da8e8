"""Reads times as users give them: numbers, tensors, one for all or one a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neurode._errors import InputError
from neurode._state import Layout, is_traced


def read_span(t_span: Any, layout: Layout, rows: int, per_row: bool) -> tuple[Any, Any]:
    """Read `t_span`.

    Args:
        t_span: two numbers or tensors, 0-d or (with rows) `(rows,)`.
        layout: of the state.
        rows: number of rows, where there are any.
        per_row: whether both ends are wanted as `(rows,)` tensors.

    Returns:
        t0 and t1: floats, or float64 tensors, 0-d or `(rows,)`.

    Raises:
        InputError: not two, not finite, or of a shape that does not fit.
    """
    if isinstance(t_span, Tensor) and t_span.ndim >= 1:
        t_span = tuple(t_span.unbind(0))
    if not isinstance(t_span, (tuple, list, Sequence)) or isinstance(t_span, str) or len(t_span) != 2:
        more = isinstance(t_span, (tuple, list)) and len(t_span) > 2
        raise InputError(
            f"t_span is {f'{len(t_span)} times' if more else _show(t_span)}; it must be two, such as t_span=(0.0, 1.0)."
            + (" For the state at all of them type t_span=(t[0], t[-1]), t_eval=t." if more else "")
        )
    ends = [_read_end(name, t, layout, rows) for name, t in zip(("t0", "t1"), t_span, strict=True)]
    wide = any(isinstance(t, Tensor) and t.ndim == 1 for t in ends)
    if wide or (per_row and layout.batched):
        ends = [_as_tensor(t, layout).expand(rows) for t in ends]
    elif any(isinstance(t, Tensor) for t in ends):
        ends = [_as_tensor(t, layout) for t in ends]
    return ends[0], ends[1]


def as_time(t: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A time as a tensor; a float takes half of what `torch.as_tensor` needs for it."""
    if isinstance(t, float):
        return torch.scalar_tensor(t, dtype=dtype, device=device)
    return torch.as_tensor(t, dtype=dtype, device=device)


def _as_tensor(t: Any, layout: Layout) -> Tensor:
    dtype = torch.float32 if layout.device.type == "mps" else torch.float64
    return as_time(t, dtype, layout.device)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"a {type(value).__name__}"


def _read_end(name: str, t: Any, layout: Layout, rows: int) -> Any:
    if isinstance(t, Tensor) and t.ndim == 1 and layout.batched:
        if len(t) != rows:
            raise InputError(f"{name} has shape {tuple(t.shape)}, but y0 has {rows} rows; give ({rows},) or a number.")
        _refuse_nan(name, t)
        return _as_tensor(t, layout)
    if isinstance(t, Tensor) and t.numel() != 1:
        needed = f"0-d or ({rows},)" if layout.batched else "0-d (one time for each row needs batch_dim=0)"
        raise InputError(f"{name} has shape {tuple(t.shape)}; it must be a number or a tensor that is {needed}.")
    if (isinstance(t, Tensor) and t.is_complex()) or isinstance(t, complex):
        raise InputError(f"{name} is complex; time is real.")
    if is_traced(t):
        return _as_tensor(t, layout).reshape(())
    try:
        if isinstance(t, str | bytes):
            raise TypeError
        number = float(t)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is {_show(t)}; it must be a number or a tensor.") from error
    if not torch.compiler.is_compiling() and not math.isfinite(number):
        raise InputError(f"{name} is {number}; both ends of t_span must be finite numbers.")
    return number


def _refuse_nan(name: str, t: Tensor) -> None:
    if not is_traced(t) and not bool(torch.isfinite(t).all()):
        raise InputError(f"{name} holds NaN or infinite times; all must be finite.")


def read_t_eval(t_eval: Any, t0: Any, t1: Any, layout: Layout, rows: int) -> Any:
    """Read output times.

    Args:
        t_eval: None, `"steps"`, a list, or a tensor `(time,)` or, with rows, `(time, rows)`.
        t0, t1: the span, as `read_span` returns it.

    Returns:
        None, `"steps"`, or a float64 tensor.

    Raises:
        InputError: out of order, outside the span, or of a shape that does not fit.
    """
    if t_eval is None:
        return None
    if isinstance(t_eval, str):
        if t_eval != "steps":
            raise InputError(f"t_eval is {t_eval!r}; the only word it knows is 'steps' (all accepted steps).")
        return t_eval
    try:
        times = _as_tensor(t_eval, layout)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"t_eval is {_show(t_eval)}; it must be a tensor or list of times.") from error
    fits = times.ndim == 1 or (times.ndim == 2 and layout.batched and times.shape[1] == rows)
    if not fits:
        needed = f"(time,) or (time, {rows})" if layout.batched else "(time,)"
        raise InputError(f"t_eval has shape {tuple(times.shape)}; it must be {needed}.")
    if not torch.compiler.is_compiling() and not torch._C._functorch.is_functorch_wrapped_tensor(times):
        _refuse_outside(times.detach(), t0, t1)
    return times


def _refuse_outside(times: Tensor, t0: Any, t1: Any) -> None:
    start, end = (as_time(t, times.dtype, times.device).detach() for t in (t0, t1))
    if start.ndim and times.ndim == 1:
        times = times.unsqueeze(1)
    sign = torch.where(end >= start, 1.0, -1.0)
    signed = times * sign
    if not bool(torch.isfinite(times).all()):
        raise InputError("t_eval holds NaN or infinite times; all must be finite.")
    if bool((signed[1:] < signed[:-1]).any()):
        raise InputError(
            "t_eval is not sorted along the integration: it must run from t0 to t1 (repeats are fine). Type"
            f" t_eval.sort({'' if bool((sign > 0).all()) else 'descending=True'}).values."
        )
    outside = (signed < start * sign) | (signed > end * sign)
    if bool(outside.any()):
        worst = times[outside.any(1) if outside.ndim > 1 else outside].flatten()[0].item()
        raise InputError(
            f"t_eval holds {worst:g}, which lies outside t_span = ({start.min().item():g}, {end.max().item():g})."
            " Widen t_span or drop the time."
        )
