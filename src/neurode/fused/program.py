"""Tile programs: the small closed instruction set that a vector field and its vector-Jacobian product are lowered to.

A program works on *rows* of T samples: row r of a space holds one number of each of T samples (the SIMD lanes). It says
nothing of T, of vector widths, of packing or of threads; those belong to whoever runs it. The table of instructions is in
`docs/fused.md`; `pack` turns a program into the flat integers that the native interpreter reads.
"""

from __future__ import annotations

import enum
from array import array
from dataclasses import dataclass, field
from typing import ClassVar

VERSION = 1
MAGIC = 0x4E4F4445  # "NODE"
SPACE_SHIFT = 28  # a reference in a row map is `space << 28 | row`: 268 million rows a space
ROW_MASK = (1 << SPACE_SHIFT) - 1
ABSENT = (-2, 0, 0)  # the three words of an operand that is not there


class Space(enum.IntEnum):
    """Where rows live.

    UNIFORM: one number for all samples (weights, then constants), read as a broadcast.
    SAVED: forward values that the backward program reads again; row 0 is t, rows 1 ... D are y.
    SCRATCH: values that live within one run of one program.
    COTANGENT: backward values that the gradient program reads; rows 0 ... D-1 are the incoming cotangent.
    ROWDATA: data of the sample itself (`neurode.per_row`), constant during a solve.
    """

    UNIFORM = 0
    SAVED = 1
    SCRATCH = 2
    COTANGENT = 3
    ROWDATA = 4


class Micro(enum.IntEnum):
    """Operations on one number of each lane; `a`, `b`, `c` are the operands. Truth is 1.0, anything but 0.0 is true."""

    COPY = 0
    ADD = 1
    SUB = 2
    MUL = 3
    DIV = 4
    MAX = 5  # NaN where either is NaN
    MIN = 6
    POW = 7
    ATAN2 = 8
    FMA = 9  # a b + c
    FNMA = 10  # c - a b
    NEG = 11
    ABS = 12
    SQRT = 13
    RSQRT = 14
    RECIPROCAL = 15
    EXP = 16
    EXPM1 = 17
    LOG = 18
    LOG1P = 19
    TANH = 20
    SIGMOID = 21
    SOFTPLUS = 22  # log(1 + exp(a)) over the whole range
    SIN = 23
    COS = 24
    TAN = 25
    ERF = 26
    ATAN = 27
    SINH = 28
    COSH = 29
    RELU = 30  # NaN stays NaN
    SILU = 31  # a sigmoid(a)
    GELU = 32  # a (1 + erf(a / sqrt 2)) / 2
    SIGN = 33
    FLOOR = 34
    CEIL = 35
    TRUNC = 36
    ROUND = 37  # half to even
    LOG2 = 38
    EXP2 = 39
    LT = 40
    LE = 41
    GT = 42
    GE = 43
    EQ = 44
    NE = 45
    AND = 46
    OR = 47
    NOT = 48
    WHERE = 49  # a != 0 ? b : c
    DTANH = 50  # a (1 - b b)
    DSIGMOID = 51  # a b (1 - b)
    DRELU = 52  # b <= c ? 0 : a
    MOD = 53  # a - floor(a / b) b


ARITY = {
    **dict.fromkeys(Micro, 1),
    **dict.fromkeys(
        (
            Micro.ADD, Micro.SUB, Micro.MUL, Micro.DIV, Micro.MAX, Micro.MIN, Micro.POW, Micro.ATAN2, Micro.LT,
            Micro.LE, Micro.GT, Micro.GE, Micro.EQ, Micro.NE, Micro.AND, Micro.OR, Micro.DTANH, Micro.DSIGMOID,
            Micro.MOD,
        ),
        2,
    ),
    **dict.fromkeys((Micro.FMA, Micro.FNMA, Micro.WHERE, Micro.DRELU), 3),
}  # fmt: skip


class Reduction(enum.IntEnum):
    """How a REDUCE folds its rows."""

    SUM = 0
    MAX = 1  # NaN where any is NaN
    MIN = 2
    PROD = 3


@dataclass(frozen=True)
class Rows:
    """An operand whose i-th row is `row + i * stride` of a space; stride 0 repeats one row."""

    space: Space
    row: int
    stride: int = 1

    def refs(self, n: int) -> list[int]:
        """The n references that this operand stands for."""
        return [self.space << SPACE_SHIFT | (self.row + i * self.stride) for i in range(n)]

    def words(self, maps: array) -> tuple[int, int, int]:
        """Three integers: space, row, stride."""
        return int(self.space), self.row, self.stride


