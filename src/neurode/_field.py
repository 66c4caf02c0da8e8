"""The user's vector field as the solvers call it: inner time and state in, inner derivative out, calls counted."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn

from neurode._errors import FieldError, InputError
from neurode._state import Layout, real_dtype, unreadable


@dataclass(frozen=True)
class PerRow:
    """Marks a pytree of tensors in `args` whose leading dimension is the batch; made by `neurode.per_row`."""

    value: Any


def per_row(value: Any) -> PerRow:
    """Mark data in `args` as belonging to rows.

    With `batch_dim=0`, solvers may drop rows that are done; data marked so follows the rows that are left. Everything
    else in `args` is shared by all rows.

    Args:
        value: tensor `(rows, ...)`, or a pytree of such tensors.

    Returns:
        An opaque marker; `f` receives the plain value, cut to the rows it is called with.

    Example:
        >>> import torch, neurode
        >>> rate = torch.tensor([[1.0], [2.0]])
        >>> decay = lambda t, y, k: -k * y
        >>> sol = neurode.solve(decay, torch.ones(2, 1), (0, 1), args=(neurode.per_row(rate),), batch_dim=0)
        >>> [round(v, 3) for v in sol.y1.flatten().tolist()]
        [0.368, 0.135]
    """
    return PerRow(value)


def is_per_row(node: Any) -> bool:
    return isinstance(node, PerRow)


def take_rows(args: tuple[Any, ...], index: Tensor | None) -> tuple[Any, ...]:
    """Unwrap every `PerRow` in `args`, cut to the rows `index` (all of them where it is None)."""

    if not args:
        return args

    def cut(node: Any) -> Any:
        if not is_per_row(node):
            return node
        return node.value if index is None else pytree.tree_map(lambda x: x.index_select(0, index), node.value)

    return pytree.tree_map(cut, args, is_leaf=is_per_row)


def misfit(f: Any, args: Sequence[Any], name: str = "f") -> str | None:
    """Why a function cannot be called as `f(t, y, *args)`; None where it can, or keeps its signature to itself."""
    try:
        signature = inspect.signature(f.forward if isinstance(f, nn.Module) else f)
    except (TypeError, ValueError):  # a builtin
        return None
    try:
        signature.bind("t", "y", *args)
    except TypeError:
        wanted = ", ".join(["t", "y", *(f"args[{k}]" for k in range(len(args)))])
        return (
            f"{name} is called as {name}({wanted}), but {getattr(f, '__name__', type(f).__name__)} takes {signature}."
        )
    return None


_NOTHING: tuple[Callable[[], Tensor | None], int] = (lambda: None, 0)


class Field:
    """`f(t, y, *args)` on the inner state.

    Attributes:
        num_calls: how often the user's function was called.
    """

    def __init__(self, f: Callable[..., Any], layout: Layout, args: Sequence[Any] = (), has_aux: bool = False) -> None:
        self.f = f
        self.layout = layout
        self.all_args = tuple(args)
        self.args = take_rows(self.all_args, None)
        self.has_aux = has_aux
        self.time_dtype = real_dtype(layout.dtype)
        self.num_calls = 0
        self.dtype = layout.dtype
        self._lean = False
        self._first_result: tuple[Callable[[], Tensor | None], int] = _NOTHING
        self._time_tail = layout.time_shape if layout.batched else None

    def of(self, f: Callable[..., Any] | None) -> Field:
        """The same for another function, or for none yet."""
        made = object.__new__(Field)
        made.__dict__.update(self.__dict__, f=f, num_calls=0, _first_result=_NOTHING)
        return made

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """Evaluate `f`.

        Args:
            t: time, 0-d, or `(rows,)` where rows have their own; in the state's real dtype.
            y: inner state.

        Returns:
            The inner derivative, of the shape and dtype of `y`.
        """
        self.num_calls += 1
        if self._time_tail is not None:
            t = self.row_time(t, y)
        if not self._lean:
            return self._call(t, y)
        dy = self.f(t, y, *self.args) if self.args else self.f(t, y)
        if type(dy) is Tensor and dy.dtype is self.dtype and dy.shape == y.shape:
            return dy
        return self.layout.derivative(dy, y)

    def _call(self, t: Tensor, y: Tensor) -> Tensor:
        """An evaluation that has something to turn into what `f` takes, or to look at."""
        looked_at = self.num_calls <= 2 and not unreadable(y) and not y.is_inference()
        first = looked_at and self.num_calls == 1
        # State and times may be the user's own: the first call shows on copies whether f writes to them.
        when, state = (t.clone() if self._time_tail is not None else t, y.clone()) if first else (t, y)
        dy = self.layout.derivative(self._result(when, state)[0], y)
        if first and state._version:  # a solver goes on using it
            raise FieldError(
                "f(t, y) changed y in place, which the solver goes on using. Return a new tensor: type -y, not y.neg_()."
            )
        if when is not t and when._version:
            raise FieldError(
                "f(t, y) changed t in place, which the solver goes on using. Make a new tensor: type t = t + 1, not t += 1."
            )
        if looked_at and not unreadable(dy) and not dy.is_inference():
            self._compare_with_first(dy)
        # Where nothing has to be packed, later evaluations are looked at for type, dtype and shape alone.
        self._lean = self.layout.plain and not self.has_aux and self.num_calls > 1
        return dy

    def _compare_with_first(self, dy: Tensor) -> None:
        """Refuse an `f` whose second call writes to what the first one returned: a solver still needs that."""
        if self.num_calls == 1:
            self._first_result = weakref.ref(dy), dy._version
            return
        result, version = self._first_result
        self._first_result = _NOTHING
        known = result()
        if known is not None and known._version != version:
            raise FieldError(
                "f(t, y) overwrote the tensor that it had returned before, and the solver needs both. Return a new tensor:"
                " type return buffer.clone()."
            )

    def row_time(self, t: Tensor, y: Tensor) -> Tensor:
        """Times as `f` gets them with rows: `(rows, 1, ..., 1)`, of the rank of the state."""
        tail = self._time_tail
        assert tail is not None
        if t.ndim == 0:
            return t.expand(y.shape[0], *tail)
        return t.reshape(-1, *tail) if tail else t

    def _result(self, t: Tensor, y: Tensor) -> tuple[Any, Any]:
        out = self.f(t, self.layout.unpack(y), *self.args)
        if not self.has_aux:
            return out, None
        if not (isinstance(out, tuple) and len(out) == 2):
            raise FieldError(
                f"has_aux=True says that f returns (dy, aux), but it returned {type(out).__name__}. Return a pair, or"
                " leave has_aux out."
            )
        return out

    def aux(self, t: Tensor, y: Tensor) -> Any:
        """The auxiliary values that `f` returns beside `dy/dt` at one point."""
        self.num_calls += 1
        return self._result(self.row_time(t, y) if self._time_tail is not None else t, y)[1]

    def take(self, index: Tensor | None) -> None:
        """From now on, be called with the rows `index` of the original batch (all of them where it is None)."""
        if self.all_args:
            self.args = take_rows(self.all_args, index)

    def check_rows(self, rows: int) -> None:
        """Refuse per-row data whose leading size is not the batch."""
        if not self.all_args:
            return
        for node in pytree.tree_leaves(self.all_args, is_leaf=is_per_row):
            if not is_per_row(node):
                continue
            if not self.layout.batched:
                raise InputError("args holds neurode.per_row(...), which needs batch_dim=0; there are no rows here.")
            for leaf in pytree.tree_leaves(node.value):
                if not isinstance(leaf, Tensor) or leaf.ndim == 0 or leaf.shape[0] != rows:
                    shape = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
                    raise InputError(f"neurode.per_row needs tensors of {rows} rows, as y0 has; given: {shape}.")
