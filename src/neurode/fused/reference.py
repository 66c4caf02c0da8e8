"""A slow interpreter of tile programs in plain PyTorch, one line an instruction: what the native one is tested against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neurode.fused.program import (
    ROW_MASK,
    SPACE_SHIFT,
    Gemm,
    Instruction,
    Micro,
    Operand,
    Pointwise,
    Program,
    Reduce,
    Reduction,
    RowGradient,
    RowMap,
    Rows,
    SampleProduct,
    Space,
    WeightGradient,
)

truth = lambda x: x != 0

MICRO: dict[Micro, Any] = {
    Micro.COPY: lambda a: a, Micro.ADD: torch.add, Micro.SUB: torch.sub, Micro.MUL: torch.mul, Micro.DIV: torch.div,
    Micro.MAX: torch.maximum, Micro.MIN: torch.minimum, Micro.POW: torch.pow, Micro.ATAN2: torch.atan2,
    Micro.FMA: lambda a, b, c: a * b + c, Micro.FNMA: lambda a, b, c: c - a * b, Micro.NEG: torch.neg,
    Micro.ABS: torch.abs, Micro.SQRT: torch.sqrt, Micro.RSQRT: torch.rsqrt, Micro.RECIPROCAL: torch.reciprocal,
    Micro.EXP: torch.exp, Micro.EXPM1: torch.expm1, Micro.LOG: torch.log, Micro.LOG1P: torch.log1p,
    Micro.TANH: torch.tanh, Micro.SIGMOID: torch.sigmoid, Micro.SIN: torch.sin, Micro.COS: torch.cos,
    Micro.SOFTPLUS: lambda a: torch.logaddexp(a, torch.zeros_like(a)), Micro.TAN: torch.tan, Micro.ERF: torch.erf,
    Micro.ATAN: torch.atan, Micro.SINH: torch.sinh, Micro.COSH: torch.cosh, Micro.RELU: torch.relu,
    Micro.SILU: torch.nn.functional.silu, Micro.GELU: torch.nn.functional.gelu, Micro.SIGN: torch.sign,
    Micro.FLOOR: torch.floor, Micro.CEIL: torch.ceil, Micro.TRUNC: torch.trunc, Micro.ROUND: torch.round,
    Micro.LOG2: torch.log2, Micro.EXP2: torch.exp2, Micro.LT: torch.lt, Micro.LE: torch.le, Micro.GT: torch.gt,
    Micro.GE: torch.ge, Micro.EQ: torch.eq, Micro.NE: torch.ne, Micro.AND: torch.logical_and,
    Micro.OR: torch.logical_or, Micro.NOT: torch.logical_not,
    Micro.WHERE: lambda a, b, c: torch.where(truth(a), b, c), Micro.DTANH: lambda a, b: a * (1 - b * b),
    Micro.DSIGMOID: lambda a, b: a * b * (1 - b), Micro.DRELU: lambda a, b, c: torch.where(b <= c, torch.zeros_like(a), a),
    Micro.MOD: torch.remainder,
}  # fmt: skip


class Reference:
    """Runs a program on T samples.

    Args:
        program: the tile program.
        uniforms: its uniform numbers, constants included.
    """

    def __init__(self, program: Program, uniforms: Tensor) -> None:
        self.program, self.uniforms = program, uniforms

    def forward(self, t: Tensor, y: Tensor, data: Tensor | None = None) -> tuple[Tensor, dict[Space, Tensor]]:
        """`dy/dt` of samples `y` (T, D) at times `t` (T,), and the workspace that `backward` needs."""
        program, lanes = self.program, len(y)
        make = lambda n: torch.full((n, lanes), float("nan"), dtype=y.dtype)
        spaces = {
            Space.UNIFORM: self.uniforms.unsqueeze(1).expand(-1, lanes),
            Space.SAVED: make(program.rows_saved),
            Space.SCRATCH: make(program.rows_forward),
            Space.ROWDATA: make(0) if data is None else data.t().contiguous(),
        }
        spaces[Space.SAVED][0] = t
        spaces[Space.SAVED][1 : 1 + program.size] = y.t()
        for instruction in program.forward:
            execute(instruction, spaces, self.uniforms)
        return read(program.out, spaces, program.size).t().clone(), spaces

    def backward(self, spaces: dict[Space, Tensor], g: Tensor) -> dict[str, Tensor]:
        """Cotangents of y, t and the samples' data, and the accumulators, for cotangents `g` (T, D)."""
        program = self.program
        make = lambda n: torch.full((n, len(g)), float("nan"), dtype=g.dtype)
        spaces = {**spaces, Space.SCRATCH: make(program.rows_backward), Space.COTANGENT: make(program.rows_cotangent)}
        spaces[Space.COTANGENT][: program.size] = g.t()
        for instruction in program.backward:
            execute(instruction, spaces, self.uniforms)
        accumulators = torch.zeros(program.num_accumulators, dtype=g.dtype)
        for instruction in program.gradient:
            accumulate(instruction, spaces, accumulators)
        wanted = {"y": (program.grad_y, program.size), "t": (program.grad_t, 1)}
        wanted["data"] = (program.grad_rowdata, program.num_rowdata)
        made = {name: read(rows, spaces, n).t().clone() for name, (rows, n) in wanted.items() if rows is not None}
        return {**made, "accumulators": accumulators}


