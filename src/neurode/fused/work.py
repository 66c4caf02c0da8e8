"""A whole solve, forward and backward, as one call into the native library each; differentiable for PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import addressof, c_double, c_int64
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from neurode._errors import GradientError
from neurode._field import is_per_row
from neurode._loop import Outcome, time_dtype
from neurode._options import LeafRms
from neurode._problem import Problem
from neurode._solution import Stats, Status
from neurode._state import Layout
from neurode.control.fixed import FloatGrid
from neurode.fused.native import Solve, Trace, pointer
from neurode.fused.programs import Bound
from neurode.fused.tableau import native_tableau

Tape = Callable[..., tuple[list[Any], dict[int, Any]]]  # `gradients.again.of_native`, which lies above this folder
STATUSES = tuple(Status)  # by code
NO_STEPS = {"num_accepted": 0, "num_rejected": 0, "gradient": "discrete", "engine": "fused", "backward": None}
MEMORY = 256 << 20  # bytes that kept stages may take where the user did not say


@dataclass(frozen=True)
class LaneForm:
    """Between the inner state of a problem and one row of numbers a lane.

    Attributes:
        inner: the problem's layout.
        rows: the layout of one row where a joint state is split; None where the inner state has rows, or is one row.
        split: whether there is more than one lane.
    """

    inner: Layout
    rows: Layout | None
    split: bool

    def pack(self, y: Tensor) -> Tensor:
        """An inner state as `(lanes, D)`; a state of one tensor, whose numbers lie in that order, as it is."""
        if self.inner.batched or self.inner.spec is None:
            return y
        return self.rows.pack(self.inner.unpack(y)) if self.split and self.rows else y.reshape(1, -1)

    def unpack(self, y: Tensor, like: Tensor) -> Tensor:
        """Inner states from `(*, lanes, D)`, or from states of one tensor."""
        if self.inner.batched or self.inner.spec is None:
            return y
        lead = y.shape[:-2]
        if not self.split or self.rows is None:
            return y.reshape((*lead, *like.shape))
        leaves = pytree.tree_leaves(self.rows.unpack(y, lead=len(lead)))
        return torch.cat([x.reshape(*lead, -1) for x in leaves], -1)


def joint_leaves(problem: Problem) -> bool:
    """Whether the norm is the largest of the leaves' over all rows."""
    return isinstance(problem.norm, LeafRms) and not problem.layout.batched


def state_bytes(problem: Problem) -> int:
    """Bytes of the record of accepted steps, a state and 40 bytes a row and step; for an adaptive method at most."""
    y0, steps = problem.y0, problem.max_steps if problem.grid is None else len(problem.grid) - 1
    return steps * (y0.numel() * y0.element_size() + 40 * (problem.rows or 1))


def row_leaves(args: Any) -> list[Tensor]:
    """The tensors of the arguments that belong to rows."""
    if not args:
        return []
    leaves = pytree.tree_leaves(args, is_leaf=is_per_row)
    return [x for node in leaves if is_per_row(node) for x in pytree.tree_leaves(node.value)]


def rowdata(problem: Problem) -> Tensor | None:
    """The per-row data of the arguments as `(rows, numbers)`, or None."""
    parts = row_leaves(problem.field.all_args)
    if not parts:
        return None
    return torch.cat([x.reshape(x.shape[0], -1).to(problem.y0.dtype) for x in parts], 1)


@lru_cache(maxsize=64)
def _template(method: Any, pid: Any) -> tuple[Solve, Any]:
    """The C structure with a method's numbers and a controller's, and the tensors that it points into."""
    numbers, s = native_tableau(method), Solve()
    s.stages, s.extra, s.degree, s.fsal = numbers.stages, numbers.extra, numbers.p.shape[1], int(numbers.fsal)
    s.a, s.b, s.c, s.p = map(pointer, (numbers.a, numbers.b, numbers.c, numbers.p))
    s.e, s.e2 = pointer(numbers.e), pointer(numbers.e2)
    s.order = float((method.order_error or 0) + 1)
    s.proportional, s.integral, s.derivative = pid.proportional, pid.integral, pid.derivative
    s.safety, s.min_factor, s.max_factor = pid.safety, pid.min_factor, pid.max_factor
    s.stretch = pid.stretch
    s.hold, s.shrink_accepted = int(pid.hold), int(pid.shrink_accepted)
    return s, numbers


