"""What a vector field depends on: every tensor that requires grad and enters its graph from outside."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.overrides import TorchFunctionMode

from neurode._errors import GradientError
from neurode._field import Field, PerRow, is_per_row
from neurode._problem import Problem
from neurode._state import number
from neurode.control.standins import StandIns
from neurode.output.events import values_at

# The node that FSDP2's `fully_shard` puts into the graph of every module that it gathers and frees on its own.
SHARDED = "RegisterPostBackwardFunctionBackward"

# The type of the node that stands for a leaf in a graph.
LEAF: Any = type(torch.zeros(1, requires_grad=True).view(1).grad_fn.next_functions[0][0])  # pyrefly: ignore[missing-attribute]


def tensors_in(args: tuple[Any, ...]) -> list[Tensor]:
    """The tensors in `args` that require grad."""
    return [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor) and leaf.requires_grad]


@dataclass(frozen=True)
class Inputs:
    """The tensors outside of `f` that it differentiates through, besides `t` and `y`.

    Attributes:
        args: those that stand in `args`.
        made: tensors computed outside, such as the weights that a hypernetwork made, which `f` reaches in any way.
        leaves: parameters and other leaves.
        hidden: True where `f` reaches a computed tensor of `args` in another way too.
    """

    args: list[Tensor]
    made: list[Tensor]
    leaves: list[Tensor]
    hidden: bool = False

    @property
    def all(self) -> list[Tensor]:
        """All of them, in the order in which they are handed to autograd."""
        return [*self.args, *self.made, *self.leaves]


class _Watch(TorchFunctionMode):
    """Notes every tensor that operations are given and did not make."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: dict[int, tuple[Tensor, int]] = {}
        self.inside: dict[int, Tensor] = {}
        self.random = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for x in pytree.tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and id(x) not in self.inside and id(x) not in self.outside:
                self.outside[id(x)] = (x, _version(x))
            self.random |= isinstance(x, torch.Generator)
        out = func(*args, **kwargs)
        for x in pytree.tree_leaves(out):
            if isinstance(x, Tensor) and id(x) not in self.outside:
                self.inside[id(x)] = x
        return out


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


def _random_state(y: Tensor) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(y.device)] if y.is_cuda else states


def find_inputs(field: Field, t: Tensor, y: Tensor, strategy: str, more: Any = None) -> Inputs:
    """The tensors that `f` differentiates through besides `t` and `y`; refuses what cannot be evaluated again.

    Evaluates `f` once, watches what its operations are given, and walks the graph that this makes.

    Args:
        field: the vector field.
        t, y: where to evaluate; detached.
        strategy: name of the strategy that asks, for the message.
        more: `more(field, t, y)` returns other tensors that the solve computes, such as the values of events.

    Raises:
        GradientError: `f` draws random numbers, changes a tensor that it did not make, holds modules sharded by
            `fully_shard`, or reaches a tensor computed outside in a way that cannot be seen.
    """
    before, watch = _random_state(y), _Watch()
    with torch.enable_grad(), uncached_autocast(autocast_state(y)):
        marker = torch.zeros((), requires_grad=True).clone().grad_fn._sequence_nr()  # type: ignore[union-attr]
        t, y = t.detach().clone().requires_grad_(), y.detach().clone().requires_grad_()
        # Not leaves: a change in place must be seen here, not refused by autograd.
        when, inner = t.clone(), y.clone()
        try:
            with watch:
                values = [field(when, inner), *(more(field, when, inner) if more is not None else ())]
        finally:
            changed = [name for name, x in (("t", when), ("y", inner)) if x._version != 0]
    for name in changed:
        raise GradientError(
            f"f changes {name} in place, and gradient={strategy!r} evaluates it again. Write {name} = {name}.clone() at the"
            f" start of f, or type gradient='autograd' with an f that leaves {name} alone."
        )
    _refuse_side_effects(watch, before, y, strategy)
    args = tensors_in(field.args)
    known = {id(t), id(y), id(when), id(inner), *map(id, args)}
    made = [
        x for x, _ in watch.outside.values()
        if id(x) not in known and x.grad_fn is not None and x.requires_grad and x.grad_fn._sequence_nr() < marker
    ]  # fmt: skip
    stop = {x.grad_fn for x in (*args, *made) if x.grad_fn is not None}
    leaves, strange = walk(values, stop, marker)
    inputs = Inputs(args, made, [x for x in leaves if id(x) not in known])
    if strange is None and any(x.grad_fn is not None for x in inputs.all):
        strange = _still_reached(field, inputs, t, y, marker, more)
        if strange is not None and any(x.grad_fn is not None for x in args):
            inputs = replace(inputs, hidden=True)
            strange = _still_reached(field, inputs, t, y, marker, more)
    if strange is not None:
        raise GradientError(
            f"f uses a tensor computed outside of it (by {strange}) that requires grad and that gradient={strategy!r} cannot"
            " see. Pass it as solve(..., args=(tensor,)) and take it as an argument of f, or type gradient='autograd'."
        )
    return inputs


