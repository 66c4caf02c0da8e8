"""A step of an Adams method on a grid, equal or not, with a Runge-Kutta start of matching order."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neurode._field import Field
from neurode._state import unreadable
from neurode.methods import METHODS
from neurode.methods.adams import AdamsFamily
from neurode.stepping.explicit import ExplicitStepper
from neurode.stepping.hermite import end_derivative, hermite_piece
from neurode.stepping.interval import Interval
from neurode.stepping.step import Piece, Step, weighted

# A start of order p - 1 keeps order p, since only a fixed number of its steps is taken: the cheapest tableau that has it.
STARTS = ((5, "rk4"), (6, "dopri5"), (9, "dop853"), (12, "verner9"))
# Grids are equal up to the rounding of their times, some 1e-13 of a step; no wanted variation is as small as this.
EQUAL = 1e-9


class History(NamedTuple):
    """What an Adams step takes from the steps before it.

    Attributes:
        ks: derivatives at past times, the newest first, the one at the present time not included.
        times: those times, of the kind that the intervals have.
        here: the derivative at the present time where it is known.
    """

    ks: tuple[Tensor, ...] = ()
    times: tuple[Any, ...] = ()
    here: Tensor | None = None


@dataclass(frozen=True)
class AdamsStepper:
    """Takes steps of an Adams-Bashforth method, or of an Adams-Moulton one by functional iteration.

    On a grid of unequal steps, the weights are those of the polynomial through the derivatives at the times where they
    were taken (Hairer, Norsett & Wanner 1993, III.5), so that the order is kept.

    Args:
        method: the family, with `max_order`, and for implicit ones `max_iters` and `tolerance`.
    """

    method: AdamsFamily

    remembers = True  # a step depends on the derivatives of the steps before it
    pull_back = None  # a step of it is taken back on the tape of its stages

    @property
    def dense_costs(self) -> bool:
        """An interpolant needs the derivative at the end, which the next step then has."""
        return True

    @property
    def start(self) -> ExplicitStepper:
        """What takes the first steps."""
        return ExplicitStepper(METHODS[next(name for order, name in STARTS if self.method.max_order <= order)])

    def step(self, field: Field, interval: Interval, y: Tensor, carry: History | None = None) -> Step:
        """Propose one step.

        Args:
            field: the vector field.
            interval: from where to where.
            y: inner state at its start.
            carry: the history; None at the beginning and behind an event.
        """
        past = carry or History()
        if len(past.ks) + 1 < self.method.num_history:
            started = self.start.step(field, interval, y, past.here)
            return self._finish(interval, y, _combine(started.ks, self.start.tableau.B), started.ks[0], past)
        here = past.here
        if here is None:
            (t0,) = interval.times((0.0,), y, field.time_dtype)
            here = field(t0, y)
        ks, times = (here, *past.ks), (interval.t0, *past.times)
        predicted = self.method.predictor_order
        rise = _combine(ks[:predicted], self._weights(interval, times[:predicted], implicit=False))
        if self.method.implicit:
            rise = self._correct(field, interval, y, ks, times, rise)
        return self._finish(interval, y, rise, here, past)

    def _finish(self, interval: Interval, y: Tensor, rise: Tensor, here: Tensor, past: History) -> Step:
        keep = self.method.num_history - 1
        after = History((here, *past.ks)[:keep], (interval.t0, *past.times)[:keep])
        return Step(interval, y, _move(y, rise, interval.h), [rise, here], after, past)

    def _correct(self, field: Field, interval: Interval, y: Tensor, ks: Any, times: Any, rise: Tensor) -> Tensor:
        """Functional iteration of the implicit formula, from the explicit prediction."""
        order = self.method.max_order
        weights = self._weights(interval, (interval.t1, *times[: order - 1]), implicit=True)
        known = _combine(ks[: order - 1], weights[1:]) if order > 1 else None
        (t1,) = interval.times((1.0,), y, field.time_dtype)
        done, first, change = None, None, None
        for _ in range(self.method.max_iters):
            newest = field(t1, _move(y, rise, interval.h)) * weights[0]
            better = newest if known is None else known + newest
            if done is not None and field.layout.batched:
                better = torch.where(done, rise, better)  # a row that has converged waits: others do not move it
            change, rise = self._change(field, interval, y, rise, better), better
            if change is None:
                continue
            first, done = change if first is None else first, change <= self.method.tolerance
            if bool(done.all()):
                return rise
        if change is not None and first is not None and bool((change > first).any()):
            warnings.warn(
                f"the functional iteration of {self.method.name} does not converge at t = {_some(interval.t1)}: the step is"
                " too long for this field. Take more steps, or an explicit method.",
                RuntimeWarning,
                stacklevel=2,
            )
        return rise

    def _change(self, field: Field, interval: Interval, y: Tensor, old: Tensor, new: Tensor) -> Tensor | None:
        """By how much a correction moved the state, relative to it: 0-d, or `(rows, 1)`; None where it cannot be read."""
        if unreadable(y):
            return None
        with torch.no_grad():
            moved, size = (interval.h * (new - old)).abs(), 1 + y.abs()
            return (moved / size).amax(1, keepdim=True) if field.layout.batched else (moved / size).amax()

    def _weights(self, interval: Interval, times: Any, implicit: bool) -> Any:
        """The weights of the derivatives at `times`, the newest first: floats, or tensors that multiply a derivative."""
        order = len(times)
        exact = self.method.weights_of(order, implicit)
        if order == 1:
            return exact
        start, h = interval.t0, interval.t1 - interval.t0
        if not any(isinstance(t, Tensor) for t in (*times, h)):
            nodes = [(t - start) / h for t in times]
            equal = all(abs(x + j - implicit) <= EQUAL for j, x in enumerate(nodes))
            return exact if equal else tuple(_solve(torch.tensor(nodes, dtype=torch.float64)).tolist())
        return self._moving_weights(interval, times, implicit)

    def _moving_weights(self, interval: Interval, times: Any, implicit: bool) -> Any:
        """Weights from times that are tensors: differentiable, and one set a row where rows have their own times."""
        h = torch.as_tensor(interval.t1 - interval.t0)
        stacked = torch.stack([torch.as_tensor(t - interval.t0).expand_as(h) for t in times], -1).to(h.dtype)
        still = (h == 0) | (stacked[..., 1:] == stacked[..., :-1]).any(-1)  # a row that stands still needs no weights
        equal = float(implicit) - torch.arange(len(times), dtype=h.dtype, device=h.device)
        nodes = torch.where(still.unsqueeze(-1), equal, stacked / torch.where(still, 1.0, h).unsqueeze(-1))
        weights = _solve(nodes).to(interval.h.dtype).unbind(-1)
        return tuple(w.unsqueeze(-1) for w in weights) if h.ndim else weights

    def piece(self, field: Field, step: Step) -> tuple[Piece, Any]:
        """Cubic Hermite interpolation; the derivative at t1 that it takes goes to the next step."""
        end = end_derivative(field, step)
        return hermite_piece(step, step.ks[0], step.ks[1], end), step.carry._replace(here=end)


def _solve(nodes: Tensor) -> Tensor:
    """Weights `(..., n)` that integrate polynomials of degree below n over [0, 1] from their values at `nodes`."""
    count = nodes.shape[-1]
    powers = [torch.ones_like(nodes)]
    for _ in range(count - 1):
        powers.append(powers[-1] * nodes)
    moments = 1 / torch.arange(1, count + 1, dtype=nodes.dtype, device=nodes.device)
    return torch.linalg.solve(torch.stack(powers, -2), moments.expand_as(nodes))


def _combine(ks: Any, weights: Any) -> Tensor:
    if not any(isinstance(w, Tensor) for w in weights):
        total = weighted(list(ks), tuple(weights))
        assert total is not None
        return total
    return sum((w * k for k, w in zip(ks[1:], weights[1:], strict=True)), weights[0] * ks[0])


def _move(y: Tensor, rise: Tensor, h: Any) -> Tensor:
    return torch.add(y, rise, alpha=h) if isinstance(h, float) else y + h * rise


def _some(t: Any) -> str:
    return f"{float(t.detach().flatten()[0] if isinstance(t, Tensor) else t):.6g}"
