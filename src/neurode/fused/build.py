"""A vector field's program together with what PyTorch does before and after it: parameters in, gradients out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from neurode._field import Field
from neurode.fused import native
from neurode.fused.assemble import Assembler
from neurode.fused.capture import (
    PROBE_ROWS,
    Probe,
    Traced,
    outside,
    record,
    same_shape,
)
from neurode.fused.lower import Accumulated, Literal, Lowering
from neurode.fused.program import Program
from neurode.fused.refusal import CannotLower, in_brief

Node = Any  # an fx.Node; PyTorch annotates its fields too widely to be of use


@dataclass(frozen=True, eq=False)
class FieldProgram:
    """A vector field, lowered.

    Attributes:
        program: the tile program.
        split: whether dimension 0 of the state counts independent rows; else the whole state is one sample.
        outside: the tensors from outside that enter f (stand-ins may be bound in their place).
        wanted: positions in `outside` of those that gradients are formed for.
        before: computes the uniform numbers.
        after: makes gradients of the accumulators.
        baked: positions in `outside` of tensors whose numbers became part of the program.
        gradients: whether there are backward and gradient sections.
        num_data: number of per-row leaves.
        recording: the graph, and the positions of its constants.
    """

    program: Program
    split: bool
    outside: tuple[Tensor, ...]
    wanted: tuple[int, ...]
    before: Before
    after: After
    baked: tuple[int, ...]
    gradients: bool
    num_data: int
    recording: tuple[Traced, dict[str, int]]


class Before:
    """Work that depends on parameters alone: run by PyTorch once a solve.

    Args:
        traced: the recording.
        sources: for each uniform buffer a graph node, a known tensor, or `("gather", places)`.
        positions: name of a constant of the graph -> its position among the tensors from outside.
        constants: the last uniforms.
        low: its lowering.
    """

    def __init__(
        self, traced: Traced, low: Lowering, sources: list[Any], positions: dict[str, int], constants: Sequence[float]
    ) -> None:
        dtype = low.dtype
        self.sources, self.positions, self.dtype = sources, positions, dtype
        self.literals = _literals(low)
        self.constants = torch.tensor(list(constants), dtype=dtype)
        self.constants_of_f = traced.constants
        needed = [s for s in sources if isinstance(s, fx.Node)]
        self.order = _order(needed, set(self.literals))
        self.any_gather = any(isinstance(s, tuple) for s in sources)
        reads = [str(s.target) for s in sources if isinstance(s, fx.Node) and s.op == "get_attr"]
        self.places = [positions[name] for name in reads if name in positions]
        self.copies = len(self.places) == len(sources)  # whether the array is tensors from outside, one after another

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        """The uniform array for the present values of the tensors from outside."""
        if not self.sources:
            return self.constants
        if self.copies and native.available():
            parts = [tensors[i] for i in self.places]
            if all(x.dtype is self.dtype and x.is_contiguous() and not x.is_neg() for x in parts):
                return native.gather([*parts, self.constants])
        with torch.no_grad():
            return self._gather(tensors)

    def bind(self, tensors: Sequence[Tensor]) -> Callable[[], Tensor]:
        """The same for the present values of these very tensors whenever it is called, as long as their facts are the same."""
        parts = [*(tensors[i] for i in self.places), self.constants]
        plain = self.copies and all(x.dtype is self.dtype and x.is_contiguous() and not x.is_neg() for x in parts)
        return native.gatherer(parts) if plain and self.sources else partial(self, tensors)

    def _gather(self, tensors: Sequence[Tensor]) -> Tensor:
        values = _evaluate(self.order, self.constants_of_f, self.positions, tensors, dict(self.literals))
        parts = []
        for source in self.sources:
            if isinstance(source, fx.Node):
                parts.append(values[source].detach().reshape(-1))
            elif isinstance(source, Tensor):
                parts.append(source.reshape(-1))
            else:
                parts.append(torch.zeros(len(source[1])))
        parts = [p if p.dtype is self.dtype else p.to(self.dtype) for p in parts]
        made = torch.cat([*parts, self.constants])
        if self.any_gather:
            start = 0
            for source, part in zip(self.sources, parts, strict=False):
                if isinstance(source, tuple):
                    made[start : start + len(part)] = made[source[1]]
                start += len(part)
        return made


class After:
    """From accumulators to gradients: PyTorch's part of the chain rule through the hoisted work.

    Args:
        traced: the recording.
        low: its lowering.
        totals: for each wanted tensor None or its total.
        positions: as for `Before`.
    """

    def __init__(self, traced: Traced, low: Lowering, totals: list[Any], positions: dict[str, int]) -> None:
        self.constants_of_f, self.positions = traced.constants, positions
        self.totals = totals
        skip = 3 + traced.num_rowdata
        self.nodes = low.output_nodes[skip:] if traced.gradients else []
        self.leaves = {n: v for n, v in low.env.items() if isinstance(v, Accumulated) and v.offset is not None}
        for node, value in low.env.items():  # parts of operations with several results
            if isinstance(value, list):
                for user in node.users:
                    part = low.env.get(user)
                    if isinstance(part, Accumulated) and part.offset is not None:
                        self.leaves[user] = part
        later = [n for n, v in zip(self.nodes, totals, strict=True) if v is not None and v.offset is None]
        self.literals = _literals(low)
        self.order = _order(later, set(self.leaves) | set(self.literals))
        # Shape, strides and offset of each gradient in the accumulators, where all of them are views of these; known at the
        # first call. The graph has no values but these, and what it does to their shapes is always the same.
        self.views: list[Any] | None = None

    def __call__(self, accumulators: Tensor, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients of the wanted tensors, None where there is none."""
        if self.views is not None:
            return [None if view is None else accumulators.as_strided(*view) for view in self.views]
        with torch.no_grad():
            made = self._made(accumulators, tensors)
        if all(x is None or _same_memory(x, accumulators) for x in made):
            self.views = [None if x is None else (x.shape, x.stride(), x.storage_offset()) for x in made]
        return made

    def _made(self, accumulators: Tensor, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        known: dict[Node, Tensor] = {}
        if self.order:
            known = {**self.literals, **{n: _piece(accumulators, v) for n, v in self.leaves.items()}}
            known = _evaluate(self.order, self.constants_of_f, self.positions, tensors, known)
        made: list[Tensor | None] = []
        for node, total in zip(self.nodes, self.totals, strict=True):
            if total is None:
                made.append(None)
            else:
                made.append(_piece(accumulators, total) if total.offset is not None else known[node])
        return made


def _same_memory(x: Tensor, y: Tensor) -> bool:
    return x.dtype is y.dtype and not x.is_neg() and x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


def _piece(accumulators: Tensor, total: Accumulated) -> Tensor:
    assert total.offset is not None
    return accumulators[total.offset : total.offset + math.prod(total.shape)].reshape(total.shape)


def _literals(low: Lowering) -> dict[Node, Tensor]:
    return {n: v.tensor for n, v in low.env.items() if isinstance(v, Literal)}


def _order(nodes: list[Node], stop: set[Node]) -> list[Node]:
    """All nodes that some nodes need, in the order of the graph."""
    needed: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node in needed or node in stop:
            continue
        needed.add(node)
        stack.extend(node.all_input_nodes)
    return [n for n in (nodes[0].graph.nodes if nodes else []) if n in needed]


def _evaluate(
    order: list[Node], constants: dict[str, Tensor], positions: dict[str, int], tensors: Any, known: dict[Any, Any]
) -> Any:
    for node in order:
        if node.op == "get_attr":
            position = positions.get(node.target)
            known[node] = constants[node.target] if position is None else tensors[position]
        else:
            assert node.op == "call_function", f"{node} depends on t or y"
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), known.__getitem__)
            known[node] = node.target(*args, **kwargs)
    return known


