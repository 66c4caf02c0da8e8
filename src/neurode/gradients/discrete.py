"""The exact derivative of the steps that were taken: each is taken again, backward, and only one is on the tape at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from neurode._errors import GradientError, InputError
from neurode._loop import Outcome, integrate, time_dtype
from neurode._problem import Problem
from neurode._solution import Stats, Status
from neurode.control import standins
from neurode.gradients.again import on_tape, recomputed
from neurode.gradients.inputs import Inputs, Replayed, autocast_state, inputs_of, uncached_autocast
from neurode.gradients.record import Recorder
from neurode.gradients.replay import JointReplay, RowReplay
from neurode.gradients.sweep import Sweep
from neurode.gradients.totals import Times, moving_times, still
from neurode.gradients.values import Attach, Parts, values_of
from neurode.stepping import COUPLED, stepper


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
    handles: ClassVar = frozenset({"events", "dense", "steps", "rows", "adams", "coupled", "symplectic"})

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
        work = _Work(self, problem, stats, inputs_of(problem, self.name))
        values = _Function.apply(work, problem.y0, *work.moving, *work.inputs.all)
        return work.attach(dict(zip(work.names, values, strict=True)))


class _Work:
    """What the forward and the backward pass of one solve share.

    Attributes:
        moving: t0, t1, grid and output times, None for those that need no gradient.
        names: what the values are that autograd has been given.
        parts: which of them are parts of interpolants.
        record: the steps.
        gone: `(rows,)`, True for rows that failed, or True for a joint solve that did; or None.
        stand: who plays the rows that failed; None where none did, or all.
    """

    def __init__(self, settings: Any, problem: Problem, stats: Stats, inputs: Inputs) -> None:
        self.settings, self.problem, self.stats, self.inputs = settings, problem, stats, inputs
        self.autocast = autocast_state(problem.y0)
        self.moving = moving_times(problem)
        self.outcome: Any = None
        self.gone: Tensor | bool | None = None
        self.stand: standins.StandIns | None = None
        self.names: list[Any] = []
        self.parts = Parts({}, [])
        self.record: Any = None

    def forward(self, y0: Tensor) -> tuple[Tensor, ...]:
        """Solve without a tape; returns the values that autograd is given."""
        problem = self.problem
        self.record = self._recorder(y0)
        plain = replace(
            problem, y0=y0, t0=still(problem.t0), t1=still(problem.t1), grid=still(problem.grid),
            t_eval=still(problem.t_eval), recorder=self.record,
        )  # fmt: skip
        with uncached_autocast(self.autocast):
            outcome = integrate(plain)
        self.gone = standins.failed(outcome.status)
        if self.lost:
            outcome = replace(outcome, lost=True)
        elif isinstance(self.gone, Tensor):
            self.stand = standins.StandIns.of(plain, self.gone, stepper(problem.method).remembers)
            if outcome.pieces is not None:
                reached = standins.Reached.of(outcome.pieces)
                outcome = replace(outcome, lost=standins.Lost(self.gone, reached, problem.t0, outcome.t1))
        values, self.parts = values_of(problem, outcome, self.record, y0, self._played)
        self.names = list(values)
        nothing: Any = None  # the states belong to autograd from here on
        self.outcome = replace(outcome, y1=nothing, ys=nothing)
        return tuple(values.values())

    def _recorder(self, y0: Tensor) -> Any:
        """What notes the steps."""
        problem = self.problem
        history, coupled = stepper(problem.method).remembers, problem.method.kind in COUPLED
        return Recorder(y0, self.settings.checkpoints, history, coupled, problem.dense)

    def attach(self, values: dict[Any, Tensor]) -> Outcome:
        """The outcome of the forward pass with the values that autograd knows."""
        replay = self._replay(None, Times(self.moving, values.get("catches"), time_dtype(self.problem.y0.device)))
        attached = Attach(self.problem, self.outcome, self.record, replay, values, self.parts, self._played).all()
        self.outcome = replace(self.outcome, events=(), pieces=None)
        self.record.intervals.clear()
        return attached

    def sweep(self, y0: Tensor, inputs: list[Tensor], grads: list[Tensor | None]) -> Sweep:
        """Make the backward pass ready."""
        named = dict(zip(self.names, grads, strict=True))
        catches = None
        if self.record.catches:
            catches = named["catches"]
            catches = torch.zeros_like(torch.stack(self.record.catches)) if catches is None else catches.clone()
        times = Times([t if t is None else t.detach() for t in self.moving], catches, time_dtype(y0.device))
        replayed = Replayed(self.problem.field, self.inputs, inputs, self.stand)
        replay = self._replay(replayed, times, self.stand)
        return self._sweep(replay, y0, named)

    def _sweep(self, replay: Any, y0: Tensor, grads: dict[Any, Any]) -> Sweep:
        """The way back over the steps."""
        return Sweep(replay, self.record.states, y0, grads, self._failed, self.settings.alive == "stage")

    @property
    def lost(self) -> bool:
        """Whether everything failed, so that nothing is left to differentiate."""
        return bool(self.gone.all()) if isinstance(self.gone, Tensor) else self.gone is not None

    @property
    def _played(self) -> Tensor | None:
        return None if self.stand is None else self.stand.gone

    def _replay(self, inputs: Any, times: Times, stand: standins.StandIns | None = None) -> Any:
        kind = RowReplay if self.problem.per_row else JointReplay
        return kind(self.problem, inputs, self.record, times, stand, self.parts.of_step)

    def again(self, y0: Tensor, inputs: list[Tensor], grads: list[Any]) -> list[Any]:
        """The gradients with a graph of their own, which replays do not give."""
        problem = self.problem
        if not problem.retape:
            raise GradientError(
                "gradient='discrete' gives derivatives of first order only (create_graph=True was asked for). Type"
                " gradient='autograd'."
            )
        given = dict(zip(self.names, grads, strict=True))
        if any(given[name] is not None for name in given if name == "catches" or name[0] == "piece"):
            raise GradientError(
                "second derivatives through dense output, or through the time of an event that changed the course, need"
                " PyTorch's tape. Type gradient='autograd'."
            )
        names = [name for name in self.names if name != "catches" and name[0] != "piece"]
        read = lambda outcome: [values_of(problem, outcome, None, y0, None)[0][name] for name in names]
        self.stats.backward = recomputed(self.stats, "discrete")
        times = [still(t) for t in (problem.t0, problem.t1, problem.grid, problem.t_eval)]
        xs = [y0, *self.moving, *inputs]
        return on_tape(problem, self.inputs, self.autocast, times, xs, [given[name] for name in names], read)

    @property
    def _failed(self) -> Any:
        """True, or `(rows, 1)`, where the final state was replaced by NaN."""
        status = self.outcome.status
        return (status > Status.TERMINATED.code).unsqueeze(1) if isinstance(status, Tensor) else status.failed

    def report(self, sweep: Sweep) -> None:
        """Leave the counts of the backward pass with the solution."""
        stats = Stats(method=self.stats.method, gradient=self.settings.name, engine="eager")
        stats.num_calls = stats.num_evaluations = sweep.inputs.field.num_calls
        stats.num_accepted = sweep.steps
        self.stats.backward = stats


class _Function(torch.autograd.Function):
    """Forward: the solve. Backward: its steps again, from the last to the first."""

    @staticmethod
    def forward(ctx: Any, work: _Work, y0: Tensor, t0: Any, t1: Any, grid: Any, t_eval: Any, *inputs: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.work = work
        ctx.save_for_backward(y0, *inputs)
        return work.forward(y0)

    @staticmethod
    def backward(ctx: Any, *grads_out: Tensor | None) -> Any:
        y0, *inputs = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, *ctx.work.again(y0, inputs, list(grads_out))
        sweep = ctx.work.sweep(y0, inputs, list(grads_out))
        if not ctx.work.lost:
            with uncached_autocast(ctx.work.autocast):
                sweep.run()
        ctx.work.report(sweep)
        grads = [g if need else None for g, need in zip(sweep.totals, ctx.needs_input_grad[6:], strict=True)]
        return None, sweep.gy if ctx.needs_input_grad[1] else None, *sweep.times.grads, *grads


__all__ = ["Discrete"]
