"""Running integrals along a solution: more components of the state, which the user's functions never see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from neurode._errors import FieldError, InputError
from neurode._field import Field
from neurode._problem import Problem
from neurode._solution import EventRecord, Solution
from neurode._state import Layout, read_state


@dataclass(frozen=True)
class Integrals:
    """The integrals of one solve.

    Args:
        function: `integrate(t, y, *args)`, a tensor or pytree of tensors.
        layout: of the user's state.
        spec: the tree of what `function` returns.
        steer: whether the integrals' errors count in the choice of steps.
    """

    function: Callable[..., Any]
    layout: Layout
    spec: pytree.TreeSpec
    steer: bool

    # ---- into the solve

    def field(self, field: Field, layout: Layout) -> Field:
        """The vector field of state and integrals together."""

        def both(t: Tensor, state: Any, *args: Any) -> Any:
            inner, _ = state
            if self.layout.batched:
                t = t.reshape(-1, *self.layout.time_shape)
            y = self.layout.unpack(inner)
            out = field.f(t, y, *args)
            dy, aux = out if field.has_aux and isinstance(out, tuple) and len(out) == 2 else (out, None)
            integrand = self._cast(self.function(t, y, *args))
            derivative = (self.layout.derivative(dy, inner), integrand)
            return (derivative, aux) if field.has_aux else derivative

        return Field(both, layout, field.all_args, field.has_aux)

    def _cast(self, values: Any) -> list[Tensor]:
        leaves, spec = pytree.tree_flatten(values)
        if spec != self.spec:
            raise FieldError(f"integrate(t, y) returned the structure {spec}, but at t0 it was {self.spec}.")
        return [leaf.to(self.layout.dtype) for leaf in leaves]

    def norm(self, norm: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The norm of the state's part of the error, and, where asked for, at least the largest ratio of an integral."""
        shape, size = self.layout.shapes[0], sum(self.layout.sizes)

        def of_state(x: Tensor) -> Tensor:
            state = x[..., :size]
            alone = self.layout.spec is None and not self.layout.batched
            ratio = norm(state.reshape(shape) if alone else state)
            return torch.maximum(ratio, x[..., size:].abs().amax(-1)) if self.steer else ratio

        return of_state

    def tolerance(self, tolerance: Any, extra: int) -> Any:
        """Tolerances of the integrals: the tightest of the state's."""
        if not isinstance(tolerance, Tensor):
            return tolerance
        wide = tolerance if self.layout.batched else tolerance.reshape(-1)
        return torch.cat([wide, wide.amin(-1, keepdim=True).expand(*wide.shape[:-1], extra)], -1)

    def event(self, event: Any) -> Any:
        """An event that sees the state alone, and leaves the integrals as they are."""

        def g(t: Tensor, state: Any, *args: Any) -> Any:
            return event.g(self._time(t), self.layout.unpack(state[0]), *args)

        def apply(t: Tensor, state: Any, *args: Any) -> Any:
            inner, sums = state
            return self.layout.derivative(event.apply(self._time(t), self.layout.unpack(inner), *args), inner), sums

        return replace(event, g=g, apply=None if event.apply is None else apply)

    def _time(self, t: Tensor) -> Tensor:
        return t.reshape(-1, *self.layout.time_shape) if self.layout.batched else t

    # ---- out of it

    def split(self, solution: Solution) -> Solution:
        """The solution as the user asked for it, with the integrals beside it."""
        inner, sums = solution.ys
        events = tuple(EventRecord(e.t, self.layout.unpack(e.y[0], lead=1), e.count) for e in solution.events)
        dense = solution.interpolant
        return replace(
            solution,
            ys=self.layout.unpack(inner, lead=1),
            y1=self.layout.unpack(solution.y1[0]),
            events=events,
            integrals=pytree.tree_unflatten(sums, self.spec),
            interpolant=None
            if dense is None
            else lambda t, derivative: self._state_of(dense(t, derivative=derivative), t),
        )

    def _state_of(self, values: Any, t: Any) -> Any:
        lead = t.ndim if isinstance(t, Tensor) else 0
        return self.layout.unpack(values[0], lead=max(lead - 1, 0) if self.layout.batched else lead)


def extend(problem: Problem, function: Any, steer: bool) -> tuple[Problem, Integrals]:
    """A problem that carries running integrals of `function`.

    Args:
        problem: the problem as the user stated it.
        function: `integrate(t, y, *args)`.
        steer: whether the integrals' errors count in the choice of steps.

    Raises:
        InputError: the integrand is no function to tensors, or the method splits its state.
    """
    layout, field = problem.layout, problem.field
    if not callable(function):
        raise InputError(
            f"integrate is of type {type(function).__name__}; it must be a function integrate(t, y) -> tensor."
        )
    if problem.method.kind == "symplectic":
        raise InputError(f"integrate= needs a method that is not symplectic; {problem.method.name!r} splits its state.")
    if problem.callbacks is not None:
        raise InputError(
            "integrate= and callbacks= do not go together: add the integral to the state, y = (state, sum)."
        )
    with torch.no_grad():
        t = torch.as_tensor(problem.t0).detach().to(field.time_dtype).to(layout.device)
        t = field.row_time(t, problem.y0) if layout.batched else t
        values, spec = pytree.tree_flatten(function(t, layout.unpack(problem.y0), *field.args))
    rows = problem.y0.shape[:1] if layout.batched else torch.Size()
    for value in values:
        if (
            not isinstance(value, Tensor)
            or value.shape[: len(rows)] != rows
            or value.is_complex() > layout.dtype.is_complex
        ):
            got = f"shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                f"integrate(t, y) returned {got}; it must return tensors{f' of {rows[0]} rows' if rows else ''}."
            )
    assert problem.norm is not None
    integrals = Integrals(function, layout, spec, steer)
    zeros = [torch.zeros_like(value, dtype=layout.dtype) for value in values]
    wide, state = read_state((problem.y0, zeros), 0 if layout.batched else None)
    extra = sum(wide.sizes) - sum(layout.sizes)
    return replace(
        problem,
        field=integrals.field(field, wide),
        layout=wide,
        y0=state,
        rtol=integrals.tolerance(problem.rtol, extra),
        atol=integrals.tolerance(problem.atol, extra),
        norm=integrals.norm(problem.norm),
        events=tuple(map(integrals.event, problem.events)),
    ), integrals
