"""Peak live tensor storage, each storage counted once, from the operations that PyTorch runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor

from neurode._storage import StorageLog


def peak_memory(run: Any, *, excluding: Iterable[Tensor] = ()) -> int:
    """Bytes of the tensors that `run` makes and that live at once at the most.

    Args:
        run: a function without arguments; returns the tensors that count as its outputs.
        excluding: inputs and parameters, which do not count, nor do their gradients. A tensor from outside that `run` takes
            a view of would count if it were not named here.

    Example:
        >>> import torch
        >>> x = torch.zeros(1000)  # made before: not counted
        >>> peak_memory(lambda: [((x + 1) * 2).sum()])
        8000
    """
    leaves = list(excluding)
    log = StorageLog()
    with log:
        outputs = run()
    results = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    results += [leaf.grad for leaf in leaves if leaf.grad is not None]
    return log.peak([*results, *leaves])
