"""Which engine takes a problem: the fused one where it can and where it pays, else the eager one; and why.

The choice never depends on timing: on `f`, on shapes and dtypes, on the gradient asked for, on what surrounds the call, on
a stated cost model (`fused/cost.py`), and for plain functions on how often their code has been evaluated.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import replace
from types import CodeType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from neurode import gradients
from neurode._errors import EngineError, InputError
from neurode._loop import Outcome
from neurode._problem import Problem
from neurode._solution import Stats
from neurode._state import unreadable
from neurode._times import as_time
from neurode.fused.refusal import CannotLower, FieldRaises

if TYPE_CHECKING:
    from neurode.fused.explain import Explanation

ENGINES = ("auto", "eager", "fused")
# A plain function is captured once its code was evaluated so often: capturing costs what some thousand evaluations of a
# small function do, so a one-off costs nothing and a loop wins.
CAPTURE_AFTER = 1_000
_evaluated: weakref.WeakKeyDictionary[CodeType, int] = weakref.WeakKeyDictionary()


def check(engine: Any) -> None:
    """Refuse an unknown engine."""
    if engine not in ENGINES:
        raise InputError(f"engine={engine!r}; it must be one of {', '.join(map(repr, ENGINES))}.")


def run(problem: Problem, engine: str, gradient: Any, stats: Stats) -> Outcome:
    """Solve a problem on the engine and with the gradient asked for.

    Args:
        problem: the strict form.
        engine: `"auto"`, `"eager"` or `"fused"`.
        gradient: a strategy, its name, or `"auto"`.
        stats: gets what was chosen, and why.

    Raises:
        EngineError: `engine="fused"` cannot take the problem; where `f` fails on any engine, its own error instead.
    """
    strategy, note = gradients.choose(gradient, problem)
    reason = "asked for" if engine == "eager" else _ahead_of_capture(problem, engine, gradient, strategy)
    if not reason:
        try:
            return _fused(problem, engine, gradient, stats)
        except CannotLower as error:
            if engine == "fused" and isinstance(error, FieldRaises):
                _show_own_error(problem)
            reason = str(error)
    if engine == "fused":
        raise EngineError(
            f"engine='fused' cannot take this solve: {reason}. Type engine='auto' to use it where it can serve, or"
            " engine='eager'."
        )
    stats.engine, stats.gradient = f"eager ({reason})", note
    outcome = strategy.solve(problem, stats)
    _note(problem)
    return outcome


def _ahead_of_capture(problem: Problem, engine: str, gradient: Any, strategy: Any) -> str:
    """Why the eager engine takes a problem, as far as that can be said without looking at what f does."""
    if unreadable(problem.y0):
        return "torch.compile or a torch.func transform surrounds the solve"
    differs = torch.is_grad_enabled() or getattr(strategy, "own_scheme", False)  # then without gradients too
    if differs and gradient != "auto" and not getattr(strategy, "fused", False):
        return f"gradient={getattr(strategy, 'name', strategy)!r} goes through PyTorch"
    if engine == "fused":
        return ""
    code = plain_code(problem.field.f)
    if code is not None and _evaluated.get(code, 0) < CAPTURE_AFTER:
        return f"a plain function is captured once it was evaluated {CAPTURE_AFTER:,} times, which this one was not yet"
    return ""


def _fused(problem: Problem, engine: str, gradient: Any, stats: Stats) -> Outcome:
    from neurode.fused import run as fused

    stats.gradient = "discrete (auto: exact, steps replayed by the fused engine)" if gradient == "auto" else "discrete"
    tape = gradients.of_native if gradient == "auto" else None
    return fused.solve(problem, stats, tape, choose=engine == "auto")


def _show_own_error(problem: Problem) -> None:
    """An `f` that fails on every engine raises its own error here: no other engine would help its user."""
    from neurode.fused.programs import evaluate

    field, y0 = problem.field, problem.y0
    evaluate(field, as_time(problem.t0, field.time_dtype, y0.device), y0)


def explain(f: Any, y0: Any, *, args: tuple[Any, ...] = (), batch_dim: int | None = None) -> Explanation:
    """Say which engine `engine="auto"` takes for a vector field, and why, and show the program that the fused one runs.

    Args:
        f: the vector field, as `neurode.solve` takes it.
        y0: an initial state.
        args: further arguments of `f`.
        batch_dim: as in `neurode.solve`.

    Returns:
        An `Explanation`: `engine`, `reason`, `program`, `flops`, `bytes_kept`; print it to see all. Where `f` cannot be
        lowered, `reason` names the operation and the line of its code.

    Example:
        >>> import torch, neurode
        >>> print(neurode.explain(lambda t, y: y - y.mean(0), torch.ones(4, 2), batch_dim=0).reason.split(" (")[0])
        rows of the batch are coupled here
    """
    from neurode.fused.explain import explain as look

    found = look(f, y0, args=args, batch_dim=batch_dim)
    code = plain_code(f)
    if found.engine == "fused" and code is not None and _evaluated.get(code, 0) < CAPTURE_AFTER:
        seen = _evaluated.get(code, 0)
        note = f"; a plain function: auto takes it after {CAPTURE_AFTER:,} evaluations, of which it saw {seen:,}"
        return replace(found, reason=found.reason + note)
    return found


def _note(problem: Problem) -> None:
    """Count what the eager engine evaluated of a plain function."""
    if torch.compiler.is_compiling():
        return
    code = plain_code(problem.field.f)
    if code is not None:
        _evaluated[code] = _evaluated.get(code, 0) + problem.field.num_calls


def plain_code(f: Callable[..., Any]) -> CodeType | None:
    """The code of a plain function or callable object; None for modules and their methods."""
    while True:
        if isinstance(f, functools.partial):
            f = f.func
        elif isinstance(f, FunctionType):
            inner = getattr(f, "neurode_wraps", None)
            if inner is None:
                return f.__code__
            f = inner
        elif isinstance(f, MethodType):
            if isinstance(f.__self__, nn.Module):
                return None
            f = f.__func__
        elif isinstance(f, nn.Module):
            return None
        else:
            call = vars(type(f)).get("__call__")
            return call.__code__ if isinstance(call, FunctionType) else None


__all__ = ["CAPTURE_AFTER", "ENGINES", "check", "explain", "run"]
