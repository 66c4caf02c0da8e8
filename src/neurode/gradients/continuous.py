"""The adjoint ODE of Chen et al. (2018): solved backward beside the state, in memory that does not grow with the steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from neurode._errors import GradientError
from neurode._field import Field
from neurode._loop import Outcome, integrate
from neurode._options import rms
from neurode._problem import Problem
from neurode._solution import Stats
from neurode._state import Layout, number
from neurode.gradients.inputs import find_inputs


@dataclass(frozen=True)
class Continuous:
    """The continuous adjoint, `da/dt = -a df/dy`, with the state solved backward from the end.

    Memory does not depend on the number of steps. The gradient is that of the continuous problem and not of the numbers
    that were computed: it is as wrong as both solves are inaccurate, and a trained field can make it 10-100 % wrong at
    the steps it was trained with. Ask for it by name; the exact strategies are the defaults.

    References:
        R. T. Q. Chen et al. (2018), Neural ordinary differential equations, NeurIPS, appendix B.
    """

    name: str = "continuous"

    def solve(self, problem: Problem, stats: Stats) -> Outcome:
        """Integrate without a tape, and attach the adjoint solve."""
        if not torch.is_grad_enabled():
            return integrate(problem)
        if problem.per_row:
            raise GradientError(
                "gradient='continuous' needs one step size for all rows. Type batch_dim=None, a fixed-step method, or"
                " gradient='autograd'."
            )
        if problem.dense or isinstance(problem.t_eval, str):
            raise GradientError(
                "gradient='continuous' differentiates the outputs at t_eval and the end only. With dense=True or"
                " t_eval='steps' type gradient='autograd'."
            )
        inputs = find_inputs(problem.field, _time(problem, number(problem.t0)), problem.y0, self.name)
        work = _Work(problem, stats)
        y1, ys = _Adjoint.apply(work, problem.y0, problem.t0, problem.t1, problem.t_eval, *inputs)
        ys = y1.unsqueeze(0) if problem.t_eval is None else ys
        ts = work.outcome.ts if problem.t_eval is None else problem.t_eval
        return replace(work.outcome, y1=y1, ys=ys, ts=ts)


def _time(problem: Problem, t: float) -> Tensor:
    return torch.tensor(t, dtype=problem.field.time_dtype, device=problem.y0.device)


class _Work:
    """What the forward and the backward pass of one solve share."""

    def __init__(self, problem: Problem, stats: Stats) -> None:
        self.problem, self.stats = problem, stats
        self.outcome: Any = None

    def forward(self, y0: Tensor) -> Outcome:
        problem = self.problem
        grid = [number(t) for t in problem.grid] if problem.grid is not None else None
        t_eval = None if problem.t_eval is None else problem.t_eval.detach()
        return integrate(
            replace(problem, y0=y0, t0=number(problem.t0), t1=number(problem.t1), grid=grid, t_eval=t_eval)
        )


class _Adjoint(torch.autograd.Function):
    """Forward: the solve. Backward: the adjoint ODE from the last output to the first."""

    @staticmethod
    def forward(ctx: Any, work: _Work, y0: Tensor, t0: Any, t1: Any, t_eval: Any, *inputs: Tensor) -> Any:
        outcome = work.forward(y0)
        ctx.work = work
        ctx.save_for_backward(outcome.y1, outcome.ys, y0, *inputs)
        work.outcome = outcome
        return outcome.y1, outcome.ys

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads_out: Tensor) -> Any:
        grad_y1, grad_ys = grads_out
        y1, ys, y0, *inputs = ctx.saved_tensors
        sweep = _Sweep(ctx.work, inputs)
        wanted = ctx.needs_input_grad
        grad_t1 = sweep.time_gradient(number(sweep.problem.t1), y1, grad_y1) if wanted[3] else None
        grad_times = sweep.run(y0, y1, ys, grad_y1, grad_ys, wanted[4])
        grad_t0 = -sweep.time_gradient(number(sweep.problem.t0), y0, sweep.a) if wanted[2] else None
        sweep.report()
        grads = [g if need else None for g, need in zip(sweep.grads(), wanted[5:], strict=True)]
        return None, sweep.a if wanted[1] else None, grad_t0, grad_t1, grad_times, *grads


class _Sweep:
    """The backward solve: state, adjoint and the gradients of the inputs, as one vector.

    Attributes:
        a: the adjoint at the time reached.
    """

    def __init__(self, work: _Work, inputs: list[Tensor]) -> None:
        self.work, self.problem, self.inputs = work, work.problem, inputs
        self.field = work.problem.field
        y0 = work.problem.y0
        self.shape, self.size = y0.shape, y0.numel()
        self.layout = Layout(None, (torch.Size([2 * self.size + self._extra]),), y0.dtype, y0.device, False)
        self.a = torch.zeros_like(y0.detach())
        self.theta = torch.zeros(self._extra, dtype=y0.dtype, device=y0.device)
        self.stats = Stats(method=work.stats.method, gradient="continuous", engine="eager")
        self.calls_before = self.field.num_calls

    @property
    def _extra(self) -> int:
        return sum(x.numel() for x in self.inputs)

    def run(self, y0: Tensor, y1: Tensor, ys: Tensor, grad_y1: Tensor, grad_ys: Tensor, times_wanted: bool) -> Any:
        """Solve from the end to the start, adding each output's gradient when its time is reached."""
        problem = self.problem
        outputs = [] if problem.t_eval is None else problem.t_eval.detach().tolist()
        t, y = number(problem.t1), y1
        self.a = self.a + grad_y1
        grad_times = torch.zeros(len(outputs), dtype=torch.float64, device=y1.device) if times_wanted else None
        for i in range(len(outputs) - 1, -1, -1):
            self._segment(t, outputs[i], y)
            t, y = outputs[i], ys[i]
            if grad_times is not None:
                grad_times[i] = self.time_gradient(t, y, grad_ys[i])
            self.a = self.a + grad_ys[i]
        self._segment(t, number(problem.t0), y)
        return grad_times

    def _segment(self, t: float, target: float, y: Tensor) -> None:
        if t == target:
            return
        state = torch.cat([y.reshape(-1), self.a.reshape(-1), self.theta])
        field = Field(self._dynamics, self.layout)
        backward = replace(
            self.problem, field=field, layout=self.layout, y0=state, t0=t, t1=target, grid=self._grid(t, target),
            rtol=self._tolerance(self.problem.rtol), atol=self._tolerance(self.problem.atol), norm=self._norm,
            t_eval=None, first_step=None,
        )  # fmt: skip
        outcome = integrate(backward)
        if outcome.status.failed:
            raise GradientError(
                f"the adjoint solve of gradient='continuous' stopped at t = {outcome.t1:.6g}: {outcome.status}. The"
                " field is unstable backward in time; use gradient='autograd'."
            )
        _, a, self.theta = outcome.y1.split([self.size, self.size, self._extra])
        self.a = a.reshape(self.shape)
        self.stats.num_accepted += outcome.num_accepted
        self.stats.num_rejected += outcome.num_rejected
        self.stats.num_evaluations += outcome.num_evaluations

    def _grid(self, t: float, target: float) -> list[float] | None:
        """The forward grid's points between two times, backward."""
        if self.problem.grid is None:
            return None
        low, high = min(t, target), max(t, target)
        inside = [s for s in map(number, self.problem.grid) if low < s < high]
        return [t, *reversed(inside), target]

    def _tolerance(self, tolerance: Any) -> Any:
        """A tolerance for each element of the state holds for its adjoint too; the inputs get the tightest."""
        if not isinstance(tolerance, Tensor):
            return tolerance
        wide = tolerance.expand(self.shape).reshape(-1)
        return torch.cat([wide, wide, wide.min().expand(self._extra)])

    def _norm(self, x: Tensor) -> Tensor:
        """The largest RMS of the three blocks, so that many parameters do not drown the state."""
        return torch.stack([rms(part) for part in x.split([self.size, self.size, self._extra]) if len(part)]).amax()

    def _vjp(self, t: Tensor, y: Tensor, a: Tensor) -> tuple[Tensor, list[Tensor]]:
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            dy = self.field(t, y)
            if not dy.requires_grad:
                return dy.detach(), [torch.zeros_like(x) for x in (y, *self.inputs)]
            grads = torch.autograd.grad(dy, (y, *self.inputs), a, allow_unused=True)
        filled = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, (y, *self.inputs), strict=True)]
        return dy.detach(), filled

    def _dynamics(self, t: Tensor, state: Tensor) -> Tensor:
        y, a = (part.reshape(self.shape) for part in state[: 2 * self.size].split(self.size))
        dy, grads = self._vjp(t, y, a)
        return torch.cat([dy.reshape(-1), *[-g.reshape(-1).to(state.dtype) for g in grads]])

    def time_gradient(self, t: float, y: Tensor, a: Tensor) -> Tensor:
        """`<a, f(t, y)>`: how a value that has the gradient `a` moves when the time of `y` does."""
        with torch.no_grad():
            return (a.conj() * self.field(_time(self.problem, t), y)).sum().real.double()

    def grads(self) -> list[Tensor]:
        """The gradients of the inputs."""
        parts = self.theta.split([x.numel() for x in self.inputs])
        return [
            (part if x.is_complex() or not part.is_complex() else part.real).reshape(x.shape).to(x.dtype)
            for part, x in zip(parts, self.inputs, strict=True)
        ]

    def report(self) -> None:
        """Leave the counts of the backward pass with the solution."""
        self.stats.num_calls = self.field.num_calls - self.calls_before
        self.work.stats.backward = self.stats


__all__ = ["Continuous"]
