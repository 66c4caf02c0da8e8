"""From a recorded graph to instructions on virtual rows: what each operation means for one sample.

Every tensor of the graph is one of four things. A *literal* is known now. A *uniform* follows from parameters alone: PyTorch
computes it once a solve. *Lanes* are the ids of virtual rows (see `virtual.py`). An *accumulated* value is a sum over samples
that is linear in the cotangent: its first form is filled by WGRAD and RGRAD, what follows is done by PyTorch after the solve.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from neurode.fused.capture import Traced, place
from neurode.fused.program import Micro, Reduction
from neurode.fused.refusal import CannotLower
from neurode.fused.virtual import BINARY, ROW, SAMPLE_SHIFT, UNARY, Rowbook, first_unique, rows_of, samples_of

Node = Any  # an fx.Node; PyTorch annotates its fields too widely to be of use
COUPLED = "rows of the batch are coupled here"


@dataclass(frozen=True)
class Literal:
    """A tensor whose numbers are known now."""

    tensor: Tensor


@dataclass(frozen=True)
class Uniform:
    """What a node that depends on parameters alone computes."""

    node: Node


@dataclass(frozen=True)
class Lanes:
    """Ids of virtual rows; `pending` where lanes still hold partial sums of one total."""

    ids: Tensor
    pending: bool = False


@dataclass(frozen=True)
class Accumulated:
    """A total over samples: the accumulators from `offset` on, or (offset None) what PyTorch makes of others afterwards."""

    offset: int | None
    shape: tuple[int, ...]
    in_lanes: Callable[[], Lanes] | None = None


@dataclass(frozen=True)
class Refused:
    """What cannot be lowered; harmless where only its shape is used."""

    reason: str


VIEWS = {
    "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "slice", "select",
    "split", "split_with_sizes", "unbind", "alias", "detach", "diagonal", "as_strided", "unfold", "movedim", "getitem",
}  # fmt: skip
MOVES = {  # operations that put elements elsewhere and compute nothing
    "clone", "flip", "roll", "repeat", "lift_fresh_copy", "contiguous", "cat", "stack", "select_scatter",
    "slice_scatter", "diagonal_scatter", "index_select", "gather", "index", "diag_embed", "rot90", "expand_copy",
    "view_copy", "as_strided_scatter", "diagonal_copy",
}  # fmt: skip
CASTS = {"_to_copy", "to", "convert_element_type"}
CREATION = {
    "full", "zeros", "ones", "empty", "full_like", "zeros_like", "ones_like", "empty_like", "new_zeros", "new_ones",
    "new_full", "new_empty", "new_empty_strided", "scalar_tensor", "arange", "eye", "linspace", "empty_strided", "iota",
    "empty_permuted",
}  # fmt: skip
LINEAR = (
    VIEWS | MOVES | CASTS | {"add", "sub", "neg", "mul", "div", "mm", "bmm", "sum", "mean", "where", "constant_pad_nd"}
)


def name_of(node: Node) -> str:
    """The name of a node's operation without namespace and overload."""
    if node.target is operator.getitem:
        return "getitem"
    parts = str(node.target).split(".")
    if parts[0] not in ("aten", "prims") or len(parts) < 2:
        raise CannotLower(f"the operation {node.target}")
    return parts[1]


def _about_nothing(node: Node) -> bool:
    """Whether numbers come out of tensors that have none, or something computed has none."""
    sizes = [x.meta["val"].numel() for x in node.all_input_nodes if isinstance(x.meta.get("val"), Tensor)]
    made, name = node.meta.get("val"), name_of(node)
    if not sizes or not isinstance(made, Tensor) or name in CREATION:
        return False
    return not any(sizes) if made.numel() else any(sizes) and name not in VIEWS


