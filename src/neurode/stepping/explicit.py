"""A step of an explicit Runge-Kutta method, given its tableau."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from neurode._field import Field
from neurode.methods.tableau import ButcherTableau
from neurode.stepping.interval import Interval
from neurode.stepping.step import Piece, Step, combined, further, increment, weighted

# Cubic Hermite basis over x in [0, 1] (Hairer, Norsett & Wanner 1993, II.6): what multiplies y1 - y0, h f0 and h f1.
HERMITE_RISE, HERMITE_START, HERMITE_END = (0.0, 3.0, -2.0), (1.0, -2.0, 1.0), (0.0, -1.0, 1.0)


def _plus(x: Tensor, y: Tensor, a: float, h: Any) -> Tensor:
    return torch.add(x, y, alpha=a * h) if isinstance(h, float) else x + (a * h) * y


@dataclass(frozen=True)
class ExplicitStepper:
    """Takes steps of one explicit Runge-Kutta method.

    Args:
        tableau: the numbers.
    """

    tableau: ButcherTableau

    remembers = False  # what a step carries to the next is known from the state alone

    @property
    def dense_costs(self) -> bool:
        """Whether an interpolant needs evaluations of `f` beyond the step's own."""
        return self.tableau.num_dense_evaluations > 0

    def step(self, field: Field, interval: Interval, y: Tensor, carry: Any = None) -> Step:
        """Propose one step.

        Args:
            field: the vector field.
            interval: from where to where.
            y: inner state at its start.
            carry: the derivative at its start where it is known, else None.
        """
        tableau, h = self.tableau, interval.h
        times = interval.times(tableau.C, y, field.time_dtype)
        k = field(times[0], y) if carry is None else carry
        ks = [k]
        z = y
        if isinstance(h, float):
            more = further()
            for terms, t in zip(tableau.terms, times[1:], strict=True):
                z = combined(y, ks, terms, h, more)
                ks.append(field(t, z))
            y1 = z if tableau.fsal else combined(y, ks, tableau.last_terms, h, more)
        else:
            for weights, t in zip(tableau.A[1:], times[1:], strict=True):
                z = increment(y, ks, weights, h)
                ks.append(field(t, z))
            y1 = z if tableau.fsal else increment(y, ks, tableau.B, h)
        return Step(interval, y, y1, ks, ks[-1] if tableau.fsal or tableau.reuse_last else None, k)

    def pull_back(self, field: Field, interval: Interval, y: Tensor, gy: Tensor, vjp: Callable[..., Any]) -> Tensor:
        """The gradient of a step's start from that of its end, with one evaluation of `f` on a tape at a time.

        The transposed step goes through the stages from the last to the first (Matsubara et al. 2021); the derivative of the
        last is never needed, so that it costs one evaluation less than the step.

        Args:
            field: the vector field.
            interval: from where to where; constants.
            y: inner state at its start.
            gy: gradient of the state at its end.
            vjp: `vjp(t, z, g)`, the transposed Jacobian of `f` in `(t, z)` times g; None for a zero.
        """
        tableau, h = self.tableau, interval.h
        last = max(i for i, b in enumerate(tableau.B) if b)
        times = interval.times(tableau.C, y, field.time_dtype)
        zs: list[Any] = [y]
        ks: list[Tensor] = []
        with torch.no_grad():
            for i in range(last):
                ks.append(field(times[i], zs[i]))
                zs.append(increment(y, ks, tableau.A[i + 1], h))
        del ks
        total = gy
        gs: list[Any] = [gy * (b * h) if b else None for b in tableau.B[: last + 1]]
        for i in range(last, -1, -1):
            gz = None if gs[i] is None else vjp(times[i], zs[i], gs[i])
            gs[i] = zs[i] = None
            if gz is None:
                continue
            total = total + gz
            for j, a in enumerate(tableau.A[i]):
                if a and j < i:
                    gs[j] = gz * (a * h) if gs[j] is None else _plus(gs[j], gz, a, h)
        return total

    def errors(self, step: Step) -> list[Tensor]:
        """The embedded error estimates of a step: one, or two for a method that combines two."""
        rows = [self.tableau.E] if self.tableau.E2 is None else [self.tableau.E, self.tableau.E2]
        h = step.interval.h
        if isinstance(h, float):
            # An error estimate has a weight that is not zero.
            return [weighted(step.ks, [w * h for w in row or ()]) for row in rows]  # pyrefly: ignore[bad-return]
        return [h * weighted(step.ks, row) for row in rows]

    def piece(self, field: Field, step: Step) -> tuple[Piece, Any]:
        """The step's interpolant, with the evaluations of `f` that it needs beyond the step's own.

        Returns:
            The piece, and the carry to go on from: where the derivative at t1 was evaluated, it is not lost.
        """
        tableau = self.tableau
        if tableau.P is None:
            return self._hermite(field, step)
        ks, y = list(step.ks), step.y0
        times = step.interval.times(tableau.extra_C, y, field.time_dtype) if tableau.extra_C else ()
        for weights, t in zip(tableau.extra_A, times, strict=True):
            ks.append(field(t, increment(y, ks, weights, step.interval.h)))
        return Piece(step.interval, y, step.y1, ks, tableau.P), step.carry

    def _hermite(self, field: Field, step: Step) -> tuple[Piece, Any]:
        end = step.carry
        if end is None:
            (t1,) = step.interval.times((1.0,), step.y1, field.time_dtype)
            end = field(t1, step.y1)
        ks = step.ks if self.tableau.fsal else [*step.ks, end]
        return Piece(step.interval, step.y0, step.y1, ks, hermite_powers(self.tableau)), end


@lru_cache(maxsize=64)
def hermite_powers(tableau: ButcherTableau) -> tuple[tuple[float, ...], ...]:
    """The cubic Hermite interpolant as weights of a method's stages, the derivative at the end the last of them."""
    rows = [tuple(b * x for x in HERMITE_RISE) for b in tableau.B]
    if not tableau.fsal:
        rows.append((0.0, 0.0, 0.0))
    rows[0] = tuple(a + b for a, b in zip(rows[0], HERMITE_START, strict=True))
    rows[-1] = tuple(a + b for a, b in zip(rows[-1], HERMITE_END, strict=True))
    return tuple(rows)
