"""Every field that lowers, on the native interpreter, against the slow reference: f, and all products with its Jacobian."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "fused"))
from fields import FIELDS
from test_lowering import prepare

from neurode.fused.build import build
from neurode.fused.capture import CannotLower
from neurode.fused.native import Machine, library, pointer
from neurode.fused.program import Program
from neurode.fused.reference import Reference

DTYPES = {"float32": (torch.float32, 1e-5), "float64": (torch.float64, 1e-12)}
ROWS = (37, 3)  # not a multiple of any tile; so few that features lie in the lanes


def close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    """Equal, relative to the largest element."""
    assert (got - wanted.reshape(got.shape)).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FIELDS)
def test_field(name: str, dtype: str) -> None:
    kind, tolerance = DTYPES[dtype]
    try:
        field, state = prepare(name, 0, kind)
        made = build(field, state, split=True, gradients=True)
    except CannotLower:
        pytest.skip("does not lower")
    program, uniforms = made.program, made.before(made.outside)
    for rows in ROWS:
        compare(program, uniforms, rows, kind, tolerance)


def compare(program: Program, uniforms: torch.Tensor, rows: int, kind: torch.dtype, tolerance: float) -> None:
    """f and all products with its Jacobian at random rows, times and cotangents."""
    torch.manual_seed(1)
    y, g = torch.randn(2, rows, program.size, dtype=kind)
    t = torch.rand(rows, dtype=kind).to(torch.float64)
    data = torch.randn(rows, program.num_rowdata, dtype=kind)
    reference = Reference(program, uniforms)
    k, spaces = reference.forward(t.to(kind), y, data)
    wanted = reference.backward(spaces, g)
    machine, out = Machine(program, kind is torch.float64), torch.empty_like(y)
    got = {"y": torch.empty_like(y), "t": torch.empty(rows, dtype=kind), "data": torch.empty_like(data)}
    got["accumulators"] = torch.empty(program.num_accumulators, dtype=kind)
    given = [rows, *map(pointer, (t, y, data))]
    library().nd_eval(machine.handle, pointer(uniforms), *given, pointer(out))
    close(out, k, tolerance)
    outputs = [pointer(got[n]) for n in ("y", "t", "data", "accumulators")]
    library().nd_vjp(machine.handle, pointer(uniforms), *given, pointer(g), *outputs)
    for part, expected in wanted.items():
        if expected.numel():
            close(got[part], expected, tolerance)


def test_a_program_of_another_version_is_refused() -> None:
    import ctypes

    words = (ctypes.c_int32 * 22)(0x4E4F4445, 99)
    assert not library().nd_program_new(ctypes.addressof(words), 22, None, 0, 0)
    assert b"version" in library().nd_error()
    assert not library().nd_program_new(ctypes.addressof(words), 5, None, 0, 0)
    assert b"not a tile program" in library().nd_error()