class Lowering:
    """Walks a graph once and fills a `Rowbook`.

    Args:
        traced: the recording.
        sized: names of nodes whose shape counts rows.
        dtype: of the state.

    Attributes:
        book: instructions and buffers.
        outputs: the value of each output of the graph.
        accumulators: how many numbers the gradient section adds to.
        baked: tensors from outside whose numbers became part of the program.
    """

    def __init__(self, traced: Traced, sized: set[str], dtype: torch.dtype) -> None:
        self.traced, self.sized, self.dtype = traced, sized, dtype
        self.book = Rowbook()
        self.zero = self.book.constant(0.0)
        self.one = self.book.constant(1.0)
        self.env: dict[Node, Any] = {}
        self.forced: dict[Node, Any] = {}
        self.concrete: dict[Node, Any] = {}
        self.uniform_ids: dict[Node, Tensor] = {}
        self.accumulators = 0
        self.baked: dict[int, Tensor] = {}
        self.late: set[Node] = set()
        self.handlers = handlers(self)
        self.written = self._written()
        self.ends = self._ends()
        self._run()

    # ---- the walk

    def _run(self) -> None:
        nodes = list(self.traced.graph.nodes)
        inputs = [node for node in nodes if node.op == "placeholder"]
        self._place_inputs(inputs)
        for node in nodes:
            if node.op == "get_attr":
                self.env[node] = self._constant(node)
            elif node.op == "call_function":
                if any(arg in self.late for arg in node.all_input_nodes):
                    self.late.add(node)
                self.env[node] = self._try(node)
        output = next(node for node in nodes if node.op == "output")
        self.outputs = [self.env[x] if isinstance(x, fx.Node) else None for x in output.args[0]]
        self.output_nodes = list(output.args[0])
        for value in self.outputs:
            if isinstance(value, Refused):
                raise CannotLower(value.reason)

    def _try(self, node: Node) -> Any:
        """The value of a node; a refusal counts only where something but its shape is used."""
        refused = next((v for v in map(self.env.get, node.all_input_nodes) if isinstance(v, Refused)), None)
        if refused is not None and name_of(node) not in CREATION and not is_inplace(node):
            return refused
        try:
            if refused is not None and is_inplace(node):
                raise CannotLower(refused.reason)
            if _about_nothing(node):
                raise CannotLower(f"a sum or product over nothing ({node.target})")
            return self._call(node)
        except CannotLower as error:
            where = place(node)
            reason = (
                f"{error} ({where})" if where and "File" not in str(error) and '"' not in str(error) else str(error)
            )
            if is_inplace(node):
                raise CannotLower(reason) from None
            return Refused(reason)

    def _place_inputs(self, inputs: list[Node]) -> None:
        rows = self.traced.rows
        t, y, *rest = inputs
        data = rest[: self.traced.num_rowdata]
        shapes = {node: tuple(node.meta["val"].shape) for node in inputs}
        per_sample = lambda node: math.prod(shapes[node][1:]) if rows else math.prod(shapes[node])
        self.t_buffer = self.book.buffer(1, "t")
        self.y_buffer = self.book.buffer(per_sample(y), "y")
        self.data_buffer = self.book.buffer(sum(per_sample(x) for x in data), "data")
        self.g_buffer = self.book.buffer(per_sample(y), "g")
        time = torch.full(shapes[t], self.t_buffer.start, dtype=torch.int64)
        if time.ndim and rows:
            time += (torch.arange(rows) + 1) << SAMPLE_SHIFT
        self.env[t] = Lanes(time)
        places = [(y, self.y_buffer.start), *[(g, self.g_buffer.start) for g in rest[self.traced.num_rowdata :]]]
        start = self.data_buffer.start
        for node in data:
            places.append((node, start))
            start += per_sample(node)
        for node, first in places:
            ids = torch.arange(per_sample(node), dtype=torch.int64) + first
            if rows:
                ids = (ids + ((torch.arange(rows) + 1) << SAMPLE_SHIFT).unsqueeze(1)).reshape(shapes[node])
            self.env[node] = Lanes(ids.reshape(shapes[node]).contiguous())
        self.late |= set(rest[self.traced.num_rowdata :])

    def _constant(self, node: Node) -> Any:
        value = self.traced.constants[node.target]
        if not isinstance(value, Tensor):
            raise CannotLower(f"a constant of type {type(value).__name__}")
        users = list(node.users)
        if users and all(str(user.target).startswith("aten.lift_fresh_copy") for user in users):
            return Literal(value.detach().clone())
        return Uniform(node)

    def _written(self) -> set[Node]:
        """Nodes that an operation in place writes to, and all that share memory with them."""
        written: set[Node] = set()
        for node in self.traced.graph.nodes:
            if node.op == "call_function" and is_inplace(node):
                if node.target._schema.arguments[0].alias_info is None:
                    raise CannotLower(f"the operation {node.target}")
                target = node.args[0]
                while True:
                    if target.op in ("placeholder", "get_attr"):
                        what = (
                            "its input in place" if target.op == "placeholder" else "a tensor from outside (a buffer?)"
                        )
                        raise CannotLower(f"f changes {what} ({place(node)})")
                    written.add(target)
                    if name_of(target) not in VIEWS and not is_inplace(target):
                        break
                    target = target.args[0]
        return written

    def _ends(self) -> set[Node]:
        """Nodes that only gradients of tensors from outside depend on."""
        output = next(node for node in self.traced.graph.nodes if node.op == "output")
        inner = output.args[0][: 3 + self.traced.num_rowdata] if self.traced.gradients else output.args[0]
        stack, reached = [x for x in inner if isinstance(x, fx.Node)], set()
        while stack:
            node = stack.pop()
            if node not in reached:
                reached.add(node)
                stack.extend(node.all_input_nodes)
        return {node for node in self.traced.graph.nodes if node not in reached}

    def _call(self, node: Node, force: bool = False) -> Any:
        if any(tag is torch.Tag.nondeterministic_seeded for tag in getattr(node.target, "tags", ())):
            raise CannotLower(f"random numbers ({node.target})")
        name = name_of(node)
        values = [self.env[arg] for arg in node.all_input_nodes]
        if force:
            values = [
                self.lanes(arg) if isinstance(v, Accumulated) else v
                for arg, v in zip(node.all_input_nodes, values, strict=True)
            ]
        flat = [x for v in values for x in (v if isinstance(v, list) else [v])]
        has = lambda kind: any(isinstance(x, kind) for x in flat)
        if name == "getitem" and isinstance(values[0], list):
            return values[0][node.args[1]]
        if is_inplace(node):
            return self._inplace(node)
        if name in CREATION:
            return self._create(node)
        return self._general(node, name, flat, has(Lanes), has(Accumulated))

    def _general(self, node: Node, name: str, flat: list[Any], lanes: bool = False, totals: bool = False) -> Any:
        if totals and not lanes:
            return self._after(node, name, flat)
        if totals:
            return self._call(node, force=True)
        if not lanes and node not in self.written:
            if all(isinstance(x, Literal) for x in flat):
                return self._literal(node)
            if node.name not in self.sized:
                return Uniform(node)
        self.book.late = node in self.late
        result = self._lower(node, name)
        self._check_pending(result, flat)
        return result

    def _check_pending(self, result: Any, operands: list[Any]) -> None:
        """A partial sum may only meet what all samples share."""
        if any(isinstance(x, Lanes) and x.pending for x in operands):
            for lane in result if isinstance(result, list) else [result]:
                if isinstance(lane, Lanes) and bool(samples_of(lane.ids).any()):
                    raise CannotLower(COUPLED)

    def _lower(self, node: Node, name: str) -> Any:
        pending = any(isinstance(v, Lanes) and v.pending for v in map(self._value, node.all_input_nodes))
        if name in VIEWS or name in MOVES:
            result = self._move(node)
        elif name in self.handlers:
            result = self.handlers[name](node)
        else:
            raise CannotLower(f"the operation {node.target}")
        if isinstance(result, Tensor):
            self._check_dtype(node)
            result = Lanes(self.like(result, node) if name not in VIEWS else result, pending)
        elif isinstance(result, list):
            result = [Lanes(x, pending) if isinstance(x, Tensor) else x for x in result]
        return result

    def _check_dtype(self, node: Node) -> None:
        value = node.meta.get("val")
        dtype = value.dtype if isinstance(value, Tensor) else self.dtype
        if dtype not in (self.dtype, torch.bool):
            raise CannotLower(f"a value of {dtype} where the state has {self.dtype} ({node.target})")

    # ---- values

    def _value(self, node: Node) -> Any:
        return self.forced.get(node, self.env[node])

    def lanes(self, node: Node) -> Lanes:
        """The value of a node in lanes, also where it is a total over samples: each lane then holds its own part."""
        if node in self.forced:
            return self.forced[node]
        value = self.env[node]
        if isinstance(value, Accumulated):
            late, self.book.late = self.book.late, True
            value = value.in_lanes() if value.in_lanes is not None else self._call(node, force=True)
            self.book.late = late
            self.forced[node] = value
        return value

    def ids(self, arg: Any) -> Tensor:
        """Ids of whatever an operation gets: a node, a number, a tensor of ids."""
        if isinstance(arg, Tensor):
            return arg
        if not isinstance(arg, fx.Node):
            return torch.tensor(self.book.constant(float(arg)), dtype=torch.int64)
        value = self._value(arg)
        if isinstance(value, Lanes):
            return value.ids
        if isinstance(value, Accumulated):
            return self.lanes(arg).ids
        if isinstance(value, Literal):
            return self._literal_ids(value.tensor, arg)
        return self._uniform_ids(value.node)

    def _uniform_ids(self, node: Node) -> Tensor:
        if node not in self.uniform_ids:
            name = "" if node.op == "get_attr" else name_of(node)
            if name in VIEWS and name != "getitem" and len(node.all_input_nodes) == 1:
                parent = self._uniform_ids(node.args[0])
                made = node.target(parent, *node.args[1:], **node.kwargs)
            else:
                shape = node.meta["val"].shape if "val" in node.meta else self.traced.constants[node.target].shape
                n = math.prod(shape)
                made = (torch.arange(n) + self.book.buffer(n, "uniform", node).start).reshape(shape)
                made = self.like(made, node)
            self.uniform_ids[node] = made
        return self.uniform_ids[node]

    def _literal_ids(self, tensor: Tensor, node: Node) -> Tensor:
        flat = tensor.detach().to(torch.float64).reshape(-1)
        if node.name in self.sized and tensor.ndim and bool((tensor == tensor[:1]).all()):
            return self._literal_ids(tensor[0].clone(), _Unsized()).unsqueeze(0).expand(tensor.shape)
        distinct, inverse = torch.unique(flat, return_inverse=True)
        if len(distinct) <= 4 or bool(((flat == 0) | (flat == 1)).all()):
            made = torch.tensor([self.book.constant(float(v)) for v in distinct], dtype=torch.int64)[inverse]
        else:
            made = torch.arange(len(flat)) + self.book.buffer(len(flat), "uniform", tensor).start
        return made.reshape(tensor.shape)

    def like(self, ids: Tensor, node: Node) -> Tensor:
        """Ids in memory of their own, laid out as PyTorch laid out the node's value, so that every later view is valid."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.shape != ids.shape:
            return ids.contiguous() if not isinstance(value, Tensor) else ids.expand(value.shape).contiguous()
        if 0 in value.stride():
            return ids.clone(memory_format=torch.contiguous_format)
        return torch.empty_strided(value.shape, value.stride(), dtype=torch.int64).copy_(ids)

    def known(self, arg: Any) -> Any:
        """The numbers of a literal or uniform, for indices; those of a uniform become part of the program."""
        if not isinstance(arg, fx.Node):
            return arg
        node: Node = arg
        if node in self.concrete:
            return self.concrete[node]
        value = self._value(node)
        if isinstance(value, Literal):
            return value.tensor
        if not isinstance(value, Uniform):
            raise CannotLower("indices or masks computed from t or y")
        if node.op == "get_attr":
            result = self.traced.constants[node.target].detach()
            self.baked[id(self.traced.constants[node.target])] = self.traced.constants[node.target]
        else:
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), self.known)
            result = node.target(*args, **kwargs)
        self.concrete[node] = result
        return result

    def _literal(self, node: Node) -> Any:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), self.known)
        result = node.target(*args, **kwargs)
        return [Literal(x) for x in result] if isinstance(result, list | tuple) else Literal(result)

    def _create(self, node: Node) -> Any:
        def stand_in(arg: Node) -> Any:
            value = self._value(arg)
            meta = arg.meta["val"]
            if isinstance(value, Literal):
                return value.tensor
            return torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype).zero_()

        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), stand_in)
        made = node.target(*args, **kwargs)
        if "empty" in name_of(node):
            made = made.zero_()
        return Lanes(self.like(self._literal_ids(made, node), node)) if node in self.written else Literal(made)

    # ---- operations that compute nothing

    def _move(self, node: Node) -> Any:
        name = name_of(node)

        def convert(arg: Node) -> Any:
            value = self._value(arg)
            if isinstance(value, list):
                return [v.ids if isinstance(v, Lanes) else self._literal_ids(v.tensor, arg) for v in value]
            meta = arg.meta.get("val")
            is_index = name in ("index", "index_select", "gather") and arg is not node.args[0]
            if is_index or (isinstance(meta, Tensor) and not (meta.is_floating_point() or meta.dtype is torch.bool)):
                return self.known(arg)
            return self.ids(arg)

        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), convert)
        if name in ("_unsafe_view", "view"):
            return args[0].reshape(args[1])
        kwargs = {k: v for k, v in kwargs.items() if k != "memory_format"}
        result = node.target(*args, **kwargs)
        return list(result) if isinstance(result, list | tuple) else result

    def _inplace(self, node: Node) -> Any:
        target = self._value(node.args[0])
        if not isinstance(target, Lanes):
            raise CannotLower(f"an operation in place on something computed from parameters alone ({node.target})")
        base = name_of(node)[:-1]
        self.book.late = node in self.late
        if base == "copy":
            new = self.ids(node.args[1]).expand(target.ids.shape)
        elif base in ("fill", "zero"):
            new = self.ids(node.args[1] if base == "fill" else 0.0).expand(target.ids.shape)
        elif base in self.handlers:
            new = self.handlers[base](node)
        else:
            raise CannotLower(f"the operation {node.target}")
        if not isinstance(new, Tensor):
            raise CannotLower(f"the operation {node.target} on a total over rows")
        target.ids.copy_(new.clone())
        return target

    # ---- totals over samples

    def _after(self, node: Node, name: str, operands: list[Any]) -> Any:
        """An operation on totals that PyTorch does after the solve; it must be linear in them."""
        totals = sum(isinstance(x, Accumulated) for x in operands)
        linear = name in LINEAR or name == "_weight_norm_interface_backward"
        if name in ("mul", "div", "mm", "bmm") and totals > 1:
            linear = False
        if name == "div" and not isinstance(self._value(node.args[0]), Accumulated):
            linear = False
        if name in ("add", "sub", "where", "cat", "stack"):
            others = [x for x in operands if not isinstance(x, Accumulated)]
            zero = all(isinstance(x, Literal) and (x.tensor.dtype is torch.bool or not x.tensor.any()) for x in others)
            scalars = any(isinstance(a, int | float) and a != 0 for a in node.args[:2]) and name in ("add", "sub")
            linear = zero and not scalars
        value = node.meta.get("val")
        if not linear or not isinstance(value, Tensor | list | tuple):
            return self._call(node, force=True)
        if isinstance(value, list | tuple):
            return [Accumulated(None, tuple(x.shape)) for x in value]
        return Accumulated(None, tuple(value.shape))

    def total(self, shape: tuple[int, ...], emit: Callable[[int], None], in_lanes: Callable[[], Tensor]) -> Accumulated:
        """New accumulators of a shape, filled by the instructions that `emit(offset)` appends."""
        offset = self.accumulators
        self.accumulators += math.prod(shape)
        emit(offset)
        return Accumulated(offset, tuple(shape), lambda: Lanes(in_lanes(), True))

    # ---- pointwise

    def pointwise(self, micro: Micro, *operands: Any) -> Tensor:
        """Ids of a pointwise function; elements that need no arithmetic are not computed."""
        ids = torch.broadcast_tensors(*map(self.ids, operands))
        shape = ids[0].shape
        flat = [x.reshape(-1) for x in ids]
        samples = torch.stack([samples_of(x) for x in flat]).amax(0)
        for x in flat:
            own = samples_of(x)
            if bool(((own != 0) & (own != samples)).any()):
                raise CannotLower(COUPLED)
        rows = [rows_of(x) for x in flat]
        result, todo = self._shortcuts(micro, flat, rows)
        if bool(todo.any()):
            keys = torch.stack([r[todo] for r in rows], 1)
            first, rank = first_unique(keys)
            out = self.book.emit(
                "pointwise", list(keys[first].unbind(1)), len(first), steps=[(micro, *range(len(rows)))]
            )
            result[todo] = (rank + out.start) | (samples[todo] << SAMPLE_SHIFT)
        return result.reshape(shape)

    def _shortcuts(self, micro: Micro, flat: list[Tensor], rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        result, todo = flat[0].clone(), torch.ones(len(flat[0]), dtype=torch.bool)

        def settle(where: Tensor, value: Any) -> None:
            nonlocal todo
            where = where & todo
            result[where] = value[where] if isinstance(value, Tensor) else value
            todo = todo & ~where

        if micro is Micro.COPY:
            settle(todo, flat[0])
        if micro in (Micro.MUL, Micro.DTANH, Micro.DSIGMOID):
            settle(rows[0] == self.zero, self.zero)
        if micro is Micro.MUL:
            settle(rows[1] == self.zero, self.zero)
            settle(rows[0] == self.one, flat[1])
        if micro in (Micro.MUL, Micro.DIV):
            settle(rows[1] == self.one, flat[0])
        if micro in (Micro.ADD, Micro.SUB):
            settle(rows[1] == self.zero, flat[0])
        if micro is Micro.ADD:
            settle(rows[0] == self.zero, flat[1])
        if micro is Micro.NEG:
            settle(rows[0] == self.zero, self.zero)
        if micro is Micro.WHERE:
            settle(rows[0] == self.one, flat[1])
            settle(rows[0] == self.zero, flat[2])
        return result, todo

    # ---- folds

    def reduce(self, kind: Reduction, ids: Tensor, dims: list[int], keep: bool) -> Any:
        """Fold dimensions: within samples, or as the last step of a gradient over all of them."""
        dims = sorted({d % max(ids.ndim, 1) for d in dims}) if ids.ndim else []
        kept = [d for d in range(ids.ndim) if d not in dims]
        shape = [1 if d in dims else ids.shape[d] for d in range(ids.ndim)] if keep else [ids.shape[d] for d in kept]
        table = ids.permute([*kept, *dims]).reshape(math.prod(ids.shape[d] for d in kept), -1)
        samples, rows = samples_of(table), rows_of(table)
        sample = samples.amax(1, keepdim=True)
        if bool(((samples != 0) & (samples != sample)).any()):
            if kind is not Reduction.SUM or not self.book.late:
                raise CannotLower(COUPLED)
            return self._total_rows(table, tuple(shape))
        return self._fold(kind, rows, sample).reshape(shape)

    def _fold(self, kind: Reduction, rows: Tensor, sample: Tensor) -> Tensor:
        if kind is Reduction.SUM and rows.shape[1] > 1:
            filled = rows != self.zero
            if int(filled.sum(1).max()) <= 1:
                rows = rows.gather(1, filled.int().argmax(1, keepdim=True))
        if rows.shape[1] == 1:
            return rows | (torch.where(rows == self.zero, 0, sample) << SAMPLE_SHIFT)
        first, rank = first_unique(rows)
        out = self.book.emit("reduce", [rows[first].reshape(-1)], len(first), fold=kind, m=rows.shape[1])
        return (rank + out.start) | (sample.squeeze(1) << SAMPLE_SHIFT)

    def by_sample(self, samples: Tensor, zero: Tensor) -> list[Tensor]:
        """Positions of each sample's elements in a list that runs over all of them; zeros belong to nobody."""
        if bool(((samples == 0) & ~zero).any()):
            raise CannotLower(COUPLED)
        return [(samples == s + 1).nonzero().squeeze(1) for s in range(self.traced.rows)]

    def _total_rows(self, table: Tensor, shape: tuple[int, ...]) -> Accumulated:
        refs = self._terms(samples_of(table), rows_of(table))
        m = refs.shape[1]

        def emit(offset: int) -> None:
            self._gradient("rgrad", [refs.reshape(-1)], n=len(refs), m=m, acc=offset)

        return self.total(
            shape,
            emit,
            lambda: self._fold(Reduction.SUM, refs, torch.zeros(len(refs), 1, dtype=torch.int64)).reshape(shape),
        )

    def _terms(self, samples: Tensor, rows: Tensor) -> Tensor:
        """What the first sample adds to each of several sums over all of them, filled up with zeros; all must add the same."""
        different = "a sum over rows of the batch that treats rows differently"
        zero = rows == self.zero
        if bool((samples == samples[:1]).all()) and not bool(zero.any()):  # as a rule: all sums run alike
            parts = [rows[:, where] for where in self.by_sample(samples[0], zero[0])]
            if any(not torch.equal(part, parts[0]) for part in parts):
                raise CannotLower(different)
            return parts[0]
        lists = []
        for i in range(len(rows)):
            parts = [rows[i][where] for where in self.by_sample(samples[i], zero[i])]
            if any(not torch.equal(part, parts[0]) for part in parts):
                raise CannotLower(different)
            lists.append(parts[0])
        m = max(map(len, lists))
        return torch.stack([torch.cat([x, x.new_full((m - len(x),), self.zero)]) for x in lists])

    def _gradient(self, kind: str, operands: list[Tensor], **attrs: Any) -> None:
        from neurode.fused.virtual import Virtual

        if all(len(refs) for refs in operands):  # a sum of no terms is what its accumulators begin with
            self.book.instructions.append(Virtual(kind, operands, None, True, attrs))

    # ---- products

    def product(self, x: Tensor, z: Tensor, late_only: bool) -> Any:
        """`(b, M, K) @ (b, K, N)` in ids: with weights, within samples, or summed over samples."""
        b = len(x)
        if b == 1:
            made = self._slice(x[0], z[0], late_only)
            return made.unsqueeze(0) if isinstance(made, Tensor) else self._reshaped(made, (1, x.shape[1], z.shape[2]))
        if any(self._mixed(a, c) for a, c in zip(x, z, strict=True)):
            return self._mixed_slices(x, z, late_only)
        keys = torch.cat([rows_of(x).reshape(b, -1), rows_of(z).reshape(b, -1)], 1)
        return self._slices(x, z, *first_unique(keys))

    def _mixed_slices(self, x: Tensor, z: Tensor, late_only: bool) -> Any:
        """A batch of products whose slices hold rows of several samples."""
        sums = [not self._is_within(a, c) for a, c in zip(x, z, strict=True)]
        if all(sums) and self.book.late:
            return self._weight_gradients(x, z)
        if any(sums):
            raise CannotLower(COUPLED)
        uniform = self._is_uniform(rows_of(z)) or self._is_uniform(rows_of(x))
        made = None if uniform else self._distinct(rows_of(x), rows_of(z))
        if made is None:
            return torch.stack([self._slice(a, c, late_only) for a, c in zip(x, z, strict=True)])
        sample = torch.maximum(samples_of(x).amax(2, keepdim=True), samples_of(z).amax(1, keepdim=True))
        return made | (sample << SAMPLE_SHIFT)

    def _distinct(self, x: Tensor, z: Tensor) -> Tensor | None:
        """Products within samples, each pair of a row and a column once; None where slices differ in their repeats."""
        firsts = [(first_unique(a), first_unique(c.t())) for a, c in zip(x, z, strict=True)]
        if len({(len(p[0]), len(q[0])) for p, q in firsts}) > 1:
            return None
        left = torch.stack([a[p[0]] for a, (p, _) in zip(x, firsts, strict=True)])
        right = torch.stack([c[:, q[0]] for c, (_, q) in zip(z, firsts, strict=True)])
        out = self._sample_product(left, right)
        return torch.stack([o[p[1]][:, q[1]] for o, (p, q) in zip(out, firsts, strict=True)])

    def _is_within(self, x: Tensor, z: Tensor) -> bool:
        """Whether every element of a product is made of one sample alone."""
        sx, sz = samples_of(x), samples_of(z)
        rx, cz = sx.amax(1, keepdim=True), sz.amax(0, keepdim=True)
        alone = not bool(((sx != 0) & (sx != rx)).any()) and not bool(((sz != 0) & (sz != cz)).any())
        return alone and not bool(((rx != 0) & (cz != 0) & (rx != cz)).any())

    def _weight_gradients(self, x: Tensor, z: Tensor) -> Accumulated:
        """A batch of products summed over samples."""
        terms = [(rows_of(a)[:, k], rows_of(c)[k]) for a, c in zip(x, z, strict=True) for k in self._columns(a, c)]
        if len({len(c) for _, c in terms}) > 1:
            raise CannotLower(COUPLED)
        shape = (len(terms), x.shape[1], z.shape[2])

        def emit(offset: int) -> None:
            for i, (a, c) in enumerate(terms):
                self._gradient(
                    "wgrad", [a.t().reshape(-1), c.reshape(-1)], count=len(c), O=shape[1], K=shape[2],
                    acc=offset + i * shape[1] * shape[2], acc_o=shape[2], acc_k=1, total=offset,
                )  # fmt: skip

        left, right = (torch.stack([t[i] for t in terms]) for i in (0, 1))
        return self.total(shape, emit, lambda: self._sample_product(left, right))

    def _reshaped(self, total: Accumulated, shape: tuple[int, ...]) -> Accumulated:
        inner = total.in_lanes
        assert inner is not None
        return Accumulated(total.offset, shape, lambda: Lanes(inner().ids.reshape(shape), True))

    def _mixed(self, x: Tensor, z: Tensor) -> bool:
        samples = samples_of(torch.cat([x.reshape(-1), z.reshape(-1)]))
        return bool((samples[samples != 0] != samples.max()).any())

    def _slices(self, x: Tensor, z: Tensor, first: Tensor, rank: Tensor) -> Tensor:
        """A batch of products, each kind of slice once."""
        b, M, N = x.shape[0], x.shape[1], z.shape[2]
        sample = torch.maximum(samples_of(x).reshape(b, -1).amax(1), samples_of(z).reshape(b, -1).amax(1))
        for part in (x, z):
            own = samples_of(part).reshape(b, -1)
            if bool(((own != 0) & (own != sample.unsqueeze(1))).any()):
                raise CannotLower(COUPLED)
        plain_x, plain_z = rows_of(x[first]), rows_of(z[first])
        if not self._is_uniform(plain_x) and not self._is_uniform(plain_z):
            distinct = self._distinct(plain_x, plain_z)
            out = self._sample_product(plain_x, plain_z) if distinct is None else distinct
        else:
            out = torch.stack([self._slice(plain_x[i], plain_z[i], False) for i in range(len(first))])
        zero = out[rank] == self.zero
        return torch.where(zero, out[rank], out[rank] | (sample << SAMPLE_SHIFT).reshape(b, 1, 1).expand(b, M, N))

    def _is_uniform(self, rows: Tensor) -> bool:
        return bool(self.book.uniform[rows.reshape(-1)].all())

    def _slice(self, x: Tensor, z: Tensor, late_only: bool) -> Any:
        """One product `(M, K) @ (K, N)`."""
        sx, sz = samples_of(x), samples_of(z)
        rx, cz = sx.amax(1, keepdim=True), sz.amax(0, keepdim=True)
        within = self._is_within(x, z)
        if within and self._is_uniform(rows_of(z)):
            return self._gemm(x, rows_of(z))
        if within and self._is_uniform(rows_of(x)):
            return self._gemm(z.t(), rows_of(x).t()).t()
        if within:
            if late_only and not bool(sx.any()) and not bool(sz.any()):
                return self._weight_gradient(x, z, [torch.arange(x.shape[1])])
            return self._within(x, z, rx, cz)
        if not self.book.late:
            raise CannotLower(COUPLED)
        return self._weight_gradient(x, z, self._columns(x, z))

    def _within(self, x: Tensor, z: Tensor, rx: Tensor, cz: Tensor) -> Tensor:
        fx_, rank_x = first_unique(rows_of(x))
        fz, rank_z = first_unique(rows_of(z).t())
        out = self._sample_product(rows_of(x)[fx_].unsqueeze(0), rows_of(z)[:, fz].unsqueeze(0))[0]
        return out[rank_x][:, rank_z] | (torch.maximum(rx, cz) << SAMPLE_SHIFT)

    def _sample_product(self, x: Tensor, z: Tensor) -> Tensor:
        count, rows, inner = x.shape
        columns = z.shape[2]
        out = self.book.emit(
            "product", [x.reshape(-1), z.reshape(-1)], count * rows * columns, count=count, I=rows, K=inner, J=columns
        )
        return (torch.arange(out.n) + out.start).reshape(count, rows, columns)

    def _gemm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Every row of x times one uniform matrix `(K, N)`."""
        rows, samples = rows_of(x), samples_of(x)
        sample = samples.amax(1, keepdim=True)
        if bool(((samples != 0) & (samples != sample)).any()):
            raise CannotLower(COUPLED)
        K, N = weight.shape
        columns, repeats = first_unique(weight.t())
        if len(columns) < N:
            return self._gemm(x, weight[:, columns])[:, repeats]
        first, rank = first_unique(rows)
        distinct = rows[first]
        made = torch.empty(len(first), N, dtype=torch.int64)
        simple = ((distinct == self.zero) | (distinct == self.one)).all(1) & ((distinct == self.one).sum(1) <= 1)
        for i in simple.nonzero().flatten().tolist():
            hot = (distinct[i] == self.one).nonzero().flatten()
            made[i] = weight[hot[0]] if len(hot) else self.zero
        rest = (~simple).nonzero().flatten()
        if len(rest):
            offset, step_k, step_o = self._affine(weight)
            out = self.book.emit(
                "gemm", [distinct[rest].reshape(-1)], len(rest) * N, count=len(rest), O=N, K=K, weight=offset,
                weight_o=step_o, weight_k=step_k, act=Micro.COPY, bias=None,
            )  # fmt: skip
            made[rest] = (torch.arange(out.n) + out.start).reshape(len(rest), N)
        result = made[rank]
        return torch.where(self.book.uniform[result], result, result | (sample << SAMPLE_SHIFT))

    def _affine(self, weight: Tensor) -> tuple[int, int, int]:
        """Offset and strides of a matrix of uniforms; one that has none is gathered into a new uniform."""
        K, N = weight.shape
        offset = int(weight[0, 0])
        step_k = int(weight[1, 0]) - offset if K > 1 else 0
        step_o = int(weight[0, 1]) - offset if N > 1 else 0
        fits = offset + torch.arange(K).unsqueeze(1) * step_k + torch.arange(N) * step_o
        home = next(b for b in self.book.buffers if b.start <= offset < b.start + b.n)
        inside = bool(((weight >= home.start) & (weight < home.start + home.n)).all())
        if inside and torch.equal(fits, weight):
            return offset, step_k, step_o
        start = self.book.buffer(K * N, "uniform", ("gather", weight.reshape(-1).clone())).start
        return start, N, 1

    def _columns(self, x: Tensor, z: Tensor) -> list[Tensor]:
        """For a sum over samples: which terms k belong to the first sample, after a check that all have the same."""
        sx, sz = samples_of(x), samples_of(z)
        kx, kz = sx.amax(0), sz.amax(1)
        mixed = ((sx != 0) & (sx != kx)).any() | ((sz != 0) & (sz != kz.unsqueeze(1))).any()
        owner = torch.maximum(kx, kz)
        if bool(mixed) or bool(((kx != 0) & (kz != 0) & (kx != kz)).any()):
            raise CannotLower(COUPLED)
        zero = (rows_of(x) == self.zero).all(0) | (rows_of(z) == self.zero).all(1)
        parts = self.by_sample(torch.where(zero, 0, owner), zero)
        for part in parts[1:]:
            same = torch.equal(rows_of(x)[:, part], rows_of(x)[:, parts[0]])
            if not same or not torch.equal(rows_of(z)[part], rows_of(z)[parts[0]]):
                raise CannotLower("a product over rows of the batch that treats rows differently")
        return parts[:1]

    def _weight_gradient(self, x: Tensor, z: Tensor, parts: list[Tensor]) -> Accumulated:
        terms = parts[0]
        g, v = rows_of(x)[:, terms].t(), rows_of(z)[terms]  # (count, O), (count, K)
        O, K = g.shape[1], v.shape[1]  # noqa: E741

        def emit(offset: int) -> None:
            self._gradient(
                "wgrad", [g.reshape(-1), v.reshape(-1)], count=len(terms), O=O, K=K, acc=offset, acc_o=K, acc_k=1
            )

        return self.total((O, K), emit, lambda: self._sample_product(g.t().unsqueeze(0), v.unsqueeze(0))[0])


class _Unsized:
    """Stands for a node whose shape does not count rows."""

    name = ""


def is_inplace(node: Node) -> bool:
    """Whether an operation writes to its first argument."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def handlers(low: Lowering) -> dict[str, Callable[[Node], Any]]:
    """What every operation that computes something means."""
    from neurode.fused.operations import table

    return table(low)


__all__ = ["BINARY", "ROW", "UNARY", "Accumulated", "Lanes", "Literal", "Lowering", "Uniform", "name_of", "pytree"]
