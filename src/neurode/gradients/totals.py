"""The times of a solve that need gradients, and the sums of these, which arise step by step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neurode._loop import time_dtype
from neurode._problem import Problem


class Total:
    """The gradient of one tensor of times, summed over the steps.

    Args:
        total: what it starts from; added to in place.
    """

    def __init__(self, total: Tensor) -> None:
        self.total = total

    def __len__(self) -> int:
        return len(self.total)

    def add(self, place: Any, grad: Tensor) -> None:
        """Add at a place: an index, `...`, or a mask of the rows that count with the index of all of them."""
        if place is ...:
            self.total += grad
        elif isinstance(place, tuple):
            mask, index = place
            index = index[: self.total.ndim]  # output times of all rows alike have one dimension
            self.total.index_put_(index, torch.where(mask, grad, 0.0), accumulate=True)
        else:
            self.total[place] += grad


class Times:
    """The totals for t0, t1, the grid and the output times, None where no gradient is wanted; and for the event times.

    Args:
        moving: t0, t1, grid and output times; None for those that do not move.
        catches: gradient of the times of the events that changed the course of the solve; None where there are none.
        dtype: of times.
    """

    def __init__(self, moving: list[Any], catches: Tensor | None, dtype: torch.dtype) -> None:
        self.moving = [None if t is None else Total(torch.zeros_like(t)) for t in moving]
        self.t0, self.t1, self.grid, self.t_eval = self.moving
        self.catches = None if catches is None else Total(catches)
        self.dtype = dtype

    @property
    def grads(self) -> list[Tensor | None]:
        """The sums, in the order of `moving`."""
        return [None if t is None else t.total for t in self.moving]


def moving_times(problem: Problem) -> list[Any]:
    """The times that need a gradient, for the autograd function: t0, t1, the grid and the outputs; None for the others."""

    def wanted(t: Any) -> Any:
        return t if isinstance(t, Tensor) and t.requires_grad else None

    grid = problem.grid
    if isinstance(grid, (list, tuple)):
        moves = any(isinstance(t, Tensor) and t.requires_grad for t in grid)
        dtype = time_dtype(problem.y0.device)
        grid = torch.stack([torch.as_tensor(t, dtype=dtype, device=problem.y0.device) for t in grid]) if moves else None
    if problem.grid is not None:
        return [None, None, wanted(grid), wanted(problem.t_eval)]
    return [wanted(problem.t0), wanted(problem.t1), None, wanted(problem.t_eval)]


def still(t: Any) -> Any:
    """A time or times without a gradient, of the same kind: the forward numbers are to be those of the tape."""
    if isinstance(t, (list, tuple)):
        return [still(x) for x in t]
    return t.detach() if isinstance(t, Tensor) else t