class Terms:
    """A solve as far as it depends on no value: what a call like an earlier one need not find out again.

    Args:
        problem: of its values only tolerances count.
        bound: the program.
        form: how samples lie in lanes.
        recording: whether steps are kept for a backward pass.
        tape: what computes gradients with a graph of their own, if anything may.
    """

    def __init__(self, problem: Problem, bound: Bound, form: LaneForm, recording: bool, tape: Tape | None) -> None:
        self.bound, self.form, self.recording, self.tape = bound, form, recording, tape
        made = bound.entry.made
        assert made is not None and bound.entry.machine is not None
        self.made, self.machine = made, bound.entry.machine
        self.dtype, self.size = problem.y0.dtype, made.program.size
        self.rows = problem.y0.numel() // self.size
        self.alive: list[Any] = []  # tensors whose addresses the structure holds
        self.structure = self._describe(problem)
        self.gradients = [bound.tensors[i] for i in made.wanted]
        self.counts = c_int64 * (5 * self.rows)

    def _describe(self, problem: Problem) -> Solve:
        template, numbers = _template(problem.method, problem.controller)
        s = Solve.from_buffer_copy(template)
        self.alive.append(numbers)
        s.joint, s.rows = int(not problem.layout.batched), self.rows
        for name in ("rtol", "atol"):
            value = getattr(problem, name)
            if isinstance(value, Tensor):
                wide = self.form.pack(value.to(self.dtype).expand(problem.y0.shape)).contiguous()
                setattr(s, f"{name}s", self._give(wide))
                setattr(s, f"{name}s_row_step", self.size)
                setattr(s, f"{name}s_step", 1)
            else:
                setattr(s, name, float(value))
        s.first_step = -1.0 if problem.first_step is None else float(problem.first_step)
        s.min_step, s.max_step, s.max_steps = problem.min_step, problem.max_step, problem.max_steps
        if joint_leaves(problem):
            sizes = self.form.rows.sizes if self.form.rows else problem.layout.sizes
            ends = torch.tensor(sizes, dtype=torch.int64).cumsum(0)
            s.num_groups, s.groups = len(ends), self._give(ends)
        s.keep, s.memory = int(self.recording), _memory(problem)
        return s

    def _give(self, tensor: Tensor) -> int:
        self.alive.append(tensor)
        return tensor.data_ptr()

    def work(self, problem: Problem, stats: Stats | None = None) -> Work:
        """A solve of one problem on these terms."""
        return Work(self, problem, stats)


def _memory(problem: Problem) -> int:
    """What is left of the memory given for stages, beside the states."""
    return MEMORY if problem.memory is None else max(0, problem.memory - state_bytes(problem))


