"""What a vector field depends on: every tensor that requires grad and enters its graph from outside."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from neurode._errors import GradientError
from neurode._field import Field


def tensors_in(args: tuple[Any, ...]) -> list[Tensor]:
    """The tensors in `args` that require grad."""
    return [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor) and leaf.requires_grad]


def find_inputs(field: Field, t: Tensor, y: Tensor, strategy: str) -> list[Tensor]:
    """The tensors that `f` differentiates through besides `t` and `y`: those in `args`, then parameters and other leaves.

    Evaluates `f` once and walks the graph that this makes.

    Args:
        field: the vector field.
        t, y: where to evaluate; detached.
        strategy: name of the strategy that asks, for the message.

    Raises:
        GradientError: a tensor that is not a leaf enters `f` other than through `args`, so that its gradient could not be
            handed on.
    """
    args = tensors_in(field.args)
    with torch.enable_grad():
        fresh: Any = torch.zeros((), requires_grad=True).clone().grad_fn
        marker = fresh._sequence_nr()
        t, y = t.detach().requires_grad_(), y.detach().requires_grad_()
        dy = field(t, y)
    stop = {arg.grad_fn for arg in args if arg.grad_fn is not None}
    skip = {id(t), id(y), *map(id, args)}
    found: dict[int, Tensor] = {}
    stack, seen = [dy.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen or node in stop:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            if id(leaf) not in skip:
                found[id(leaf)] = leaf
            continue
        if node._sequence_nr() < marker:
            raise GradientError(
                f"f uses a tensor computed outside of it (by {node.name()}) that requires grad and is not in args;"
                f" gradient={strategy!r} cannot hand its gradient on. Pass it as solve(..., args=(tensor,)) and take it as"
                " an argument of f, or use gradient='autograd'."
            )
        stack.extend(parent for parent, _ in node.next_functions)
    return args + list(found.values())
