"""A layer whose output is the solution of an ordinary differential equation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from neurode import methods
from neurode._errors import InputError
from neurode._solution import Solution, Stats
from neurode._solve import check_options, misfit, solve

GRID = ("steps", "step_size", "grid")


class NeuralODE(nn.Module):
    """Flows its input along a vector field: `y1 = y0 + integral of f(t, y; theta) dt`.

    Each row of dimension 0 is a system of its own: with adaptive methods it takes its own steps.

    Args:
        f: the vector field, a module or function `f(t, y)`.
        t_span: start and end of the flow; numbers or tensors, which may be parameters.
        method: a method's name or tableau; None chooses by tolerance (`rk4` where `steps` is given).
        steps: number of equal steps of a fixed-step method.
        batch_dim: 0, or None for one system.
        **options: further keywords of `neurode.solve` (`rtol`, `atol`, `step_size`, `gradient`, `controller`, ...).

    Attributes:
        last_stats: the `Stats` of the latest solve, or None.

    References:
        R. T. Q. Chen et al. (2018), Neural ordinary differential equations, NeurIPS, arXiv:1806.07366.

    Example:
        >>> import torch, neurode
        >>> layer = neurode.nn.NeuralODE(neurode.nn.MLP(6), method="rk4", steps=20)
        >>> layer(torch.ones(8, 6)).shape, layer.last_stats.num_calls
        (torch.Size([8, 6]), 80)
    """

    def __init__(
        self,
        f: Callable[..., Any],
        t_span: Any = (0.0, 1.0),
        method: Any = None,
        steps: int | None = None,
        batch_dim: int | None = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"method": method, "steps": steps, "batch_dim": batch_dim, **options}
        check_options(self.options)
        _refuse_field(f, self.options.get("args", ()))
        self._set_span(t_span)
        self.f = f
        self.last_stats: Stats | None = None

    def _set_span(self, t_span: Any) -> None:
        try:
            t0, t1 = t_span
        except (TypeError, ValueError):
            raise InputError(f"t_span={t_span!r}; it must be two times, such as (0.0, 1.0).") from None
        for name, value in (("t0", t0), ("t1", t1)):
            self._parameters.pop(name, None)  # a number in place of a learned time
            setattr(self, name, value)

    @property
    def t_span(self) -> tuple[Any, Any]:
        """Start and end of the flow."""
        return self.t0, self.t1

    def solve(self, y0: Any, **changes: Any) -> Solution:
        """Solve from `y0` and return the whole `Solution`; `changes` override the layer's options for this call."""
        options: dict[str, Any] = {"t_span": self.t_span, **self.options, **changes}
        solution = solve(self.f, y0, **options)
        if not torch.compiler.is_compiling():  # there it would be a guard, and every call a recompilation
            self.__dict__["last_stats"] = solution.stats  # what nn.Module does for a plain value, without its search
        return solution

    def forward(self, y0: Any) -> Any:
        """The state at the end, of the structure and shape of `y0`, `(rows, ...)`."""
        return self.solve(y0).y1

    def trajectory(self, y0: Any, t_eval: Any) -> Any:
        """The states at the times `t_eval` `(time,)`: `(time, rows, ...)`."""
        return self.solve(y0, t_eval=t_eval).ys

    def inverse(self, y1: Any) -> Any:
        """The state at the start that flows to `y1`: the same field solved from t1 to t0.

        It is the inverse of `forward` up to the error of both solves, see `check_depth`; where the flow contracts strongly
        it is ill-conditioned, whatever the solver.
        """
        changes: dict[str, Any] = {"t_span": (self.t1, self.t0), "t_eval": None}
        grid = self.options.get("grid")
        if grid is not None:
            changes["grid"] = (lambda t0, t1: _backward(grid(t1, t0))) if callable(grid) else _backward(grid)
        return self.solve(y1, **changes).y1

    def with_solver(self, **options: Any) -> NeuralODE:
        """The same layer, the same parameters (shared, not copied), solved differently.

        Args:
            **options: keywords of `neurode.solve`, `t_span` among them. A `method` without `steps`, `step_size` or `grid`
                drops the layer's own where the new method chooses its steps.

        Raises:
            UnknownOptionError: a keyword or a method that does not exist.
            InputError: a fixed-step method without steps, or an adaptive one with.

        Example:
            >>> import torch, neurode
            >>> layer = neurode.nn.NeuralODE(neurode.nn.MLP(2), method="euler", steps=20)
            >>> deeper = layer.with_solver(method="rk4", steps=320)
            >>> accurate = layer.with_solver(method="dopri5", rtol=1e-8, atol=1e-8)
            >>> accurate.f is layer.f
            True
        """
        other = copy.copy(self)
        other._modules, other._parameters = dict(self._modules), dict(self._parameters)
        kept = dict(self.options)
        if any(options.get(name) is not None for name in GRID) or _adaptive(options.get("method")):
            kept = {name: value for name, value in kept.items() if name not in GRID}
        other.options, other.last_stats = {**kept, **options}, None
        span = other.options.pop("t_span", None)
        check_options(other.options)
        if span is not None:
            other._set_span(span)
        return other

    def extra_repr(self) -> str:
        shown = {name: value for name, value in self.options.items() if value is not None and name != "batch_dim"}
        span = f"t_span=({_plain(self.t0)}, {_plain(self.t1)})"
        return ", ".join([span, *(f"{name}={_word(value)}" for name, value in shown.items())])


def _refuse_field(f: Any, args: tuple[Any, ...]) -> None:
    """Refuse what cannot be called as `f(t, y, *args)`, while the line that gave it is at hand."""
    if isinstance(f, type):
        raise InputError(f"f is the class {f.__name__}; give an instance, {f.__name__}(...).")
    if not callable(f):
        raise InputError(f"f is of type {type(f).__name__}; it must be a module or function f(t, y).")
    problem = misfit(f, args)
    if problem is not None:
        raise InputError(
            f"{problem} Give it a time: a module whose forward(self, t, y) returns the derivative, with what it wraps as an"
            " attribute (so that its parameters count)."
        )


def _backward(grid: Any) -> Any:
    return grid.flip(0) if isinstance(grid, Tensor) else list(grid)[::-1]


def _word(value: Any) -> str:
    """A method by its name; anything else as it is."""
    return repr(value.name if hasattr(value, "kind") and hasattr(value, "name") else value)


def _adaptive(method: Any) -> bool:
    return method is not None and methods.get(method).adaptive


def _plain(t: Any) -> str:
    return f"{t.item():g}" if isinstance(t, Tensor) and t.numel() == 1 else str(t)
