"""Which tensor storages live, and when: each counted once, from the operations that PyTorch runs."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class StorageLog(TorchDispatchMode):
    """Records when storages come to life and die, while it is entered.

    It sees the operations of the backward pass and what a custom backward keeps, since it follows the storages
    themselves by weak references.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []  # (number of the storage, bytes come or gone)
        self._numbers: dict[int, int] = {}
        self._refs: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._numbers:
            return
        number, size = len(self.events), storage.nbytes()
        self._numbers[key] = number
        self.events.append((number, size))

        def gone(_: Any) -> None:
            self.events.append((number, -size))
            if self._numbers.get(key) == number:
                del self._numbers[key], self._refs[key]

        self._refs[key] = weakref.ref(storage, gone)

    def number(self, tensor: Tensor) -> int | None:
        """The number under which a tensor's storage was seen, or None."""
        return self._numbers.get(tensor.untyped_storage()._cdata)

    @property
    def live(self) -> int:
        """Bytes that live now, of what came to life since the log was entered."""
        return sum(size for _, size in self.events)

    def peak(self, without: Iterable[Tensor] = ()) -> int:
        """The most bytes that lived at once, not counting the storages of some tensors (still alive)."""
        left_out = {self.number(tensor) for tensor in without}
        live = highest = 0
        for number, size in self.events:
            if number not in left_out:
                live += size
                highest = max(highest, live)
        return highest
