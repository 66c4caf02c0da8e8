"""The adjoint ODE of Chen et al. (2018): solved backward beside the state, in memory that does not grow with the steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from neurode._errors import GradientError, InputError
from neurode._loop import Outcome, end_time, integrate, time_dtype
from neurode._options import choose_method
from neurode._problem import Problem
from neurode._solution import Stats, Status
from neurode.control import standins
from neurode.gradients.adjoint import JointPath, RowPath, Sweep, apart
from neurode.gradients.inputs import Inputs, autocast_state, inputs_of, tensors_in, uncached_autocast
from neurode.gradients.jumps import Happenings, stops
from neurode.gradients.values import output_times, values_of
from neurode.output.events import Events
from neurode.stepping import stepper


@dataclass(frozen=True)
class Continuous:
    """The continuous adjoint, `da/dt = -a df/dy`, with the state solved backward from the end.

    Memory does not depend on the number of steps. The gradient is that of the continuous problem and not of the numbers
    that were computed: it is as wrong as both solves are inaccurate, and a trained field can make it 10-100 % wrong at
    the steps it was trained with (`benchmarks/continuous.py`). Ask for it by name; the exact strategies are the defaults.

    With `batch_dim=0` and adaptive steps, every row's adjoint takes steps of its own, and the gradients of what rows share
    are summed over the stages of its accepted steps, for one more evaluation of each. At an event the adjoint jumps, by the
    implicit function theorem for its time and by the derivative of `apply`.

    Args:
        method: method of the backward solve, an explicit one-step method; None for that of the forward solve. A fixed-step
            method walks the forward grid backward.
        rtol, atol: tolerances of an adaptive backward solve; None for those of the forward solve.
        norm: which error an adaptive backward solve controls: `"all"`, the largest RMS of state, adjoint and gradients of
            the inputs; `"seminorm"`, state and adjoint alone, since the rest is an integral that nothing depends on. None is
            `"all"` where the gradients of the inputs are a part of the ODE: in a joint solve without `quadrature`.
        params: the tensors that need a gradient besides `y0`, the times and `args`; None finds them from the graph of `f`.
        interpolate: take the state from the forward solve's interpolants, one of which is kept for every step, in place of
            solving it backward: half the ODE, stable where the field is not, memory in proportion to the steps.
        quadrature: take the gradients of the inputs out of the ODE, and integrate them by Gauss-Legendre quadrature over the
            accepted adjoint steps. The ODE then has the size of the state, whatever the number of parameters.

    References:
        R. T. Q. Chen et al. (2018), Neural ordinary differential equations, NeurIPS, appendix B.
        P. Kidger, R. T. Q. Chen, T. Lyons (2021), "Hey, that's not an ODE": faster ODE adjoints via seminorms, ICML.
        C. Rackauckas et al. (2020), Universal differential equations for scientific machine learning, arXiv:2001.04385, and
        the GaussAdjoint of SciMLSensitivity, whose idea `quadrature` is.

    Example:
        >>> import torch, neurode
        >>> w = torch.tensor(-0.5, requires_grad=True)
        >>> adjoint = neurode.Continuous(method="dopri5", rtol=1e-6, atol=1e-6, norm="seminorm")
        >>> sol = neurode.solve(lambda t, y: w * y, [2.0], (0, 1), method="dopri5", rtol=1e-6, gradient=adjoint)
        >>> round(torch.autograd.grad(sol.y1.sum(), w)[0].item(), 4)
        1.2131
        >>> gauss = neurode.Continuous(interpolate=True, quadrature=True)
        >>> sol = neurode.solve(lambda t, y: w * y, [2.0], (0, 1), method="rk4", steps=20, gradient=gauss)
        >>> round(torch.autograd.grad(sol.y1.sum(), w)[0].item(), 4)
        1.2131
    """

    method: Any = None
    rtol: float | None = None
    atol: float | None = None
    norm: str | None = None
    params: tuple[Tensor, ...] | None = None
    interpolate: bool = False
    quadrature: bool = False

    name = "continuous"
    handles: ClassVar = frozenset({"rows", "events"})
    fused = False  # whether the fused engine gives this gradient

    def __post_init__(self) -> None:
        if self.norm not in (None, "all", "seminorm"):
            raise InputError(f"norm={self.norm!r}; it must be 'all' or 'seminorm'.")
        if self.norm == "all" and self.quadrature:
            raise InputError(
                "Continuous(norm='all', quadrature=True): with quadrature the gradients of the inputs are no part of the ODE,"
                " so that their error cannot be controlled. Type norm='seminorm', or leave norm out."
            )
        for name, value in (("rtol", self.rtol), ("atol", self.atol)):
            if value is not None and not (isinstance(value, int | float) and value >= 0):
                raise InputError(f"{name}={value!r}; it must be a number that is not negative, or None.")
        for name in ("interpolate", "quadrature"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}={getattr(self, name)!r}; it must be True or False.")

    def solve(self, problem: Problem, stats: Stats) -> Outcome:
        """Integrate without a tape, and attach the adjoint solve."""
        if not torch.is_grad_enabled():
            return integrate(problem)
        method = self._backward_method(problem)
        if self.params is None:
            inputs = inputs_of(problem, self.name)
        else:
            inputs = Inputs(tensors_in(problem.field.args), [], list(self.params))
        work = _Work(problem, stats, self, method, inputs)
        found = _Adjoint.apply(work, problem.y0, problem.t0, problem.t1, problem.t_eval, *inputs.all)
        return work.attach(dict(zip(work.names, found, strict=True)))

    def _backward_method(self, problem: Problem) -> Any:
        """The numbers of the backward solve's method."""
        chosen = problem.method
        if self.method is not None:
            chosen, _ = choose_method(self.method, problem.grid is not None, self.rtol or problem.rtol)
        if chosen.kind != "explicit":
            raise InputError(
                f"Continuous(method={chosen.name!r}): the adjoint ODE is solved by an explicit one-step method. Type 'rk4' on a"
                " grid, or 'dopri5'."
            )
        if not chosen.adaptive and problem.grid is None:
            raise InputError(
                f"Continuous(method={chosen.name!r}) takes fixed steps, but the forward solve chooses its own, so that there"
                " is no grid to go back on. Give an adaptive method."
            )
        if self.norm == "all" and apart(problem, chosen):
            raise InputError(
                "Continuous(norm='all') with batch_dim=0: rows go back with steps of their own, and the gradients of what they"
                " share belong to none of them. Type norm='seminorm', or leave norm out."
            )
        return chosen


