"""The adjoint ODE of Chen et al. (2018): solved backward beside the state, in memory that does not grow with the steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from neurode._errors import GradientError, InputError
from neurode._field import Field
from neurode._loop import Outcome, end_time, integrate
from neurode._options import choose_method, rms
from neurode._problem import Problem
from neurode._solution import Stats
from neurode._state import Layout, number
from neurode.gradients.inputs import (
    Inputs,
    Replayed,
    autocast_state,
    find_inputs,
    refuse_unlisted,
    tensors_in,
    uncached_autocast,
)


@dataclass(frozen=True)
class Continuous:
    """The continuous adjoint, `da/dt = -a df/dy`, with the state solved backward from the end.

    Memory does not depend on the number of steps. The gradient is that of the continuous problem and not of the numbers
    that were computed: it is as wrong as both solves are inaccurate, and a trained field can make it 10-100 % wrong at
    the steps it was trained with. Ask for it by name; the exact strategies are the defaults.

    Args:
        method: method of the backward solve; None for that of the forward solve. A fixed-step method walks the forward
            grid backward.
        rtol, atol: tolerances of an adaptive backward solve; None for those of the forward solve.
        norm: which error an adaptive backward solve controls: `"all"`, the largest RMS of state, adjoint and gradients of
            the inputs; `"seminorm"`, state and adjoint alone, since the rest is an integral that nothing depends on.
        params: the tensors that need a gradient besides `y0`, the times and `args`; None finds them from the graph of `f`.

    References:
        R. T. Q. Chen et al. (2018), Neural ordinary differential equations, NeurIPS, appendix B.
        P. Kidger, R. T. Q. Chen, T. Lyons (2021), "Hey, that's not an ODE": faster ODE adjoints via seminorms, ICML.

    Example:
        >>> import torch, neurode
        >>> w = torch.tensor(-0.5, requires_grad=True)
        >>> adjoint = neurode.Continuous(method="dopri5", rtol=1e-6, atol=1e-6, norm="seminorm")
        >>> sol = neurode.solve(lambda t, y: w * y, [2.0], (0, 1), method="dopri5", rtol=1e-6, gradient=adjoint)
        >>> round(torch.autograd.grad(sol.y1.sum(), w)[0].item(), 4)
        1.2131
    """

    method: Any = None
    rtol: float | None = None
    atol: float | None = None
    norm: str = "all"
    params: tuple[Tensor, ...] | None = None

    name = "continuous"
    handles: ClassVar = frozenset[str]()
    fused = False  # whether the fused engine gives this gradient

    def __post_init__(self) -> None:
        if self.norm not in ("all", "seminorm"):
            raise InputError(f"norm={self.norm!r}; it must be 'all' or 'seminorm'.")
        for name, value in (("rtol", self.rtol), ("atol", self.atol)):
            if value is not None and not (isinstance(value, int | float) and value >= 0):
                raise InputError(f"{name}={value!r}; it must be a number that is not negative, or None.")

    def solve(self, problem: Problem, stats: Stats) -> Outcome:
        """Integrate without a tape, and attach the adjoint solve."""
        if not torch.is_grad_enabled():
            return integrate(problem)
        backward_method = self._backward_method(problem)
        if self.params is None:
            inputs = find_inputs(problem.field, _time(problem, number(problem.t0)), problem.y0, self.name)
        else:
            inputs = Inputs(tensors_in(problem.field.args), [], list(self.params))
        work = _Work(problem, stats, self, backward_method, inputs)
        y1, ys = _Adjoint.apply(work, problem.y0, problem.t0, problem.t1, problem.t_eval, *inputs.all)
        ys = y1.unsqueeze(0) if problem.t_eval is None else ys
        ts = work.outcome.ts if problem.t_eval is None else problem.t_eval
        return replace(work.outcome, y1=y1, ys=ys, ts=ts, t1=end_time(problem, work.outcome.status, work.outcome.t1))

    def _backward_method(self, problem: Problem) -> Any:
        """The numbers of the backward solve's method."""
        if self.method is None:
            return problem.method
        chosen, _ = choose_method(self.method, problem.grid is not None, self.rtol or problem.rtol)
        if not chosen.adaptive and problem.grid is None:
            raise InputError(
                f"Continuous(method={chosen.name!r}) takes fixed steps, but the forward solve chooses its own, so that there"
                " is no grid to go back on. Give an adaptive method."
            )
        return chosen


