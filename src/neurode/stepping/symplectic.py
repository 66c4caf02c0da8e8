"""A step of a symplectic splitting method: kicks of p and drifts of q in turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neurode._errors import InputError
from neurode._field import Field
from neurode._state import Layout
from neurode.methods.symplectic import SymplecticTableau
from neurode.stepping.hermite import end_derivative, hermite_piece
from neurode.stepping.interval import Interval
from neurode.stepping.step import Piece, Step


class LastKick(NamedTuple):
    """What a step leaves to the next one.

    Attributes:
        dp: `dp/dt` at the present q, where the method ends with a kick.
        whole: the whole derivative at the present state, where an interpolant has evaluated it.
    """

    dp: Tensor | None = None
    whole: Tensor | None = None


def size_of_q(layout: Layout) -> int:
    """How many elements of the inner state (of a row of it) are q; refuses states that are not `(q, p)`."""
    children = [] if layout.spec is None else layout.spec.children()
    if len(children) != 2:
        raise InputError(
            "a symplectic method needs a state of two parts, (q, p), and an f that returns (dq(p), dp(q)). Type"
            " y0=(q, p), or take a method such as 'rk4'."
        )
    first = children[0].num_leaves
    sizes = layout.sizes
    if sum(sizes[:first]) != sum(sizes[first:]):
        raise InputError(
            f"the state's parts have {sum(sizes[:first])} and {sum(sizes[first:])} elements; q and p of a symplectic method"
            " must have as many."
        )
    return sum(sizes[:first])


@dataclass(frozen=True)
class SymplecticStepper:
    """Takes steps of one splitting method for separable systems `dq/dt = g(t, p)`, `dp/dt = f(t, q)`.

    Every evaluation of `f` is given the newest q and p; a kick uses only the dp of it and a drift only the dq.

    Args:
        method: the numbers.
    """

    method: SymplecticTableau

    remembers = False  # what a step carries to the next is known from the state alone
    pull_back = None  # a step of it is taken back on the tape of its stages

    @property
    def dense_costs(self) -> bool:
        """An interpolant needs the whole derivative at both ends."""
        return True

    def step(self, field: Field, interval: Interval, y: Tensor, carry: LastKick | None = None) -> Step:
        """Propose one step.

        Args:
            field: the vector field, on `(q, p)`.
            interval: from where to where.
            y: inner state at its start.
            carry: what the step before left; None at the beginning and behind an event.
        """
        method, size = self.method, size_of_q(field.layout)
        times = interval.times(method.kick_times + method.drift_times, y, field.time_dtype)
        q, p = y[..., :size], y[..., size:]
        known, whole = carry or LastKick()
        rise_q, rise_p = torch.zeros_like(q), torch.zeros_like(p)
        dp = None
        for i in range(method.num_stages):
            if method.kick[i]:
                if known is None:
                    both = field(times[i], torch.cat([q, p], -1))
                    known, whole = both[..., size:], both if i == 0 else whole
                dp, known = known, None
                rise_p = torch.add(rise_p, dp, alpha=method.kick[i])
                p = _along(y[..., size:], rise_p, interval.h)
            if method.drift[i]:
                dq = field(times[method.num_stages + i], torch.cat([q, p], -1))[..., :size]
                rise_q = torch.add(rise_q, dq, alpha=method.drift[i])
                q = _along(y[..., :size], rise_q, interval.h)
        after = LastKick(dp if method.fsal else None)
        rise = torch.cat([rise_q, rise_p], -1)
        return Step(interval, y, torch.cat([q, p], -1), [rise], after, LastKick(whole=whole))

    def piece(self, field: Field, step: Step) -> tuple[Piece, Any]:
        """Cubic Hermite interpolation, from the whole derivative at both ends."""
        start = step.restart.whole
        if start is None:
            (t0,) = step.interval.times((0.0,), step.y0, field.time_dtype)
            start = field(t0, step.y0)
        end = end_derivative(field, step)
        dp = end[..., size_of_q(field.layout) :]
        return hermite_piece(step, step.ks[0], start, end), LastKick(dp if self.method.fsal else None, end)


def _along(start: Tensor, rise: Tensor, h: Any) -> Tensor:
    return torch.add(start, rise, alpha=h) if isinstance(h, float) else start + h * rise