class Work:
    """What the forward and the backward pass of one solve share."""

    problem: Problem
    times_given: tuple[Any, Any, Any, Any] = (None, None, None, None)
    trace: Trace | None = None

    def __init__(self, terms: Terms, problem: Problem, stats: Any) -> None:
        self.terms, self.problem, self.stats = terms, problem, stats
        self.uniforms = terms.made.before(terms.bound.tensors)
        self.alive: list[Any] = []  # tensors whose addresses the native library was given

    def run(self) -> tuple[Tensor, Tensor | None]:
        """The forward solve, on PyTorch's tape where gradients are wanted: the inner state at the end, and the outputs."""
        terms, problem, form = self.terms, self.problem, self.terms.form
        inputs = form.pack(problem.y0), rowdata(problem), *self._times()
        if terms.recording:
            y1, ys = NativeSolve.apply(self, *inputs, *terms.gradients)
        else:
            y1, ys = self.forward(*inputs)
        return form.unpack(y1, problem.y0), None if ys is None else form.unpack(ys, problem.y0)

    def _times(self) -> tuple[Any, Any, Any, Any]:
        """t0, t1, the grid and t_eval as float64 tensors or None; t0 and t1 may stay numbers."""
        problem = self.problem
        grid = problem.grid
        if isinstance(grid, FloatGrid):
            grid = grid.tensor
        elif isinstance(grid, list):
            if any(isinstance(t, Tensor) for t in grid):
                grid = torch.stack([torch.as_tensor(t, dtype=torch.float64) for t in grid])
            else:
                grid = torch.tensor(grid, dtype=torch.float64)
        as_time = lambda t: t.double() if isinstance(t, Tensor) else t
        t_eval = None if problem.t_eval is None else problem.t_eval.double()
        return as_time(problem.t0), as_time(problem.t1), grid, t_eval

    def _give(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        tensor = in_memory(tensor)
        self.alive.append(tensor)
        return tensor.data_ptr()

    def _give_end(self, t: Any) -> tuple[int | None, int]:
        """The address of the times of an end, and the step from row to row."""
        if isinstance(t, Tensor):
            return self._give(t), int(t.ndim > 0)
        box = c_double(t)
        self.alive.append(box)
        return addressof(box), 0

    def _describe(self, data: Tensor | None, t0: Any, t1: Any, grid: Any, t_eval: Any) -> Solve:
        """The C structure with the values of this solve."""
        give, s = self._give, Solve.from_buffer_copy(self.terms.structure)
        s.uniforms, s.rowdata = give(self.uniforms), give(data)
        s.t0, s.t0_step = self._give_end(t0)
        s.t1, s.t1_step = self._give_end(t1)
        if grid is not None:
            s.grid, s.points = give(grid), len(grid)
            s.grid_point_step, s.grid_row_step = (1, 0) if grid.ndim == 1 else (grid.shape[1], 1)
        if t_eval is not None:
            s.t_eval, s.num_eval = give(t_eval), len(t_eval)
            s.eval_point_step, s.eval_row_step = (1, 0) if t_eval.ndim == 1 else (t_eval.shape[1], 1)
        return s

    def forward(self, y0: Tensor, data: Tensor | None, t0: Any, t1: Any, grid: Any, t_eval: Any) -> Any:
        """The native forward solve."""
        self.times_given = (t0, t1, grid, t_eval)
        points = None if t_eval is None else len(t_eval)
        return self.call(self._describe(data, t0, t1, grid, t_eval), y0, points)

    def call(self, s: Solve, y0: Tensor, points: int | None) -> tuple[Tensor, Tensor | None]:
        """The native forward solve of what a structure describes but the states.

        Args:
            s: the structure.
            y0: the initial state in lanes.
            points: how many outputs; None for the end alone.
        """
        terms, row = self.terms, 8 * self.terms.rows
        self.solve, self.y0 = s, (y0 := in_memory(y0))
        y1 = torch.empty_like(y0)
        ys = None if points is None else torch.empty(points, *y0.shape, dtype=terms.dtype)
        counts = self.counts = terms.counts()  # four counts a row, and the bits of where it ended
        first = addressof(counts)
        s.threads, s.y0, s.y1, s.ys = torch.get_num_threads(), y0.data_ptr(), y1.data_ptr(), pointer(ys)
        s.status, s.evaluations, s.accepted, s.rejected = first, first + row, first + 2 * row, first + 3 * row
        s.t_end = first + 4 * row
        terms.machine.forward(s)
        if terms.recording:
            self.trace = Trace(terms.machine, s.trace)
        self.most = s.most_status, s.most_evaluations, s.most_accepted, s.most_rejected
        return y1, ys

    def count(self) -> None:
        """Note the evaluations of f, which f itself may count too."""
        calls = self.most[1]
        self.problem.field.num_calls += calls
        self.terms.bound.count(calls)

    def backward(self, grad_y1: Tensor | None, grad_ys: Tensor | None, wanted: Any) -> list[Any]:
        """The native backward pass: gradients of y0, rowdata, t0, t1, grid, t_eval and the tensors from outside."""
        s, terms, rows, dtype = self.solve, self.terms, self.terms.rows, self.terms.dtype
        t0, t1, grid, t_eval = self.times_given
        made = terms.made
        keep = [None if g is None else in_memory(g) for g in (grad_y1, grad_ys)]
        new = lambda want, *shape: torch.empty(*shape, dtype=torch.float64) if want else None  # all are written
        grad_y0 = torch.empty_like(self.y0)
        grad_data = torch.empty(rows, made.program.num_rowdata, dtype=dtype) if wanted[1] else None
        accumulators = torch.empty(max(made.program.num_accumulators, 1), dtype=dtype)
        adaptive = grid is None
        grad_t0, grad_t1 = (new(wanted[i] and adaptive, rows) for i in (2, 3))
        grad_grid = new(wanted[4], len(grid) if grid is not None else 0, rows)
        grad_eval = new(wanted[5], len(t_eval) if t_eval is not None else 0, rows)
        s.grad_y1, s.grad_ys = map(pointer, keep)
        s.grad_y0, s.grad_rowdata, s.accumulators = map(pointer, (grad_y0, grad_data, accumulators))
        s.grad_t0, s.grad_t1, s.grad_grid, s.grad_eval = map(pointer, (grad_t0, grad_t1, grad_grid, grad_eval))
        terms.machine.backward(s)
        self._report()
        fit = lambda g, like: None if g is None else g if g.shape == like.shape else g.sum(-1).reshape(like.shape)
        outer = made.after(accumulators, terms.bound.tensors)
        return [
            grad_y0, grad_data, fit(grad_t0, t0), fit(grad_t1, t1), fit(grad_grid, grid), fit(grad_eval, t_eval), *outer,
        ]  # fmt: skip

    def on_tape(self, saved: Any, grads: Any, needed: Any) -> list[Any]:
        """The same gradients as tensors with a graph: the solve again, on the eager engine and PyTorch's tape."""
        if not self.terms.tape:
            raise GradientError(
                "gradient='discrete' gives derivatives of first order only (create_graph=True was asked for). Type"
                " gradient='autograd', or leave gradient='auto'."
            )
        problem, form = self.problem, self.terms.form
        y0, data, *times = saved[:6]
        moving = [t if t is not None and t.requires_grad else None for t in times]
        if times[2] is not None:  # the grid holds both ends
            moving[:2] = None, None
        read = lambda outcome: [form.pack(outcome.y1), *self._outputs(outcome)]
        shown = grads if problem.t_eval is not None else grads[:1]
        (grad_y0, *grad_times), known = self.terms.tape(problem, form.unpack(y0, problem.y0), moving, shown, read)
        self.stats.backward = Stats(method=self.stats.method, gradient="autograd (create_graph=True)", engine="eager")
        grad_data = None
        if data is not None:
            parts = [(x, known.get(id(x))) for x in row_leaves(problem.field.all_args)]
            grad_data = torch.cat([(torch.zeros_like(x) if g is None else g).reshape(len(x), -1) for x, g in parts], 1)
        outer = [known.get(id(x)) for x in self.terms.gradients]
        grad_y0 = None if grad_y0 is None else form.pack(grad_y0)
        found = [grad_y0, None if grad_data is None else grad_data.to(data.dtype), *grad_times, *outer]
        return [grad if need else None for grad, need in zip(found, needed, strict=True)]

    def _outputs(self, outcome: Outcome) -> list[Tensor]:
        """The outputs that were asked for, as the native loops give them."""
        return [] if self.problem.t_eval is None else [torch.stack([self.terms.form.pack(y) for y in outcome.ys])]

    def _report(self) -> None:
        s = self.solve
        counts = {"num_calls": s.backward_evaluations, "num_evaluations": s.backward_evaluations}
        now = {**NO_STEPS, **counts, "method": self.stats.method}
        self.stats.backward = Stats.later(dict, now)

    def outcome(self, y1: Tensor, ys: Tensor | None) -> Outcome:
        """The record that every engine returns."""
        problem = self.problem
        end = torch.as_tensor(problem.t1, dtype=time_dtype(y1.device))
        ts = end.unsqueeze(0) if ys is None else problem.t_eval
        ys = y1.unsqueeze(0) if ys is None else ys
        facts = count_rows(self.counts)
        if problem.layout.batched:
            status, *counts, ends = facts.unbind()
            t_end: Any = ends.view(torch.float64)
            if _moves(problem.t1):
                t_end = torch.where(status == Status.SUCCESS.code, end, t_end)
            return Outcome(y1, ts, ys, t_end, status, *counts)
        code, *counts = self.most
        t_end = facts[4].view(torch.float64)[0].item()
        if code == Status.SUCCESS.code and _moves(problem.t1):
            t_end = problem.t1
        return Outcome(y1, ts, ys, t_end, STATUSES[code], *counts)


def count_rows(counts: Any) -> Tensor:
    """The counts of a solve, `(5, rows)`: status, evaluations, accepted, rejected, bits of the time of the end."""
    return torch.frombuffer(counts, dtype=torch.int64).view(5, -1)


def in_memory(x: Tensor) -> Tensor:
    """A tensor whose numbers lie in memory as they are, one after another."""
    return x if x.is_contiguous() and not x.is_neg() else x.resolve_neg().contiguous()


def _moves(t: Any) -> bool:
    return isinstance(t, Tensor) and t.requires_grad


class NativeSolve(torch.autograd.Function):
    """The solve as one operation of PyTorch's tape."""

    @staticmethod
    def forward(
        ctx: Any, work: Work, y0: Tensor, data: Any, t0: Any, t1: Any, grid: Any, t_eval: Any, *outer: Tensor
    ) -> Any:
        ctx.work = work
        ctx.set_materialize_grads(False)
        t0_given, t1_given = t0 if isinstance(t0, Tensor) else None, t1 if isinstance(t1, Tensor) else None
        ctx.save_for_backward(y0, data, t0_given, t1_given, grid, t_eval, *outer)
        return work.forward(y0, data, t0, t1, grid, t_eval)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        needed = ctx.needs_input_grad[1:]
        saved = ctx.saved_tensors  # raises where a parameter was changed in place since the solve
        if grad_outputs[0] is None and (len(grad_outputs) == 1 or grad_outputs[1] is None):
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled():
            return None, *ctx.work.on_tape(saved, grad_outputs, needed)
        grads = ctx.work.backward(*grad_outputs, needed)
        return None, *[g if need else None for g, need in zip(grads, needed, strict=True)]
