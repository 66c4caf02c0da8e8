"""Reads the arguments that all of torchdiffeq's functions share, and raises and warns as it does."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from neurode._errors import SolveError
from neurode._solution import Status
from neurode.control import Callbacks
from neurode.torchdiffeq._solvers import ALL_CALLBACKS, SOLVERS, Solver

MAX_ADAMS_ORDER, MIN_ADAMS_ORDER = 12, 4  # of torchdiffeq: beyond an error, below a warning


@dataclass(frozen=True)
class Call:
    """The arguments of one call, read.

    Attributes:
        func: the user's function.
        field: the same, returning exactly the structure, shapes and dtype of the state.
        y0: a tensor, or a tuple of tensors of one dtype.
        t: `(times,)`, on the device of `y0`.
        rtol, atol: a number, a tensor, or a tuple with one of them for each entry of the state.
        solver: one of torchdiffeq's methods.
        options: a copy of the user's.
        engine: of `neurode.solve`.
    """

    func: Callable[..., Any]
    field: Callable[..., Any]
    y0: Any
    t: Tensor
    rtol: Any
    atol: Any
    solver: Solver
    options: dict[str, Any]
    engine: str = "auto"

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The entries of the state."""
        return self.y0 if isinstance(self.y0, tuple) else (self.y0,)

    def at(self, y0: Any) -> Call:
        """The same call from another state."""
        return replace(self, y0=y0)

    @property
    def norm(self) -> Any:
        """The norm on the state: the user's, or torchdiffeq's default."""
        return self.options.get("norm") or default_norm(self.y0)

    def stack(self, *states: Any) -> Any:
        """States along a new first dimension."""
        if not isinstance(self.y0, tuple):
            return torch.stack(states)
        return tuple(map(torch.stack, zip(*states, strict=True)))

    def callbacks(self) -> Callbacks | None:
        """The callbacks that `func` carries, with a count of steps where `max_num_steps` limits them."""
        found = {name: getattr(self.func, name, None) for name in self.solver.callbacks}
        step, accept, reject = (found.get(f"callback_{kind}") for kind in ("step", "accept_step", "reject_step"))
        if "max_num_steps" in self.options:
            step = Budget(int(self.options["max_num_steps"]), self.t.detach().tolist(), step)
        if step is None and accept is None and reject is None:
            return None
        return Callbacks(step, accept, reject)


class Budget:
    """Counts the attempts from one output time to the next, and raises beyond `limit`."""

    def __init__(self, limit: int, times: list[float], then: Callable[..., Any] | None) -> None:
        self.limit, self.then, self.count = limit, then, 0
        self.sign = 1.0 if times[-1] >= times[0] else -1.0
        self.times, self.next = times, 1

    def __call__(self, t0: Tensor, y0: Any, dt: Tensor) -> None:
        t = self.sign * float(t0)
        while self.next < len(self.times) - 1 and self.sign * self.times[self.next] <= t:
            self.next, self.count = self.next + 1, 0
        if self.count >= self.limit:
            raise AssertionError(f"max_num_steps exceeded ({self.count}>={self.limit})")
        self.count += 1
        if self.then is not None:
            self.then(t0, y0, dt)


def read_call(func: Any, y0: Any, t: Any, rtol: Any, atol: Any, method: Any, options: Any) -> Call:
    """Read and check the arguments of `odeint`.

    Raises:
        AssertionError, TypeError, ValueError: as torchdiffeq.
    """
    y0 = read_state(y0)
    leaves = y0 if isinstance(y0, tuple) else (y0,)
    rtol, atol = (_read_tolerance(name, tol, y0) for name, tol in (("rtol", rtol), ("atol", atol)))
    options = {} if options is None else dict(options)
    method = "dopri5" if method is None else method
    if method not in SOLVERS:
        names = '", "'.join(SOLVERS)
        raise ValueError(f'Invalid method "{method}". Must be one of {{"{names}"}}.')
    solver = SOLVERS[method]
    t = read_times(t)
    if t.device != leaves[0].device:
        warnings.warn("t is not on the same device as y0. Coercing to y0.device.", stacklevel=4)
        t = t.to(leaves[0].device)
    _warn(func, solver, options)
    return Call(func, conforming(func, y0), y0, t, rtol, atol, solver, options)


