"""`gradient="auto"`: among the strategies that give the same gradient of the same numbers, the fastest that fits `memory`."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from neurode._errors import GradientError, InputError, UnknownOptionError, did_you_mean
from neurode._loop import Outcome
from neurode._problem import Problem
from neurode._solution import Stats
from neurode._state import is_transformed, number, unreadable
from neurode.gradients.autograd import Autograd
from neurode.gradients.continuous import Continuous
from neurode.gradients.discrete import Discrete
from neurode.gradients.features import refuse
from neurode.gradients.inputs import inputs_of
from neurode.gradients.rehearsal import rehearse, traceless
from neurode.gradients.reversible import Retrace
from neurode.stepping import COUPLED, stepper

STRATEGIES: dict[str, Any] = {
    "autograd": Autograd(),
    "discrete": Discrete(),
    "reversible": Retrace(),
    "continuous": Continuous(),
}
PLACES = 32  # for states: with as many, 561 steps are gone back with each taken twice more at the most
STEP_BYTES = 25  # of a row and step with times of its own: two float64 times, its number and a verdict


def choose(gradient: Any, problem: Problem) -> tuple[Any, str]:
    """The strategy for a problem, and what to say of it in the statistics.

    Args:
        gradient: a name, a strategy, or `"auto"`.
        problem: the problem to be differentiated; with `memory`, if the user gave any.

    Raises:
        UnknownOptionError: no strategy has that name.
        InputError: it is neither a name nor a strategy, or one that takes no `memory=`.
        GradientError: gradients are on and the strategy does not go through something that the problem has.
    """
    strategy, note = _named(gradient)
    if problem.memory is not None:
        strategy, note = _fitted(gradient, strategy), note
    if torch.is_grad_enabled() and gradient != "auto":
        refuse(strategy, problem, STRATEGIES.values())
    return strategy, note


def _named(gradient: Any) -> tuple[Any, str]:
    if gradient == "auto":
        return STRATEGIES["autograd"], "autograd (auto: exact, on PyTorch's tape)"
    if isinstance(gradient, str):
        if gradient not in STRATEGIES:
            raise UnknownOptionError(
                f"gradient={gradient!r} is not a strategy.{did_you_mean(gradient, STRATEGIES)} It is one of: auto,"
                f" {', '.join(STRATEGIES)}."
            )
        return STRATEGIES[gradient], gradient
    if not hasattr(gradient, "solve"):
        raise InputError(f"gradient is of type {type(gradient).__name__}; give a name such as 'autograd'.")
    return gradient, gradient.name


def _fitted(gradient: Any, strategy: Any) -> Fitted:
    """What chooses within `memory`, refused beside a strategy that keeps what it keeps."""
    if gradient not in ("auto", "discrete"):
        name = repr(gradient) if isinstance(gradient, str) else f"an object of type {type(strategy).__name__}"
        raise InputError(
            f"memory= chooses what gradient='auto' or gradient='discrete' keeps; gradient is {name}. Leave memory= out, or"
            " type gradient='auto'."
        )
    return Fitted(exact=gradient == "discrete")


@dataclass(frozen=True)
class Fitted:
    """Chooses when the problem is known, then leaves the solve to what it chose.

    Args:
        exact: whether the strategy is `"discrete"` by name, so that `memory` says only what it keeps.
    """

    exact: bool = False

    name = "discrete"
    handles = Discrete.handles

    def solve(self, problem: Problem, stats: Stats) -> Outcome:
        """Choose, say what and why in `stats.gradient`, and solve."""
        plan = self._plan(problem)
        stats.gradient = f"{_words(plan.strategy)} ({self._by}: {plan.reason})"
        if plan.over:
            warnings.warn(f"memory= cannot be kept: {plan.reason}.", RuntimeWarning, stacklevel=6)
        return plan.strategy.solve(replace(problem, retape=not self.exact), stats)

    @property
    def _by(self) -> str:
        return "memory=" if self.exact else "auto"

    def _plan(self, problem: Problem) -> Plan:
        tape: Any = Discrete() if self.exact else Autograd()
        if not torch.is_grad_enabled():
            return Plan(tape, "gradients are off")
        if problem.y0.numel() == 0:
            return Plan(tape, "there is nothing to solve")
        if not self.exact and (unreadable(problem.y0) or is_transformed()):
            return Plan(tape, "torch.compile and torch.func transforms need PyTorch's tape")
        cost = Cost.of(problem)
        if not self.exact:
            if cost.on_tape <= cost.memory:
                return Plan(tape, f"{_bytes(cost.on_tape)} of tape fit {_bytes(cost.memory)}")
            refused = _refusal(problem)
            if refused:
                return Plan(tape, f"{cost.too_large}, but {refused.rstrip('.')}", over=cost.known)
        return cost.plan()


@dataclass(frozen=True)
class Plan:
    """A strategy, why, and whether it takes more than the user gave."""

    strategy: Any
    reason: str
    over: bool = False


@dataclass(frozen=True)
class Cost:
    """What the strategies would keep, in bytes; bounds from above.

    Attributes:
        memory: what may be kept.
        state: of one state, with what a step needs beside it: a coupling's second state, Adams' past derivatives.
        steps: number of steps; of an adaptive method the most that it may take.
        known: whether it takes as many.
        step: of one step on the tape.
        evaluation: of one evaluation of `f` on the tape, and of what its derivative has under way.
        apart: of one step however it is gone back: its times, and outputs that interpolate.
        inputs: of the gradients of one step with respect to what `f` depends on, and of their sums.
    """

    memory: int
    state: int
    steps: int
    known: bool
    step: int
    evaluation: int
    apart: int
    inputs: int

    @classmethod
    def of(cls, problem: Problem) -> Cost:
        """Measure one evaluation of `f`, and count."""
        y0, method = problem.y0, problem.method
        evaluation = rehearse(problem.field, _start(problem), y0)
        one, rows = y0.numel() * y0.element_size(), len(y0) if problem.per_row else 0
        state = one * _carried(method)
        kept = one * (2 if _times_move(problem) else 1)  # a stage's state; its derivative, where times move
        stages = method.num_evaluations_per_step
        if problem.t_eval is not None or problem.dense or problem.events:
            stages += getattr(method, "num_dense_evaluations", 0)
            kept += one  # an interpolant keeps the derivatives
        assert problem.memory is not None
        return cls(
            memory=problem.memory,
            state=state,
            steps=problem.max_steps if problem.grid is None else max(1, len(problem.grid) - 1),
            known=problem.grid is not None,
            step=stages * (evaluation.tape + kept) + state + rows * 8 * (stages + 4),
            evaluation=max(evaluation.tape, evaluation.peak) + kept,
            apart=rows * STEP_BYTES + (one if isinstance(problem.t_eval, str) else 0),
            inputs=2 * _input_bytes(problem),
        )

    @property
    def on_tape(self) -> int:
        """All steps on the tape."""
        return self.steps * (self.step + self.apart)

    @property
    def too_large(self) -> str:
        """Why not the tape, in words."""
        if self.known:
            return f"{_bytes(self.on_tape)} of tape do not fit {_bytes(self.memory)}"
        return f"an adaptive method does not say how many steps of {_bytes(self.step)} of tape it will take"

    def plan(self) -> Plan:
        """Replays: one step alive where that leaves enough places for states, else one stage."""
        places = self._places(self.step)
        alive: str = "step"
        if places < min(self.steps, PLACES):
            places, alive = self._places(self.evaluation + 4 * self.state), "stage"
        if places >= self.steps:
            kept = f"{_bytes(self._all_states)} of states do" if self.known else "as many states as max_steps fit"
            return Plan(Discrete(alive), f"{self.too_large}; {kept}")
        if places < 1:
            needed = _bytes(self.memory + (1 - places) * self.state)
            least = f"{needed} are the least that any strategy keeps, more than {_bytes(self.memory)}"
            return Plan(Discrete(alive, 1), least, over=True)
        return Plan(Discrete(alive, places), f"{self.too_large}; {places:,} states of {_bytes(self.state)} fit")

    def _places(self, alive: int) -> int:
        """How many states may be kept beside what is alive; one more is under way."""
        steps = self.steps if self.known else 0
        left = self.memory - self.inputs - self.evaluation - alive - steps * self.apart
        return left // self.state - 1

    @property
    def _all_states(self) -> int:
        return (self.steps + 1) * self.state + self.steps * self.apart


def _carried(method: Any) -> int:
    """How many tensors of the state's size a step starts from."""
    if method.kind in COUPLED:
        return 2
    return method.num_history if stepper(method).remembers else 1


