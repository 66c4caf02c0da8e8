"""`odeint_event`: an event's time and state as differentiable functions of everything before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neurode._errors import GradientError
from neurode.torchdiffeq._odeint import odeint
from neurode.torchdiffeq._terminal import combined


def odeint_event(
    func: Callable[..., Any],
    y0: Any,
    t0: Tensor,
    *,
    event_fn: Callable[..., Any],
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Solve from t0 until `event_fn(t, y)` changes sign.

    Args:
        func, y0: as for `odeint`.
        t0: initial time, a tensor with one element.
        event_fn: function of time and state; with several elements, the first sign change counts. What it depends on
            other than `t` and `y` gets no gradient.
        reverse_time: solve towards earlier times.
        odeint_interface: `odeint` or `odeint_adjoint`.
        **kwargs: for `odeint_interface`.

    Returns:
        The time of the event, 0-d, and the states `(2, *y0.shape)` at the start and at the event. Both have the gradient
        of the implicit function theorem: the final state moves with the time.

    References:
        R. T. Q. Chen, B. Amos, M. Nickel (2021), Learning neural event functions for ordinary differential equations,
        ICLR, arXiv:2011.03902.

    Example:
        >>> import torch
        >>> fall = lambda t, y: torch.stack([y[1], torch.full_like(y[1], -2.0)])
        >>> t, y = odeint_event(fall, torch.tensor([1.0, 0.0]), torch.tensor(0.0), event_fn=lambda t, y: y[0])
        >>> round(float(t), 3)
        1.0
    """
    start = t0.reshape(-1)
    t = torch.cat([start, start.detach() + (-1.0 if reverse_time else 1.0)])
    event_t, solution = odeint_interface(func, y0, t, event_fn=event_fn, **kwargs)
    leaves = solution if isinstance(solution, tuple) else (solution,)
    last = tuple(y[-1] for y in leaves)
    if not any(y.requires_grad for y in last):
        return event_t, solution
    event_t, moved = _follow(func, combined(event_fn, t[0].detach(), y0), event_t.detach(), last, isinstance(y0, tuple))
    ends = tuple(torch.cat([y[:-1], end.unsqueeze(0)]) for y, end in zip(leaves, moved, strict=True))
    return event_t, ends if isinstance(solution, tuple) else ends[0]


def _follow(
    func: Callable[..., Any], g: Callable[..., Tensor], t: Tensor, state: tuple[Tensor, ...], tuples: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Give a located event the gradient of the implicit function theorem.

    With the state's motion dy at the fixed time, the time moves by dt = -<dg/dy, dy> / (dg/dt + <dg/dy, f>), and the
    state by dy + f dt.

    Args:
        func: the vector field.
        g: the scalar event function.
        t: time of the event, a constant.
        state: the entries of the state there, with their gradients at the fixed time.
        tuples: whether `func` and `g` take a tuple.
    """
    with torch.enable_grad():
        time = t.to(state[0].abs().dtype).requires_grad_()
        parts = tuple(y.detach().requires_grad_() for y in state)
        value = g(time, parts if tuples else parts[0])
        inputs = (time, *parts)
        if not value.requires_grad:  # a constant or a boolean: where it changes is known, how that place moves is not
            return _unknown(t, state)
        g_t, *g_y = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
    with torch.no_grad():
        dy = func(time.detach(), tuple(y.detach() for y in parts) if tuples else parts[0].detach())
        slope = tuple(d.reshape(y.shape).to(y.dtype) for d, y in zip(dy if tuples else (dy,), state, strict=True))
        rate = g_t + sum((a.conj() * b).sum().real for a, b in zip(g_y, slope, strict=True))
        if float(rate) == 0.0:
            return _unknown(t, state)
    motion = sum((a.conj() * (y - y.detach())).sum().real for a, y in zip(g_y, state, strict=True))
    shift = -motion / rate  # zero, with a gradient
    return t + shift.to(t.dtype), tuple(y + f * shift for y, f in zip(state, slope, strict=True))


def _unknown(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    moved = _Unknown.apply(t, *state)
    return moved[0], tuple(moved[1:])


class _Unknown(torch.autograd.Function):
    """Lets time and state of an event through, and raises where a gradient of theirs is asked for."""

    @staticmethod
    def forward(ctx: Any, *values: Tensor) -> Any:
        return tuple(value.clone() for value in values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if any(bool((grad != 0).any()) for grad in grads):
            raise GradientError(
                "the gradient of an event was asked for, but event_fn has no derivative there (it is constant, boolean, or"
                " only touches zero), so that nobody knows how the event moves. Let event_fn pass through zero as a smooth"
                " function of t and y, or detach the event's time and state."
            )
        return grads
