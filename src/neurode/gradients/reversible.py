"""Going back algebraically: the exact gradient of a reversible coupling, in memory that does not grow with the steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from neurode._errors import GradientError, InputError
from neurode._loop import Outcome, end_time, integrate, time_dtype
from neurode._problem import Problem
from neurode._solution import Stats, Status
from neurode._state import number
from neurode.control import standins
from neurode.gradients.inputs import Inputs, Replayed, autocast_state, find_inputs, refuse_unlisted, uncached_autocast
from neurode.gradients.track import JointTimes, JointTrack, Leg, RowTimes, RowTrack, Total
from neurode.methods import Reversible
from neurode.stepping import Interval, Step, stepper
from neurode.stepping.step import increment

TIMES = ("t0", "t1", "grid", "t_eval")


@dataclass(frozen=True)
class Retrace:
    """The exact gradient of `neurode.Reversible(method)`: each step is undone on the way back.

    Asked for by name, `gradient="reversible"`, since it integrates `Reversible(method)` in place of the method: a scheme of
    the same order, with other numbers and twice the evaluations of `f`. A method that is a `Reversible` already is taken
    as it is, with its own coupling.

    The forward solve keeps the two states at its end, and with adaptive steps the times: 8 bytes a step (and row). The
    backward pass undoes a step half by half; what it evaluates to find the old state is what it differentiates, so that
    it takes as many evaluations as the forward solve. The states it finds differ from those that there were by
    rounding, which grows as `coupling ** -steps`, and as errors do where the field contracts and is gone through
    backward.

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
    handles: ClassVar = frozenset({"rows", "coupled"})
    fused = False  # whether the fused engine gives this gradient
    own_scheme = True  # whether the forward numbers are those of another scheme than the method asked for

    def solve(self, problem: Problem, stats: Stats) -> Outcome:
        """Integrate the coupling without a tape, and attach the way back."""
        problem = self._coupled(problem, stats)
        if not torch.is_grad_enabled():
            return integrate(problem)
        start = number(problem.t0) if not problem.per_row else problem.t0.detach()
        t = torch.as_tensor(start, dtype=problem.field.time_dtype, device=problem.y0.device)
        work = _Work(problem, stats, find_inputs(problem.field, t, problem.y0, self.name))
        y1, ys = _Function.apply(work, problem.y0, *_moving(problem), *work.inputs.all)
        ys = y1.unsqueeze(0) if problem.t_eval is None else ys
        end = end_time(problem, work.outcome.status, work.outcome.t1)
        return replace(work.outcome, y1=y1, ys=ys, ts=_output_times(problem, work.outcome), t1=end)

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


class _Work:
    """What the forward and the backward pass of one solve share."""

    def __init__(self, problem: Problem, stats: Stats, inputs: Inputs) -> None:
        self.problem, self.stats, self.inputs = problem, stats, inputs
        self.autocast = autocast_state(problem.y0)
        self.track: Any = None
        self.outcome: Any = None
        self.gone: Tensor | None = None

    def forward(self, y0: Tensor) -> tuple[Tensor, Tensor]:
        problem = self.problem
        times = {name: _still(getattr(problem, name)) for name in ("t0", "t1", "grid", "t_eval")}
        plain = replace(problem, y0=y0, **times)
        self.track = RowTrack(plain) if problem.per_row else JointTrack(plain)
        with uncached_autocast(self.autocast):
            outcome = integrate(replace(plain, recorder=self.track))
        y1, ys = outcome.y1, outcome.ys if problem.t_eval is not None else outcome.y1.new_empty(0)
        if isinstance(outcome.status, Tensor):
            self.gone = outcome.status > Status.TERMINATED.code
            self.gone = self.gone if bool(self.gone.any()) else None
            if self.gone is not None and problem.t_eval is not None:
                ys = torch.where(self.gone[:, None], torch.nan, ys)
        nothing: Any = None  # the outputs belong to autograd from here on
        self.outcome = replace(outcome, y1=nothing, ys=nothing)
        # What is returned belongs to the user, who may change it in place; the track goes back from its own.
        return y1.clone(), ys.clone() if ys._base is y0 or ys._base is y1 else ys

    @property
    def lost(self) -> bool:
        """Whether nothing of the solve is left to differentiate."""
        if self.gone is not None:
            return bool(self.gone.all())
        return not isinstance(self.outcome.status, Tensor) and self.outcome.status.failed


def _still(t: Any) -> Any:
    """A time or times without a gradient, of the same kind: the forward numbers are to be those of the tape."""
    return [_still(x) for x in t] if isinstance(t, list) else t.detach() if isinstance(t, Tensor) else t


