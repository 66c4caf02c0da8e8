"""The exact derivative of the steps that were taken: each is taken again, backward, and only one is on the tape at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from neurode._errors import GradientError, InputError
from neurode._loop import Outcome, end_time, integrate, time_dtype
from neurode._problem import Problem
from neurode._solution import Stats, Status
from neurode._state import number
from neurode.gradients.again import on_tape, recomputed
from neurode.gradients.inputs import Inputs, Replayed, autocast_state, find_inputs, refuse_unlisted, uncached_autocast
from neurode.gradients.replay import JointReplay, Recorder, RowReplay
from neurode.gradients.stages import StageField


@dataclass(frozen=True)
class Discrete:
    """The exact gradient from stored states.

    The forward solve keeps the state before every step and no activations. The backward pass takes each step again on the
    tape, from the last to the first. The gradient is that of `"autograd"` to rounding, in the memory of the states and of
    one step, for one more evaluation of every stage.

    Args:
        alive: `"step"`: the activations of one step are alive at a time; `"stage"`: those of one evaluation of `f`, for one
            more evaluation of every stage.
        checkpoints: how many states may be kept; the others are computed again. None keeps all.

    References:
        T. Matsubara, Y. Miyatake, T. Yaguchi (2021), Symplectic adjoint method for exact gradient of neural ODE with minimal
        memory, NeurIPS.
        A. Griewank, A. Walther (2000), Algorithm 799: revolve, ACM TOMS 26(1).

    Example:
        >>> import torch, neurode
        >>> w = torch.tensor(-0.5, requires_grad=True)
        >>> few = neurode.Discrete(checkpoints=4)
        >>> sol = neurode.solve(lambda t, y: w * y, [2.0], (0, 1), method="rk4", steps=50, gradient=few)
        >>> round(torch.autograd.grad(sol.y1.sum(), w)[0].item(), 4)
        1.2131
    """

    alive: str = "step"
    checkpoints: int | None = None

    name = "discrete"
    handles: ClassVar = frozenset({"rows", "symplectic"})

    def __post_init__(self) -> None:
        if self.alive not in ("step", "stage"):
            raise InputError(f"alive={self.alive!r}; it must be 'step' or 'stage'.")
        k = self.checkpoints
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
            raise InputError(f"checkpoints={k!r}; it must be a whole number of at least 1, or None for all states.")

    @property
    def fused(self) -> bool:
        """Whether the fused engine gives this gradient: it keeps every state, and stages within its own budget."""
        return self.alive == "step" and self.checkpoints is None

    def solve(self, problem: Problem, stats: Stats) -> Outcome:
        """Integrate without a tape, keep states, and attach the way back."""
        if not torch.is_grad_enabled():
            return integrate(problem)
        start = number(problem.t0) if not problem.per_row else problem.t0.detach()
        t = torch.as_tensor(start, dtype=problem.field.time_dtype, device=problem.y0.device)
        work = _Work(self, problem, stats, find_inputs(problem.field, t, problem.y0, self.name))
        times = _moving(problem)
        y1, ys = _Function.apply(work, problem.y0, *times, *work.inputs.all)
        ys = y1.unsqueeze(0) if problem.t_eval is None else ys
        end = end_time(problem, work.outcome.status, work.outcome.t1)
        return replace(work.outcome, y1=y1, ys=ys, ts=_output_times(problem, work.outcome), t1=end)


def _moving(problem: Problem) -> list[Any]:
    """The times that need a gradient, for the autograd function: t0, t1, the grid and the outputs; None for the others."""

    def wanted(t: Any) -> Any:
        return t if isinstance(t, Tensor) and t.requires_grad else None

    grid = problem.grid
    if isinstance(grid, (list, tuple)):
        moves = any(isinstance(t, Tensor) and t.requires_grad for t in grid)
        dtype = time_dtype(problem.y0.device)
        grid = torch.stack([torch.as_tensor(t, dtype=dtype, device=problem.y0.device) for t in grid]) if moves else None
    if problem.grid is not None:
        return [None, None, wanted(grid), wanted(problem.t_eval)]
    return [wanted(problem.t0), wanted(problem.t1), None, wanted(problem.t_eval)]


def _output_times(problem: Problem, outcome: Outcome) -> Tensor:
    """The times of the outputs with the gradients that the user's own have."""
    if isinstance(problem.t_eval, Tensor):
        return problem.t_eval
    t1 = problem.t1
    return t1.unsqueeze(0) if isinstance(t1, Tensor) and t1.requires_grad else outcome.ts


