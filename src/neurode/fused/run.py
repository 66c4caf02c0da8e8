"""Whether the native loops can solve a problem, on which program, and the solve."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neurode._loop import Outcome
from neurode._options import rms, row_rms
from neurode._problem import Problem
from neurode._solution import Stats
from neurode._state import number
from neurode.control.fixed import FloatGrid
from neurode.fused import cost, programs, short
from neurode.fused.capture import row_layout
from neurode.fused.programs import Bound
from neurode.fused.refusal import CannotLower
from neurode.fused.work import LaneForm, Tape, Terms, joint_leaves, row_leaves, state_bytes


def unsuitable(problem: Problem) -> str:
    """Why the native loops cannot solve a problem, whatever its field; empty where they can."""
    y0, method = problem.y0, problem.method
    if method.kind != "explicit":
        return f"the method {method.name!r}, which is not an explicit Runge-Kutta method"
    if method.reuse_last and not method.fsal:
        return f"{method.name!r} with reuse_last, which starts a step from the last stage of the step before"
    if y0.device.type != "cpu" or y0.dtype not in (torch.float32, torch.float64):
        return f"a state of {y0.dtype} on {y0.device}"
    if y0.numel() == 0 or _empty_span(problem):
        return "a solve without rows or with an empty span"
    if isinstance(problem.first_step, Tensor) and problem.first_step.ndim > 0:
        return "a first_step for each row"
    if problem.grid is None and problem.norm not in (rms, row_rms) and not joint_leaves(problem):
        return "a norm other than 'rms' (and, under one step, 'leaf-rms')"
    used = {
        "events": problem.events,
        "dense=True": problem.dense,
        "t_eval='steps'": isinstance(problem.t_eval, str),
        "save=": problem.save is not None,
        "callbacks": problem.callbacks is not None,
        "estimates=": problem.estimates,
        "step_at= or jump_at=": len(problem.step_at) or len(problem.jump_at),
    }
    return next((name for name, value in used.items() if value), "")


def _empty_span(problem: Problem) -> bool:
    if isinstance(problem.t0, Tensor) and problem.t0.ndim:
        return bool((problem.t0 == problem.t1).all())
    return number(problem.t0) == number(problem.t1)


def prepare(problem: Problem, choose: bool = False) -> tuple[Bound, LaneForm]:
    """The program for a problem, and how its state lies in lanes.

    Raises:
        CannotLower: the field or the problem cannot be solved natively; the message says why.
    """
    reason = unsuitable(problem)
    if reason:
        raise CannotLower(f"the fused engine does not take {reason}")
    field, y0 = problem.field, problem.y0
    want_t = any(isinstance(t, Tensor) and t.requires_grad for t in _times(problem))
    wanted = want_t or y0.requires_grad or any(x.requires_grad for x in row_leaves(field.all_args))
    if field.layout.batched:
        return programs.find(field, y0, (True,), wanted, want_t), LaneForm(field.layout, None, True)
    rows = row_layout(field.layout)
    forms = (
        (False,) if rows is None else (True, False)
    )  # where rows are coupled all elements are the features of one lane
    if choose and y0.numel() > cost.LARGEST_SAMPLE:
        forms = forms[:-1]
    if not forms:
        raise CannotLower(f"one sample of {y0.numel():,} numbers, more than {cost.LARGEST_SAMPLE:,}")
    bound = programs.find(field, y0, forms, wanted, want_t)
    split = bound.entry.made is not None and bound.entry.made.split
    return bound, LaneForm(field.layout, rows if split else None, split)


def _times(problem: Problem) -> list[Any]:
    grid = problem.grid if isinstance(problem.grid, list) else [problem.grid]
    grid = [] if isinstance(grid, FloatGrid) else grid
    return [problem.t0, problem.t1, problem.t_eval, *grid]


def solve(problem: Problem, stats: Stats, tape: Tape | None = None, choose: bool = False) -> Outcome:
    """Solve a problem in one native call; gradients come back by another.

    Args:
        problem: the strict form of the problem.
        stats: filled with what was chosen, and after the backward pass with its counts.
        tape: computes gradients with a graph of their own (`create_graph=True`) on PyTorch's tape; None: they are an error.
        choose: whether to leave to the eager engine what it does better.

    Raises:
        CannotLower: the problem or its field cannot be solved natively, or is not to be.
    """
    bound, form = prepare(problem, choose)
    made = bound.entry.made
    assert made is not None
    recording = made.gradients and torch.is_grad_enabled()
    if recording and problem.memory is not None and state_bytes(problem) > problem.memory:
        raise CannotLower("the states of all steps, which the fused engine keeps, may not fit memory=")
    reason = cost.too_large(made.program, problem.method.num_stages) if choose else ""
    if reason:
        raise CannotLower(reason)
    terms = Terms(problem, bound, form, recording, tape)
    stats.engine = f"fused ({len(made.program.forward)} instructions, {form_name(form, problem)})"
    work = terms.work(problem, stats)
    y1, ys = work.run()
    work.count()
    if problem.ticket is not None:
        short.keep(problem, terms, stats, bound.key)
    return work.outcome(y1, ys)


def form_name(form: LaneForm, problem: Problem) -> str:
    """How samples lie in lanes, in words."""
    if form.inner.batched:
        return "each row its own ODE" if problem.grid is None or problem.per_row else "each row a lane"
    return "rows share one step" if form.split else "one sample"
