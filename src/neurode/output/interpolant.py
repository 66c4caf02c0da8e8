"""Evaluates a step's interpolating polynomial, its derivative, and gathers pieces of many steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neurode._state import cached_tensor, real_dtype
from neurode.stepping import Piece


@cached_tensor(maxsize=256)
def _matrix(powers: tuple[tuple[float, ...], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The coefficients, one row a power, one column a derivative."""
    return torch.tensor(powers, dtype=dtype, device=device).T.contiguous()


def _monomials(x: Tensor, degree: int, derivative: bool) -> Tensor:
    """`x, x^2, ...`, or their derivatives, along a new last dimension; by products, since `pow` is slow."""
    terms = [torch.ones_like(x) if derivative else x]
    for _ in range(degree - 1):
        terms.append(terms[-1] * x)
    stacked = torch.stack(terms, -1)
    return stacked * torch.arange(1, degree + 1, dtype=x.dtype, device=x.device) if derivative else stacked


def weights(powers: tuple[tuple[float, ...], ...], x: Tensor, derivative: bool = False) -> Tensor:
    """What multiplies each derivative of a piece at the fractions `x`.

    Args:
        powers: coefficients of the piece.
        x: fractions of the step, any shape.
        derivative: weights of `dy/dx` instead of `y`.

    Returns:
        `(*x.shape, number of derivatives)`.
    """
    matrix = _matrix(powers, x.dtype, x.device)
    return _monomials(x, len(matrix), derivative) @ matrix


def evaluate(piece: Piece, x: Tensor, derivative: bool = False) -> Tensor:
    """The state of a joint solve at fractions of one step.

    Args:
        piece: the step's interpolant.
        x: `(m,)` fractions, in the real dtype of the state.
        derivative: return `dy/dt` instead.

    Returns:
        `(m, *state.shape)`.
    """
    w = weights(piece.powers, x, derivative).to(piece.y0.dtype)
    stacked = torch.stack(piece.ks)
    total = (w @ stacked.reshape(len(piece.ks), -1)).reshape(x.shape + piece.y0.shape)
    return total if derivative else piece.y0 + piece.interval.h * total


def coefficients(pieces: list[Piece]) -> Tensor:
    """The polynomials of several steps: `(steps, degree, elements of the state)`, so that `y = y0 + h sum_j c_j x^(j+1)`.

    One product of matrices for all steps: a few operations where a step at a time would take a dozen each.
    """
    first = pieces[0]
    stages = torch.stack([k for piece in pieces for k in piece.ks]).view(len(pieces), len(first.ks), -1)
    return _matrix(first.powers, real_dtype(stages.dtype), stages.device).to(stages.dtype) @ stages


def horner(c: Tensor, x: Tensor, derivative: bool = False) -> Tensor:
    """`sum_j c_j x^(j+1)`, or its derivative, for `c` `(m, degree, n)` and `x` `(m,)`: `(m, n)`."""
    x = x.unsqueeze(-1)
    degree = c.shape[1]
    scale = range(1, degree + 1) if derivative else [1] * degree
    total = c[:, -1] * scale[-1]
    for j in range(degree - 2, -1, -1):
        total = torch.add(total * x, c[:, j], alpha=scale[j])
    return total if derivative else total * x


def sample(piece: Piece, x: Tensor, derivative: bool = False) -> Tensor:
    """`evaluate` in the order of operations in which `coefficients` and `horner` evaluate many steps at once.

    Interpolants of high order have large coefficients that cancel: another order gives another rounding.
    """
    c = coefficients([piece]).expand(len(x), -1, -1)
    total = horner(c, x, derivative).reshape(len(x), *piece.y0.shape)
    return total if derivative else piece.y0 + piece.interval.h * total


def fractions(piece: Piece, times: Any, dtype: torch.dtype) -> Tensor:
    """`times` as fractions of a joint step, in `dtype`; a gradient of time flows through."""
    interval = piece.interval
    if isinstance(times, Tensor) or isinstance(interval.h, Tensor):
        t = torch.as_tensor(times, dtype=torch.float64, device=piece.y0.device)
        return interval.fraction(t).to(dtype)
    values = [interval.fraction(t) for t in times]
    return torch.tensor(values, dtype=dtype, device=piece.y0.device)
