"""Between the state as the user has it and the one tensor that the solvers integrate: the only place that knows pytrees.

Inside, a joint solve (`batch_dim=None`) keeps a tensor state in its own shape and packs a pytree into one vector; a
solve with rows (`batch_dim=0`) always works on `(rows, size)`.
"""

from __future__ import annotations

import cmath
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from neurode._errors import FieldError, InputError

REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64, torch.complex32: torch.float16}


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the absolute value of a number of `dtype`."""
    return REAL.get(dtype, dtype)


@dataclass(frozen=True)
class Layout:
    """How a state is laid out: its tree, the shapes of its leaves, its dtype and device, and its rows.

    Attributes:
        spec: the tree, or None where the state is one tensor.
        shapes: the shape of every leaf, without the leading batch dimension where there are rows.
        dtype: the one dtype of all leaves.
        device: the one device of all leaves.
        batched: True where dimension 0 counts rows (`batch_dim=0`).
    """

    spec: pytree.TreeSpec | None
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype
    device: torch.device
    batched: bool

    @property
    def plain(self) -> bool:
        """True where the inner tensor is the user's own, so that packing costs nothing."""
        return self.spec is None and (not self.batched or len(self.shapes[0]) == 1)

    @property
    def sizes(self) -> list[int]:
        """Number of elements of every leaf (of one row of it)."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def time_shape(self) -> tuple[int, ...]:
        """What follows the rows in the shape of `t`: ones, so that `t` broadcasts against the state as a number would."""
        ranks = {len(shape) for shape in self.shapes}
        return (1,) * ranks.pop() if len(ranks) == 1 else ()

    def pack(self, tree: Any) -> Tensor:
        """The one tensor for a state-like tree whose structure and shapes are known to be right."""
        if self.plain:
            return tree
        leaves = [tree] if self.spec is None else pytree.tree_leaves(tree)
        if not self.batched:
            return torch.cat([leaf.reshape(-1) for leaf in leaves])
        flat = [leaf.reshape(leaf.shape[0], size) for leaf, size in zip(leaves, self.sizes, strict=True)]
        return flat[0] if len(flat) == 1 else torch.cat(flat, 1)

    def unpack(self, y: Tensor, lead: int = 0) -> Any:
        """The user's tree for the inner tensor `y`, which may carry `lead` further dimensions (time) in front."""
        if self.plain:
            return y
        front = y.shape[: lead + self.batched]
        if self.spec is None:
            return y.reshape(front + self.shapes[0])
        parts = y.split(self.sizes, dim=-1)
        leaves = [part.reshape(front + shape) for part, shape in zip(parts, self.shapes, strict=True)]
        return pytree.tree_unflatten(leaves, self.spec)

    def derivative(self, dy: Any, y: Tensor) -> Tensor:
        """Pack what the vector field returned for the inner state `y`, or raise.

        Raises:
            FieldError: `dy` differs from the state in structure, shape, dtype or device.
        """
        if self.spec is None:
            shape = y.shape if self.plain else (*y.shape[:1], *self.shapes[0])
            dy = self._check(dy, shape, "")
        else:
            dy = self._check_tree(dy, y)
        return self.pack(dy)

    def _check_tree(self, dy: Any, y: Tensor) -> Any:
        leaves, spec = pytree.tree_flatten(dy)
        if spec != self.spec:
            raise FieldError(
                f"f(t, y) returned the structure {spec}, but the state has {self.spec}. Return dy/dt with the same"
                " containers and keys as y."
            )
        paths = [pytree.keystr(path) for path, _ in pytree.tree_leaves_with_path(dy)]
        front = y.shape[:1] if self.batched else ()
        shapes = [(*front, *shape) for shape in self.shapes]
        checked = [self._check(leaf, shape, path) for leaf, shape, path in zip(leaves, shapes, paths, strict=True)]
        return pytree.tree_unflatten(checked, spec)

    def _check(self, dy: Any, shape: Any, where: str) -> Tensor:
        if not isinstance(dy, Tensor):
            raise FieldError(
                f"f(t, y){where} returned {type(dy).__name__}, but dy/dt must be a tensor of shape {tuple(shape)}"
                f" and dtype {self.dtype}."
            )
        if dy.shape != shape:
            raise FieldError(
                f"f(t, y){where} returned shape {tuple(dy.shape)}, but the state has shape {tuple(shape)}. dy/dt must"
                " have the shape of y exactly; nothing is broadcast."
            )
        if dy.device != self.device:
            raise FieldError(
                f"f(t, y){where} returned a tensor on {dy.device}, but the state is on {self.device}. Move the"
                " parameters or the state so that both are on one device."
            )
        return dy if dy.dtype is self.dtype else self._cast(dy, where)

    def _cast(self, dy: Tensor, where: str) -> Tensor:
        lower = dy.is_floating_point() and torch.finfo(dy.dtype).bits < torch.finfo(self.dtype).bits
        if (lower and not dy.is_complex()) or (dy.is_floating_point() and self.dtype.is_complex):
            return dy.to(self.dtype)  # autocast: the state, its time and its error stay in their own precision
        other = f"Give y0 as y0.to({dy.dtype}), or return" if dy.is_floating_point() or dy.is_complex() else "Return"
        raise FieldError(
            f"f(t, y){where} returned dtype {dy.dtype}, but the state has {self.dtype}. {other} dy.to({self.dtype})."
        )