@torch.no_grad()
def evaluate_graph(made: FieldProgram, tensors: Sequence[Tensor], values: Sequence[Tensor]) -> list[Any]:
    """The outputs of the recording itself, by PyTorch, for other tensors from outside and other inputs."""
    traced, positions = made.recording
    nodes = list(traced.graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder"]
    known = dict(zip(inputs, values, strict=True))
    order = [n for n in nodes if n.op in ("get_attr", "call_function")]
    known = _evaluate(order, traced.constants, positions, tensors, known)
    output = next(n for n in nodes if n.op == "output")
    return [known[x] if isinstance(x, fx.Node) else x for x in output.args[0]]


def build(field: Field, y: Tensor, split: bool, gradients: bool, want_t: bool = True, seed: int = 0) -> FieldProgram:
    """Lower a vector field.

    Args:
        field: on the inner state.
        y: an inner state, for its shape and dtype.
        split: take dimension 0 for rows that do not depend on each other, and prove it.
        gradients: with the vector-Jacobian product.
        want_t: with the cotangent of t.
        seed: of the stand-in values.

    Raises:
        CannotLower: with the reason and the line of the user's code.
    """
    if y.dtype not in (torch.float32, torch.float64) or y.device.type != "cpu":
        raise CannotLower(f"a state of {y.dtype} on {y.device}; float32 and float64 on the CPU are lowered")
    try:
        return _build(Probe(field, y.shape, split, torch.Generator().manual_seed(seed)), y, gradients, want_t)
    except CannotLower:
        pass
    again = Probe(field, y.shape, split, torch.Generator().manual_seed(seed), places=True)
    return _build(again, y, gradients, want_t)  # raises again, and says where


def _build(probe: Probe, y: Tensor, gradients: bool, want_t: bool) -> FieldProgram:
    split = probe.split
    recordings = [record(probe, rows, gradients) for rows in PROBE_ROWS]
    sized = same_shape(*recordings) if split else set()
    made = [_assemble(recording, sized, y.dtype, want_t) for recording in recordings]
    (low, assembler, program), (_, other, twin) = made
    if program.pack() != twin.pack() or program.constants != twin.constants or not _same_sources(assembler, other):
        raise CannotLower("what f computes depends on the number of rows, or on values that Python read from t or y")
    return _finish(recordings[0], low, assembler, program, split)


def _assemble(traced: Traced, sized: set[str], dtype: Any, want_t: bool) -> tuple[Lowering, Assembler, Program]:
    try:
        low = Lowering(traced, sized, dtype)
        assembler = Assembler(low, want_t)
        return low, assembler, assembler.program()
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CannotLower(f"neurode fails to lower it, a defect to report: {in_brief(error)}") from error


def _same_sources(one: Assembler, two: Assembler) -> bool:
    for a, b in zip(one.uniforms, two.uniforms, strict=False):
        x, y = a.source, b.source
        if a.n != b.n or type(x) is not type(y):
            return False
        if isinstance(x, Tensor) and not torch.equal(x, y):
            return False
        if isinstance(x, fx.Node) and x.name != y.name:
            return False
    return len(one.uniforms) == len(two.uniforms)


def _finish(traced: Traced, low: Lowering, assembler: Assembler, program: Program, split: bool) -> FieldProgram:
    tensors = outside(traced)
    used = {id(x): i for i, x in enumerate(tensors)}
    positions = {}
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            value = traced.constants[node.target]
            if not _is_literal(node) and isinstance(value, Tensor):
                positions[node.target] = used[id(value)]
    sources = [
        ("gather", assembler.place[b.source[1]]) if isinstance(b.source, tuple) else b.source
        for b in assembler.uniforms
    ]
    real = sorted(set(positions.values()))
    compact = {old: new for new, old in enumerate(real)}
    positions = {name: compact[old] for name, old in positions.items()}
    outer = tuple(tensors[i] for i in real)
    outer += tuple({id(x): x for x in traced.numbers if all(x is not y for y in outer)}.values())
    where = {id(x): i for i, x in enumerate(outer)}
    baked = {*low.baked, *map(id, traced.numbers)}
    missing = [x for x in traced.wanted if id(x) not in where]
    assert not missing, "a tensor that needs a gradient is missing from the recording"
    return FieldProgram(
        program,
        split,
        outer,
        tuple(where[id(x)] for x in traced.wanted),
        Before(traced, low, sources, positions, program.constants),
        After(traced, low, assembler.totals, positions),
        tuple(sorted(where[key] for key in baked if key in where)),
        traced.gradients,
        traced.num_rowdata,
        (traced, positions),
    )


def _is_literal(node: Node) -> bool:
    users = list(node.users)
    return bool(users) and all(str(u.target).startswith("aten.lift_fresh_copy") for u in users)


__all__ = ["CannotLower", "FieldProgram", "build"]
