"""`odeint`: states at given times, or until an event, with PyTorch's own gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from neurode.torchdiffeq._call import read_call
from neurode.torchdiffeq._states import states
from neurode.torchdiffeq._terminal import until_event


def odeint(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable[..., Any] | None = None,
) -> Any:
    """Solve dy/dt = func(t, y), y(t[0]) = y0, at the times t; gradients go through the solver's own operations.

    Args:
        func: vector field, called with a 0-d tensor and a state like `y0`.
        y0: tensor, or tuple of tensors, of any shapes.
        t: `(times,)` floating tensor, strictly increasing or decreasing; `t[0]` is the initial time.
        rtol, atol: tolerances of one step, for all, for each element, or for each entry of a tuple.
        method: a name; None for `"dopri5"`.
        options: of the method.
        event_fn: `event_fn(t, y)`: solve from `t[0]` towards `t[1]`, and beyond, until it changes sign.

    Returns:
        The states `(times, *y0.shape)`, a tuple of them for a tuple; with `event_fn`, the time of the event, and the
        states at `t[0]` and at the event.

    Raises:
        AssertionError, TypeError, ValueError: as torchdiffeq; see docs/torchdiffeq.md.

    Example:
        >>> import torch
        >>> t = torch.linspace(0.0, 1.0, 3)
        >>> odeint(lambda t, y: (y[1], -y[0]), (torch.zeros(2), torch.ones(2)), t)[0].shape
        torch.Size([3, 2])
    """
    if event_fn is not None and len(t) != 2:
        raise ValueError(f"We require len(t) == 2 when in event handling mode, but got len(t)={len(t)}.")
    call = read_call(func, y0, t, rtol, atol, method, options)
    return states(call) if event_fn is None else until_event(call, event_fn)