def _as_tensor(leaf: Any) -> Tensor:
    if isinstance(leaf, Tensor):
        return leaf
    try:
        return torch.as_tensor(leaf, dtype=_dtype_for(leaf))
    except (TypeError, ValueError, RuntimeError) as error:
        text = f"y0 holds a {type(leaf).__name__}, which is not a number, a list of numbers, an array or a tensor."
        if dataclasses.is_dataclass(leaf):
            text += f" Type torch.utils._pytree.register_dataclass({type(leaf).__name__}) once, before the first solve."
        raise InputError(text) from error


def _dtype_for(leaf: Any) -> torch.dtype | None:
    """Numbers, lists and arrays become the default dtype; a complex array becomes the complex dtype of it."""
    default = torch.get_default_dtype()
    kind = getattr(getattr(leaf, "dtype", None), "kind", None)
    is_complex = kind == "c" if kind else any(isinstance(x, complex) for x in _numbers(leaf))
    return (torch.complex128 if default is torch.float64 else torch.complex64) if is_complex else default


def _numbers(leaf: Any) -> list[Any]:
    return [x for item in leaf for x in _numbers(item)] if isinstance(leaf, list | tuple) else [leaf]


def _is_number_list(y0: Any) -> bool:
    return isinstance(y0, list) and all(isinstance(x, int | float | complex) or _is_number_list(x) for x in y0)


def read_state(y0: Any, batch_dim: int | None) -> tuple[Layout, Tensor]:
    """Read a user's initial state.

    Args:
        y0: a tensor, number, (nested) list of numbers, NumPy array, or a pytree of those.
        batch_dim: None where the whole state is one system, 0 where dimension 0 of every leaf counts rows.

    Returns:
        The layout, and the state as one tensor.

    Raises:
        InputError: the state has no leaves or no elements, is not floating point or complex, mixes dtypes, devices or
            batch sizes.
    """
    single = isinstance(y0, Tensor) or _is_number_list(y0) or pytree.tree_structure(y0).is_leaf()
    leaves, spec = ([y0], None) if single else pytree.tree_flatten(y0)
    tensors = [_as_tensor(leaf) for leaf in leaves]
    _refuse_unusable(tensors, batch_dim)
    batched = batch_dim == 0
    shapes = tuple(leaf.shape[1:] if batched else leaf.shape for leaf in tensors)
    layout = Layout(spec, shapes, tensors[0].dtype, tensors[0].device, batched)
    tree = tensors[0] if spec is None else pytree.tree_unflatten(tensors, spec)
    return layout, layout.pack(tree)


