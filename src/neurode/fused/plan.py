"""A call like one before: what its options came to is known, and only values are read.

The first solves of a field go the long way, where every argument is read and every error is raised. From the second on there is
a plan for the call's options, found by their values and classes and by what surrounds them, and kept by the watch over the field
as it is (`watch.py`). It reads the times, fills the values in and makes the native call. Wherever it meets what is not as it
was, or a solve that fails, it steps back, and the call goes the long way.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from neurode._problem import Problem
from neurode._solution import Stats, Status
from neurode.control.fixed import FloatGrid
from neurode.control.pid import PID
from neurode.fused import guards, watch
from neurode.methods import ButcherTableau

if TYPE_CHECKING:
    from neurode.fused.run import Terms

# Classes whose values do not change: equal ones of one class ask for the same. The dataclasses are frozen.
CONSTANT = {str, int, float, bool, type(None), PID, ButcherTableau}
MOST_PLANS = 64  # of one field
STATES, TIMES, REAL = (Tensor, nn.Parameter), {float, int}, (torch.float64, torch.float32)
SUCCESS = Status.SUCCESS.code


def ticket(y0: Any, t_span: Any, t_eval: Any, options: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What a call is known by beside its field; None where it goes the long way every time.

    Args:
        y0, t_span, t_eval: as the user gave them.
        options: all others, in one order.
    """
    if (
        type(y0) not in STATES
        or type(t_span) not in (tuple, list)
        or len(t_span) != 2
        or not TIMES.issuperset(map(type, t_span))
    ):
        return None
    outputs = None
    if t_eval is not None:
        if type(t_eval) is not Tensor or t_eval.dtype not in REAL or t_eval.requires_grad or t_eval.ndim != 1:
            return None
        outputs = t_eval.shape, t_eval.dtype, t_eval.device
    state = y0.shape, y0.dtype, y0.device, y0.layout, y0.requires_grad
    return options, tuple(map(type, options)), state, outputs, torch.is_grad_enabled(), torch.get_default_dtype()


def find(f: Any, known: tuple[Any, ...]) -> Plan | None:
    """The plan for a call of the field as it is now.

    Args:
        f: the vector field.
        known: the call's ticket.
    """
    parts = watch.parts_of(f)
    watched = watch.find(parts)
    if watched is None or guards.unusual_surroundings():
        return None
    try:
        made = watched.plans.get(known)
    except TypeError:  # an option without a hash
        return None
    return made if made is not None and made.fresh() and watched.holds(parts) else None


def keep(problem: Problem, terms: Terms, stats: Stats, key: Any) -> None:
    """Plan for calls like the one that was just solved, if all that it takes can be told from its ticket.

    Args:
        problem: as it was solved, with its ticket.
        terms: it was solved on.
        stats: what was chosen.
        key: of the walk over its field.
    """
    options, kinds, *_ = problem.ticket
    constant = all(kind in CONSTANT or value == () for value, kind in zip(options, kinds, strict=True))
    if not constant or problem.layout.spec is not None or problem.field.has_aux or problem.memory is not None:
        return
    if problem.grid is not None and not isinstance(problem.grid, FloatGrid):
        return
    watched = watch.start(problem.field, key)
    if watched is not None:
        if len(watched.plans) >= MOST_PLANS:
            watched.plans.clear()
        watched.plans[problem.ticket] = Plan(problem, terms, stats)


class Plan:
    """A solve without its values.

    Args:
        problem: one that was solved.
        terms: it was solved on.
        stats: what was chosen for it.
    """

    def __init__(self, problem: Problem, terms: Terms, stats: Stats) -> None:
        self.terms, self.layout, self.grid = terms, problem.layout, problem.grid
        self.rows = problem.rows if problem.per_row else None
        self.problem = problem.at(
            field=problem.field.of(None), y0=None, t0=None, t1=None, grid=None, t_eval=None, ticket=None
        )
        self.words = {"method": stats.method, "gradient": stats.gradient, "engine": stats.engine}
        self.span: Any = (None, None, None)
        self.baked = terms.bound.baked

    def fresh(self) -> bool:
        """Whether the numbers that became part of the program are still those."""
        return all(x._version == version for x, version in self.baked)

    def solve(self, f: Any, y0: Tensor, t_span: tuple[Any, Any], t_eval: Any, failing: bool) -> Any:
        """Solve with these values.

        Args:
            f: the field.
            y0, t_span, t_eval: of the kind that the plan is for.
            failing: whether a solve may fail.

        Returns:
            What was done, the inner state at the end and the inner outputs; None where the call must go the long way.
        """
        times = self._times(*t_span)
        if times is None:
            return None
        t0, t1, grid, start, end = times
        if t_eval is not None:
            t_eval = t_eval.double().contiguous()
            if not self.terms.machine.library.nd_ordered(t_eval.data_ptr(), len(t_eval), start, end):
                return None
        problem = self.problem.at(
            field=self.problem.field.of(f), y0=self.layout.pack(y0), t0=t0, t1=t1, grid=grid, t_eval=t_eval
        )
        work = self.terms.work(problem)
        y1, ys = work.run()
        if work.most[0] != SUCCESS and not failing:
            return None
        work.count()
        work.stats = Stats.later(partial(_counts, work.facts, work.most, self.layout.batched), **self.words)
        return work, y1, ys

    def _times(self, t0: Any, t1: Any) -> Any:
        """The ends as the problem has them, the grid, and the ends as numbers; None where they are no span."""
        last = self.span
        if last[0] is t0 and last[1] is t1:
            return last[2]
        try:
            start, end = float(t0), float(t1)
        except OverflowError:
            return None
        if not math.isfinite(start) or not math.isfinite(end) or start == end:
            return None
        ends: Any = start, end
        if self.rows is not None:
            ends = [torch.full((self.rows,), t, dtype=torch.float64) for t in ends]
        grid = None if self.grid is None else self.grid.over(start, end)
        made = *ends, grid, start, end
        self.span = t0, t1, made
        return made


def _counts(facts: Tensor, most: list[int], rows: bool) -> dict[str, Any]:
    """The counts of a solve, as its statistics have them."""
    evaluations, accepted, rejected = facts[1:4].unbind() if rows else most[1:4]
    return {
        "num_calls": most[1], "num_evaluations": evaluations, "num_accepted": accepted, "num_rejected": rejected,
    }  # fmt: skip


__all__ = ["Plan", "find", "keep", "ticket"]
