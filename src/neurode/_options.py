"""Reads how to solve: methods, grids, tolerances and norms as users give them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from neurode import methods
from neurode._errors import InputError, UnknownOptionError, did_you_mean
from neurode._state import Layout, number, unreadable
from neurode.control import PID
from neurode.control.fixed import grid_of_size, grid_of_steps
from neurode.output.estimates import NAMES, estimated


def read_control(
    method: Any, grid: Any, controller: Any, first_step: Any, min_step: Any, max_step: Any, step_at: Any, jump_at: Any
) -> dict[str, Any]:
    """What controls the steps, as `Problem` has it.

    Raises:
        InputError: a value that controls nothing, or an option of adaptive methods for one that walks along a grid.
    """
    lengths = {"first_step": first_step, "min_step": min_step, "max_step": max_step}
    stops, jumps = _floats("step_at", step_at), _floats("jump_at", jump_at)
    if grid is not None:
        given = [name for name, value in lengths.items() if isinstance(value, Tensor) or value != DEFAULT_LENGTHS[name]]
        given += ["controller"] * (controller is not None) + ["step_at"] * bool(stops)
        if given:
            raise InputError(
                f"{given[0]}= is for methods that choose their steps, but {method.name!r} walks along a grid. Leave it out,"
                " or give the grid that you want: grid=[t0, ..., t1]."
            )
        _refuse_off_grid(jumps, grid)
    if controller is not None and not isinstance(controller, PID):
        raise InputError(f"controller={controller!r}; type controller=neurode.PID.pi() or another neurode.PID.")
    for name, value in lengths.items():
        if value is not None:
            _refuse_length(name, value, zero=name == "min_step")
    for name in ("min_step", "max_step"):
        if isinstance(lengths[name], Tensor) and lengths[name].numel() != 1:
            raise InputError(f"{name} has shape {tuple(lengths[name].shape)}; it is one number for all rows.")
    if float(min_step) > float(max_step):
        raise InputError(f"min_step={min_step!r} is above max_step={max_step!r}.")
    return {"controller": controller or DEFAULT_CONTROLLER, **lengths, "step_at": stops, "jump_at": jumps}


# The elementary controller with the constants of SciPy's `solve_ivp`: with its tableaus the steps, and so the errors, are
# SciPy's. DOPRI5's PI controller makes smaller errors on most problems and some 20 times larger ones on a few
# (docs/solver.md, accuracy).
DEFAULT_CONTROLLER = PID()
DEFAULT_LENGTHS = {"first_step": None, "min_step": 0.0, "max_step": math.inf}


def _refuse_length(name: str, value: Any, zero: bool) -> None:
    if isinstance(value, Tensor):
        good = bool(((value >= 0) if zero else (value > 0)).all())
    elif isinstance(value, bool) or not isinstance(value, (float, int, Real)):  # `Real` alone asks an abstract class
        raise InputError(f"{name}={value!r}; it must be a length of time, such as {name}=0.1.")
    else:
        length = float(value)
        good = length >= 0 if zero else length > 0
    if not good:
        raise InputError(f"{name}={value!r}; it must be a positive length (its direction follows t_span).")


def _floats(name: str, times: Any) -> tuple[float, ...]:
    try:
        numbers = tuple(float(t) for t in times)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}={times!r}; it must be a list or tensor of times.") from error
    if not all(map(math.isfinite, numbers)):
        raise InputError(f"{name}={times!r}; all times must be finite.")
    return numbers


def _refuse_off_grid(jumps: tuple[float, ...], grid: Any) -> None:
    """On a grid, `f` may jump at points of it, or outside of the span."""
    if not jumps:
        return
    columns = ([number(t) for t in grid],) if not isinstance(grid, Tensor) else grid.detach().T.tolist()
    for jump in jumps:
        for points in columns:
            if min(points[0], points[-1]) < jump < max(points[0], points[-1]) and jump not in points:
                raise InputError(
                    f"jump_at holds {jump:g}, which is no point of the grid, so that a step would go across it. Type"
                    f" grid=[t0, ..., {jump:g}, ..., t1]."
                )


def choose_method(method: Any, fixed: bool, rtol: Any) -> tuple[Any, str]:
    """The method, and what to say of it in the statistics.

    Args:
        method: a name, a tableau, or None.
        fixed: whether a fixed grid was asked for.
        rtol: relative tolerance, by which None picks.
    """
    if method is not None:
        chosen = methods.get(method)
        return chosen, chosen.name
    if fixed:
        return methods.get("rk4"), "rk4 (chosen: a fixed grid was given)"
    tightest = _tightest(rtol)
    name = next(name for bound, name in BY_TOLERANCE if tightest >= bound)
    return methods.get(name), f"{name} (chosen for rtol={tightest:g})"


def _tightest(rtol: Any) -> float:
    """The smallest relative tolerance that is not zero; 1 where there is none."""
    found = [1.0]
    for leaf in pytree.tree_leaves(rtol):
        if isinstance(leaf, Tensor):
            found += leaf.detach().flatten().tolist()
        elif isinstance(leaf, float | int):
            found.append(float(leaf))
    return min(value for value in found if value > 0)


# Evaluations of f for a given accuracy on DETEST (`benchmarks/method_by_tolerance.py`; geometric mean over 22 problems, taken
# under PI control): tsit5 is the cheapest down to errors of 1e-5, which it has at a tolerance of 1e-6; dop853 needs 10 % less at
# 1e-6, a quarter less at 1e-7 and a third less at 1e-9. As dop853 pays three more evaluations for every step with outputs, it
# starts one decade later. No other pair is the cheapest anywhere by more than a few per cent.
BY_TOLERANCE: list[tuple[float, str]] = [(1e-7, "tsit5"), (0.0, "dop853")]


def read_grid(method: Any, t0: Any, t1: Any, steps: Any, step_size: Any, grid: Any) -> Any:
    """The grid of a fixed-step method, or None for an adaptive one.

    Returns:
        A list of floats or 0-d tensors, or a tensor `(points, rows)`.

    Raises:
        InputError: none or two of `steps`, `step_size` and `grid` for a fixed-step method, any for an adaptive one, or a
            value that makes no grid.
    """
    given = {"steps": steps, "step_size": step_size, "grid": grid}
    if not refuse_grids(method, given):
        return None
    if steps is not None:
        return _steps_grid(t0, t1, steps)
    if step_size is not None:
        return _size_grid(t0, t1, step_size)
    return _given_grid(t0, t1, grid)


def refuse_grids(method: Any, given: dict[str, Any]) -> bool:
    """Whether the method walks on a grid; refuses a grid for an adaptive method, and none or two for a fixed one."""
    names = [name for name, value in given.items() if value is not None]
    if method.adaptive and not names:
        return False
    if method.adaptive:
        raise InputError(
            f"{names[0]}={given[names[0]]!r} was given, but {method.name!r} chooses its own steps. Leave {names[0]} out"
            " and set rtol and atol, or take a fixed-step method such as method='rk4'."
        )
    if len(names) != 1:
        got = " and ".join(names) if names else "none"
        raise InputError(
            f"the fixed-step method {method.name!r} needs exactly one of steps=, step_size= or grid=; given: {got}."
            " Type steps=20."
        )
    return True


def _steps_grid(t0: Any, t1: Any, steps: Any) -> Any:
    if isinstance(steps, bool) or not isinstance(steps, (int, Integral)) or steps < 1:
        raise InputError(f"steps={steps!r}; it must be a whole number of at least 1.")
    grid = grid_of_steps(t0, t1, int(steps))
    return torch.stack(list(grid)) if isinstance(t0, Tensor) and t0.ndim else grid


def _size_grid(t0: Any, t1: Any, step_size: Any) -> Any:
    try:
        size = float(step_size)
    except (TypeError, ValueError):
        size = math.nan
    if not (math.isfinite(size) and size > 0):
        raise InputError(f"step_size={step_size!r}; it must be a positive number (its direction follows t_span).")
    if not isinstance(t0, Tensor) and not isinstance(t1, Tensor):
        return grid_of_size(t0, t1, size)
    if isinstance(t0, Tensor) and t0.ndim:
        return _row_size_grid(t0, t1, size)
    inner = grid_of_size(number(t0), number(t1), size)[1:-1]
    # The points move with t0, as t0 + k h does; the last step absorbs t1.
    return [t0, *[t0 + (t - number(t0)) for t in inner], t1]


def _row_size_grid(t0: Tensor, t1: Tensor, size: float) -> Tensor:
    grids = [grid_of_size(a, b, size) for a, b in zip(t0.tolist(), t1.tolist(), strict=True)]
    longest = max(map(len, grids))
    columns = []
    for row, grid in enumerate(grids):
        inner = [t0[row] + (t - grid[0]) for t in grid[1:-1]]
        columns.append(torch.stack([t0[row], *inner, *[t1[row]] * (longest - len(inner) - 1)]))
    return torch.stack(columns, 1)


def _given_grid(t0: Any, t1: Any, grid: Any) -> Any:
    if isinstance(t0, Tensor) and t0.ndim:
        if not len(t0):
            return torch.stack([t0, t1])
        if bool((t0 != t0[0]).any() | (t1 != t1[0]).any()):
            raise InputError("grid= with a t_span for each row: give steps= or step_size= instead.")
        inner = _given_grid(number(t0[0]), number(t1[0]), grid)[1:-1]
        return torch.stack(
            [t0, *(torch.as_tensor(t, dtype=t0.dtype, device=t0.device).expand_as(t0) for t in inner), t1]
        )
    if callable(grid):
        grid = grid(t0, t1)
    points = torch.as_tensor(grid, dtype=torch.float64)
    if points.ndim != 1 or len(points) < 2:
        raise InputError(f"grid has shape {tuple(points.shape)}; it must be (points,), from t0 to t1.")
    plain = isinstance(grid, list | tuple) and not any(isinstance(t, Tensor) for t in grid)
    values = [float(t) for t in grid] if plain else points.detach().tolist()
    if values[0] != number(t0) or values[-1] != number(t1):
        raise InputError(
            f"grid runs from {values[0]:g} to {values[-1]:g}, but t_span from {number(t0):g} to {number(t1):g}."
        )
    ups = [b - a for a, b in zip(values[:-1], values[1:], strict=True)]
    if not (all(u > 0 for u in ups) or all(u < 0 for u in ups)):
        raise InputError("grid must be strictly increasing or strictly decreasing, from t0 to t1.")
    return [t0, *(points.unbind()[1:-1] if points.requires_grad else values[1:-1]), t1]


def read_tolerance(name: str, value: Any, layout: Layout, y0: Tensor, lowest: float) -> Any:
    """A tolerance as a float, or as a tensor that broadcasts against the inner state.

    Raises:
        InputError: negative, not finite, below what the dtype resolves, or of a shape that does not fit.
    """
    if isinstance(value, bool) or value is None:
        raise InputError(f"{name}={value!r}; it must be a positive number, such as {name}=1e-6.")
    if isinstance(value, int | float):
        number_ = float(value)
        if torch.compiler.is_compiling():
            return number_
        if not (number_ >= lowest and math.isfinite(number_)) and number_ != 0.0:
            _refuse_tolerance(name, torch.tensor(number_, dtype=torch.float64), lowest)
        return number_
    if isinstance(value, Tensor) and value.requires_grad:
        raise InputError(f"{name} requires grad, but tolerances are not differentiated. Type {name}.detach().")
    packed = _pack_tolerance(name, value, layout, y0)
    _refuse_tolerance(name, packed.double(), lowest)
    return packed


def refuse_no_tolerance(rtol: Any, atol: Any) -> None:
    """Refuse tolerances that are both zero: no step is that accurate."""

    def nothing(tol: Any) -> bool:
        if isinstance(tol, Tensor):
            return tol.numel() == 1 and not unreadable(tol) and tol.item() == 0
        return isinstance(tol, int | float) and tol == 0

    if nothing(rtol) and nothing(atol):
        raise InputError(
            "rtol and atol are both 0, which no step can reach. Type rtol=1e-6, atol=1e-8, or take a fixed-step method:"
            " method='rk4', steps=100."
        )


def _refuse_tolerance(name: str, value: Tensor, lowest: float) -> None:
    if torch.compiler.is_compiling():
        return
    if not bool((torch.isfinite(value) & (value >= 0)).all()):
        raise InputError(f"{name} is {value.min().item():g}; a tolerance must be a finite number and not negative.")
    if bool(((value < lowest) & (value > 0)).any()):
        raise InputError(
            f"{name}={value.min().item():g} is below what the state's dtype resolves ({lowest:.1e}). Loosen it, or use"
            " y0.double()."
        )


def _pack_tolerance(name: str, value: Any, layout: Layout, y0: Tensor) -> Tensor:
    """Broadcast each leaf's tolerance to the leaf, and pack them as the state is packed."""
    leaves = pytree.tree_leaves(value) if not isinstance(value, Tensor) else [value]
    single = len(leaves) == 1 and isinstance(value, Tensor)
    if not single and (layout.spec is None or pytree.tree_structure(value) != layout.spec):
        given = pytree.tree_structure(value)
        raise InputError(f"{name} has the structure {given}; give a number, a tensor, or a pytree like y0.")
    leaves = leaves * len(layout.shapes) if single else leaves
    rows = (y0.shape[0],) if layout.batched else ()
    wide = []
    for leaf, shape in zip(leaves, layout.shapes, strict=True):
        tensor = torch.as_tensor(leaf, dtype=layout_real(layout), device=layout.device)
        full = (*rows, *shape)
        if layout.batched and tensor.ndim == 1 and len(full) > 1 and full[-1] != 1 and tensor.shape[0] == full[0]:
            raise InputError(
                f"{name} has shape ({full[0]},), which could mean rows or columns. For one tolerance a row type"
                f" {name}.reshape({', '.join(['-1'] + ['1'] * (len(full) - 1))})."
            )
        try:
            wide.append(tensor.expand(full))
        except RuntimeError as error:
            raise InputError(f"{name} has shape {tuple(tensor.shape)}, which does not broadcast to {full}.") from error
    tree = wide[0] if layout.spec is None else pytree.tree_unflatten(wide, layout.spec)
    return layout.pack(tree)


