"""The first step of an adaptive solve (Hairer, Norsett & Wanner 1993, section II.4, 'Starting Step Size')."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neurode.control.pid import power


def first_step(
    evaluate: Callable[[Any], Tensor], norm: Callable[[Tensor], Any], f0: Tensor, y0: Tensor, scale: Tensor, k: float
) -> Any:
    """A step whose error should be near the tolerance.

    Args:
        evaluate: `evaluate(h) -> f(t0 + h, y0 + h f0)` for a positive length h.
        norm: norm of an inner state, as a float or `(rows,)` tensor.
        f0, y0: derivative and state at the start.
        scale: `atol + rtol |y0|`.
        k: order of the error estimate plus one.

    Returns:
        The length, positive: a float or `(rows,)`.
    """
    d0, d1 = norm(y0 / scale), norm(f0 / scale)
    h0 = _select((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / _positive(d1))
    d2 = norm((evaluate(h0) - f0) / scale) / h0
    steepest = _larger(d1, d2)
    h1 = _select(steepest <= 1e-15, _larger(h0 * 1e-3, 1e-6), power(0.01 / _positive(steepest), 1.0 / k))
    h = _smaller(100 * h0, h1)
    return _select(h == h, h, h0)  # a NaN from f beyond the start says nothing about the start


def _positive(x: Any) -> Any:
    return max(x, 1e-300) if isinstance(x, float) else x.clamp_min(1e-300)


def _select(condition: Any, yes: Any, no: Any) -> Any:
    if isinstance(condition, Tensor):
        return torch.where(condition, yes, no)
    return yes if condition else no


def _larger(a: Any, b: Any) -> Any:
    if isinstance(a, Tensor):
        return a.clamp_min(b) if isinstance(b, float) else torch.maximum(a, b)
    return max(a, b)


def _smaller(a: Any, b: Any) -> Any:
    return torch.minimum(a, b) if isinstance(a, Tensor) else min(a, b)
