"""A step of a reversible coupling, forward and, exactly, back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from neurode.methods.reversible import Reversible
from neurode.methods.tableau import ButcherTableau
from neurode.stepping.explicit import ExplicitStepper, hermite_powers
from neurode.stepping.interval import Interval
from neurode.stepping.step import Piece, Step, increment


@dataclass(frozen=True)
class ReversibleStepper:
    """Takes steps of one coupling. The carry of a step is z.

    A step is two halves, `up` from z and `down` from the new y; each is one step of the base method, and either can be taken
    alone, which is how a gradient goes back.

    Args:
        method: the base method and the coupling.
    """

    method: Reversible

    remembers = False  # what it carries is a second state, not a history
    pull_back = None  # a step of it is taken back on the tape of its stages

    @property
    def dense_costs(self) -> bool:
        """Whether an interpolant needs evaluations of `f` beyond the step's own."""
        base = self.method.base
        return len(base.extra_A) > (base.end_stage is not None and base.end_stage >= base.num_stages)

    def step(self, field: Any, interval: Interval, y: Tensor, carry: Tensor | None = None) -> Step:
        """Propose one step.

        Args:
            field: the vector field.
            interval: from where to where.
            y: inner state at its start.
            carry: z there; None where it is y: at the start of a solve, and behind an event.
        """
        z, h = y if carry is None else carry, interval.h
        times = interval.times(self.method.C, y, field.time_dtype)
        ks = self.up(field, times, z, h)
        y1 = self.joined(y, z, ks, h)
        back = self.down(field, times, y1, h)
        return Step(interval, y, y1, [*ks, back[0]], self.moved(z, back, h), z)

    # ---- its parts

    def up(self, field: Any, times: tuple[Tensor, ...], z: Tensor, h: Any) -> list[Tensor]:
        """The stages of the method's step from z over h."""
        return self._stages(field, times[: self.method.num_half], z, h)

    def down(self, field: Any, times: tuple[Tensor, ...], y1: Tensor, h: Any) -> list[Tensor]:
        """The stages of the method's step from the new y over -h."""
        return self._stages(field, times[self.method.num_half :], y1, -h)

    def _stages(self, field: Any, times: tuple[Tensor, ...], y: Tensor, h: Any) -> list[Tensor]:
        ks = [field(times[0], y)]
        for weights, t in zip(self.method.base.A[1 : self.method.num_half], times[1:], strict=True):
            ks.append(field(t, increment(y, ks, weights, h)))
        return ks

    def joined(self, y: Tensor, z: Tensor, ks: list[Tensor], h: Any) -> Tensor:
        """The new y: `l y + (1 - l) z + Psi_h(z)`."""
        start = y if y is z else torch.add(z, y - z, alpha=self.method.coupling)
        return increment(start, ks, self.method.base.B, h)

    def moved(self, z: Tensor, back: list[Tensor], h: Any) -> Tensor:
        """The new z: `z - Psi_{-h}(y_new)`."""
        return increment(z, back, self.method.base.B, h)

    def old_z(self, z1: Tensor, back: list[Tensor], h: Any) -> Tensor:
        """The old z from the new one, and the stages of `down`."""
        return increment(z1, back, self.method.base.B, -h)

    def old_y(self, y1: Tensor, z: Tensor, ks: list[Tensor], h: Any) -> Tensor:
        """The old y from the new one, the old z, and the stages of `up`."""
        rest = increment(y1, ks, self.method.base.B, -h) - z
        return torch.add(z, rest, alpha=1 / self.method.coupling)

    # ---- what is made of its stages

    def errors(self, step: Step) -> list[Tensor]:
        """The embedded error estimates of the base method."""
        return ExplicitStepper(self.method.base).errors(step)

    def piece(self, field: Any, step: Step) -> tuple[Piece, Any]:
        """The step's interpolant: the base method's, moved by the share of `z - y` that the step takes away."""
        base, h = self.method.base, step.interval.h
        ks = list(step.ks)
        if base.P is not None:
            ks = self._with_extras(field, step, ks)
        return Piece(step.interval, step.y0, step.y1, [*ks, self._closing(step, h)], _powers(base)), step.carry

    def _with_extras(self, field: Any, step: Step, ks: list[Tensor]) -> list[Tensor]:
        """The base's stages and those of its dense output; where one of them is `f` at the end, it is known."""
        base, end = self.method.base, ks[-1]
        ks = ks[: base.num_stages]
        times = step.interval.times(base.extra_C, step.y0, field.time_dtype) if base.extra_C else ()
        for weights, t in zip(base.extra_A, times, strict=True):
            known = len(ks) == base.end_stage
            ks.append(end if known else field(t, increment(step.restart, ks, weights, step.interval.h)))
        return ks

    def _closing(self, step: Step, h: Any) -> Tensor:
        """`(1 - l) (z - y) / h`; zero where a row stands still."""
        y, z = step.y0, step.restart
        if y is z:
            return torch.zeros_like(y)
        gap = (1 - self.method.coupling) * (z - y)
        return gap / torch.where(h == 0, 1.0, h) if isinstance(h, Tensor) else gap / h


@lru_cache(maxsize=64)
def _powers(base: ButcherTableau) -> tuple[tuple[float, ...], ...]:
    """The base's interpolant, and a straight line."""
    powers = hermite_powers(base) if base.P is None else base.P
    return (*powers, (1.0, *[0.0] * (len(powers[0]) - 1)))
