"""Instructions on virtual rows, before anything is decided about where rows live.

While a graph is lowered, a tensor is the integer tensor of the *ids* of its elements: `sample << 40 | row`, where `row` is a
virtual row (or a uniform number) and `sample` says whose (0: the same for all samples, then 1, 2, ...). A view of a
tensor is then that view of its ids, and copies nothing; that rows do not depend on each other can be read off.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from neurode.fused.program import Micro

SAMPLE_SHIFT = 40
ROW = (1 << SAMPLE_SHIFT) - 1
MOST_IN_PYTHON = 2048  # numbers up to which a dict is faster than sorting


@dataclass(eq=False)
class Buffer:
    """A range of virtual rows with one producer.

    Attributes:
        start, n: the range.
        kind: `"t"`, `"y"`, `"g"`, `"data"`, `"uniform"` or `"value"`.
        source: for uniforms the graph node (or baked tensor) whose numbers they are.
    """

    start: int
    n: int
    kind: str
    source: Any = None


@dataclass(eq=False)
class Virtual:
    """One instruction on virtual rows.

    Attributes:
        kind: `"pointwise"`, `"gemm"`, `"reduce"`, `"product"`, `"wgrad"` or `"rgrad"`.
        operands: references of the operands, in order.
        out: the buffer written, or None for a gradient.
        late: whether it depends on the cotangent.
        attrs: the rest.
    """

    kind: str
    operands: list[Tensor]
    out: Any
    late: bool
    attrs: dict[str, Any] = field(default_factory=dict)


class Rowbook:
    """Hands out virtual rows and keeps the instructions that fill them."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.instructions: list[Virtual] = []
        self.constants: dict[float, int] = {}
        self.num_rows = 0
        self.late = False  # whether what is emitted now depends on the cotangent
        self._uniform = torch.zeros(1024, dtype=torch.bool)

    @property
    def uniform(self) -> Tensor:
        """For every row so far, whether it holds a uniform number or a constant."""
        return self._uniform[: self.num_rows]

    def buffer(self, n: int, kind: str, source: Any = None) -> Buffer:
        """A new range of n rows."""
        made = Buffer(self.num_rows, n, kind, source)
        self.num_rows += n
        self.buffers.append(made)
        if self.num_rows > len(self._uniform):
            self._uniform = torch.cat([self._uniform, torch.zeros(self.num_rows, dtype=torch.bool)])
        if kind in ("uniform", "constant"):
            self._uniform[made.start : self.num_rows] = True
        return made

    def constant(self, value: float) -> int:
        """The uniform number that always is `value`."""
        key = value if value == value else float("nan")
        for known, row in self.constants.items():
            if (known == key and _signed(known) == _signed(key)) or (known != known and key != key):
                return row
        row = self.buffer(1, "constant", value).start
        self.constants[key] = row
        return row

    def emit(self, kind: str, operands: list[Tensor], n: int, **attrs: Any) -> Buffer:
        """Append an instruction that writes n new rows."""
        out = self.buffer(n, "value")
        self.instructions.append(Virtual(kind, operands, out, self.late, attrs))
        return out


def _signed(x: float) -> bool:
    return str(x).startswith("-")


def rows_of(ids: Tensor) -> Tensor:
    """Virtual rows of ids."""
    return ids & ROW


def samples_of(ids: Tensor) -> Tensor:
    """Samples of ids, 0 for what all share."""
    return ids >> SAMPLE_SHIFT


def first_unique(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct rows of a 2-D tensor in the order of their first appearance.

    Returns:
        Positions of the first appearances, and for every row the number of its distinct value.
    """
    if keys.numel() > MOST_IN_PYTHON:
        return _first_unique_large(keys)
    seen: dict[Any, int] = {}
    first: list[int] = []
    rank: list[int] = []
    for i, key in enumerate(map(tuple, keys.tolist())):
        number = seen.setdefault(key, len(first))
        if number == len(first):
            first.append(i)
        rank.append(number)
    return torch.tensor(first, dtype=torch.int64), torch.tensor(rank, dtype=torch.int64)


def _first_unique_large(keys: Tensor) -> tuple[Tensor, Tensor]:
    if len(torch.unique(keys[:, 0])) == len(keys):  # as the rows of a weight
        return torch.arange(len(keys)), torch.arange(len(keys))
    _, inverse = torch.unique(keys, dim=0, return_inverse=True)
    count = int(inverse.max()) + 1
    first = torch.full((count,), len(inverse), dtype=torch.int64)
    first.scatter_reduce_(0, inverse, torch.arange(len(inverse)), "amin")
    order = torch.argsort(first)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(count)
    return first[order], rank[inverse]


UNARY = {
    "neg": Micro.NEG, "abs": Micro.ABS, "sqrt": Micro.SQRT, "rsqrt": Micro.RSQRT, "reciprocal": Micro.RECIPROCAL,
    "exp": Micro.EXP, "expm1": Micro.EXPM1, "log": Micro.LOG, "log1p": Micro.LOG1P, "tanh": Micro.TANH,
    "sigmoid": Micro.SIGMOID, "sin": Micro.SIN, "cos": Micro.COS, "tan": Micro.TAN, "erf": Micro.ERF,
    "atan": Micro.ATAN, "sinh": Micro.SINH, "cosh": Micro.COSH, "relu": Micro.RELU, "sign": Micro.SIGN,
    "sgn": Micro.SIGN, "floor": Micro.FLOOR, "ceil": Micro.CEIL, "trunc": Micro.TRUNC, "round": Micro.ROUND,
    "log2": Micro.LOG2, "exp2": Micro.EXP2, "logical_not": Micro.NOT, "bitwise_not": Micro.NOT,
}  # fmt: skip
BINARY = {
    "add": Micro.ADD, "sub": Micro.SUB, "mul": Micro.MUL, "div": Micro.DIV, "maximum": Micro.MAX,
    "minimum": Micro.MIN, "pow": Micro.POW, "atan2": Micro.ATAN2, "lt": Micro.LT, "le": Micro.LE, "gt": Micro.GT,
    "ge": Micro.GE, "eq": Micro.EQ, "ne": Micro.NE, "logical_and": Micro.AND, "logical_or": Micro.OR,
    "bitwise_and": Micro.AND, "bitwise_or": Micro.OR, "logical_xor": Micro.NE, "bitwise_xor": Micro.NE,
    "remainder": Micro.MOD, "tanh_backward": Micro.DTANH, "sigmoid_backward": Micro.DSIGMOID,
    "fmax": Micro.MAX, "fmin": Micro.MIN,
}  # fmt: skip
