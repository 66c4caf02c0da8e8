"""What the fused engine makes of a vector field, in words: its program and its cost, or why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neurode._field import Field
from neurode._state import read_state
from neurode.fused import cost, guards, native
from neurode.fused.build import build
from neurode.fused.capture import row_layout
from neurode.fused.program import (
    Gemm,
    Instruction,
    Operand,
    Pointwise,
    Program,
    Reduce,
    RowGradient,
    RowMap,
    Rows,
    SampleProduct,
    WeightGradient,
)
from neurode.fused.programs import undone
from neurode.fused.refusal import CannotLower

STAGES = 7  # of a method, for the size of a tile: dopri5's


@dataclass(frozen=True)
class Explanation:
    """The result of `neurode.explain`; printing it shows everything.

    Attributes:
        engine: `"fused"` where the field can be lowered and the native library is there, else `"eager"`.
        reason: why.
        program: the tile program, or None.
        form: how the state lies in lanes.
        flops: multiplications and additions of one evaluation of f for one sample, and of its vector-Jacobian product
            with parameter gradients.
        bytes_kept: bytes of one sample that a stage keeps for the way back.
    """

    engine: str
    reason: str
    program: Program | None = None
    form: str = ""
    flops: tuple[int, int] = (0, 0)
    bytes_kept: int = 0

    def __str__(self) -> str:
        if self.program is None:
            return f"engine: {self.engine}\nwhy: {self.reason}"
        lines = [
            f"engine: {self.engine}",
            f"why: {self.reason}",
            f"lanes: {self.form}",
            f"one evaluation: {self.flops[0]:,} flops a sample; backward: {self.flops[1]:,}",
            f"kept for the way back: {self.bytes_kept:,} bytes a sample and stage",
            f"uniform numbers (weights): {self.program.num_uniforms:,}",
        ]
        for name in ("forward", "backward", "gradient"):
            lines.append(f"{name}:")
            lines += [f"  {describe(i)}" for i in getattr(self.program, name)]
        return "\n".join(lines)


def explain(f: Any, y0: Any, *, args: tuple[Any, ...] = (), batch_dim: int | None = None) -> Explanation:
    """What `neurode.explain` says of a field, whatever `auto` waits for before it captures one."""
    layout, y = read_state(y0, batch_dim)
    field = Field(f, layout, args)
    reason = guards.unusual_surroundings()
    if reason:
        return Explanation("eager", reason)
    try:
        with undone(field):
            made, form = _lower(field, y)
    except CannotLower as error:
        return Explanation("eager", str(error))
    program = made.program
    lack = native.lack() or cost.too_large(program, STAGES)
    reason = lack or "every operation is in the instruction set"
    forward = sum(map(flops, program.forward))
    backward = sum(map(flops, (*program.backward, *program.gradient)))
    kept = program.rows_saved * y.element_size()
    return Explanation("eager" if lack else "fused", reason, program, form, (forward, backward), kept)


def _lower(field: Field, y: Tensor) -> tuple[Any, str]:
    if field.layout.batched:
        return build(field, y, True, torch.is_grad_enabled()), "each row its own"
    if row_layout(field.layout) is not None:
        try:
            return build(field, y, True, torch.is_grad_enabled()), "rows, which share one step"
        except CannotLower:
            pass
    return build(field, y, False, torch.is_grad_enabled()), "one sample, all its elements as features"


def flops(i: Instruction) -> int:
    """Multiplications and additions of one instruction for one sample; a function counts as one."""
    if isinstance(i, Gemm | WeightGradient):
        return 2 * i.count * i.O * i.K
    if isinstance(i, SampleProduct):
        return 2 * i.count * i.I * i.K * i.J
    if isinstance(i, Pointwise):
        return i.n * len(i.steps)
    return i.n * i.m


def describe(i: Instruction) -> str:
    """One instruction on one line."""
    if isinstance(i, Gemm):
        act = "" if i.act.name == "COPY" else f", then {i.act.name.lower()}"
        extra = (", bias" if i.bias >= 0 else "") + (", added rows" if i.add is not None else "")
        return f"product {i.O} x {i.K}{f', {i.count} times' if i.count > 1 else ''}{extra}{act}: {show(i.x)} -> {show(i.out)}"
    if isinstance(i, Pointwise):
        steps = " ".join(s.micro.name.lower() for s in i.steps)
        return f"pointwise on {i.n} rows: {steps}: {', '.join(map(show, i.inputs))} -> {show(i.outputs[0][1])}"
    if isinstance(i, Reduce):
        return f"{i.kind.name.lower()} of {i.m} rows, {i.n} times: {show(i.x)} -> {show(i.out)}"
    if isinstance(i, SampleProduct):
        return f"sample product {i.I} x {i.K} x {i.J}, {i.count} times: {show(i.x)}, {show(i.z)} -> {show(i.out)}"
    if isinstance(i, WeightGradient):
        return f"weight gradient {i.O} x {i.K}: {show(i.g)}, {show(i.x)} -> accumulators from {i.acc}"
    assert isinstance(i, RowGradient)
    return f"row gradient of {i.n}: {show(i.g)} -> accumulators from {i.acc}"


def show(x: Operand) -> str:
    """An operand in brief."""
    if isinstance(x, RowMap):
        return f"map of {len(x.rows)}"
    assert isinstance(x, Rows)
    every = "" if x.stride == 1 else " repeated" if x.stride == 0 else f" every {x.stride}"
    return f"{x.space.name.lower()}[{x.row}{every}]"