class _Work:
    """What the forward and the backward pass of one solve share."""

    def __init__(self, settings: Discrete, problem: Problem, stats: Stats, inputs: Inputs) -> None:
        self.settings, self.problem, self.stats, self.inputs = settings, problem, stats, inputs
        self.autocast = autocast_state(problem.y0)
        self.recorder: Any = None
        self.outcome: Any = None
        self.gone: Tensor | None = None

    def forward(self, y0: Tensor) -> tuple[Tensor, Tensor]:
        problem = self.problem
        plain = replace(
            problem, y0=y0, t0=_still(problem.t0), t1=_still(problem.t1), grid=_still(problem.grid),
            t_eval=_still(problem.t_eval),
            recorder=Recorder(y0, self.settings.checkpoints),
        )  # fmt: skip
        self.recorder = plain.recorder
        with uncached_autocast(self.autocast):
            outcome = integrate(plain)
        y1, ys = outcome.y1, outcome.ys if problem.t_eval is not None else outcome.y1.new_empty(0)
        if problem.layout.batched:
            self.gone = outcome.status == Status.NON_FINITE.code
            self.gone = self.gone if bool(self.gone.any()) else None
            if self.gone is not None and problem.t_eval is not None:
                ys = torch.where(self.gone[:, None], torch.nan, ys)
        nothing: Any = None  # the outputs belong to autograd from here on
        self.outcome = replace(outcome, y1=nothing, ys=nothing)
        return y1.clone() if y1 is y0 else y1, ys.clone() if ys._base is y0 else ys

    def again(self, y0: Tensor, inputs: list[Tensor], grads: Any) -> list[Any]:
        """The gradients with a graph of their own, which replays do not give."""
        problem = self.problem
        if not problem.retape:
            raise GradientError(
                "gradient='discrete' gives derivatives of first order only (create_graph=True was asked for). Type"
                " gradient='autograd'."
            )
        self.stats.backward = recomputed(self.stats, "discrete")
        times = [_still(t) for t in (problem.t0, problem.t1, problem.grid, problem.t_eval)]
        return on_tape(problem, self.inputs, self.autocast, times, [y0, *_moving(problem), *inputs], grads)

    @property
    def failed(self) -> Any:
        """True, or `(rows, 1)`, where the final state was replaced by NaN."""
        status = self.outcome.status
        return (status > Status.TERMINATED.code).unsqueeze(1) if isinstance(status, Tensor) else status.failed


def _still(t: Any) -> Any:
    """A time or times without a gradient, of the same kind: the forward numbers are to be those of the tape."""
    if isinstance(t, (list, tuple)):
        return [_still(x) for x in t]
    return t.detach() if isinstance(t, Tensor) else t


class _Function(torch.autograd.Function):
    """Forward: the solve. Backward: its steps again, from the last to the first."""

    @staticmethod
    def forward(ctx: Any, work: _Work, y0: Tensor, t0: Any, t1: Any, grid: Any, t_eval: Any, *inputs: Tensor) -> Any:
        ctx.work = work
        ctx.save_for_backward(y0, *inputs)
        ctx.times = [t if t is None else t.detach() for t in (t0, t1, grid, t_eval)]
        return work.forward(y0)

    @staticmethod
    def backward(ctx: Any, *grads_out: Tensor) -> Any:
        y0, *inputs = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, *ctx.work.again(y0, inputs, grads_out)
        sweep = _Sweep(ctx.work, y0, inputs, ctx.times)
        with uncached_autocast(ctx.work.autocast):
            sweep.run(*grads_out)
        totals = [t.total if t is not None else None for t in sweep.times.all]
        grads = [g if need else None for g, need in zip(sweep.totals, ctx.needs_input_grad[6:], strict=True)]
        return None, sweep.gy if ctx.needs_input_grad[1] else None, *totals, *grads


class _Total:
    """The gradient of one tensor of times, summed over the steps."""

    def __init__(self, like: Tensor) -> None:
        self.total = torch.zeros_like(like)

    def __len__(self) -> int:
        return len(self.total)

    def add(self, place: Any, grad: Tensor) -> None:
        if place is ...:
            self.total += grad
        elif isinstance(place, tuple):
            mask, index = place
            index = index[: self.total.ndim]  # output times of all rows alike have one dimension
            self.total.index_put_(index, torch.where(mask, grad, 0.0), accumulate=True)
        else:
            self.total[place] += grad


class _Times:
    """The sums for t0, t1, the grid and the output times; None where no gradient is wanted."""

    def __init__(self, values: list[Any], dtype: torch.dtype) -> None:
        self.all = [None if t is None else _Total(t) for t in values]
        self.t0, self.t1, self.grid, self.t_eval = self.all
        self.dtype = dtype