@dataclass(frozen=True)
class RowMap:
    """An operand whose i-th row is anywhere: `rows[i] = space << 28 | row`. Never mixes UNIFORM with lane rows."""

    rows: tuple[int, ...]

    def refs(self, n: int) -> list[int]:
        """The n references that this operand stands for."""
        assert len(self.rows) == n
        return list(self.rows)

    def words(self, maps: array) -> tuple[int, int, int]:
        """Three integers: -1, the position in `maps`, 0."""
        start = len(maps)
        maps.extend(self.rows)
        return -1, start, 0


Operand = Rows | RowMap


@dataclass(frozen=True)
class Step:
    """One operation of a pointwise chain; registers count the inputs first, then every step's result."""

    micro: Micro
    a: int
    b: int = -1
    c: int = -1


@dataclass(frozen=True)
class Pointwise:
    """A chain of pointwise operations over n rows: `out[i] = chain(in_0[i], in_1[i], ...)`.

    Attributes:
        n: rows.
        inputs: operands of n rows each; registers 0 ... len(inputs) - 1.
        steps: the chain; step s writes register `len(inputs) + s`.
        outputs: `(register, where)`; every `where` is n consecutive rows that no input of this instruction overlaps.
    """

    opcode: ClassVar[int] = 1
    n: int
    inputs: tuple[Operand, ...]
    steps: tuple[Step, ...]
    outputs: tuple[tuple[int, Rows], ...]

    def fields(self, maps: array) -> list[int]:
        """`n, #inputs, #outputs, #steps, inputs (3 each), outputs (register, space, row), steps (micro, a, b, c)`."""
        words = [self.n, len(self.inputs), len(self.outputs), len(self.steps)]
        for operand in self.inputs:
            words += operand.words(maps)
        for register, out in self.outputs:
            words += [register, int(out.space), out.row]
        for step in self.steps:
            words += [int(step.micro), step.a, step.b, step.c]
        return words


@dataclass(frozen=True)
class Gemm:
    """Matrix products with one matrix for all samples, with bias and activation in the epilogue.

    With `s = sum_k u[weight + o weight_o + k weight_k] x[c K + k] + u[bias + o bias_o] + add[c O + o]` for c < count,
    `out[c O + o]` is `act(s)`, or for a binary `act` (DTANH, DSIGMOID) `act(s, aux[c O + o])`.

    Attributes:
        bias: position in the uniforms, -1 for none.
        act: a unary `Micro`, COPY for none; or DTANH or DSIGMOID.
        x: operand of `count * K` lane rows.
        out: first of `count * O` consecutive rows.
        add: operand of `count * O` lane rows, or None.
        aux: second operand of `act`, `count * O` lane rows, or None.
    """

    opcode: ClassVar[int] = 2
    count: int
    O: int  # noqa: E741
    K: int
    weight: int
    weight_o: int
    weight_k: int
    bias: int
    bias_o: int
    act: Micro
    x: Operand
    out: Rows
    add: Operand | None = None
    aux: Operand | None = None

    def fields(self, maps: array) -> list[int]:
        """`count, O, K, weight, weight_o, weight_k, bias, bias_o, act, x (3), out space, out row, add (3), aux (3)`."""
        return [
            self.count, self.O, self.K, self.weight, self.weight_o, self.weight_k, self.bias, self.bias_o,
            int(self.act), *self.x.words(maps), int(self.out.space), self.out.row,
            *(ABSENT if self.add is None else self.add.words(maps)),
            *(ABSENT if self.aux is None else self.aux.words(maps)),
        ]  # fmt: skip


@dataclass(frozen=True)
class WeightGradient:
    """Outer products summed over lanes, stages and steps: `acc[acc + o acc_o + k acc_k] += sum_c g[c O + o] x[c K + k]`."""

    opcode: ClassVar[int] = 3
    count: int
    O: int  # noqa: E741
    K: int
    acc: int
    acc_o: int
    acc_k: int
    g: Operand
    x: Operand

    def fields(self, maps: array) -> list[int]:
        """`count, O, K, acc, acc_o, acc_k, g (3), x (3)`."""
        return [
            self.count, self.O, self.K, self.acc, self.acc_o, self.acc_k, *self.g.words(maps), *self.x.words(maps),
        ]  # fmt: skip