def _refuse_unusable(leaves: list[Tensor], batch_dim: int | None) -> None:
    if not leaves:
        raise InputError("y0 is a pytree without tensors. Give a state with at least one tensor.")
    for leaf in leaves:
        if leaf.layout is not torch.strided:
            raise InputError(f"y0 has the layout {leaf.layout}; a state is a dense tensor. Type y0.to_dense().")
        if not (leaf.is_floating_point() or leaf.is_complex()):
            raise InputError(
                f"y0 has the integer dtype {leaf.dtype}; a state needs a floating or complex dtype. Type"
                " y0.to(torch.get_default_dtype())."
            )
    for name in ("dtype", "device") if len(leaves) > 1 else ():
        values = {getattr(leaf, name) for leaf in leaves}
        if len(values) > 1:
            raise InputError(f"the leaves of y0 have several {name}s: {sorted(map(str, values))}. Give them one.")
    if batch_dim == 0:
        _refuse_ragged(leaves)
    if not any(math.prod(leaf.shape[1:] if batch_dim == 0 else leaf.shape) for leaf in leaves):
        shapes = [tuple(leaf.shape) for leaf in leaves]
        raise InputError(f"y0 has no elements (shape {shapes[0] if len(shapes) == 1 else shapes}); nothing to solve.")


def _refuse_ragged(leaves: list[Tensor]) -> None:
    shapes = [tuple(leaf.shape) for leaf in leaves]
    if any(len(shape) == 0 for shape in shapes):
        raise InputError("batch_dim=0 needs leaves with a leading batch dimension, but a leaf of y0 is 0-d.")
    if any(shape[0] != shapes[0][0] for shape in shapes[1:]):
        raise InputError(f"batch_dim=0 needs one leading size for all leaves of y0, but their shapes are {shapes}.")


def number(t: Any) -> float:
    """A time as a Python float, whatever follows it."""
    return float(t.detach()) if isinstance(t, Tensor) else float(t)


FEW = 32  # numbers that Python looks through sooner than PyTorch


def all_finite(y: Tensor) -> bool:
    """Whether all elements are finite, by one host read where they are.

    A sum that is finite has no term that is not, and costs half of what the largest absolute value does; one that
    overflows leaves the question to that.
    """
    y = y.detach()
    if y.numel() <= FEW and y.is_cpu and not y.is_complex():
        return all(map(math.isfinite, y.reshape(-1).tolist()))
    if cmath.isfinite(y.sum().item()):
        return True
    parts = torch.view_as_real(y.resolve_conj()) if y.is_complex() else y
    return y.numel() == 0 or math.isfinite(float(torch.linalg.vector_norm(parts, math.inf)))


def unreadable(y: Tensor) -> bool:
    """True where values cannot be read: under `torch.compile`, functorch transforms, and on the meta device."""
    return torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(y) or y.is_meta


def hidden(y: Tensor) -> bool:
    """True where not even one row's values can be read: under `torch.compile`, `torch.vmap`, and on the meta device."""
    return torch.compiler.is_compiling() or y.is_meta or is_vmapped(y)


def is_transformed() -> bool:
    """Whether a transform of torch.func or forward mode is under way."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def cached_tensor(maxsize: int) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """`lru_cache` for functions that return constant tensors: one made within a transform belongs to that alone."""

    def decorate(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        kept = lru_cache(maxsize=maxsize)(make)

        @wraps(make)
        def call(*args: Any) -> Tensor:
            return make(*args) if torch.compiler.is_compiling() or is_transformed() else kept(*args)

        return call

    return decorate


def is_traced(t: Any) -> bool:
    """True where `t` is a tensor that a derivative, `vmap` or `torch.compile` follows, so that it must stay one."""
    if not isinstance(t, Tensor):
        return False
    if t.requires_grad or torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(t):
        return True
    forward_ad = torch.autograd.forward_ad
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None


def is_vmapped(y: Tensor) -> bool:
    """True where `torch.vmap` runs over `y`, at any level of nesting."""
    functorch = torch._C._functorch
    if torch.compiler.is_compiling():
        return False
    while functorch.is_functorch_wrapped_tensor(y):
        if functorch.is_batchedtensor(y):
            return True
        y = functorch.get_unwrapped(y)
    return False