class _Work:
    """What the forward and the backward pass of one solve share."""

    def __init__(self, problem: Problem, stats: Stats, settings: Continuous, method: Any, inputs: Inputs) -> None:
        self.problem, self.stats, self.settings, self.method = problem, stats, settings, method
        self.inputs, self.autocast = inputs, autocast_state(problem.y0)
        self.outcome: Any = None
        self.path: Any = None
        self.gone: Tensor | None = None
        self.stand: standins.StandIns | None = None
        self.names: list[Any] = []
        self.happenings = Happenings() if problem.events else None

    def forward(self, y0: Tensor) -> tuple[Tensor, ...]:
        """Solve without a tape."""
        problem = self.problem
        times = {name: _still(getattr(problem, name)) for name in ("t0", "t1", "grid", "t_eval")}
        plain = replace(problem, y0=y0, dense=self.settings.interpolate, recorder=self.happenings, **times)
        with uncached_autocast(self.autocast):
            outcome = integrate(plain)
        if outcome.pieces is not None and outcome.pieces.pieces:
            kind = RowPath if apart(problem, self.method) else JointPath
            self.path = kind(plain, outcome.pieces)
        if isinstance(outcome.status, Tensor):
            failed = outcome.status > Status.TERMINATED.code
            self.gone = failed if bool(failed.any()) else None
            if self.gone is not None and not bool(self.gone.all()):
                self.stand = standins.StandIns.of(plain, self.gone, stepper(problem.method).remembers)
        values, _ = values_of(problem, outcome, None, y0, None)
        self.names = list(values)
        nothing: Any = None  # the outputs belong to autograd from here on
        self.outcome = replace(outcome, y1=nothing, ys=nothing, pieces=None)
        return tuple(values.values())

    def attach(self, values: dict[Any, Tensor]) -> Outcome:
        """The outcome of the forward pass with the values that autograd knows."""
        problem, outcome, y1 = self.problem, self.outcome, values["y1"]
        times = [values["event t", i] for i in range(len(outcome.events))]
        reached = outcome.t1 if self.happenings is None else self.happenings.reached(outcome.t1, times)
        reached = reached if self.gone is None else torch.where(self.gone, outcome.t1, reached)
        end = end_time(problem, outcome.status, reached)
        events = tuple(replace(e, t=times[i], y=values["event y", i]) for i, e in enumerate(outcome.events))
        self.outcome = replace(outcome, events=())
        ys, ts = values.get("ys", y1.unsqueeze(0)), output_times(problem, outcome, end)
        return replace(outcome, y1=y1, ys=ys, ts=ts, t1=end, events=events)

    @property
    def lost(self) -> bool:
        """Whether nothing of the solve is left to differentiate."""
        if self.gone is not None:
            return bool(self.gone.all())
        return not isinstance(self.outcome.status, Tensor) and self.outcome.status.failed

    def events(self) -> Events | None:
        """The events of the problem, to be found again."""
        problem = self.problem
        if not problem.events:
            return None
        start = torch.as_tensor(problem.t0, dtype=time_dtype(problem.y0.device), device=problem.y0.device)
        start = start.detach().reshape(-1)
        return Events(problem, start, torch.ones_like(start))

    def at_t1(self, grad: Tensor) -> Tensor:
        """The gradient of t1, which has none where an event ended the solve."""
        if not self.problem.events:
            return grad
        status = self.outcome.status
        ended = status == Status.TERMINATED.code if isinstance(status, Tensor) else status is Status.TERMINATED
        return torch.where(ended, 0.0, grad) if isinstance(ended, Tensor) else grad * (not ended)