def layout_real(layout: Layout) -> torch.dtype:
    """The real dtype of a state."""
    return layout.dtype.to_real()


def read_estimates(estimates: Any, method: Any) -> tuple[str, ...]:
    """The names of the estimates that a solve sums over its steps.

    Args:
        estimates: a name, or several.
        method: the method of the solve.

    Raises:
        UnknownOptionError: there is no such estimate.
        InputError: the method's steps do not hold it.
    """
    names = (estimates,) if isinstance(estimates, str) else tuple(estimates)
    for name in names:
        if name not in NAMES:
            raise UnknownOptionError(
                f"estimates={name!r}.{did_you_mean(str(name), NAMES)} There are: {', '.join(NAMES)}."
            )
        if not estimated(name, method):
            able = [other.name for other in methods.METHODS.values() if estimated(name, other)]
            raise InputError(
                f"the steps of {method.name!r} hold no estimate of {name!r}; those of {', '.join(able)} do."
            )
    return names


def rms(x: Tensor) -> Tensor:
    """Root mean square over all elements of the state (Hairer, Norsett & Wanner 1993, II.4, eq. 4.11)."""
    return torch.linalg.vector_norm(x) / math.sqrt(x.numel())


def row_rms(x: Tensor) -> Tensor:
    """Root mean square over each row."""
    return torch.linalg.vector_norm(x, dim=1) / math.sqrt(x.shape[1])


