"""A call like one before: what its options came to is known, and only values are read.

The first solves of a field go the long way, where every argument is read and every error is raised. From the second on there is
a plan for the call's options, found by their values and classes and by what surrounds them, and kept by the watch over the field
as it is (`watch.py`). It reads the times, fills the values in and makes the native call. Wherever it meets what is not as it
was, or a solve that fails, it steps back, and the call goes the long way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from neurode.fused import guards, watch

STATES, TIMES, REAL = (Tensor, nn.Parameter), {float, int}, (torch.float64, torch.float32)


def ticket(y0: Any, t_span: Any, t_eval: Any, options: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What a call is known by beside its field; None where it goes the long way every time.

    Args:
        y0, t_span, t_eval: as the user gave them.
        options: all others, in one order.
    """
    if (
        type(y0) not in STATES
        or type(t_span) not in (tuple, list)
        or len(t_span) != 2
        or not TIMES.issuperset(map(type, t_span))
    ):
        return None
    outputs = None
    if type(t_eval) in (tuple, list):
        if not t_eval or not TIMES.issuperset(map(type, t_eval)):
            return None
        outputs = len(t_eval)
    elif t_eval is not None:
        if type(t_eval) is not Tensor or t_eval.dtype not in REAL or t_eval.requires_grad or t_eval.ndim != 1:
            return None
        outputs = t_eval.shape, t_eval.dtype, t_eval.device
    state = y0.shape, y0.dtype, y0.device, y0.layout, y0.requires_grad
    # Classes first: where they are those of a plan's options, which are constants, comparing the values is safe.
    return tuple(map(type, options)), options, state, outputs, torch.is_grad_enabled(), torch.get_default_dtype()


def find(f: Any, y0: Any, t_span: Any, t_eval: Any, options: tuple[Any, ...]) -> Any:
    """The plan (see `short.py`) for a call of the field as it is now, or None.

    Args:
        f: the vector field.
        y0, t_span, t_eval, options: as for `ticket`.
    """
    parts = watch.parts_of(f)
    watched = watch.find(parts)
    if watched is None or not watched.plans:
        return None
    known = ticket(y0, t_span, t_eval, options)
    made = watched.latest
    if known is None:
        return None
    if made is None or made.ticket != known:
        try:
            made = watched.latest = watched.plans.get(known)
        except TypeError:  # an option without a hash
            return None
    if made is None or not made.fresh() or guards.unusual_surroundings():
        return None
    return made if watched.holds(parts) else None


__all__ = ["find", "ticket"]
