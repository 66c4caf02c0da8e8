"""Vector fields as hand-written tile programs, with the same field in PyTorch beside them, and solves of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neurode import PID, methods
from neurode.fused.native import Machine, Solve, Trace, pointer
from neurode.fused.program import (
    Gemm,
    Micro,
    Pointwise,
    Program,
    RowGradient,
    Rows,
    Space,
    Step,
    WeightGradient,
)
from neurode.fused.tableau import native_tableau


@dataclass(frozen=True, eq=False)
class System:
    """A field in two forms.

    Attributes:
        program: the tile program.
        uniforms: its numbers.
        f: `f(t, y)` in PyTorch, reading `leaves`.
        leaves: parameters; the accumulators are their gradients, one after the other.
    """

    program: Program
    uniforms: Tensor
    f: Callable[[Tensor, Tensor], Tensor]
    leaves: list[Tensor]


def perceptron(size: int, hidden: int, dtype: torch.dtype) -> System:
    """`W2 tanh(W1 [t, y] + b1) + b2`."""
    n = 1 + size
    shapes = [(hidden, n), (hidden,), (size, hidden), (size,)]
    leaves = [(torch.randn(s, dtype=dtype) / n**0.5).requires_grad_() for s in shapes]
    w1, b1, w2, b2 = leaves
    at = [0, hidden * n, hidden * (n + 1), hidden * (n + 1 + size)]
    total = at[3] + size
    inner, out = Rows(Space.SAVED, n), Rows(Space.SCRATCH, 0)
    g1 = Rows(Space.COTANGENT, size)
    forward = (
        Gemm(1, hidden, n, at[0], n, 1, at[1], 1, Micro.TANH, Rows(Space.SAVED, 0), inner),
        Gemm(1, size, hidden, at[2], hidden, 1, at[3], 1, Micro.COPY, inner, out),
    )
    g = Rows(Space.COTANGENT, 0)
    backward = (
        Gemm(1, hidden, size, at[2], 1, hidden, -1, 0, Micro.DTANH, g, g1, aux=inner),
        Gemm(1, n, hidden, at[0], 1, n, -1, 0, Micro.COPY, g1, out),
    )
    gradient = (
        WeightGradient(1, hidden, n, at[0], n, 1, g1, Rows(Space.SAVED, 0)),
        RowGradient(hidden, 1, at[1], g1),
        WeightGradient(1, size, hidden, at[2], hidden, 1, g, inner),
        RowGradient(size, 1, at[3], g),
    )
    program = Program(
        size, total, (), total, 0, n + hidden, size, n, size + hidden, out, Rows(Space.SCRATCH, 1), Rows(Space.SCRATCH, 0),
        None, forward, backward, gradient,
    )  # fmt: skip

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(torch.cat([t.expand(len(y), 1).to(y), y], 1) @ w1.T + b1) @ w2.T + b2

    uniforms = torch.cat([x.detach().reshape(-1) for x in leaves])
    return System(program, uniforms, f, leaves)


def lotka_volterra(dtype: torch.dtype) -> System:
    """`(a x - b x y, d x y - c y)`, all in one chain a row; without gradients."""
    numbers = torch.tensor([1.5, 1.0, 3.0, 1.0], dtype=dtype)
    x, y = Rows(Space.SAVED, 1), Rows(Space.SAVED, 2)
    inputs = (x, y, *(Rows(Space.UNIFORM, i) for i in range(4)))
    steps = (
        Step(Micro.MUL, 0, 1), Step(Micro.MUL, 2, 0), Step(Micro.FNMA, 3, 6, 7), Step(Micro.MUL, 4, 1),
        Step(Micro.NEG, 9), Step(Micro.FMA, 5, 6, 10),
    )  # fmt: skip
    out = Rows(Space.SCRATCH, 0)
    chain = Pointwise(1, inputs, steps, ((8, out), (11, Rows(Space.SCRATCH, 1))))
    program = Program(2, 4, (), 0, 0, 3, 2, 0, 2, out, None, None, None, (chain,))

    def f(t: Tensor, s: Tensor) -> Tensor:
        a, b, c, d = numbers.tolist()
        return torch.stack([a * s[:, 0] - b * s[:, 0] * s[:, 1], d * s[:, 0] * s[:, 1] - c * s[:, 1]], 1)

    return System(program, numbers, f, [])


class NativeSolve:
    """One solve by the native library; attributes hold its results.

    Args:
        system: the field.
        y0: `(rows, size)`.
        span: t0 and t1.
        method: name.
        steps: number of equal steps; None is adaptive.
        options: `rtol`, `atol`, `t_eval`, `joint`, `keep`, `memory`, `max_steps`, `first_step`, `threads`.
    """

    def __init__(
        self,
        system: System,
        y0: Tensor,
        span: tuple[float, float],
        method: str,
        steps: int | None = None,
        **options: Any,
    ) -> None:
        self.system, self.y0, self.kept = system, y0, []
        self.machine = Machine(system.program, y0.dtype == torch.float64)
        self.solve = Solve(rows=len(y0), uniforms=self._own(system.uniforms), y0=self._own(y0))
        self._tableau(method)
        self._control(options)
        t0, t1 = (torch.tensor([t], dtype=torch.float64) for t in span)
        self.solve.t0, self.solve.t1 = self._own(t0), self._own(t1)
        if steps is not None:
            grid = torch.linspace(*span, steps + 1, dtype=torch.float64)
            self.solve.grid, self.solve.points, self.solve.grid_point_step = self._own(grid), steps + 1, 1
        self._outputs(options.get("t_eval"))
        self.solve.keep, self.solve.memory = int(options.get("keep", False)), options.get("memory", 0)
        self.machine.forward(self.solve)
        self.trace = Trace(self.machine, self.solve.trace) if self.solve.keep else None

    def _own(self, x: Tensor | None) -> int | None:
        self.kept.append(x)
        return pointer(x)

    def _tableau(self, method: str) -> None:
        table = native_tableau(methods.get(method))
        s = self.solve
        s.stages, s.extra, s.degree, s.fsal = table.stages, table.extra, table.p.shape[1], int(table.fsal)
        for name in ("a", "b", "c", "e", "e2", "p"):
            setattr(s, name, self._own(getattr(table, name)))
        s.order = float((methods.get(method).order_error or 0) + 1)

    def _control(self, options: dict[str, Any]) -> None:
        s, pid = self.solve, PID.i()
        for name in ("proportional", "integral", "derivative", "safety", "min_factor", "max_factor"):
            setattr(s, name, getattr(pid, name))
        s.hold, s.shrink_accepted, s.max_step = int(pid.hold), int(pid.shrink_accepted), float("inf")
        s.stretch = pid.stretch
        s.rtol, s.atol = options.get("rtol", 1e-4), options.get("atol", 1e-6)
        s.first_step, s.threads = options.get("first_step", 0.0), options.get("threads", 1)
        s.max_steps, s.joint = options.get("max_steps", 100_000), int(options.get("joint", False))

    def _outputs(self, t_eval: Tensor | None) -> None:
        s, rows = self.solve, len(self.y0)
        self.y1 = torch.zeros_like(self.y0)
        s.y1 = self._own(self.y1)
        if t_eval is not None:
            self.ys = torch.zeros(len(t_eval), *self.y0.shape, dtype=self.y0.dtype)
            s.ys, s.t_eval, s.num_eval, s.eval_point_step = self._own(self.ys), self._own(t_eval), len(t_eval), 1
        self.t_end = torch.zeros(rows, dtype=torch.float64)
        s.t_end = self._own(self.t_end)
        for name in ("status", "evaluations", "accepted", "rejected"):
            setattr(self, name, torch.zeros(rows, dtype=torch.int64))
            setattr(s, name, self._own(getattr(self, name)))

    def backward(self, grad_y1: Tensor | None = None, grad_ys: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Gradients of y0 and of the accumulators."""
        s = self.solve
        grad_y0 = torch.zeros_like(self.y0)
        accumulators = torch.zeros(self.system.program.num_accumulators, dtype=self.y0.dtype)
        s.grad_y1, s.grad_ys = self._own(grad_y1), self._own(grad_ys)
        s.grad_y0, s.accumulators = self._own(grad_y0), self._own(accumulators)
        self.machine.backward(s)
        return grad_y0, accumulators