def inputs_of(problem: Problem, strategy: str) -> Inputs:
    """What the field and the events of a problem depend on; see `find_inputs`."""
    start = problem.t0.detach() if problem.per_row else number(problem.t0)
    t = torch.as_tensor(start, dtype=problem.field.time_dtype, device=problem.y0.device)
    more = (lambda field, t, y: values_at(problem.events, field, t, y)) if problem.events else None
    return find_inputs(problem.field, t, problem.y0, strategy, more)


def _still_reached(field: Field, inputs: Inputs, t: Tensor, y: Tensor, marker: int, more: Any) -> str | None:
    """What a replay would still reach behind the tensors made outside: `f` may use them where no operation shows."""
    replayed = Replayed(field, inputs, inputs.all)
    with torch.enable_grad(), uncached_autocast(autocast_state(y)), replayed.outer():
        values = [replayed.field(t, y), *(more(replayed.field, t, y) if more is not None else ())]
    return walk(values, set(), marker)[1]


def _refuse_side_effects(watch: _Watch, before: list[Tensor], y: Tensor, strategy: str) -> None:
    after = _random_state(y)
    if watch.random or any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)):
        raise GradientError(
            f"f draws random numbers (dropout, noise), and gradient={strategy!r} evaluates it again, with other numbers."
            " Draw them outside and pass them through args, call .eval() on a module with dropout, or type"
            " gradient='autograd'."
        )
    for x, version in watch.outside.values():
        if _version(x) != version:
            raise GradientError(
                f"f changes a tensor of shape {tuple(x.shape)} that it did not make (BatchNorm's running statistics, a buffer,"
                f" a counter), and gradient={strategy!r} evaluates it again. Call .eval() on such a module, or type"
                " gradient='autograd'."
            )


def walk(values: Sequence[Tensor], stop: set[Any], marker: int) -> tuple[list[Tensor], str | None]:
    """The leaves that the graph of some values reaches, and the name of a node older than `marker` where it reaches one.

    Raises:
        GradientError: the graph holds a module that `fully_shard` gathers inside of `f`.
    """
    found = {id(x): x for x in values if x.grad_fn is None and x.requires_grad}  # `f` may return a leaf as it is
    stack, seen = [value.grad_fn for value in values], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen or node in stop:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            found[id(leaf)] = leaf
            continue
        if node.name() == SHARDED:
            raise GradientError(
                "f holds a module sharded by fully_shard, whose parameters exist only while it runs: their gradients would be"
                " lost. Type gradient='autograd', or apply fully_shard to the whole model and not to f."
            )
        if node._sequence_nr() < marker:
            return list(found.values()), node.name()
        stack.extend(parent for parent, _ in node.next_functions)
    return list(found.values()), None