class _Sweep:
    """The backward pass.

    Attributes:
        gy: gradient of the state reached, all rows.
        totals: gradients of the inputs.
    """

    def __init__(self, work: _Work, y0: Tensor, inputs: list[Tensor], times: list[Any]) -> None:
        self.work, problem = work, work.problem
        self.times = _Times(times, time_dtype(y0.device))
        self.y0, self.strides = y0, work.recorder.strides
        gone = None if work.gone is None or bool(work.gone.all()) else work.gone
        self.inputs = Replayed(problem.field, work.inputs, inputs, gone)
        self.inputs.field.num_calls = 0
        self.totals = [torch.zeros_like(x) for x in inputs]
        self.stages = StageField(self.inputs, self.totals) if work.settings.alive == "stage" else None
        kind = RowReplay if problem.per_row else JointReplay
        self.replay: Any = kind(problem, self.strides, self.times, gone)
        self.gy = torch.zeros_like(y0)
        self.grad_ys: Any = None
        self.steps = 0

    def run(self, grad_y1: Tensor, grad_ys: Tensor) -> None:
        """Go back through all steps."""
        problem, work = self.work.problem, self.work
        failed = work.failed
        self.gy = torch.where(failed, 0.0, grad_y1) if isinstance(failed, Tensor) else grad_y1.clone() * (not failed)
        if problem.t_eval is not None:
            self.grad_ys = grad_ys if work.gone is None else torch.where(work.gone[:, None], 0.0, grad_ys)
        states = work.recorder.states
        if work.gone is None or not bool(work.gone.all()):
            with self.inputs.outer():
                kept = dict(states.kept)
                states.reverse(len(self.strides), self._advance, self._back)
                states.kept = kept  # for another backward pass over the same graph
        self._start_outputs()
        stats = Stats(method=work.stats.method, gradient="discrete", engine="eager")
        stats.num_calls = stats.num_evaluations = self.inputs.field.num_calls
        stats.num_accepted = self.steps
        work.stats.backward = stats

    @torch.no_grad()
    def _advance(self, n: int, state: Tensor) -> Tensor:
        return self.replay.advance(n, state, self.inputs)

    def _back(self, n: int, state: Tensor) -> None:
        """One step on the tape, and its derivative."""
        stride, rows, accepted = self.strides[n], None, None
        if self.work.problem.per_row:
            rows = None if stride.whole else stride.rows
            accepted = stride.accepted.unsqueeze(1)
        gy = self.gy if rows is None else self.gy.index_select(0, rows)
        with torch.enable_grad():
            y = self.replay.state(n, state).detach().requires_grad_()
            values, index, leaves = self.replay.take(n, y, self.inputs, self.stages, self.times)
        cotangents = [gy if accepted is None else torch.where(accepted, gy, 0.0)]
        cotangents += [self.grad_ys[place] for place in index]
        grads = self._derivative(values, [y, *(leaf for leaf, _, _ in leaves), *self.inputs.wanted], cotangents)
        self.steps += 1
        new = torch.zeros_like(gy) if grads[0] is None else grads[0]
        if accepted is not None:
            new = torch.where(accepted, new, gy)
        self.gy = new if rows is None else self.gy.index_copy(0, rows, new)
        for (_, name, place), grad in zip(leaves, grads[1:], strict=False):
            if grad is not None:
                getattr(self.times, name).add(place, grad)
        for total, grad in zip(self.totals, grads[1 + len(leaves) :], strict=True):
            if grad is not None:
                total.add_(grad)

    def _derivative(self, values: list[Tensor], wanted: list[Tensor], cotangents: list[Tensor]) -> Any:
        pairs = [(v, c) for v, c in zip(values, cotangents, strict=True) if v.requires_grad]
        if not pairs:
            return [None] * len(wanted)
        known = self.inputs.listed.union(map(id, wanted))
        refuse_unlisted(pairs[0][0], known)
        return torch.autograd.grad([v for v, _ in pairs], wanted, [c for _, c in pairs], allow_unused=True)

    def _start_outputs(self) -> None:
        """Outputs at t0 that do not move are the initial state."""
        problem = self.work.problem
        if problem.t_eval is None or problem.t_eval.requires_grad:
            return
        if problem.per_row:
            here = self.replay.at == self.replay.t0
            self.gy = self.gy + torch.where(here.unsqueeze(-1), self.grad_ys, 0.0).sum(0)
        else:
            first = self.replay.outputs.start
            if first:
                self.gy = self.gy + self.grad_ys[:first].sum(0)