def _start(problem: Problem) -> Tensor:
    """The time at which the solve begins, as `f` is given it."""
    t0 = problem.t0.detach() if problem.per_row else number(problem.t0)
    return torch.as_tensor(t0, dtype=problem.field.time_dtype, device=problem.y0.device)


def _times_move(problem: Problem) -> bool:
    grid = problem.grid if isinstance(problem.grid, list) else [problem.grid]
    return any(isinstance(t, Tensor) and t.requires_grad for t in (problem.t0, problem.t1, problem.t_eval, *grid))


def _input_bytes(problem: Problem) -> int:
    """Bytes of the tensors that `f` depends on, as far as it is a module; they are the size of a step's gradients."""
    f = getattr(problem.field.f, "__self__", problem.field.f)
    parameters = f.parameters() if isinstance(f, torch.nn.Module) else []
    return sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)


def _refusal(problem: Problem) -> str:
    """Why the problem cannot be replayed; empty where it can."""
    try:
        refuse(Discrete(), problem, STRATEGIES.values())
        with traceless(problem.y0):
            inputs_of(problem, "discrete")
    except GradientError as error:
        return str(error)
    return ""


def _words(strategy: Any) -> str:
    if not isinstance(strategy, Discrete):
        return strategy.name
    alive = ", one stage alive" if strategy.alive == "stage" else ""
    kept = "" if strategy.checkpoints is None else f", at most {strategy.checkpoints:,} states"
    return f"discrete{alive}{kept}"


def _bytes(number: int) -> str:
    """A size with three digits.

    Example:
        >>> _bytes(512), _bytes(3_072), _bytes(8_249_000)
        ('512 bytes', '3.07 KB', '8.25 MB')
    """
    if number < 1000:
        return f"{number} bytes"
    power = min(4, int(math.log10(number) / 3))
    return f"{number / 1000**power:.3g} {('KB', 'MB', 'GB', 'TB')[power - 1]}"
