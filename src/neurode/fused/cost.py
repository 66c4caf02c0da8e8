"""What a program costs on a processor: whether the fused engine is the better place for it.

A tile is some samples side by side, at least one vector of them. While its live rows stay in the second-level cache the
interpreter runs near the processor's peak; beyond it every instruction waits for memory, and PyTorch's operations, which
see the whole batch at once, are as fast or faster (`benchmarks/cost_model.py`, table in docs/fused.md).
"""

from __future__ import annotations

from neurode.fused.program import Gemm, Program, SampleProduct

LANES_BYTES = 64  # one vector of the widest instruction set: the narrowest tile
LARGEST_TILE = 3 << 19  # bytes of live rows of one tile; second-level caches of today's processors hold 1-2 MB

LARGEST_SAMPLE = 4096  # numbers of a state that is one sample: beyond it lowering takes seconds, and PyTorch is as fast


def tile_bytes(program: Program, stages: int) -> int:
    """Bytes of the narrowest tile: the rows alive in one step of a method with `stages` stages."""
    rows = program.rows_saved + max(program.rows_forward, program.rows_backward) + program.rows_cotangent
    return (rows + program.size * (stages + 3)) * LANES_BYTES


def too_large(program: Program, stages: int) -> str:
    """Why PyTorch serves a program better; empty where it does not."""
    size = tile_bytes(program, stages)
    if size <= LARGEST_TILE:
        return ""
    return f"the live rows of one tile are {size >> 10:,} KB, more than the {LARGEST_TILE >> 10:,} KB of a second-level cache"


def flops(program: Program) -> int:
    """Multiplications and additions in matrix products of one evaluation for one sample."""
    total = 0
    for i in program.forward:
        if isinstance(i, Gemm):
            total += 2 * i.count * i.O * i.K
        elif isinstance(i, SampleProduct):
            total += 2 * i.count * i.I * i.K * i.J
    return total
