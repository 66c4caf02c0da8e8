"""A call like one before, the short way: what its options came to is known, and only values are read (see `plan.py`)."""

from __future__ import annotations

import math
from ctypes import addressof, c_double
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from neurode._problem import Problem
from neurode._solution import Stats, Status
from neurode.control.fixed import FloatGrid
from neurode.control.pid import PID
from neurode.fused import watch
from neurode.fused.native import Solve
from neurode.fused.work import NativeSolve, Terms, Work, count_rows, in_memory
from neurode.methods import ButcherTableau

# Classes whose values do not change: equal ones of one class ask for the same. The dataclasses are frozen.
CONSTANT = {str, int, float, bool, type(None), PID, ButcherTableau}
MOST_PLANS = 64  # of one field
SUCCESS = Status.SUCCESS.code


def keep(problem: Problem, terms: Terms, stats: Stats, key: Any) -> None:
    """Plan for calls like the one that was just solved, if all that it takes can be told from its ticket.

    Args:
        problem: as it was solved, with its ticket.
        terms: it was solved on.
        stats: what was chosen.
        key: of the walk over its field.
    """
    kinds, options, *_ = problem.ticket
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


@dataclass(frozen=True, eq=False)
class Span:
    """A span as the native library is told of it.

    Attributes:
        t0, t1: its ends as they were given.
        start, end: as numbers.
        grid: the times of a fixed grid.
        structure: of a plan, with the addresses of all of them.
        alive: what these are addresses of.
    """

    t0: Any
    t1: Any
    start: float
    end: float
    grid: FloatGrid | None
    structure: Solve
    alive: tuple[Any, ...]


class Plan:
    """A solve without its values.

    Args:
        problem: one that was solved.
        terms: it was solved on.
        stats: what was chosen for it.
    """

    span: Span | None = None

    def __init__(self, problem: Problem, terms: Terms, stats: Stats) -> None:
        self.terms, self.layout, self.grid, self.ticket = terms, problem.layout, problem.grid, problem.ticket
        self.rows = problem.rows if problem.per_row else None
        self.plain = problem.layout.plain
        self.problem = problem.at(
            field=problem.field.of(None), y0=None, t0=None, t1=None, grid=None, t_eval=None, ticket=None
        )
        self.words = {"method": stats.method, "gradient": stats.gradient, "engine": stats.engine}
        self.uniforms = terms.made.before.bind(terms.bound.tensors)
        self.baked, self.counts = terms.bound.baked, bool(terms.bound.counters)

    def fresh(self) -> bool:
        """Whether the numbers that became part of the program are still those."""
        return not self.baked or all(torch.equal(x, content) for x, content in self.baked)

    def solve(self, f: Any, y0: Tensor, t_span: tuple[Any, Any], t_eval: Any, failing: bool) -> Any:
        """Solve with these values.

        Args:
            f: the field.
            y0, t_span, t_eval: of the kind that the plan is for.
            failing: whether a solve may fail.

        Returns:
            What was done, the inner state at the end and the inner outputs; None where the call must go the long way.
        """
        t0, t1 = t_span
        span = self.span
        if span is None or span.t0 is not t0 or span.t1 is not t1:
            span = self.span = self._over(t0, t1)
            if span is None:
                return None
        if t_eval is not None:
            try:
                t_eval = torch.as_tensor(t_eval, dtype=torch.float64).contiguous()
            except (OverflowError, RuntimeError):  # a whole number that no float holds
                return None
            if not self.terms.machine.library.nd_ordered(t_eval.data_ptr(), len(t_eval), span.start, span.end):
                return None
        work = Short(self, f, y0, span, t_eval)
        y1, ys = work.run()
        most = work.most
        if most[0] != SUCCESS and not failing:
            return None
        if self.counts:
            self.terms.bound.count(most[1])
        work.stats = Stats.later(partial(_counts, work.counts, most, self.layout.batched), self.words)
        return work, y1, ys

    def _over(self, t0: Any, t1: Any) -> Span | None:
        """The span of these ends; None where they are none."""
        try:
            start, end = float(t0), float(t1)
        except OverflowError:
            return None
        if not math.isfinite(start) or not math.isfinite(end) or start == end:
            return None
        s, ends = Solve.from_buffer_copy(self.terms.structure), (c_double * 2)(start, end)
        s.t0 = addressof(ends)
        s.t1 = s.t0 + 8
        if self.grid is None:
            return Span(t0, t1, start, end, None, s, (ends,))
        grid = self.grid.over(start, end)
        s.grid, s.points, s.grid_point_step = grid.tensor.data_ptr(), len(grid), 1
        return Span(t0, t1, start, end, grid, s, (ends, grid.tensor))