def _still(t: Any) -> Any:
    """A time or times without a gradient."""
    return [_still(x) for x in t] if isinstance(t, list) else t.detach() if isinstance(t, Tensor) else t


def _like(grad: Tensor | None, time: Any) -> Tensor | None:
    """The gradient of a time that is the same for all rows: the sum of theirs."""
    return grad if grad is None or grad.ndim == time.ndim else grad.sum(-1)


class _Adjoint(torch.autograd.Function):
    """Forward: the solve. Backward: the adjoint ODE from the last output to the first."""

    @staticmethod
    def forward(ctx: Any, work: _Work, y0: Tensor, t0: Any, t1: Any, t_eval: Any, *inputs: Tensor) -> Any:
        values = work.forward(y0)
        ctx.work = work
        ctx.save_for_backward(*values, y0, *inputs)
        return values

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
        work, wanted, problem = ctx.work, ctx.needs_input_grad, ctx.work.problem
        names = work.names
        saved = ctx.saved_tensors
        y0, *inputs = saved[len(names) :]
        values, grads = (dict(zip(names, tensors, strict=False)) for tensors in (saved, grads_out))
        sweep = Sweep(problem, work.settings, work.method, work.inputs, inputs, work.path, work.stand, work.events())
        grad_t0 = grad_t1 = grad_times = None
        if not work.lost:
            with sweep.replayed.outer():
                reached = work.outcome.t1 if problem.events else problem.t1
                start, end = sweep._time(problem.t0), sweep._time(reached)
                if wanted[3]:
                    y1, grad_y1 = sweep.played(values["y1"]), sweep.played(grads["y1"], 0.0)
                    grad_t1 = work.at_t1(sweep.time_gradient(end, y1, grad_y1))
                times = [values["event t", i] for i in range(len(problem.events))]
                back = stops(problem, reached, work.happenings, times, sweep.apart, sweep.gone)
                grad_times = sweep.run(back, reached, values, grads)
                if wanted[2]:
                    grad_t0 = -sweep.time_gradient(start, sweep.played(y0), sweep.played(sweep.a, 0.0))
        work.stats.backward = sweep.report(work.method.name)
        grads = [g if need else None for g, need in zip(sweep.totals(), wanted[5:], strict=True)]
        times = [
            _like(grad, getattr(problem, name))
            for name, grad in (("t0", grad_t0), ("t1", grad_t1), ("t_eval", grad_times if wanted[4] else None))
        ]
        return None, sweep.played(sweep.a, 0.0) if wanted[1] else None, *times, *grads


__all__ = ["Continuous"]
