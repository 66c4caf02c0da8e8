"""One evaluation of `f` before the solve, to measure what its tape keeps; it leaves no trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from neurode._field import Field
from neurode._storage import StorageLog

# Operations of PyTorch that write to arguments without their schema saying so: the positions of running statistics.
WRITES = {"native_batch_norm": (3, 4), "cudnn_batch_norm": (3, 4), "miopen_batch_norm": (3, 4)}


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation of a field costs.

    Attributes:
        tape: bytes that its tape keeps alive, besides its inputs and what lived before.
        peak: bytes that live at once while it runs on the tape.
    """

    tape: int
    peak: int


class _Undo(StorageLog):
    """Follows storages, and remembers what operations overwrite of tensors that lived before."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: dict[int, Any] = {}
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.generators: dict[int, tuple[torch.Generator, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in pytree.tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and self.number(x) is None:
                storage = x.untyped_storage()  # held, so that its address stays its own
                self.outside.setdefault(storage._cdata, storage)
            elif isinstance(x, torch.Generator):
                self.generators.setdefault(id(x), (x, x.get_state()))
        for x in _written(func, args, kwargs or {}):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata in self.outside:
                self.before.setdefault(id(x), (x, x.detach().clone()))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _see(self, tensor: Tensor) -> None:
        if tensor.untyped_storage()._cdata not in self.outside:  # a view of a weight is no memory of the tape's
            super()._see(tensor)

    def undo(self) -> None:
        """Put everything back."""
        with torch.no_grad():
            for x, value in self.before.values():
                if x.untyped_storage().nbytes() < value.untyped_storage().nbytes():
                    continue  # freed meanwhile, as fully_shard does with the parameters that it gathered
                with torch.autograd._unsafe_preserve_version_counter(x):
                    x.copy_(value)
        for generator, state in self.generators.values():
            generator.set_state(state)


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operation writes to."""
    hidden = WRITES.get(func._schema.name.removeprefix("aten::"))
    if hidden is not None:
        return [args[i] for i in hidden if i < len(args)]
    if not func._schema.is_mutable:
        return []
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += pytree.tree_leaves(args[i] if i < len(args) else kwargs.get(argument.name))
    return found


@contextlib.contextmanager
def traceless(y: Tensor) -> Iterator[_Undo]:
    """Whatever is evaluated inside: random numbers and tensors are afterwards as they were."""
    log = _Undo()
    with torch.random.fork_rng(devices=[y.device] if y.is_cuda else []):
        try:
            with log:
                yield log
        finally:
            log.undo()


def rehearse(field: Field, t: Tensor, y: Tensor) -> Evaluation:
    """Evaluate `f` once on the tape and measure.

    Args:
        field: the vector field.
        t, y: where; `y` gets a gradient there, as it has one from the first step on.
    """
    with traceless(y) as log, torch.enable_grad():
        t, y = t.detach().clone(), y.detach().clone().requires_grad_()
        inner = y.clone()  # not a leaf, so that a change in place is no error here
        start = log.live
        dy: Any = field(t, inner)
        kept = dy.grad_fn  # the tape alone: the derivative itself goes into sums that keep nothing
        del dy
        tape = log.live - start
        del kept
    return Evaluation(tape, log.peak() - start)
