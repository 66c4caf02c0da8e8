"""From instructions on virtual rows to a tile program: fused, split in sections, and with every row in its place."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from neurode.fused.lower import Accumulated, Lanes, Literal, Lowering, Uniform
from neurode.fused.program import (
    ARITY,
    SPACE_SHIFT,
    Gemm,
    Instruction,
    Micro,
    Operand,
    Pointwise,
    Program,
    Reduce,
    RowGradient,
    RowMap,
    Rows,
    SampleProduct,
    Space,
    Step,
    WeightGradient,
)
from neurode.fused.refusal import CannotLower
from neurode.fused.virtual import Buffer, Virtual, rows_of, samples_of

LONGEST_CHAIN = 24  # steps of one pointwise instruction, and
MOST_INPUTS = 12  # its inputs: what a small block of rows keeps in L1
EPILOGUES = {
    Micro.TANH,
    Micro.SIGMOID,
    Micro.RELU,
    Micro.SOFTPLUS,
    Micro.SILU,
    Micro.GELU,
    Micro.SIN,
    Micro.COS,
    Micro.EXP,
}
BINARY_EPILOGUES = {Micro.DTANH, Micro.DSIGMOID}


class Assembler:
    """Turns one `Lowering` into a `Program`.

    Args:
        low: the walked graph.
        want_y, want_t, want_data: whether these cotangents are asked for.

    Attributes:
        uniforms: the buffers whose numbers are handed over, in order.
        gradients: for each tensor of `wanted`: None, or its total.
    """

    def __init__(self, low: Lowering, want_t: bool = True) -> None:
        self.low, self.book, self.want_t = low, low.book, want_t
        self.list = list(low.book.instructions)
        self.size = low.y_buffer.n
        self.out = self._state(low.outputs[0], "dy/dt")
        self.late_roots: list[Tensor] = []
        self.grad_y = self.grad_t = self.grad_data = None
        self.totals: list[Accumulated | None] = []
        if low.traced.gradients:
            self._gradients()
        self.list = list(low.book.instructions)
        self._uniform_table()
        self._materialise()
        self.out = self._contiguous(self.out, False)
        self.grad_y, self.grad_t, self.grad_data = (
            None if x is None else self._contiguous(x, True) for x in (self.grad_y, self.grad_t, self.grad_data)
        )
        self._drop_unused()
        self._fuse_products()
        self._fuse_chains()
        self._sections()

    # ---- outputs

    def _state(self, value: Any, what: str) -> Tensor:
        """Virtual rows of something shaped like the state, the same for every sample."""
        low = self.low
        if value is None or isinstance(value, Literal | Uniform):
            node = low.output_nodes[0]
            value = Lanes(low.ids(node))
        if not isinstance(value, Lanes):
            raise CannotLower(f"{what} is a total over rows")
        return self._per_sample(value, what)

    def _per_sample(self, value: Lanes, what: str) -> Tensor:
        rows, samples = rows_of(value.ids), samples_of(value.ids)
        count = self.low.traced.rows
        if not count:
            return rows.reshape(-1)
        if value.ids.ndim == 0 or value.ids.shape[0] != count:
            raise CannotLower(f"{what} has no rows")
        own = torch.arange(1, count + 1).reshape(-1, *[1] * (rows.ndim - 1))
        if bool(((samples != 0) & (samples != own)).any()):
            raise CannotLower("rows of the batch are coupled: dy/dt of one depends on another")
        if not bool((rows == rows[:1]).all()):
            raise CannotLower("rows of the batch are treated differently (data of single rows? use neurode.per_row)")
        return rows[0].reshape(-1)

    def _gradients(self) -> None:
        low = self.low
        low.book.late = True
        _, grad_y, grad_t, *rest = low.output_nodes
        data, wanted = rest[: low.traced.num_rowdata], rest[low.traced.num_rowdata :]
        if grad_y is not None:
            self.grad_y = self._late(grad_y)
        if grad_t is not None and self.want_t:
            self.grad_t = self._time(grad_t)
        if data and any(x is not None for x in data):
            parts = []
            for place, node in zip(low.traced.graph.nodes, data, strict=False):
                del place
                if node is None:
                    raise CannotLower("some of the per-row data has no gradient")
                parts.append(self._late(node))
            self.grad_data = torch.cat(parts)
        self.totals = [None if node is None else self._total(node) for node in wanted]

    def _late(self, node: Any) -> Tensor:
        value = self.low.env[node]
        if isinstance(value, Literal):
            ids = self.low.ids(node)
            return self._per_sample(Lanes(ids.expand(node.meta["val"].shape)), "a gradient")
        if isinstance(value, Uniform):
            raise CannotLower("a gradient that does not depend on the cotangent")
        return self._per_sample(self.low.lanes(node), "a gradient")

    def _time(self, node: Any) -> Tensor:
        value = self.low.env[node]
        if isinstance(value, Literal):
            return self.low.ids(node).reshape(-1)[:1]
        if isinstance(value, Uniform):
            raise CannotLower("a gradient of t that does not depend on the cotangent")
        lane = self.low.lanes(node)
        if lane.ids.ndim and self.low.traced.rows:
            return self._per_sample(lane, "the gradient of t")
        if bool(samples_of(lane.ids).any()):
            raise CannotLower("the gradient of t")
        return rows_of(lane.ids).reshape(-1)

    def _total(self, node: Any) -> Accumulated | None:
        """The total for the gradient of a tensor from outside."""
        low = self.low
        value = low.env[node]
        if isinstance(value, Accumulated):
            return value
        if isinstance(value, Literal):
            if bool(value.tensor.any()):
                raise CannotLower("a gradient that does not depend on the cotangent")
            return None
        if isinstance(value, Uniform) or bool(samples_of(value.ids).any()) or node not in low.late:
            raise CannotLower("a gradient that is not a total over rows")
        refs = rows_of(value.ids).reshape(-1)
        emit = lambda offset: low._gradient("rgrad", [refs], n=len(refs), m=1, acc=offset)
        return low.total(tuple(value.ids.shape), emit, lambda: value.ids)

    # ---- uniform numbers

    def _uniform_table(self) -> None:
        """Uniform buffers first, in order, then constants: their places in the uniform array."""
        buffers = self.book.buffers
        self.uniforms = [b for b in buffers if b.kind == "uniform"]
        self.place = torch.full((self.book.num_rows,), -1, dtype=torch.int64)  # space << shift | row, once known
        position = 0
        for b in self.uniforms:
            self.place[b.start : b.start + b.n] = torch.arange(position, position + b.n)
            position += b.n
        self.constants = []
        for b in buffers:
            if b.kind == "constant":
                self.place[b.start] = position
                self.constants.append(b.source)
                position += 1
        self.num_uniforms = position

    def _copy(self, refs: Tensor, late: bool, before: Virtual | None) -> Buffer:
        out = self.book.buffer(len(refs), "value")
        made = Virtual("pointwise", [refs], out, late, {"steps": [(Micro.COPY, 0)]})
        index = self.list.index(before) if before is not None else len(self.list)
        self.list.insert(index, made)
        return out

    def _materialise(self) -> None:
        """Give uniform numbers rows of their own where lanes are needed or mixed with them."""
        made: dict[tuple[bool, int], int] = {}
        for virtual in list(self.list):
            for i, refs in enumerate(virtual.operands):
                uniform = self.book.uniform[refs]
                if not bool(uniform.any()) or (virtual.kind == "pointwise" and bool(uniform.all())):
                    continue
                section = virtual.late
                new = [int(r) for r in torch.unique(refs[uniform]) if (section, int(r)) not in made]
                if new:
                    first = next(v for v in self.list if v.late == section or v.kind in ("wgrad", "rgrad"))
                    out = self._copy(torch.tensor(new), section, first)
                    made.update({(section, r): out.start + j for j, r in enumerate(new)})
                refs = refs.clone()
                refs[uniform] = torch.tensor([made[section, int(r)] for r in refs[uniform]])
                virtual.operands[i] = refs

    def _contiguous(self, refs: Tensor, late: bool) -> Tensor:
        """Rows in a row, copied there where they are not."""
        straight = torch.equal(refs, torch.arange(len(refs)) + refs[0])
        if straight and self._one_buffer(refs):
            return refs
        uniform = self.book.uniform[refs]
        if bool(uniform.any()) and not bool(uniform.all()):
            mixed = torch.unique(refs[uniform])
            out = self._copy(mixed, late, None)
            table = {int(r): out.start + j for j, r in enumerate(mixed)}
            refs = torch.tensor([table.get(int(r), int(r)) for r in refs])
        out = self._copy(refs, late, None)
        return torch.arange(len(refs)) + out.start

    def _one_buffer(self, refs: Tensor) -> bool:
        first, last = int(refs[0]), int(refs[-1])
        return any(
            b.start <= first and last < b.start + b.n and b.kind not in ("uniform", "constant")
            for b in self.book.buffers
        )

    # ---- passes

    def _roots(self) -> list[Tensor]:
        roots = [self.out, self.grad_y, self.grad_t, self.grad_data]
        return [r for r in roots if r is not None]

    def _drop_unused(self) -> None:
        needed = torch.zeros(self.book.num_rows, dtype=torch.bool)
        for refs in self._roots():
            needed[refs] = True
        kept, offsets = [], self._wanted_offsets()
        for virtual in reversed(self.list):
            out = virtual.out
            if out is None and virtual.attrs.get("total", virtual.attrs["acc"]) not in offsets:
                continue
            if out is None or bool(needed[out.start : out.start + out.n].any()):
                kept.append(virtual)
                for refs in virtual.operands:
                    needed[refs] = True
        self.list = kept[::-1]

    def _wanted_offsets(self) -> set[int]:
        """The accumulators that some wanted gradient is made of."""
        low, found = self.low, set()
        for total, node in zip(
            self.totals, low.output_nodes[3 + low.traced.num_rowdata :] if low.traced.gradients else [], strict=True
        ):
            if total is not None and total.offset is not None:
                found.add(total.offset)
                continue
            stack, seen = [node] if total is not None else [], set()
            while stack:
                at = stack.pop()
                if at in seen:
                    continue
                seen.add(at)
                value = low.env[at]
                parts = value if isinstance(value, list) else [value]
                offsets = {v.offset for v in parts if isinstance(v, Accumulated) and v.offset is not None}
                found |= offsets
                if not offsets:
                    stack.extend(at.all_input_nodes)
        return found

    def _readers(self) -> dict[int, list[Virtual]]:
        """For each buffer (by its start) who reads any of it; a root counts as None."""
        owner = torch.full((self.book.num_rows,), -1, dtype=torch.int64)
        for virtual in self.list:
            if virtual.out is not None:
                owner[virtual.out.start : virtual.out.start + virtual.out.n] = virtual.out.start
        readers: dict[int, list[Any]] = {}
        for virtual in self.list:
            for start in set().union(*(owner[refs].tolist() for refs in virtual.operands)) - {-1}:
                readers.setdefault(start, []).append(virtual)
        for refs in self._roots():
            for start in torch.unique(owner[refs]).tolist():
                readers.setdefault(start, []).append(None)
        return readers

    def _fuse_products(self) -> None:
        """Bias, an added row, and an activation become the epilogue of the product that makes their operand."""
        self._repeat("gemm", self._absorb)

    def _repeat(self, kind: str, merge: Any) -> None:
        """Merge instructions of a kind into their only readers until nothing changes."""
        changed = True
        while changed:
            changed, gone = False, set()
            readers = self._readers()
            for virtual in list(self.list):
                if virtual.kind != kind or id(virtual) in gone:
                    continue
                users = readers.get(virtual.out.start, [])
                if len(users) != 1 or users[0] is None or id(users[0]) in gone:
                    continue
                if merge(virtual, users[0]):
                    changed = True
                    gone |= {id(virtual), id(users[0])}

    def _absorb(self, gemm: Virtual, user: Virtual) -> bool:
        assert gemm.out is not None
        whole = torch.arange(gemm.out.n) + gemm.out.start
        if user.kind != "pointwise" or len(user.attrs["steps"]) != 1 or user.late != gemm.late:
            return False
        matches = [i for i, refs in enumerate(user.operands) if torch.equal(refs, whole)]
        if len(matches) != 1 or sum(_overlaps(refs, gemm.out) for refs in user.operands) != 1:
            return False
        micro = user.attrs["steps"][0][0]
        others = [refs for i, refs in enumerate(user.operands) if i not in matches]
        attrs = gemm.attrs
        if attrs["act"] is not Micro.COPY:
            return False
        if micro in EPILOGUES and not others:
            attrs["act"] = micro
        elif micro is Micro.ADD and attrs.get("add") is None:
            uniform = bool(self.book.uniform[others[0]].all())
            if uniform and attrs["bias"] is None and (bias := self._bias(others[0], attrs)) is not None:
                attrs["bias"] = bias
            elif not uniform:
                attrs["add"] = len(gemm.operands)
                gemm.operands.append(others[0])
            else:
                return False
        elif micro in BINARY_EPILOGUES and matches == [0] and not bool(self.book.uniform[others[0]].any()):
            attrs["act"] = micro
            attrs["aux"] = len(gemm.operands)
            gemm.operands.append(others[0])
        else:
            return False
        gemm.out = user.out
        position, target = self.list.index(gemm), self.list.index(user)
        self.list[target] = gemm
        del self.list[position]
        return True

    def _bias(self, refs: Tensor, attrs: dict[str, Any]) -> tuple[int, int] | None:
        places = self.place[refs].reshape(attrs["count"], attrs["O"])
        offset = int(places[0, 0])
        stride = int(places[0, 1]) - offset if attrs["O"] > 1 else 0
        fits = offset + torch.arange(attrs["O"]) * stride
        return (offset, stride) if bool((places == fits).all()) else None

    def _fuse_chains(self) -> None:
        """A pointwise instruction that alone reads another of the same length takes it in."""
        self._repeat("pointwise", self._join)

    def _join(self, first: Virtual, user: Virtual) -> bool:
        assert first.out is not None
        if user.kind != "pointwise" or user.late != first.late:
            return False
        whole = torch.arange(first.out.n) + first.out.start
        places = [i for i, refs in enumerate(user.operands) if torch.equal(refs, whole)]
        if not places or sum(_overlaps(refs, first.out) for refs in user.operands) != len(places):
            return False
        inputs = list(first.operands)
        steps = [tuple(step) for step in first.attrs["steps"]]
        table: dict[int, int] = {}
        kept = [i for i in range(len(user.operands)) if i not in places]
        extra = []
        for i in kept:
            known = next((j for j, refs in enumerate(inputs) if torch.equal(refs, user.operands[i])), None)
            if known is None:
                known = len(inputs) + len(extra)
                extra.append(user.operands[i])
                inputs_now = inputs + extra
                known = len(inputs_now) - 1
            table[i] = known
        total = len(inputs) + len(extra)
        if total > MOST_INPUTS or len(steps) + len(user.attrs["steps"]) > LONGEST_CHAIN:
            return False
        shift = len(extra)
        old = len(first.operands)
        steps = [(m, *(a if a < old else a + shift for a in args)) for m, *args in steps]
        for i in places:
            table[i] = total + len(steps) - 1
        base = total + len(steps)
        for micro, *args in user.attrs["steps"]:
            steps.append(
                (micro, *(table[a] if a < len(user.operands) else base + a - len(user.operands) for a in args))
            )
        user.operands = inputs + extra
        user.attrs["steps"] = steps
        self.list.remove(first)
        return True

    # ---- sections and places

    def _sections(self) -> None:
        """What dy/dt needs is forward; the rest is backward, however little it depends on the cotangent."""
        needed = torch.zeros(self.book.num_rows, dtype=torch.bool)
        needed[self.out] = True
        forward = []
        for virtual in reversed(self.list):
            out = virtual.out
            if out is not None and bool(needed[out.start : out.start + out.n].any()):
                assert not virtual.late
                forward.append(virtual)
                for refs in virtual.operands:
                    needed[refs] = True
        self.forward = forward[::-1]
        chosen = set(map(id, self.forward))
        rest = [v for v in self.list if id(v) not in chosen]
        self.backward = [v for v in rest if v.kind not in ("wgrad", "rgrad")]
        self.gradient = [v for v in rest if v.kind in ("wgrad", "rgrad")]

    def program(self) -> Program:
        """Give every buffer its rows, and encode."""
        grow = self.book.num_rows - len(self.place)
        self.place = torch.cat([self.place, torch.full((grow,), -1, dtype=torch.int64)])
        self.rows = {Space.SAVED: 0, Space.SCRATCH: 0, Space.COTANGENT: 0, Space.ROWDATA: 0}
        low = self.low
        for buffer, space in (
            (low.t_buffer, Space.SAVED),
            (low.y_buffer, Space.SAVED),
            (low.g_buffer, Space.COTANGENT),
            (low.data_buffer, Space.ROWDATA),
        ):
            self._settle(buffer, space)
        read = lambda section: {int(r) for v in section for refs in v.operands for r in refs.tolist()}
        late_reads, gradient_reads = read(self.backward) | read(self.gradient), read(self.gradient)
        for v in self.forward:
            if any(r in late_reads for r in range(v.out.start, v.out.start + v.out.n)):
                self._settle(v.out, Space.SAVED)
        for v in self.backward:
            if any(r in gradient_reads for r in range(v.out.start, v.out.start + v.out.n)):
                self._settle(v.out, Space.COTANGENT)
        rows_forward = self._scratch(self.forward, [self.out])
        late = [x for x in (self.grad_y, self.grad_t, self.grad_data) if x is not None]
        rows_backward = self._scratch(self.backward, late)
        return Program(
            size=self.size,
            num_uniforms=self.num_uniforms,
            constants=tuple(self.constants),
            num_accumulators=low.accumulators,
            num_rowdata=low.data_buffer.n,
            rows_saved=self.rows[Space.SAVED],
            rows_forward=rows_forward,
            rows_backward=rows_backward,
            rows_cotangent=self.rows[Space.COTANGENT],
            out=self._rows(self.out),
            grad_y=None if self.grad_y is None else self._rows(self.grad_y),
            grad_t=None if self.grad_t is None else self._rows(self.grad_t),
            grad_rowdata=None if self.grad_data is None else self._rows(self.grad_data),
            forward=tuple(map(self._encode, self.forward)),
            backward=tuple(map(self._encode, self.backward)),
            gradient=tuple(map(self._encode, self.gradient)),
        )

    def _settle(self, buffer: Buffer, space: Space) -> None:
        start = self.rows[space]
        self.place[buffer.start : buffer.start + buffer.n] = torch.arange(start, start + buffer.n) | (
            space << SPACE_SHIFT
        )
        self.rows[space] = start + buffer.n

    def _scratch(self, section: list[Virtual], roots: list[Tensor]) -> int:
        """First fit by lifetime, from the first free row on; returns how many rows are used at most."""
        last: dict[int, int] = {}
        for i, virtual in enumerate(section):
            for refs in virtual.operands:
                for r in torch.unique(refs).tolist():
                    last[r] = i
        for refs in roots:
            for r in refs.tolist():
                last[r] = len(section)
        live: list[tuple[int, int, int]] = []  # (end of life, start, end)
        most = 0
        for i, virtual in enumerate(section):
            out = virtual.out
            assert out is not None
            if int(self.place[out.start]) >= 0:
                continue
            live = [x for x in live if x[0] >= i]
            start = 0
            for _, a, b in sorted(live, key=lambda x: x[1]):
                if start + out.n <= a:
                    break
                start = max(start, b)
            end = max(last.get(r, i) for r in range(out.start, out.start + out.n))
            live.append((end, start, start + out.n))
            most = max(most, start + out.n)
            self.place[out.start : out.start + out.n] = torch.arange(start, start + out.n) | (
                Space.SCRATCH << SPACE_SHIFT
            )
        return most

    def _operand(self, refs: Tensor) -> Operand:
        places = self.place[refs]
        assert bool((places >= 0).all())
        stride = int(places[1] - places[0]) if len(places) > 1 else 1
        one_space = not bool(((places >> SPACE_SHIFT) != (places[0] >> SPACE_SHIFT)).any())
        if one_space and stride >= 0 and torch.equal(places, places[0] + torch.arange(len(places)) * stride):
            return Rows(Space(int(places[0]) >> SPACE_SHIFT), int(places[0]) & ((1 << SPACE_SHIFT) - 1), stride)
        return RowMap(tuple(places.tolist()))

    def _rows(self, refs: Tensor) -> Rows:
        made = self._operand(refs)
        assert isinstance(made, Rows)
        return replace(made, stride=1)

    def _where(self, buffer: Buffer) -> Rows:
        place = int(self.place[buffer.start])
        return Rows(Space(place >> SPACE_SHIFT), place & ((1 << SPACE_SHIFT) - 1))

    def _encode(self, virtual: Virtual) -> Instruction:
        attrs = virtual.attrs
        operands = [self._operand(refs) for refs in virtual.operands]
        if virtual.kind == "pointwise":
            steps = tuple(Step(m, *args) for m, *args in attrs["steps"])
            assert all(len([a for a in (s.a, s.b, s.c) if a >= 0]) == ARITY[s.micro] for s in steps)
            out = self._where(virtual.out)
            return Pointwise(virtual.out.n, tuple(operands), steps, ((len(operands) + len(steps) - 1, out),))
        if virtual.kind == "gemm":
            bias, bias_o = attrs["bias"] or (-1, 0)
            pick = lambda name: None if attrs.get(name) is None else operands[attrs[name]]
            stride = {"weight_o": attrs["weight_o"], "weight_k": attrs["weight_k"]}
            return Gemm(
                attrs["count"], attrs["O"], attrs["K"], int(self.place[attrs["weight"]]), stride["weight_o"],
                stride["weight_k"], bias, bias_o, attrs["act"], operands[0], self._where(virtual.out),
                pick("add"), pick("aux"),
            )  # fmt: skip
        if virtual.kind == "reduce":
            return Reduce(attrs["fold"], virtual.out.n, attrs["m"], operands[0], self._where(virtual.out))
        if virtual.kind == "product":
            return SampleProduct(
                attrs["count"], attrs["I"], attrs["K"], attrs["J"], operands[0], operands[1], self._where(virtual.out)
            )
        if virtual.kind == "wgrad":
            return WeightGradient(
                attrs["count"], attrs["O"], attrs["K"], attrs["acc"], attrs["acc_o"], attrs["acc_k"], *operands
            )
        return RowGradient(attrs["n"], attrs["m"], attrs["acc"], operands[0])


def _overlaps(refs: Tensor, buffer: Buffer) -> bool:
    return bool(((refs >= buffer.start) & (refs < buffer.start + buffer.n)).any())


__all__ = ["Assembler", "math"]
