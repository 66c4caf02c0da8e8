"""Solving until an event: the first sign change of `event_fn` after `t[0]`, in the direction of `t[1]`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from neurode._solution import Status
from neurode.output.events import Event
from neurode.torchdiffeq._call import Call
from neurode.torchdiffeq._states import adaptive_settings, run

# How far to look, in units of |t0|, |t[1] - t0| or 1, whichever is largest; a float64 still tells short steps near t0
# from each other on such a span.
HORIZON = 1e12
MAX_GRID_STEPS = 20_000  # torchdiffeq's limit with a method on a grid
FIRST_CHUNK = 64  # steps on a grid between two looks at whether the event came; doubled each time


def combined(event_fn: Callable[..., Any], t0: Tensor, y0: Any) -> Callable[[Tensor, Any], Tensor]:
    """One scalar function, positive at the start, whose zero is the first of those of all elements of `event_fn`.

    Args:
        event_fn: the user's function; a tensor of any shape, or booleans.
        t0, y0: the start, where every element's sign is taken.
    """
    with torch.no_grad():
        signs = torch.sign(_as_numbers(event_fn(t0, y0)))

    def function(t: Tensor, y: Any) -> Tensor:
        return (_as_numbers(event_fn(t, y)) * signs).min()

    return function


def _as_numbers(value: Tensor) -> Tensor:
    return torch.where(value, 1.0, -1.0) if value.dtype is torch.bool else value


def until_event(call: Call, event_fn: Callable[..., Any]) -> tuple[Tensor, Any]:
    """Solve until the event.

    Returns:
        The time of the event, a constant, and the states at the start and at that time, which have a gradient.
    """
    if call.solver.kind == "scipy":
        raise ValueError("scipy_solver does not look for events; type method='dopri5' with event_fn.")
    t0 = call.t[0].detach().to(call.leaves[0].abs().dtype)
    function = combined(event_fn, t0, call.y0)

    @torch.no_grad()
    def g(t: Tensor, y: Any) -> Tensor:
        return function(t, y)

    if float(g(t0, call.y0)) == 0.0:
        return call.t[0].detach(), call.stack(call.y0, call.y0)
    search = adaptive_search if call.solver.kind == "adaptive" else grid_search
    time, state = search(call, Event(g, terminal=True))
    return time.detach().to(call.t), call.stack(call.y0, state)


def adaptive_search(call: Call, event: Event) -> tuple[Tensor, Any]:
    """Time and state of the event, by steps as long as the tolerances allow."""
    ends = call.t.detach().tolist()
    way = 1.0 if ends[1] >= ends[0] else -1.0
    far = ends[0] + way * HORIZON * max(1.0, abs(ends[0]), abs(ends[1] - ends[0]))
    solution = run(call, call.t[0], far, events=(event,), **adaptive_settings(call))
    if solution.status is not Status.TERMINATED:
        raise RuntimeError(f"event_fn did not change its sign between t = {ends[0]:g} and {far:g}.")
    return solution.t1, solution.y1


def grid_search(call: Call, event: Event) -> tuple[Tensor, Any]:
    """Time and state of the event, by steps of `step_size`."""
    size = call.options.get("step_size")
    assert size is not None, (
        "Event handling for fixed step solvers currently requires `step_size` to be provided in options."
    )
    state = call.y0
    for grid in _chunks(call.t, float(size)):
        solution = run(call.at(state), grid[0], grid[-1], grid=grid, events=(event,), on_failure="nan")
        state = solution.y1
        if solution.status is Status.TERMINATED:
            return solution.t1, state
    raise RuntimeError(f"Reached maximum number of iterations {MAX_GRID_STEPS}.")


def _chunks(t: Tensor, size: float) -> Iterator[Tensor]:
    """The points `t[0] + k size` in growing pieces that share their ends; they move with `t[0]`."""
    way = 1.0 if bool(t[1] > t[0]) else -1.0
    first, steps = 0, FIRST_CHUNK
    while first < MAX_GRID_STEPS:
        last = min(first + steps, MAX_GRID_STEPS)
        yield t[0].double() + way * size * torch.arange(first, last + 1, dtype=torch.float64, device=t.device)
        first, steps = last, 2 * steps
