"""The outputs at `t_eval` that lie in a step, as the solve wrote them, for those who go back over its steps."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from neurode._state import number, real_dtype
from neurode.gradients.totals import Times
from neurode.output.interpolant import fractions, sample
from neurode.output.rows import gather
from neurode.stepping import Step

# Pairs of a value and the place in `ys` that it fills; and leaves of moving times, each with the name of the total that
# its gradient goes to and the place in that.
Found = tuple[list[tuple[Tensor, Any]], list[tuple[Tensor, str, Any]]]


class JointOutputs:
    """Which outputs of a joint solve lie in which step, and their values there.

    Args:
        problem: what was solved.
        strides: its steps, from the first to the last.
    """

    def __init__(self, problem: Any, strides: Iterable[Any]) -> None:
        self.sign = 1.0 if number(problem.t1) >= number(problem.t0) else -1.0
        self.times = problem.t_eval.detach()
        self.keys = [self.sign * t for t in self.times.tolist()]
        self.moving = problem.t_eval.requires_grad
        t0, t1 = number(problem.t0), number(problem.t1)
        early = t0 != t1 and (self.moving or isinstance(problem.t0, Tensor))
        self.start = 0 if early else bisect.bisect_right(self.keys, self.sign * t0)
        self.bounds = [self.start, *(bisect.bisect_right(self.keys, self.sign * stride.end) for stride in strides)]

    def take(self, n: int, stride: Any, step: Step, end: Tensor, piece: Any, times: Times) -> Found:
        """The outputs in step n.

        Args:
            n, stride: which step.
            step: the step on the tape.
            end: the state that it ended in, of an event or its own.
            piece: a function that returns its interpolant.
            times: where the gradients of output times are summed.
        """
        a, b = self.bounds[n], self.bounds[n + 1]
        if b <= a:
            return [], []
        moves = self.moving or isinstance(
            step.interval.h, Tensor
        )  # then all through the interpolant, as the solve does
        inside = b if moves else bisect.bisect_left(self.keys, self.sign * stride.end, a, b)
        found: list[tuple[Tensor, Any]] = []
        leaves: list[tuple[Tensor, str, Any]] = []
        if inside > a:
            at = self.times[a:inside]
            if times.t_eval is not None:
                at = at.clone().requires_grad_()
                leaves.append((at, "t_eval", slice(a, inside)))
            x = fractions(piece(), at, real_dtype(step.y0.dtype))
            found.append((sample(piece(), x), slice(a, inside)))
        if b > inside:
            found.append((end.expand(b - inside, *end.shape), slice(inside, b)))
        return found, leaves

    def within(self, n: int, stride: Any) -> bool:
        """Whether any output lies in step n."""
        return self.bounds[n + 1] > self.bounds[n]

    def at_start(self, grad_ys: Tensor) -> Any:
        """The gradient of the outputs that are the initial state itself."""
        return grad_ys[: self.start].sum(0) if self.start else 0.0


class RowOutputs:
    """Which outputs of rows with times of their own lie in a step, and their values there.

    Args:
        problem: what was solved.
        gone: `(rows,)`, True for rows that failed, whose outputs are constants; or None.
    """

    def __init__(self, problem: Any, gone: Tensor | None) -> None:
        self.gone = gone
        self.t0, t1 = problem.t0.detach(), problem.t1.detach()
        at = problem.t_eval.detach()
        self.at = at.unsqueeze(1).expand(-1, len(self.t0)) if at.ndim == 1 else at
        self.sign = torch.where(t1 >= self.t0, 1.0, -1.0).to(self.t0.dtype)
        self.early = (self.t0 != t1) & (problem.t_eval.requires_grad or problem.t0.requires_grad)

    def take(self, n: int, stride: Any, step: Step, end: Tensor, piece: Any, times: Times) -> Found:
        """See `JointOutputs.take`."""
        j, row = self._inside(stride).nonzero(as_tuple=True)
        if not len(j):
            return [], []
        rows = stride.rows[row]
        at, leaves = self.at[j, rows], []
        if times.t_eval is not None:
            at = at.clone().requires_grad_()
            leaves.append((at, "t_eval", (torch.ones_like(j, dtype=torch.bool), (j, rows))))
        values = gather([piece()._replace(y1=end)], torch.zeros_like(row), row, at)
        return [(values, (j, rows))], leaves

    def _inside(self, stride: Any) -> Tensor:
        """`(time, rows)`, True where an output of a row lies in a step."""
        sign = self.sign[stride.rows]
        keys = (self.at if stride.whole else self.at.index_select(1, stride.rows)) * sign
        low, high = stride.t0 * sign, stride.end * sign
        inside = (keys > low) & (keys <= high) & stride.accepted
        early = self.early[stride.rows]
        inside |= (keys == low) & (stride.t0 == self.t0[stride.rows]) & stride.accepted & early
        return inside if self.gone is None else inside & ~self.gone[stride.rows]

    def within(self, n: int, stride: Any) -> bool:
        """See `JointOutputs.within`."""
        return bool(self._inside(stride).any())

    def at_start(self, grad_ys: Tensor) -> Any:
        """See `JointOutputs.at_start`."""
        here = (self.at == self.t0) & ~self.early
        return torch.where(here.unsqueeze(-1), grad_ys, 0.0).sum(0)
