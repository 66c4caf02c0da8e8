"""A recorder of what PyTorch's dispatcher sees: operations on stand-ins, in order, as an `fx.Graph`.

`torch.fx.experimental.proxy_tensor.make_fx` records the same and serves many more purposes (symbolic shapes, subclasses,
modules); most of its time goes there. Here a stand-in is an ordinary small tensor, so that an operation costs its own run and
one node, and a field of thirty layers is recorded in hundredths of a second.
"""

from __future__ import annotations

import linecache
import operator
import sys
from collections.abc import Callable, Sequence
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from neurode.fused.refusal import CannotLower

aten = torch.ops.aten
RESHAPED_IN_PLACE = {  # these change no number
    aten.squeeze_.default: aten.squeeze.default, aten.squeeze_.dim: aten.squeeze.dim,
    aten.squeeze_.dims: aten.squeeze.dims, aten.unsqueeze_.default: aten.unsqueeze.default,
    aten.t_.default: aten.t.default, aten.transpose_.default: aten.transpose.int,
}  # fmt: skip
READS = "Python reads a value of t or y, or a random one (a branch on it, .item(), float())"
RANDOM = torch.Tag.nondeterministic_seeded
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
NOT_THE_USERS = ("/torch/", "/neurode/fused/", "/neurode/_field")


class Recorder(TorchDispatchMode):
    """Records operations while it is entered.

    Args:
        table: operations and the functions that say the same in simpler ones.
        places: whether to note the line of the user's code that each operation comes from, which takes most of the time.

    Attributes:
        graph: the record. A node's `meta["val"]` has the shape and dtype of its value; `meta["place"]` its line.
        constants: tensors that entered from outside, by the `target` of their `get_attr` node.
        numbers: those among them of which Python read a value (`.item()`, a branch).
    """

    def __init__(self, table: dict[Any, Callable[..., Any]], places: bool = False) -> None:
        super().__init__()
        self.table, self.places = table, places
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self.numbers: list[Tensor] = []
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[Tensor] = []  # an id is good as long as its tensor lives
        self._in_place = False
        self._forward: dict[int, str] = {}
        self._stop: CodeType | None = None

    def input(self, name: str, value: Tensor) -> None:
        """Make `value` an input of the graph."""
        self._name(value, self.graph.placeholder(name))

    def output(self, values: Sequence[Tensor | None]) -> None:
        """End the record: its outputs, and without the nodes that nothing uses."""
        self.graph.output(tuple(None if value is None else self.node(value) for value in values))
        self.graph.eliminate_dead_code()

    def node(self, value: Tensor) -> fx.Node:
        """The node of a tensor; one that no operation has made is a constant."""
        found = self._nodes.get(id(value))
        if found is None:
            name = f"constant_{len(self.constants)}"
            self.constants[name] = value
            found = self.graph.create_node("get_attr", name)
            self._name(value, found)
        return found

    def reached(self, value: Tensor) -> list[Tensor]:
        """The tensors from outside that a recorded one was computed from, in the order of their first use."""
        seen: set[fx.Node] = set()
        stack = [self.node(value)]
        while stack:
            node = stack.pop()
            if node not in seen:
                seen.add(node)
                stack.extend(node.all_input_nodes)
        return [self.constants[n.target] for n in self.graph.nodes if n.op == "get_attr" and n in seen]

    def until(self, code: CodeType) -> None:
        """Look for the user's lines no further out than the frame of `code`."""
        self._stop = code

    def _name(self, value: Tensor, node: fx.Node) -> None:
        self._nodes[id(value)] = node
        self._alive.append(value)
        node.meta["val"] = _stand_in(value)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(not issubclass(kind, torch.nn.Parameter) and kind is not Tensor for kind in types):
            return NotImplemented  # a subclass unfolds itself first
        simpler = self.table.get(func)
        if simpler is not None:
            with self:
                made = simpler(*args, **kwargs)
            if made is not NotImplemented:
                return made
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE):
            with self:
                return func.decompose(*args, **kwargs)
        return self._record(func, args, kwargs)

    def _record(self, func: Any, args: Any, kwargs: Any) -> Any:
        if torch.Tag.data_dependent_output in func.tags:
            return self._read(func, args, kwargs)
        if func is aten.lift_fresh.default:  # a number or list written in f: what it holds may change, so it is copied
            func = aten.lift_fresh_copy.default
        recorded = RESHAPED_IN_PLACE.get(func, func)
        self._in_place |= recorded._schema.is_mutable
        values = _map(args, self.node), _map(kwargs, self.node)
        node = self.graph.create_node("call_function", recorded, *values, name=func.__name__.split(".")[0])
        made = func(*args, **kwargs)
        if self.places:
            node.meta["place"] = self._place()
        if isinstance(made, Tensor):
            self._name(made, node)
        elif isinstance(made, tuple | list):
            for i, part in enumerate(made):
                if isinstance(part, Tensor):
                    self._name(part, self.graph.call_function(operator.getitem, (node, i)))
            node.meta["val"] = _map(made, _stand_in)
        return made

    def _read(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Python asks for a number: it may have one that follows from what is written in f and from tensors from outside, which
        are watched from then on."""
        sources: list[Tensor] = []
        where = f" ({self._place()})" if self.places else ""
        if self._in_place:  # what a view wrote into is not followed
            raise CannotLower(f"Python reads a value after an operation in place{where}")

        def look(value: Tensor) -> Tensor:
            stack = [self.node(value)]
            while stack:
                node = stack.pop()
                if node.op == "placeholder" or RANDOM in getattr(node.target, "tags", ()):
                    raise CannotLower(READS + where)
                if node.op == "get_attr":
                    sources.append(self.constants[str(node.target)])
                elif node.target is not aten.lift_fresh_copy.default:
                    stack.extend(node.all_input_nodes)
            return value

        _map((args, kwargs), look)
        self.numbers += sources
        return func(*args, **kwargs)

    def _place(self) -> str:
        """The line that called, or for a part of a gradient the line that made what it is the gradient of."""
        backward = torch._C._current_autograd_node()
        if backward is not None:
            return self._forward.get(backward._sequence_nr(), "")
        found = _line(sys._getframe(1), self._stop)
        self._forward[torch._C._autograd._get_sequence_nr() - 1] = found
        return found


def _line(frame: FrameType | None, stop: CodeType | None) -> str:
    while frame is not None and frame.f_code is not stop:
        name = frame.f_code.co_filename
        if not any(part in name for part in NOT_THE_USERS) and not name.startswith("<"):
            return f'"{name}", line {frame.f_lineno}: "{linecache.getline(name, frame.f_lineno).strip()}"'
        frame = frame.f_back
    return ""


def _stand_in(value: Tensor) -> Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _map(value: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(_map(x, change) for x in value)
    if isinstance(value, dict):
        return {key: _map(x, change) for key, x in value.items()}
    return value