def read(operand: Operand, spaces: dict[Space, Tensor], n: int) -> Tensor:
    """The n rows of an operand, `(n, lanes)`."""
    if isinstance(operand, Rows):
        rows = torch.arange(n) * operand.stride + operand.row
        return spaces[operand.space][rows]
    assert isinstance(operand, RowMap)
    return torch.stack([spaces[Space(ref >> SPACE_SHIFT)][ref & ROW_MASK] for ref in operand.rows])


def write(out: Rows, spaces: dict[Space, Tensor], value: Tensor) -> None:
    """Store consecutive rows."""
    spaces[out.space][out.row : out.row + len(value)] = value.to(spaces[out.space].dtype)


def execute(i: Instruction, spaces: dict[Space, Tensor], uniforms: Tensor) -> None:
    """One instruction of the forward or backward section."""
    if isinstance(i, Pointwise):
        registers = [read(x, spaces, i.n) for x in i.inputs]
        for step in i.steps:
            args = [registers[r] for r in (step.a, step.b, step.c) if r >= 0]
            registers.append(MICRO[step.micro](*args).to(uniforms.dtype))
        for register, out in i.outputs:
            write(out, spaces, registers[register])
    elif isinstance(i, Gemm):
        _gemm(i, spaces, uniforms)
    elif isinstance(i, Reduce):
        x = read(i.x, spaces, i.n * i.m).reshape(i.n, i.m, -1)
        folds = {
            Reduction.SUM: torch.sum,
            Reduction.MAX: torch.amax,
            Reduction.MIN: torch.amin,
            Reduction.PROD: torch.prod,
        }
        write(i.out, spaces, folds[i.kind](x, 1))
    else:
        assert isinstance(i, SampleProduct)
        x = read(i.x, spaces, i.count * i.I * i.K).reshape(i.count, i.I, i.K, -1)
        z = read(i.z, spaces, i.count * i.K * i.J).reshape(i.count, i.K, i.J, -1)
        write(i.out, spaces, torch.einsum("bikt,bkjt->bijt", x, z).reshape(i.count * i.I * i.J, -1))


def _gemm(i: Gemm, spaces: dict[Space, Tensor], uniforms: Tensor) -> None:
    o, k = torch.arange(i.O).unsqueeze(1), torch.arange(i.K)
    weight = uniforms[i.weight + o * i.weight_o + k * i.weight_k]
    x = read(i.x, spaces, i.count * i.K).reshape(i.count, i.K, -1)
    made = torch.einsum("ok,ckt->cot", weight, x)
    if i.bias >= 0:
        made = made + uniforms[i.bias + o * i.bias_o]
    made = made.reshape(i.count * i.O, -1)
    if i.add is not None:
        made = made + read(i.add, spaces, len(made))
    args = (made,) if i.aux is None else (made, read(i.aux, spaces, len(made)))
    write(i.out, spaces, MICRO[i.act](*args))


def accumulate(i: Instruction, spaces: dict[Space, Tensor], accumulators: Tensor) -> None:
    """One instruction of the gradient section."""
    if isinstance(i, WeightGradient):
        g = read(i.g, spaces, i.count * i.O).reshape(i.count, i.O, -1)
        x = read(i.x, spaces, i.count * i.K).reshape(i.count, i.K, -1)
        where = i.acc + torch.arange(i.O).unsqueeze(1) * i.acc_o + torch.arange(i.K) * i.acc_k
        accumulators[where] += torch.einsum("cot,ckt->ok", g, x)
    else:
        assert isinstance(i, RowGradient)
        g = read(i.g, spaces, i.n * i.m).reshape(i.n, -1)
        accumulators[i.acc : i.acc + i.n] += g.sum(1)