class Short(Work):
    """A solve by a plan, whose problem is put together where something asks for it."""

    def __init__(self, plan: Plan, f: Any, y0: Tensor, span: Span, t_eval: Tensor | None) -> None:
        self.terms, self.plan, self.f, self.span, self.t_eval = plan.terms, plan, f, span, t_eval
        self.given = y0

    @cached_property
    def problem(self) -> Problem:  # pyrefly: ignore[bad-override]
        """The problem in its strict form, evaluations counted."""
        plan, span = self.plan, self.span
        field, ends = plan.problem.field.of(self.f), (span.start, span.end)
        field.num_calls = self.most[1]
        t0, t1 = ends if plan.rows is None else [torch.full((plan.rows,), t, dtype=torch.float64) for t in ends]
        y0 = plan.layout.pack(self.given)
        return plan.problem.at(field=field, y0=y0, t0=t0, t1=t1, grid=span.grid, t_eval=self.t_eval)

    def run(self) -> tuple[Tensor, Tensor | None]:
        """The forward solve, on PyTorch's tape where gradients are wanted."""
        terms, y0 = self.terms, self.given if self.plan.plain else self.plan.layout.pack(self.given)
        if terms.recording:
            return RECORD(self, torch._C._functorch.unwrap_if_dead(y0), None, None, None, None, None, *terms.gradients)
        return self.forward(y0)

    def forward(self, y0: Tensor, *_: Any) -> tuple[Tensor, Tensor | None]:  # pyrefly: ignore[bad-override]
        """The native forward solve."""
        s, t_eval, uniforms = Solve.from_buffer_copy(self.span.structure), self.t_eval, self.plan.uniforms()
        s.uniforms, self.alive = uniforms.data_ptr(), [uniforms]
        if t_eval is None:
            return self.call(s, y0, None)
        s.t_eval, s.num_eval, s.eval_point_step = t_eval.data_ptr(), len(t_eval), 1
        return self.call(s, y0, len(t_eval))

    def backward(self, grad_y1: Tensor | None, grad_ys: Tensor | None, wanted: Any) -> list[Any]:
        """The native backward pass: gradients of y0 and of the tensors from outside, which are all that a plan has."""
        s, terms = self.solve, self.terms
        made = terms.made
        grad_y1 = None if grad_y1 is None else in_memory(grad_y1)
        grad_ys = None if grad_ys is None else in_memory(grad_ys)
        grad_y0 = torch.empty_like(self.y0)
        accumulators = torch.empty(max(made.program.num_accumulators, 1), dtype=terms.dtype)
        s.grad_y1 = None if grad_y1 is None else grad_y1.data_ptr()
        s.grad_ys = None if grad_ys is None else grad_ys.data_ptr()
        s.grad_y0, s.accumulators = grad_y0.data_ptr(), accumulators.data_ptr()
        terms.machine.backward(s)
        self._report()
        return [grad_y0, None, None, None, None, None, *made.after(accumulators, terms.bound.tensors)]


# `Function.apply` looks through every argument for wrappers that functorch has left, in Python. Here `y0` alone may be one: of
# the tensors from outside the guards know what they are, and that no transform is on.
RECORD: Any = super(torch.autograd.Function, NativeSolve).apply  # pyrefly: ignore[missing-attribute]


def _counts(counts: Any, most: tuple[int, ...], rows: bool) -> dict[str, Any]:
    """The counts of a solve, as its statistics have them."""
    evaluations, accepted, rejected = count_rows(counts)[1:4].unbind() if rows else most[1:]
    return {
        "num_calls": most[1], "num_evaluations": evaluations, "num_accepted": accepted, "num_rejected": rejected,
    }  # fmt: skip


__all__ = ["Plan", "keep"]