def _moving(problem: Problem) -> list[Any]:
    """The times that need a gradient, in the order of `TIMES`; None for the others."""

    def wanted(t: Any) -> Any:
        return t if isinstance(t, Tensor) and t.requires_grad else None

    grid = problem.grid
    if isinstance(grid, list):
        moves = any(isinstance(t, Tensor) and t.requires_grad for t in grid)
        dtype, device = time_dtype(problem.y0.device), problem.y0.device
        grid = torch.stack([torch.as_tensor(t, dtype=dtype, device=device) for t in grid]) if moves else None
    ends = [None, None, wanted(grid)] if problem.grid is not None else [wanted(problem.t0), wanted(problem.t1), None]
    return [*ends, wanted(problem.t_eval)]


def _output_times(problem: Problem, outcome: Outcome) -> Tensor:
    """The times of the outputs with the gradients that the user's own have."""
    if isinstance(problem.t_eval, Tensor):
        return problem.t_eval
    t1 = problem.t1
    return t1.unsqueeze(0) if isinstance(t1, Tensor) and t1.requires_grad else outcome.ts


class _Function(torch.autograd.Function):
    """Forward: the solve. Backward: its steps undone, from the last to the first."""

    @staticmethod
    def forward(ctx: Any, work: _Work, y0: Tensor, t0: Any, t1: Any, grid: Any, t_eval: Any, *inputs: Tensor) -> Any:
        ctx.work = work
        y1, ys = work.forward(y0)
        ctx.save_for_backward(y0, *inputs)
        ctx.times = [t if t is None else t.detach() for t in (t0, t1, grid, t_eval)]
        return y1, ys

    @staticmethod
    def backward(ctx: Any, *grads_out: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise GradientError(
                "gradient='reversible' gives derivatives of first order only (create_graph=True was asked for). Type"
                " gradient='autograd', with method=neurode.Reversible(...) for the same numbers."
            )
        y0, *inputs = ctx.saved_tensors
        sweep = _Sweep(ctx.work, y0, inputs, ctx.times)
        with uncached_autocast(ctx.work.autocast):
            sweep.run(*grads_out)
        totals = [t.total if t is not None else None for t in sweep.sums.values()]
        grads = [g if need else None for g, need in zip(sweep.totals, ctx.needs_input_grad[6:], strict=True)]
        return None, sweep.gy if ctx.needs_input_grad[1] else None, *totals, *grads


class _Apart(NamedTuple):
    """What the outputs of a step depend on besides z and its stages, as leaves of their own.

    Attributes:
        y0, y1: y at both ends.
        slope: the derivative at the new y, which is the first stage of `down`.
    """

    y0: Tensor
    y1: Tensor
    slope: Tensor


class _Sweep:
    """The backward pass.

    Attributes:
        y, z: the two states reached, all rows.
        gy, gz: their gradients.
        totals: gradients of the inputs.
    """

    def __init__(self, work: _Work, y0: Tensor, inputs: list[Tensor], times: list[Any]) -> None:
        self.work, problem = work, work.problem
        self.problem, self.track, self.y0 = problem, work.track, y0
        self.sums: dict[str, Any] = {
            name: None if t is None else Total(t) for name, t in zip(TIMES, times, strict=True)
        }
        self.times = (RowTimes if problem.per_row else JointTimes)(
            problem, work.track, self.sums, time_dtype(y0.device)
        )
        self.gone = None if work.lost else work.gone
        self.inputs = Replayed(problem.field, work.inputs, inputs, self.gone)
        self.inputs.field.num_calls = 0
        self.totals = [torch.zeros_like(x) for x in inputs]
        self.stepper, self.share = stepper(problem.method), problem.method.coupling
        self.gy, self.gz = torch.zeros_like(y0), torch.zeros_like(y0)
        self.grad_ys: Any = None
        self.steps = 0

    def run(self, grad_y1: Tensor, grad_ys: Tensor) -> None:
        """Go back through all steps."""
        if not self.work.lost:
            self.y, self.z = self.track.states()
            gone = None if self.gone is None else self.gone[:, None]
            self.gy = grad_y1 if gone is None else torch.where(gone, 0.0, grad_y1)
            if self.problem.t_eval is not None:
                self.grad_ys = grad_ys if gone is None else torch.where(gone, 0.0, grad_ys)
            with self.inputs.outer():
                for n, leg in self.track.backward(self.gone):
                    self._undo(n, leg)
            self.gy = self.gy + self.gz  # y and z start alike
            if self.grad_ys is not None:
                self.gy = self.gy + self.times.at_start(self.grad_ys)
        self._report()

    def _report(self) -> None:
        """Leave the counts of the backward pass with the solution."""
        stats = Stats(method=self.work.stats.method, gradient="reversible", engine="eager")
        stats.num_calls = stats.num_evaluations = self.inputs.field.num_calls
        stats.num_accepted = self.steps
        self.work.stats.backward = stats

    # ---- one step

    def _undo(self, n: int, leg: Leg) -> None:
        """Find the states before a step, and hand its gradients on."""
        y1, z1, gy, gz = (x if leg.rows is None else x.index_select(0, leg.rows) for x in self._present)
        y1, z1 = self._played(leg, y1), self._played(leg, z1)
        ends, leaves = self.times.ends(n, replace(leg, t0=self._played(leg, leg.t0), t1=self._played(leg, leg.t1)))
        stepping, B = self.stepper, self.stepper.method.base.B
        grad_ys: Any = self.grad_ys
        with torch.enable_grad():
            field, interval, times = self._afresh(leg, ends)
            end = y1.detach().requires_grad_()
            back = stepping.down(field, times, end, interval.h)
            z0 = increment(z1, back, B, -interval.h)
            # What both halves read must not be one graph: each has its own pass of autograd.
            field, interval, times = self._afresh(leg, ends)
            z = z0.detach().requires_grad_()
            ks = stepping.up(field, times, z, interval.h)
            rest = increment(y1, ks, B, -interval.h)
            y0 = torch.add(z0.detach(), rest.detach() - z0.detach(), alpha=1 / self.share)
            apart = _Apart(*(x.detach().requires_grad_() for x in (y0, y1, back[0])))
            values, places = [], []
            if grad_ys is not None:
                step = Step(interval, apart.y0, apart.y1, [*ks, apart.slope], None, z)
                values, places = self.times.outputs(n, leg, step, stepping, field, leaves)
        cotangents = [grad_ys[place] for place in places]
        first, into = [z0], [self._only(leg, -gz)]
        if values:  # what they ask of the new y, and of the derivative there, goes down with the rest
            into_y1, slope = torch.autograd.grad(
                values, (apart.y1, apart.slope), cotangents, retain_graph=True, allow_unused=True
            )
            gy = gy if into_y1 is None else gy + into_y1
            first, into = (first, into) if slope is None else ([z0, back[0]], [*into, slope])
        (into_y1,) = self._derivative(leaves, first, into, [end])
        gy = gy if into_y1 is None else gy + into_y1
        into_z, into_y0 = self._derivative(leaves, [rest, *values], [self._only(leg, -gy), *cotangents], [z, apart.y0])
        gy, gz = self.share * gy, torch.add(gz, gy, alpha=1 - self.share)
        gy = gy if into_y0 is None else gy + into_y0
        gz = gz if into_z is None else gz + into_z
        self._arrive(leg, y0, z0.detach(), gy, gz)

    def _afresh(self, leg: Leg, ends: list[Any]) -> tuple[Any, Interval, tuple[Tensor, ...]]:
        """The field on the rows of a step, its interval and the times of its stages, on the tape."""
        self.inputs.take(leg.rows)
        field = self.inputs.field
        interval = Interval(ends[0], ends[1], field.time_dtype, *leg.jumps)
        return field, interval, interval.times(self.stepper.method.C, self.y0, field.time_dtype)

    def _played(self, leg: Leg, x: Any) -> Any:
        """Rows of `x`; a failed row is played by a good one, so that nothing of it reaches what rows share."""
        if self.gone is None or not isinstance(x, Tensor):
            return x
        gone = self.gone if leg.rows is None else self.gone[leg.rows]
        return standins._instead(x, gone) if bool(gone.any()) else x

    @property
    def _present(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.y, self.z, self.gy, self.gz

    def _only(self, leg: Leg, gradient: Tensor) -> Tensor:
        """A gradient of the rows that took the step."""
        return gradient if leg.moved is None else torch.where(leg.moved.unsqueeze(1), gradient, 0.0)

    def _derivative(
        self, leaves: list[Any], values: list[Tensor], cotangents: list[Tensor], starts: list[Tensor]
    ) -> Any:
        """Gradients of `starts`; those of times and inputs go to their sums."""
        pairs = [(v, c) for v, c in zip(values, cotangents, strict=True) if v.requires_grad]
        if not pairs:
            return [None] * len(starts)
        wanted = [*starts, *(leaf for leaf, _, _ in leaves), *self.inputs.wanted]
        refuse_unlisted(pairs[0][0], self.inputs.listed.union(map(id, wanted)))
        grads = torch.autograd.grad([v for v, _ in pairs], wanted, [c for _, c in pairs], allow_unused=True)
        rest = iter(grads[len(starts) :])
        for (_, name, place), grad in zip(leaves, rest, strict=False):
            if grad is not None:
                self.sums[name].add(place, grad)
        found = [
            (t, g) for t, g in zip(self.totals, grads[len(grads) - len(self.totals) :], strict=True) if g is not None
        ]
        if found:
            torch._foreach_add_([t for t, _ in found], [g for _, g in found])
        return grads[: len(starts)]

    def _arrive(self, leg: Leg, *new: Tensor) -> None:
        """The states before the step and their gradients; rows that did not take it keep theirs."""
        self.steps += 1
        values = []
        for old, x in zip(self._present, new, strict=True):
            here = old if leg.rows is None else old.index_select(0, leg.rows)
            x = x if leg.moved is None else torch.where(leg.moved.unsqueeze(1), x, here)
            values.append(x if leg.rows is None else old.index_copy(0, leg.rows, x))
        self.y, self.z, self.gy, self.gz = values
