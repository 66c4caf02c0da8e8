"""Running integrals along a solution: more components of the state, which the user's functions never see."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from neurode._errors import FieldError, GradientError, InputError
from neurode._field import Field, per_row, take_rows
from neurode._problem import Problem
from neurode._solution import EventRecord, Solution
from neurode._state import Layout, read_state


@dataclass(frozen=True, eq=False)
class Integrand:
    """What `integrate=` takes besides a function of `(t, y)`: a function of what `f` makes of them.

    It shares the solve's own evaluation of `f`.

    Args:
        value: `value(y, dy, product, noise, batched)`: the state and its derivative; `product(e)`, which gives the
            vector-Jacobian product of `f` with a state-like `e`; what `draw` gave; whether dimension 0 counts rows. Returns
            a tensor: 0-d, or `(rows,)`.
        draw: `draw(y0)`, called once a solve, gives the noise, state-like; None where there is none.
        inside: whether `product` is used.
    """

    value: Callable[..., Any]
    draw: Callable[[Any], Any] | None = None
    inside: bool = False


@dataclass(frozen=True)
class Integrands:
    """All that one solve integrates.

    Args:
        parts: functions `integrate(t, y, *args)` and `Integrand`s.
        outer: the tree in which the user gave them.
        batched: whether dimension 0 counts rows.
    """

    parts: tuple[Any, ...]
    outer: pytree.TreeSpec
    batched: bool

    @classmethod
    def read(cls, given: Any, batched: bool) -> Integrands:
        """Take what the user wrote: a function, an `Integrand`, or a dict, list or tuple of them."""
        parts, outer = pytree.tree_flatten(given)
        for part in parts:
            if not isinstance(part, Integrand) and not callable(part):
                raise InputError(
                    f"integrate is of type {type(part).__name__}; it must be a function integrate(t, y) -> tensor, or a"
                    " regularizer such as neurode.regularizers.kinetic_energy()."
                )
            if getattr(part, "__module__", "") == "neurode.regularizers":
                name = getattr(part, "__name__", "regularizer")
                raise InputError(f"integrate= is given {name} itself. Call it: {name}().")
        return cls(tuple(parts), outer, batched)

    @property
    def inside(self) -> bool:
        """Whether any of them differentiates `f`."""
        return any(isinstance(part, Integrand) and part.inside for part in self.parts)

    @property
    def plain(self) -> bool:
        """Whether all are functions of `(t, y)` alone."""
        return not any(isinstance(part, Integrand) for part in self.parts)

    def draw(self, y0: Any) -> tuple[Any, ...]:
        """The noise of each, for one solve."""
        noises = [p.draw(y0) if isinstance(p, Integrand) and p.draw else None for p in self.parts]
        return tuple(per_row(noise) if self.batched and noise is not None else noise for noise in noises)

    def evaluate(self, f: Callable[..., Any], has_aux: bool, t: Tensor, y: Any, args: Any, noises: Any) -> Any:
        """`f(t, y, *args)` and the values of all integrands there."""
        recording = torch.is_grad_enabled()
        if self.inside:
            _refuse_transforms()
            t, args, noises = pytree.tree_map(_usable, (t, tuple(args), noises))
        with _differentiable(y) if self.inside else contextlib.nullcontext(y) as y:
            out = f(t, y, *args)
            dy = out[0] if has_aux and isinstance(out, tuple) and len(out) == 2 else out
            product = lambda e: _product(dy, y, e, recording)
            values = [
                part.value(y, dy, product, noise, self.batched) if isinstance(part, Integrand) else part(t, y, *args)
                for part, noise in zip(self.parts, noises, strict=True)
            ]
        if self.inside and not recording:
            out, values = pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (out, values))
        return out, pytree.tree_unflatten(values, self.outer)


@contextlib.contextmanager
def _differentiable(y: Any) -> Iterator[Any]:
    """The state as a tape needs it, also where the solve itself keeps none."""
    recording = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        yield pytree.tree_map(lambda x: x if recording and x.requires_grad else x.detach().clone().requires_grad_(), y)


def _refuse_transforms() -> None:
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise GradientError(
            "a regularizer that differentiates f (jacobian_frobenius) does not run within torch.func transforms. Take the"
            " gradient by torch.autograd.grad or backward()."
        )


def _usable(x: Any) -> Any:
    """What a tape may save: inference tensors must not."""
    if not (isinstance(x, Tensor) and x.is_inference()):
        return x
    with torch.inference_mode(False):
        return x.clone()


def _product(dy: Any, y: Any, e: Any, recording: bool) -> Any:
    """`e^T df/dy`, with a graph where the solve records one."""
    states, spec = pytree.tree_flatten(y)
    pairs = [(d, x) for d, x in zip(pytree.tree_leaves(dy), pytree.tree_leaves(e), strict=True) if d.requires_grad]
    if not pairs:
        return pytree.tree_map(torch.zeros_like, y)
    values, vectors = zip(*pairs, strict=True)
    found = torch.autograd.grad(
        values, states, vectors, create_graph=recording, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return pytree.tree_unflatten(list(found), spec)


@dataclass(frozen=True)
class Integrals:
    """The integrals of one solve.

    Args:
        integrands: what is integrated.
        layout: of the user's state.
        spec: the tree of their values.
        steer: whether the integrals' errors count in the choice of steps.
    """

    integrands: Integrands
    layout: Layout
    spec: pytree.TreeSpec
    steer: bool

    # ---- into the solve

    def field(self, field: Field, layout: Layout, noises: tuple[Any, ...]) -> Field:
        """The vector field of state and integrals together; the noises are its last argument."""

        def both(t: Tensor, state: Any, *args: Any) -> Any:
            inner, _ = state
            args, noises = args[:-1], args[-1]
            if self.layout.batched:
                t = t.reshape(-1, *self.layout.time_shape)
            y = self.layout.unpack(inner)
            out, values = self.integrands.evaluate(field.f, field.has_aux, t, y, args, noises)
            dy, aux = out if field.has_aux and isinstance(out, tuple) and len(out) == 2 else (out, None)
            integrand = self._cast(values)
            derivative = (self.layout.derivative(dy, inner), integrand)
            return (derivative, aux) if field.has_aux else derivative

        return Field(both, layout, (*field.all_args, noises), field.has_aux)

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
            return event.g(self._time(t), self.layout.unpack(state[0]), *args[:-1])

        def apply(t: Tensor, state: Any, *args: Any) -> Any:
            inner, sums = state
            return self.layout.derivative(
                event.apply(self._time(t), self.layout.unpack(inner), *args[:-1]), inner
            ), sums

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
        function: `integrate(t, y, *args)`, an `Integrand`, or a tree of them.
        steer: whether the integrals' errors count in the choice of steps.

    Raises:
        InputError: the integrand is no function to tensors, or the method splits its state.
    """
    layout, field = problem.layout, problem.field
    integrands = Integrands.read(function, layout.batched)
    if problem.method.kind == "symplectic":
        raise InputError(f"integrate= needs a method that is not symplectic; {problem.method.name!r} splits its state.")
    if problem.callbacks is not None:
        raise InputError(
            "integrate= and callbacks= do not go together: add the integral to the state, y = (state, sum)."
        )
    with torch.no_grad():
        t = torch.as_tensor(problem.t0).detach().to(field.time_dtype).to(layout.device)
        t = field.row_time(t, problem.y0) if layout.batched else t
        y0 = layout.unpack(problem.y0.detach())
        noises = integrands.draw(y0)
        f = (lambda *nothing: None) if integrands.plain else field.f  # functions of (t, y) alone need none of it
        _, values = integrands.evaluate(f, field.has_aux, t, y0, field.args, take_rows(noises, None))
        values, spec = pytree.tree_flatten(values)
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
    integrals = Integrals(integrands, layout, spec, steer)
    zeros = [torch.zeros_like(value, dtype=layout.dtype) for value in values]
    wide, state = read_state((problem.y0, zeros), 0 if layout.batched else None)
    both = integrals.field(field, wide, noises)
    both.num_calls = int(not integrands.plain)
    extra = sum(wide.sizes) - sum(layout.sizes)
    return replace(
        problem,
        field=both,
        layout=wide,
        y0=state,
        rtol=integrals.tolerance(problem.rtol, extra),
        atol=integrals.tolerance(problem.atol, extra),
        norm=integrals.norm(problem.norm),
        events=tuple(map(integrals.event, problem.events)),
    ), integrals
