"""What a solve's own steps tell of its difficulty: local errors and stiffness, summed over the accepted ones."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from neurode._solution import Status
from neurode.stepping.step import increment

NAMES = ("local_error", "stiffness")


def stiff_pair(method: Any) -> tuple[int, int] | None:
    """The last two stages of a method at one time, whose difference shows how fast `f` changes with the state."""
    nodes = getattr(method, "C", ())
    for j in reversed(range(len(nodes))):
        for i in reversed(range(j)):
            if nodes[i] == nodes[j]:
                return i, j
    return None


def estimated(name: str, method: Any) -> bool:
    """Whether a method's steps hold an estimate."""
    if method.kind != "explicit":
        return False
    return method.E is not None if name == "local_error" else stiff_pair(method) is not None


class Estimates:
    """Sums the estimates of one solve.

    Args:
        problem: with the names wanted in `estimates`.
        stepper: takes its steps.

    Attributes:
        totals: by name: 0-d, or `(rows,)` with rows.
    """

    def __init__(self, problem: Any, stepper: Any) -> None:
        self.stepper, self.batched = stepper, problem.layout.batched
        self.pair = stiff_pair(problem.method)
        zero = problem.y0.detach().abs().new_zeros(problem.y0.shape[:1] if self.batched else ())
        self.totals: dict[str, Tensor] = dict.fromkeys(problem.estimates, zero)

    def joint(self, step: Any) -> None:
        """Add an accepted step that all rows share."""
        for name in self.totals:
            self.totals[name] = self.totals[name] + getattr(self, f"_{name}")(step)

    def rows(self, pace: Any, step: Any) -> None:
        """Add an attempt of rows; one that was not accepted adds nothing."""
        for name, total in self.totals.items():
            value = torch.where(pace.accepted, getattr(self, f"_{name}")(step), 0.0)
            self.totals[name] = total + value if pace.whole else total.index_add(0, pace.rows, value)

    def of(self, status: Any) -> dict[str, Tensor]:
        """The totals; NaN in rows that failed, whose steps say nothing of a whole solve."""
        if not isinstance(status, Tensor):
            return self.totals
        gone = status > Status.TERMINATED.code
        return {name: torch.where(gone, torch.nan, total) for name, total in self.totals.items()}

    def _norm(self, x: Tensor) -> Tensor:
        """Root mean square, of all elements or of every row; its derivative at zero is zero."""
        if not self.batched:
            return torch.linalg.vector_norm(x) / math.sqrt(x.numel())
        return torch.linalg.vector_norm(x, dim=1) / math.sqrt(x.shape[1])

    def _local_error(self, step: Any) -> Tensor:
        """The embedded error times the length of the step (Pal et al. 2021, eq. 9)."""
        norms = [self._norm(error) for error in self.stepper.errors(step)]
        h = step.interval.h
        length = abs(h) if isinstance(h, float) else h.abs().reshape(norms[0].shape)
        if len(norms) == 1:
            return norms[0] * length
        # DOP853's combination of its two estimates (Hairer, Norsett & Wanner 1993, II.10).
        square = norms[0].square()
        both = square + 0.01 * norms[1].square()
        return square / torch.where(both == 0, 1.0, both).sqrt() * length  # a root has no derivative at zero

    def _stiffness(self, step: Any) -> Tensor:
        """How much `f` differs by how much two stages at one time differ (Shampine 1977)."""
        assert self.pair is not None
        i, j = self.pair
        rows, h = self.stepper.tableau.A, step.interval.h
        states = [increment(step.y0, step.ks, rows[k], h) for k in (i, j)]
        return _ratio(self._norm(step.ks[j] - step.ks[i]), self._norm(states[1] - states[0]))


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """A quotient that is zero, with a derivative of zero, where there is nothing to divide by."""
    nothing = below == 0
    return torch.where(nothing, 0.0, above / torch.where(nothing, 1.0, below))
