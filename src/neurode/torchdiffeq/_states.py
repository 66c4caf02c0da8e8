"""The states at given times: by adaptive methods, by methods on a grid, or by SciPy's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from neurode._errors import SolveError
from neurode._solve import solve
from neurode.control import PID
from neurode.torchdiffeq._call import Call, as_assertion
from neurode.torchdiffeq._scipy import scipy_states

UNLIMITED = 2**31 - 1  # torchdiffeq's default of max_num_steps


def states(call: Call) -> Any:
    """The states at `call.t`."""
    if len(call.t) == 1 or not any(y.numel() for y in call.leaves):
        return call.stack(*[call.y0] * len(call.t))
    if call.solver.kind == "scipy":
        return scipy_states(call)
    return adaptive_states(call) if call.solver.kind == "adaptive" else grid_states(call)


def run(call: Call, t0: Any, t1: Any, **arguments: Any) -> Any:
    """One call of `neurode.solve`, failing as torchdiffeq does."""
    _refuse_non_finite(call)
    method = call.solver.method_for(call.options, call.rtol)
    try:
        with _adams_warnings() if call.solver.kind == "adams" else nullcontext():
            return solve(
                call.field, call.y0, (t0, t1), method=method, engine=call.engine,
                callbacks=call.callbacks(), check_tolerance=False, max_steps=UNLIMITED, **arguments,
            )  # fmt: skip
    except SolveError as error:
        raise as_assertion(error) from error


@contextmanager
def _adams_warnings() -> Iterator[None]:
    """Say in torchdiffeq's words that an implicit step did not converge; let every other warning through."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        if warning.category is RuntimeWarning and "functional iteration" in str(warning.message):
            text = "Functional iteration did not converge. Solution may be incorrect."
            warnings.warn(text, UserWarning, stacklevel=6)
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _refuse_non_finite(call: Call) -> None:
    for y in call.leaves:
        finite = torch.isfinite(y.detach())
        assert bool(finite.all()), f"non-finite values in state `y`: {y}"


# ---- adaptive


def adaptive_settings(call: Call) -> dict[str, Any]:
    """torchdiffeq's step size control in neurode's words."""
    options = call.options
    first = options.get("first_step")
    controller = PID(
        safety=float(options.get("safety", 0.9)),
        max_factor=float(options.get("ifactor", 10.0)),
        min_factor=float(options.get("dfactor", 0.2)),
        hold=False,
        shrink_accepted=False,
        retain=False,
        stretch=1.0,
    )
    steps, jumps = (_times(options.get(name)) for name in ("step_t", "jump_t"))
    if len(set(steps + jumps)) < len(steps + jumps):
        raise ValueError("`step_t` and `jump_t` must not have any repeated elements between them.")
    return {
        "rtol": call.rtol,
        "atol": call.atol,
        "norm": options.get("norm") or "leaf-rms",
        "controller": controller,
        "first_step": None if first is None else float(first),
        "min_step": float(options.get("min_step", 0.0)),
        "max_step": float(options.get("max_step", float("inf"))),
        "step_at": steps,
        "jump_at": jumps,
    }


def _times(times: Any) -> list[float]:
    return [] if times is None else [float(t) for t in times]


def adaptive_states(call: Call) -> Any:
    """The states at `call.t`, from the dense output."""
    t = call.t
    return run(call, t[0], t[-1], t_eval=t, **adaptive_settings(call)).ys


# ---- on a grid