def _time(problem: Problem, t: float) -> Tensor:
    return torch.tensor(t, dtype=problem.field.time_dtype, device=problem.y0.device)


class _Work:
    """What the forward and the backward pass of one solve share."""

    def __init__(self, problem: Problem, stats: Stats, settings: Continuous, method: Any, inputs: Inputs) -> None:
        self.problem, self.stats, self.settings, self.method = problem, stats, settings, method
        self.inputs, self.autocast = inputs, autocast_state(problem.y0)
        self.outcome: Any = None

    def forward(self, y0: Tensor) -> Outcome:
        problem = self.problem
        grid = [number(t) for t in problem.grid] if problem.grid is not None else None
        t_eval = None if problem.t_eval is None else problem.t_eval.detach()
        plain = replace(problem, y0=y0, t0=number(problem.t0), t1=number(problem.t1), grid=grid, t_eval=t_eval)
        with uncached_autocast(self.autocast):
            return integrate(plain)


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
    def backward(ctx: Any, *grads_out: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise GradientError(
                "gradient='continuous' gives derivatives of first order only (create_graph=True was asked for). Type"
                " gradient='autograd'."
            )
        with uncached_autocast(ctx.work.autocast):
            return _Adjoint.sweep(ctx, *grads_out)

    @staticmethod
    def sweep(ctx: Any, *grads_out: Tensor) -> Any:
        """The backward pass, in the autocast of the forward one."""
        grad_y1, grad_ys = grads_out
        y1, ys, y0, *inputs = ctx.saved_tensors
        sweep = _Sweep(ctx.work, inputs)
        wanted = ctx.needs_input_grad
        with sweep.replayed.outer():
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
        self.work, self.problem = work, work.problem
        self.replayed = Replayed(work.problem.field, work.inputs, inputs)
        self.field, self.inputs = self.replayed.field, self.replayed.wanted
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
            method=self.work.method, rtol=self._tolerance("rtol"), atol=self._tolerance("atol"), norm=self._norm,
            t_eval=None, first_step=None, callbacks=None,
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
        if self.problem.grid is None or self.work.method.adaptive:
            return None
        low, high = min(t, target), max(t, target)
        inside = [s for s in map(number, self.problem.grid) if low < s < high]
        return [t, *reversed(inside), target]

    def _tolerance(self, name: str) -> Any:
        """A tolerance for each element of the state holds for its adjoint too; the inputs get the tightest."""
        own = getattr(self.work.settings, name)
        tolerance = getattr(self.problem, name) if own is None else own
        if not isinstance(tolerance, Tensor):
            return tolerance
        wide = tolerance.expand(self.shape).reshape(-1)
        return torch.cat([wide, wide, wide.min().expand(self._extra)])

    def _norm(self, x: Tensor) -> Tensor:
        """The largest RMS of the three blocks, so that many parameters do not drown the state; or of the first two."""
        blocks = x.split([self.size, self.size, self._extra])
        blocks = blocks[:2] if self.work.settings.norm == "seminorm" else blocks
        return torch.stack([rms(block) for block in blocks if len(block)]).amax()

    def _vjp(self, t: Tensor, y: Tensor, a: Tensor) -> tuple[Tensor, list[Tensor]]:
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            dy = self.field(t, y)
            refuse_unlisted(dy, self.replayed.listed | {id(y)})
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
