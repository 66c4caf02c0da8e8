"""What a stepper returns, and what an interpolant over it is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neurode.stepping.interval import Interval

add = torch.add  # once: it is looked up for every term of every stage


def increment(y: Tensor, ks: list[Tensor], weights: tuple[float, ...], h: Any) -> Tensor:
    """`y + h * sum(w_i k_i)`, leaving out zero weights.

    With a float h every term is one addition with `alpha`: no 0-dim tensor arithmetic, and for forward Euler bit for bit
    the residual block `y + h f`.
    """
    if isinstance(h, float):
        return combined(y, ks, [(i, w) for i, w in enumerate(weights[: len(ks)]) if w], h, further())
    total = weighted(ks, weights)
    if total is None:
        return y
    return torch.addcmul(y, h, total) if h.dtype is y.dtype else y + h * total


def further() -> Callable[..., Tensor]:
    """What adds one more term to a sum of a stepper's own: in place where neither a tape nor a transform looks on."""
    return add if torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None else Tensor.add_


def combined(
    y: Tensor, ks: list[Tensor], terms: Sequence[tuple[int, float]], h: float, more: Callable[..., Tensor]
) -> Tensor:
    """`increment` for a float h, where `terms` are the weights that are not zero and `more` is `further()`."""
    plus = add
    for i, w in terms:
        y, plus = plus(y, ks[i], alpha=w * h), more
    return y


def weighted(ks: list[Tensor], weights: Any) -> Tensor | None:
    """`sum(w_i k_i)`, or None where all weights are zero."""
    total = None
    for k, w in zip(ks, weights, strict=False):
        if w:
            total = (k if w == 1.0 else k * w) if total is None else torch.add(total, k, alpha=w)
    return total


class Step(NamedTuple):
    """A proposed step.

    Attributes:
        interval: where.
        y0, y1: inner states at both ends.
        ks: stage derivatives, in the order of the tableau.
        carry: what the next step may start from (FSAL: the derivative at t1; Adams: the history; else None).
        restart: the same for a second attempt from t0 (the derivative at t0).
    """

    interval: Interval
    y0: Tensor
    y1: Tensor
    ks: list[Tensor]
    carry: Any
    restart: Any


class Piece(NamedTuple):
    """One step of a continuous solution: `y(t0 + x h) = y0 + h sum_i k_i sum_j powers[i][j] x^(j+1)`.

    Attributes:
        interval: where.
        y0, y1: states at both ends.
        ks: the derivatives that the polynomial combines.
        powers: its coefficients, one row a derivative, one column a power of x, from x^1.
    """

    interval: Interval
    y0: Tensor
    y1: Tensor
    ks: list[Tensor]
    powers: tuple[tuple[float, ...], ...]