def refuse_unlisted(values: Tensor | Sequence[Tensor], known: set[int]) -> None:
    """Raise where a replayed graph reaches a leaf that the probe did not see.

    Raises:
        GradientError: `f` used a tensor at this time that it did not use at the start.
    """
    values = [values] if isinstance(values, Tensor) else values
    stack = [x.grad_fn for x in values if x.grad_fn is not None]
    leaves = [x for x in values if x.grad_fn is None and x.requires_grad]
    seen = set(stack)
    while stack:  # `walk` without what only the probe needs: this one runs at every step
        for node, _ in stack.pop().next_functions:
            if node is None or node in seen:
                continue
            seen.add(node)
            if type(node) is LEAF:
                leaves.append(node.variable)
            else:
                stack.append(node)
    for leaf in leaves:
        if id(leaf) not in known:
            raise GradientError(
                f"f uses a tensor of shape {tuple(leaf.shape)} that requires grad at some times but not at the start of the"
                " solve, or makes it anew each time (t.requires_grad_() is such a tensor too), so that this strategy did not"
                " know of it. Pass it through args, or type gradient='autograd'."
            )


class Replayed:
    """A field for replays: its inputs that were computed outside are cut from what computed them.

    A gradient handed on at such a tensor must not also flow past it, or what lies behind would get it twice.

    Args:
        field: the vector field.
        inputs: what it depends on.
        values: the same tensors as autograd has kept them.
        stand: who plays the rows that failed; or None.

    Attributes:
        field: what to call, within `outer()`.
        wanted: the tensors with respect to which to differentiate, in the order of `inputs.all`.
    """

    def __init__(self, field: Field, inputs: Inputs, values: list[Tensor], stand: StandIns | None = None) -> None:
        pairs = list(zip(inputs.all, values, strict=True))
        self.wanted = [x if x.grad_fn is None else value.detach().requires_grad_() for x, value in pairs]
        swap = {id(x): new for x, new in zip(inputs.all, self.wanted, strict=True) if x is not new}
        self.field, self.stand = copy.copy(field), stand
        self.rows: Tensor | None = None
        self.args = pytree.tree_map(lambda node: _swapped(node, swap), field.all_args, is_leaf=is_per_row)
        self.take(None)
        shown = {id(x) for x in (inputs.all if inputs.hidden else inputs.made)}
        unseen = {key: new for key, new in swap.items() if key in shown}
        self.mode = _Swap(unseen) if unseen else None
        self.listed = {id(x) for x in self.wanted}

    def take(self, rows: Tensor | None) -> None:
        """Be called with these rows from now on; makes what is cut of `args` anew, for one pass of autograd."""
        self.rows = rows
        self.field.all_args = self.args
        if self.stand is not None and self.args:
            self.field = self.stand.field(self.field)
        self.field.take(rows)

    def outer(self) -> Any:
        """The context in which the field is to be called."""
        return self.mode if self.mode is not None else contextlib.nullcontext()


def _swapped(node: Any, swap: dict[int, Tensor]) -> Any:
    if is_per_row(node):
        return PerRow(pytree.tree_map(lambda x: swap.get(id(x), x), node.value))
    return swap.get(id(node), node)


class _Swap(TorchFunctionMode):
    """Gives operations other tensors in place of some."""

    def __init__(self, swap: dict[int, Tensor]) -> None:
        super().__init__()
        self.swap = swap

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map(lambda x: self.swap.get(id(x), x), (args, kwargs or {}))
        return func(*args, **kwargs)


# ---- autocast


def autocast_state(y: Tensor) -> tuple[str, bool, Any]:
    """Device type, whether autocast is on, and its dtype."""
    kind = y.device.type
    return kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


@contextlib.contextmanager
def uncached_autocast(state: tuple[str, bool, Any]) -> Iterator[None]:
    """The same autocast, without its cache: what it keeps from a pass without a tape has no gradient in the next."""
    kind, enabled, dtype = state
    if not enabled:
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext():
            yield
        return
    with torch.autocast(kind, dtype=dtype, cache_enabled=False):
        yield
