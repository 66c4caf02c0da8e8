"""Going back algebraically: the exact gradient of a reversible coupling, in memory that does not grow with the steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from neurode._errors import GradientError, InputError
from neurode._loop import Outcome, integrate
from neurode._problem import Problem
from neurode._solution import Stats
from neurode.gradients.discrete import _Function, _Work
from neurode.gradients.inputs import inputs_of
from neurode.gradients.record import RowStride, State
from neurode.gradients.replay import Taken
from neurode.gradients.sweep import Sweep, leaf
from neurode.gradients.track import JointTrack, RowTrack
from neurode.methods import Reversible
from neurode.stepping import Interval, Step
from neurode.stepping.step import increment

LARGEST_LOSS = -3.0  # log10 of the share of the states that rounding may grow to on the way back


@dataclass(frozen=True)
class Retrace:
    """The exact gradient of `neurode.Reversible(method)`: each step is undone on the way back.

    Asked for by name, `gradient="reversible"`, since it integrates `Reversible(method)` in place of the method: a scheme of
    the same order, with other numbers and twice the evaluations of `f`. A method that is a `Reversible` already is taken
    as it is, with its own coupling.

    The forward solve keeps the two states at its end, and the times: 8 bytes a step (and row). Where an event changes the
    course, no algebra leads back over it, and the two states before that step are kept too. The
    backward pass undoes a step half by half; what it evaluates to find the old state is what it differentiates, so that
    it takes as many evaluations as the forward solve. The states it finds differ from those that there were by
    rounding, which grows as `coupling ** -steps`, and as errors do where the field contracts and is gone through
    backward. Where the first would leave less than three digits (with the default coupling, beyond 29,000 steps in float64
    and 9,000 in float32), the solve raises.

    References:
        S. McCallum, J. Foster (2024), Efficient, accurate and stable gradients for neural ODEs, arXiv:2410.11648.

    Example:
        >>> import torch, neurode
        >>> w = torch.tensor(-0.5, requires_grad=True)
        >>> sol = neurode.solve(lambda t, y: w * y, [2.0], (0, 1), method="rk4", steps=50, gradient="reversible")
        >>> sol.stats.method
        'reversible(rk4)'
        >>> round(torch.autograd.grad(sol.y1.sum(), w)[0].item(), 4), sol.stats.backward.num_evaluations
        (1.2131, 400)
    """

    name = "reversible"
    handles: ClassVar = frozenset({"rows", "coupled", "events", "steps"})
    fused = False  # whether the fused engine gives this gradient
    own_scheme = True  # whether the forward numbers are those of another scheme than the method asked for

    def solve(self, problem: Problem, stats: Stats) -> Outcome:
        """Integrate the coupling without a tape, and attach the way back."""
        problem = self._coupled(problem, stats)
        if not torch.is_grad_enabled():
            return integrate(problem)
        work = _Trace(self, problem, stats, inputs_of(problem, self.name))
        values = _Function.apply(work, problem.y0, *work.moving, *work.inputs.all)
        return work.attach(dict(zip(work.names, values, strict=True)))

    def _coupled(self, problem: Problem, stats: Stats) -> Problem:
        """The problem with the coupling of its method."""
        if problem.method.kind == "reversible":
            return problem
        if problem.method.kind != "explicit":
            raise InputError(
                f"gradient='reversible' couples explicit one-step methods, and {problem.method.name!r} is"
                f" {problem.method.kind}. Type gradient='autograd' or gradient='discrete', or take a method such as 'rk4'."
            )
        method = Reversible(problem.method)
        stats.method = stats.method.replace(problem.method.name, method.name, 1)
        return replace(problem, method=method)


class _Trace(_Work):
    """What the forward and the backward pass of one solve share; see `discrete`."""

    def forward(self, y0: Tensor) -> tuple[Tensor, ...]:
        """Solve without a tape; the track goes back from its own final state, which the user cannot change."""
        y1, *rest = super().forward(y0)
        self._refuse_lost_digits(y0)
        return y1.clone(), *rest

    def _refuse_lost_digits(self, y0: Tensor) -> None:
        """Going back multiplies rounding by `1 / coupling` a step: raise where too little of a gradient would be left."""
        taken, coupling = self.outcome.num_accepted, self.problem.method.coupling
        steps = (
            int(taken.max())
            if isinstance(taken, Tensor) and len(taken)
            else int(taken)
            if isinstance(taken, int)
            else 0
        )
        digits = math.log10(torch.finfo(y0.dtype).eps) - steps * math.log10(coupling)
        if digits > LARGEST_LOSS:
            raise GradientError(
                f"gradient='reversible' over {steps:,} steps with coupling={coupling:g} would multiply the rounding of {y0.dtype}"
                f" to some 1e{digits:.0f} of the states. Type a coupling nearer to 1, such as"
                " method=neurode.Reversible(method, 0.9999), or gradient='autograd', with method=neurode.Reversible(...) for the"
                " same numbers."
            )

    def _recorder(self, y0: Tensor) -> Any:
        return (RowTrack if self.problem.per_row else JointTrack)(replace(self.problem, y0=y0))

    def _sweep(self, replay: Any, y0: Tensor, grads: dict[Any, Any]) -> Sweep:
        return _Retrace(replay, self.record, y0, grads, self._failed)

    def again(self, y0: Tensor, inputs: list[Tensor], grads: list[Any]) -> list[Any]:
        """Refuse a graph of the gradients."""
        raise GradientError(
            "gradient='reversible' gives derivatives of first order only (create_graph=True was asked for). Type"
            " gradient='autograd', with method=neurode.Reversible(...) for the same numbers."
        )


class _Apart(NamedTuple):
    """What the outputs of a step depend on besides z and its stages, as leaves of their own.

    Attributes:
        y0, y1: y at both ends.
        slope: the derivative at the new y, which is the first stage of `down`.
    """

    y0: Tensor
    y1: Tensor
    slope: Tensor


class _Retrace(Sweep):
    """The backward pass, in which each step is undone.

    Attributes:
        y, z: the two states reached, all rows.
        gz: gradient of z; `gy` is that of y.
    """

    def __init__(self, replay: Any, track: Any, y0: Tensor, grads: dict[Any, Any], failed: Any) -> None:
        super().__init__(replay, track, y0, grads, failed, by_stages=False)
        self.track = track
        self.stepper, self.share = replay.stepper, replay.problem.method.coupling
        (self.gz,) = self.gpast

    def run(self) -> None:
        """Go back through all steps."""
        state = self.track.states()
        self.y, (self.z,) = state.y, state.past
        with self.inputs.outer():
            for n in range(len(self.track) - 1, -1, -1):
                self._undo(n)
        self.gy = self.gy + self.gz  # y and z start alike
        ys = self.grads.get("ys")
        if ys is not None:
            self.gy = self.gy + self.replay.at_start(ys)

    def _undo(self, n: int) -> None:
        """Find the states before a step, and hand its gradients on."""
        stride = self.track[n]
        rows, moved = self._lanes(stride)
        if moved is not None and not bool(moved.any()):
            return
        wide = None if moved is None else moved.unsqueeze(1)
        y1, z1, gy, gz = (x if rows is None else x.index_select(0, rows) for x in self._present)
        undo = self._back_over_events if n in self.track.special else self._halves
        new = undo(n, stride, rows, y1, z1, _of(wide, gy), _of(wide, gz))
        self._arrive(rows, wide, new)

    def _lanes(self, stride: Any) -> tuple[Tensor | None, Tensor | None]:
        """Which rows a step has (None for all), and which of them it moves (None for all)."""
        gone = self.replay.gone
        if not isinstance(stride, RowStride):
            return None, None if gone is None else ~gone
        moved = stride.accepted if gone is None else stride.accepted & ~gone[stride.rows]
        return None if stride.whole else stride.rows, moved

    # ---- a step without events: half by half

    def _halves(self, n: int, stride: Any, rows: Any, y1: Tensor, z1: Tensor, gy: Tensor, gz: Tensor) -> list[Tensor]:
        """Undo each half of a step; what finds the old state is what is differentiated."""
        state = self.replay.state(n, State(y1, (z1,)))
        y1, (z1,) = state.y, state.past
        stepping, B, taken = self.stepper, self.stepper.method.base.B, Taken(y1, ())
        ends = self.replay._ends(n, taken)
        with torch.enable_grad():
            field, interval, times = self._afresh(n, rows, ends)
            end = leaf(y1)
            back = stepping.down(field, times, end, interval.h)
            z0 = increment(z1, back, B, -interval.h)
            # What both halves read must not be one graph: each has its own pass of autograd.
            self.inputs.take(rows)
            field = self.inputs.field
            if taken.times:
                interval, times = self._times(n, ends)
            z = leaf(z0)
            ks = stepping.up(field, times, z, interval.h)
            rest = increment(y1, ks, B, -interval.h)
        z0_, rest_ = z0.detach(), rest.detach()
        y0 = torch.add(z0_, rest_ - z0_, alpha=1 / self.share)
        out, apart, slope = [], [], None
        if not self.replay.is_plain(
            n
        ):  # what outputs ask of the new y, and of the derivative there, goes down with the rest
            out, apart = self._outputs(n, interval, z, y0, y1, [*ks, back[0]], taken)
            into_y1, slope = self._asked(out, apart)
            gy = gy if into_y1 is None else gy + into_y1
        (into_y1,) = self._pull([(z0, -gz), (back[0], slope)], [end], taken.times)
        gy = gy if into_y1 is None else gy + into_y1
        into_z, *into = self._pull([(rest, -gy), *out], [z, *apart], taken.times)
        gy, gz = self.share * gy, torch.add(gz, gy, alpha=1 - self.share)
        gy = gy if not into or into[0] is None else gy + into[0]
        gz = gz if into_z is None else gz + into_z
        return [y0, z0_, gy, gz]

    def _outputs(
        self, n: int, interval: Interval, z: Tensor, y0: Tensor, y1: Tensor, ks: list[Tensor], taken: Taken
    ) -> tuple[list[Any], list[Tensor]]:
        """The outputs in a step with their cotangents, and the leaves that they hang on besides z and its stages."""
        with torch.enable_grad():
            apart = _Apart(*map(leaf, (y0, y1, ks[-1])))
            step = Step(interval, apart.y0, apart.y1, [*ks[:-1], apart.slope], None, z)
            piece = cache(lambda: self.stepper.piece(self.inputs.field, step)[0])
            self.replay.put_outputs(n, step, apart.y1, piece, taken)
        out = [(v, c) for v, name, place in taken.outputs if (c := self._cotangent(name, place)) is not None]
        return out, [*apart]

    def _asked(self, out: list[Any], apart: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """What outputs ask of the new y, and of the derivative there."""
        if not out:
            return None, None
        _, y1, slope = apart
        values, cotangents = zip(*out, strict=True)
        into = torch.autograd.grad(values, (y1, slope), cotangents, retain_graph=True, allow_unused=True)
        return into[0], into[1]

    def _afresh(self, n: int, rows: Any, ends: list[Any]) -> tuple[Any, Interval, tuple[Tensor, ...]]:
        """The field on the rows of a step, its interval and the times of its stages, on the tape."""
        self.inputs.take(rows)
        return self.inputs.field, *self._times(n, ends)

    def _times(self, n: int, ends: list[Any]) -> tuple[Interval, tuple[Tensor, ...]]:
        """The interval of a step, and the times of its stages."""
        dtype = self.inputs.field.time_dtype
        interval = self.replay.between(n, ends, dtype)
        return interval, interval.times(self.stepper.method.C, self.y, dtype)

    # ---- a step with events: found again from the states before it

    def _back_over_events(
        self, n: int, stride: Any, rows: Any, y1: Tensor, z1: Tensor, gy: Tensor, gz: Tensor
    ) -> list[Tensor]:
        """Take a step with events in it again, whole, from the states before it."""
        start = self._start_of(n, stride, rows, y1, z1)
        y, z = (leaf(x) for x in (start.y, start.past[0]))
        with torch.enable_grad():
            self.inputs.take(rows)
            taken = self.replay.take(n, State(y, (z,)), self.inputs.field)
        pairs = [(taken.after, gy), (taken.carry[0], gz)]
        pairs += [(value, self._cotangent(name, place)) for value, name, place in taken.outputs]
        into = self._pull(pairs, [y, z], taken.times)
        return [start.y, start.past[0], *(torch.zeros_like(y) if grad is None else grad for grad in into)]

    @torch.no_grad()
    def _start_of(self, n: int, stride: Any, rows: Any, y1: Tensor, z1: Tensor) -> State:
        """The states before a step: kept where an event changed the course, else by algebra."""
        special = self.track.special[n]
        kept, lanes = special.start or State(y1, (z1,)), special.lanes
        if special.caught is not None and lanes is None:
            return self.replay.state(n, kept)
        if lanes is not None:  # in the place of what came out of the event, something that is no stranger to the field
            y1, z1 = y1.clone(), z1.clone()
            y1[lanes], z1[lanes] = kept.y, kept.past[0]
        state = self.replay.state(n, State(y1, (z1,)))
        y1, (z1,) = state.y, state.past
        whole = self.replay.interval(n, self.inputs.field.time_dtype)
        ends = [whole.t0, whole.t1]
        field, interval, times = self._afresh(n, rows, ends)
        z0 = self.stepper.old_z(z1, self.stepper.down(field, times, y1, interval.h), interval.h)
        y0 = self.stepper.old_y(y1, z0, self.stepper.up(field, times, z0, interval.h), interval.h)
        if lanes is not None:
            y0[lanes], z0[lanes] = kept.y, kept.past[0]
        return self.replay.state(n, State(y0, (z0,)))

    # ---- gradients

    @property
    def _present(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.y, self.z, self.gy, self.gz

    def _arrive(self, rows: Tensor | None, wide: Tensor | None, new: list[Tensor]) -> None:
        """The states before the step and their gradients; rows that did not take it keep theirs."""
        self.steps += 1
        values = []
        for old, x in zip(self._present, new, strict=True):
            here = old if rows is None else old.index_select(0, rows)
            x = x if wide is None else torch.where(wide, x, here)
            values.append(x if rows is None else old.index_copy(0, rows, x))
        self.y, self.z, self.gy, self.gz = values


def _of(wide: Tensor | None, gradient: Tensor) -> Tensor:
    """A gradient of the rows that took the step."""
    return gradient if wide is None else torch.where(wide, gradient, 0.0)