def largest(x: Tensor) -> Tensor:
    """The largest absolute value."""
    return x.abs().amax()


def row_largest(x: Tensor) -> Tensor:
    """The largest absolute value of each row."""
    return x.abs().amax(1)


@dataclass(frozen=True)
class LeafRms:
    """The largest of the leaves' root mean squares.

    Attributes:
        sizes: elements of every leaf, of one row of it where there are rows.
        batched: whether dimension 0 counts rows.
    """

    sizes: tuple[int, ...]
    batched: bool

    def __call__(self, x: Tensor) -> Tensor:
        """The norm of an inner state."""
        parts = x.split(self.sizes, dim=-1) if len(self.sizes) > 1 else (x,)
        return torch.stack([row_rms(part) if self.batched else rms(part) for part in parts]).amax(0)


NORMS = {"rms": (rms, row_rms), "max": (largest, row_largest)}


def rms_of_leaves(layout: Layout) -> Callable[[Tensor], Tensor]:
    """The largest of the leaves' root mean squares; of one leaf its own."""
    return NORMS["rms"][layout.batched] if len(layout.sizes) == 1 else LeafRms(tuple(layout.sizes), layout.batched)


def read_norm(norm: Any, layout: Layout) -> Callable[[Tensor], Tensor]:
    """A norm on the inner state.

    Args:
        norm: None or `"rms"`, `"leaf-rms"`, `"max"`, or a callable that gets the state's pytree and returns one value (a row).
    """
    if norm == "leaf-rms":
        return rms_of_leaves(layout)
    if norm is None or isinstance(norm, str):
        if norm is not None and norm not in NORMS:
            raise InputError(f"norm={norm!r}; it must be 'rms', 'leaf-rms', 'max' or a callable on the state.")
        return NORMS[norm or "rms"][layout.batched]
    if not callable(norm):
        raise InputError(f"norm={norm!r}; it must be 'rms', 'leaf-rms', 'max' or a callable on the state.")

    def checked(x: Tensor) -> Tensor:
        value = torch.as_tensor(norm(layout.unpack(x)), device=x.device)
        shape = x.shape[:1] if layout.batched else ()
        if value.shape != shape and (layout.batched or value.numel() != 1):
            needed = f"one value a row, of shape {tuple(shape)}" if layout.batched else "one number"
            raise InputError(f"norm returned the shape {tuple(value.shape)}; it must return {needed}.")
        return value.reshape(shape)

    return checked