def grid_states(call: Call) -> Any:
    """The states at `call.t`, interpolated where they are no points of the grid."""
    options, t = call.options, call.t
    interp = options.get("interp", "linear")
    if interp not in ("linear", "cubic"):
        raise ValueError(f"Unknown interpolation method {interp}")
    grid = grid_of(call)
    points = grid.detach().tolist()
    settings = {"grid": grid, "jump_at": points if options.get("perturb") else (), "on_failure": "nan"}
    place = {point: index for index, point in enumerate(points)}
    moves = grid.requires_grad and torch.is_grad_enabled()
    if all(time in place for time in t.detach().tolist()):
        places = [place[time] for time in t.detach().tolist()]
        if not moves:
            return run(call, grid[0], grid[-1], t_eval=t.detach(), **settings).ys
        ys = run(call, grid[0], grid[-1], t_eval="steps", **settings).ys  # states that move with the grid's points
        return ys if grid is t else _moving(call, _each(call, ys, lambda y: y[places]), grid, places)
    if interp == "cubic":
        return run(call, grid[0], grid[-1], t_eval=t, **settings).ys
    ys = run(call, grid[0], grid[-1], t_eval="steps" if moves else grid, **settings).ys
    return _each(call, ys, lambda y: _linear(y, grid, t))


def grid_of(call: Call) -> Tensor:
    """The times between which steps are taken."""
    options, t = call.options, call.t
    size, constructor = options.get("step_size"), options.get("grid_constructor")
    if size is not None and constructor is not None:
        raise ValueError("step_size and grid_constructor are mutually exclusive arguments.")
    if constructor is not None:
        grid = constructor(call.field, call.y0, t)
        assert bool(grid[0] == t[0]) and bool(grid[-1] == t[-1]), "the grid must begin at t[0] and end at t[-1]"
        return grid
    return t if size is None else even_grid(t, float(size))


def even_grid(t: Tensor, size: float) -> Tensor:
    """`t[0] + k size` towards `t[-1]`; the last step is shorter. It moves with both ends."""
    if not size > 0:
        raise ValueError(f"step_size is {size:g}; it must be positive (its direction follows t).")
    end, span = t[-1].detach(), (t[-1] - t[0]).detach()
    num = int(torch.ceil(span.abs() / size + 1))
    inner = t[0] + span.sign() * (torch.arange(1, max(num - 1, 1), dtype=t.dtype, device=t.device) * size)
    inside = (end - inner.detach()) * span.sign() > 0  # rounding may bring the last one to the end
    return torch.cat([t[:1], inner[inside], t[-1:]])


def _each(call: Call, ys: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return tuple(map(change, ys)) if isinstance(call.y0, tuple) else change(ys)


def _linear(ys: Tensor, grid: Tensor, t: Tensor) -> Tensor:
    """Straight lines between the points of the grid."""
    sign = 1.0 if bool(grid[-1] > grid[0]) else -1.0
    keys = (sign * grid).detach().contiguous()
    after = torch.searchsorted(keys, (sign * t).detach().contiguous()).clamp(1, len(grid) - 1)
    share = (t - grid[after - 1]) / (grid[after] - grid[after - 1])
    share = share.reshape(-1, *[1] * (ys.ndim - 1)).to(ys.real.dtype if ys.is_complex() else ys.dtype)
    start, end = ys[after - 1], ys[after]
    exact = (t.detach() == grid.detach()[after]).reshape(share.shape)
    between = start + share * (end - start)
    return torch.where(exact, end, between) if not t.requires_grad else between


def _moving(call: Call, ys: Any, grid: Tensor, places: list[int]) -> Any:
    """Let outputs on the points of a grid move with their times, relative to the grid: the derivative there is `func`.

    The first and the last move with the grid already.
    """
    t = call.t
    if not (t.requires_grad and torch.is_grad_enabled()):
        return ys
    tuples = isinstance(call.y0, tuple)
    leaves = ys if tuples else (ys,)
    moves: list[list[Tensor]] = [[torch.zeros_like(y[0])] for y in leaves]
    for i in range(1, len(t) - 1):
        state = tuple(y[i] for y in leaves)
        now = t[i].detach().to(state[0].abs().dtype)
        slope = call.field(now, state if tuples else state[0])
        shift = (t[i] - grid[places[i]]).to(now.dtype)  # zero, with the gradients of both times
        for move, dy in zip(moves, slope if tuples else (slope,), strict=True):
            move.append(shift * dy)
    moved = tuple(y + torch.stack([*move, move[0]]) for y, move in zip(leaves, moves, strict=True))
    return moved if tuples else moved[0]