def read_state(y0: Any) -> Any:
    """A tensor as it is; a tuple with its entries promoted to one dtype."""
    if isinstance(y0, Tensor):
        return y0
    assert isinstance(y0, tuple), "y0 must be either a torch.Tensor or a tuple"
    dtype = functools.reduce(torch.promote_types, (y.dtype for y in y0))
    return tuple(y.to(dtype) for y in y0)


def read_times(t: Any) -> Tensor:
    """Check output times."""
    assert isinstance(t, Tensor), "t must be a torch.Tensor"
    if not torch.is_floating_point(t):
        raise TypeError(f"`t` must be a floating point Tensor but is a {t.type()}")
    assert t.ndim == 1, "t must be one dimensional"
    if len(t) == 0:
        raise IndexError("t is empty; it needs at least the initial time")
    later, earlier = t[1:].detach(), t[:-1].detach()
    assert bool((later > earlier).all()) or bool((later < earlier).all()), "t must be strictly increasing or decreasing"
    return t


def _read_tolerance(name: str, value: Any, y0: Any) -> Any:
    if isinstance(value, Tensor):
        assert not value.requires_grad, f"{name} cannot require gradient"
    many = isinstance(value, Tensor) and value.ndim > 0
    if not many and not isinstance(value, list | tuple):
        return float(value)
    if not isinstance(y0, tuple):
        return torch.as_tensor(value, dtype=torch.float64, device=y0.device)
    entries = tuple(value)
    assert len(entries) == len(y0), f"If using tupled {name} it must have the same length as the tuple y0"
    return entries


def _warn(func: Any, solver: Solver, options: dict[str, Any]) -> None:
    unknown = {key: value for key, value in options.items() if key not in solver.options}
    if unknown:
        warnings.warn(f"{solver.title}: Unexpected arguments {unknown}", stacklevel=5)
    made = {name for name in ALL_CALLBACKS if hasattr(func, name)}
    if made - solver.callbacks:
        warnings.warn(f"Solver '{solver.name}' does not support callbacks {made - solver.callbacks}", stacklevel=5)
    if solver.kind == "adams" and "max_order" in options:
        assert options["max_order"] <= MAX_ADAMS_ORDER, f"max_order must be at most {MAX_ADAMS_ORDER}"
        if options["max_order"] < MIN_ADAMS_ORDER:
            text = f"max_order is below {MIN_ADAMS_ORDER}, so the solver reduces to `rk4`."
            warnings.warn(text, stacklevel=5)


def conforming(func: Callable[..., Any], y0: Any) -> Callable[..., Any]:
    """`func` with what it returns brought to the structure and dtype of the state, as torchdiffeq does."""
    if isinstance(y0, tuple):

        def tuple_field(t: Tensor, y: Any) -> Any:
            return tuple(dy.reshape(like.shape).to(like.dtype) for dy, like in zip(func(t, y), y, strict=True))

        return wrapping(tuple_field, func)

    def field(t: Tensor, y: Tensor) -> Any:
        dy = func(t, y)
        return dy.to(y.dtype) if isinstance(dy, Tensor) and dy.dtype is not y.dtype else dy

    return wrapping(field, func)


def wrapping(field: Callable[..., Any], func: Callable[..., Any]) -> Callable[..., Any]:
    """Say whose function a field calls: a module is captured by the fused engine at once, a plain function later."""
    field.neurode_wraps = func  # pyrefly: ignore[missing-attribute]
    return field


def rms(x: Tensor) -> Tensor:
    """Root mean square of all elements."""
    return x.abs().square().mean().sqrt() if x.numel() else x.abs().sum()


def largest_rms(parts: Any) -> Tensor:
    """The largest of the entries' root mean squares, torchdiffeq's norm of a tuple."""
    return torch.stack([rms(part) for part in parts]).amax()


def default_norm(y0: Any) -> Callable[..., Tensor]:
    """torchdiffeq's norm for a state."""
    return largest_rms if isinstance(y0, tuple) else rms


def as_assertion(error: SolveError) -> Exception:
    """A failed solve as programs written for torchdiffeq expect it: by the first words of an AssertionError."""
    solution = error.solution
    where = f" at t = {float(solution.t1):.6g}"
    if solution.status is Status.UNDERFLOW:
        return AssertionError(f"underflow in dt{where}: {error}")
    if solution.status is Status.NON_FINITE:
        return AssertionError(f"non-finite values in state `y`{where}: {error}")
    return AssertionError(str(error))