@dataclass(frozen=True)
class RowGradient:
    """Rows summed over lanes, stages and steps: `acc[acc + i] += sum_{j < m} g[i m + j]` for i < n."""

    opcode: ClassVar[int] = 4
    n: int
    m: int
    acc: int
    g: Operand

    def fields(self, maps: array) -> list[int]:
        """`n, m, acc, g (3)`."""
        return [self.n, self.m, self.acc, *self.g.words(maps)]


@dataclass(frozen=True)
class Reduce:
    """Folds m rows into one: `out[i] = fold_j x[i m + j]` for i < n."""

    opcode: ClassVar[int] = 5
    kind: Reduction
    n: int
    m: int
    x: Operand
    out: Rows

    def fields(self, maps: array) -> list[int]:
        """`kind, n, m, x (3), out space, out row`."""
        return [int(self.kind), self.n, self.m, *self.x.words(maps), int(self.out.space), self.out.row]


@dataclass(frozen=True)
class SampleProduct:
    """Products of two matrices of each sample: `out[b, i, j] = sum_k x[b, i, k] z[b, k, j]`, all row-major."""

    opcode: ClassVar[int] = 6
    count: int
    I: int  # noqa: E741
    K: int
    J: int
    x: Operand
    z: Operand
    out: Rows

    def fields(self, maps: array) -> list[int]:
        """`count, I, K, J, x (3), z (3), out space, out row`."""
        return [
            self.count, self.I, self.K, self.J, *self.x.words(maps), *self.z.words(maps), int(self.out.space),
            self.out.row,
        ]  # fmt: skip


Instruction = Pointwise | Gemm | WeightGradient | RowGradient | Reduce | SampleProduct


@dataclass(frozen=True)
class Program:
    """A vector field, its vector-Jacobian product and its parameter gradient, over rows of samples.

    Attributes:
        size: D, numbers of one sample's state.
        num_uniforms: numbers in the uniform space, constants (the last of them) included.
        constants: values of the last `len(constants)` uniforms.
        num_accumulators: numbers that the gradient program adds to.
        num_rowdata: numbers of a sample's own data.
        rows_saved: rows of SAVED, t and y included.
        rows_forward, rows_backward: rows of SCRATCH in either program.
        rows_cotangent: rows of COTANGENT, the incoming cotangent included.
        forward: reads t, y; leaves dy/dt in `out` (D rows).
        backward: reads SAVED and the cotangent; leaves the cotangent of y in `grad_y` (D rows), and where they are
            wanted that of t in `grad_t` (1 row) and that of the sample's data in `grad_rowdata` (num_rowdata rows).
        gradient: WeightGradient and RowGradient alone; reads SAVED and COTANGENT (and ROWDATA), so that it can run
            once over all stages of a step.
    """

    size: int
    num_uniforms: int
    constants: tuple[float, ...]
    num_accumulators: int
    num_rowdata: int
    rows_saved: int
    rows_forward: int
    rows_backward: int
    rows_cotangent: int
    out: Rows
    grad_y: Rows | None
    grad_t: Rows | None
    grad_rowdata: Rows | None
    forward: tuple[Instruction, ...]
    backward: tuple[Instruction, ...] = ()
    gradient: tuple[Instruction, ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)

    def pack(self) -> tuple[array, array]:
        """Flatten to integers.

        Returns:
            `words` (32-bit): the header of `HEADER` integers, then the three programs; every instruction is
            `opcode, number of words in all, fields`. `maps` (32-bit): the row maps that operands point into.
        """
        maps = array("i")
        sections = [_flatten(part, maps) for part in (self.forward, self.backward, self.gradient)]
        places = []
        for rows in (self.out, self.grad_y, self.grad_t, self.grad_rowdata):
            places += [-1, -1] if rows is None else [int(rows.space), rows.row]
        header = array(
            "i",
            [
                MAGIC, VERSION, self.size, self.num_uniforms, self.num_accumulators, self.num_rowdata, self.rows_saved,
                self.rows_forward, self.rows_backward, self.rows_cotangent, *places, *map(len, sections),
                len(self.constants),
            ],
        )  # fmt: skip
        assert len(header) == HEADER
        return sum(sections, header), maps


HEADER = 22


def _flatten(instructions: tuple[Instruction, ...], maps: array) -> array:
    words = array("i")
    for instruction in instructions:
        fields = instruction.fields(maps)
        words.extend([instruction.opcode, len(fields) + 2, *fields])
    return words
