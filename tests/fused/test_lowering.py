"""The reference interpreter of lowered programs against PyTorch: dy/dt, and the gradients of y, t and all parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fields import FIELDS, Case
from torch import Tensor

from neurode._field import Field
from neurode._state import read_state
from neurode.fused.build import FieldProgram, build
from neurode.fused.capture import CannotLower
from neurode.fused.reference import Reference

ROWS = 5
CNF = {"cnf_hypernet", "cnf_exact_trace"}


def prepare(name: str, batch_dim: int | None, dtype: torch.dtype) -> tuple[Field, Tensor]:
    """The field on the inner state, and an inner state."""
    torch.manual_seed(3)
    case = FIELDS[name]
    f = case.make()
    convert(f, dtype)
    y: Any = torch.randn(ROWS, *case.shape, dtype=dtype)
    if name in CNF:
        y = (y, torch.randn(ROWS, 1, dtype=dtype))
    layout, state = read_state(y, batch_dim)
    return Field(f, layout), state


def convert(f: Any, dtype: torch.dtype) -> None:
    """Give every parameter that a field reaches the dtype, and values that are not special."""
    seen = [f] if isinstance(f, torch.nn.Module) else [c.cell_contents for c in f.__closure__ or ()]
    for x in seen:
        if isinstance(x, torch.nn.Module):
            x.to(dtype)
        elif isinstance(x, torch.nn.Parameter):
            x.data = x.data.to(dtype)


def check(made: FieldProgram, field: Field, y: Tensor, tolerance: float) -> None:
    """Compare with PyTorch on values that the program was not recorded with."""
    torch.manual_seed(11)
    lanes = ROWS if made.split else 1
    y = torch.randn_like(y)
    t = torch.rand(ROWS, dtype=y.dtype) if field.layout.batched else torch.rand((), dtype=y.dtype)
    t.requires_grad_()
    wide = y.clone().requires_grad_()
    parameters = [made.outside[i] for i in made.wanted]
    dy = field(t, wide)
    g = torch.randn_like(dy)
    expected = torch.autograd.grad(dy, [wide, t, *parameters], g, allow_unused=True)
    machine = Reference(made.program, made.before(made.outside))
    k, spaces = machine.forward(t.detach().expand(lanes), y.reshape(lanes, -1))
    back = machine.backward(spaces, g.reshape(lanes, -1))
    close(k, dy.reshape(lanes, -1), tolerance)
    close(back.get("y"), expected[0], tolerance)
    close(back["t"].sum() if "t" in back and not t.ndim else back.get("t"), expected[1], tolerance)
    for mine, theirs in zip(made.after(back["accumulators"], made.outside), expected[2:], strict=True):
        close(mine, theirs, tolerance)


def close(mine: Tensor | None, theirs: Tensor | None, tolerance: float) -> None:
    if mine is None or theirs is None:
        other = mine if theirs is None else theirs
        assert other is None or not bool(other.any())
        return
    scale = theirs.detach().abs().max().clamp_min(1e-3)
    assert float((mine.reshape(theirs.shape) - theirs).detach().abs().max() / scale) < tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("name", [n for n, c in FIELDS.items() if c.rows])
def test_rows_agree_with_pytorch(name: str, dtype: torch.dtype) -> None:
    field, y = prepare(name, 0, dtype)
    check(build(field, y, split=True, gradients=True), field, y, 1e-12 if dtype is torch.float64 else 2e-5)


@pytest.mark.parametrize("name", [n for n, c in FIELDS.items() if c.rows or c.joint])
def test_a_state_with_one_step_agrees_with_pytorch(name: str) -> None:
    field, y = prepare(name, None, torch.float64)
    split = y.ndim > 1 and FIELDS[name].rows
    check(build(field, y, split=split, gradients=True), field, y, 1e-12)
    if split:
        check(build(field, y, split=False, gradients=True), field, y, 1e-12)


def test_a_continuous_flow_with_one_time_for_all_rows_splits_into_rows() -> None:
    field, y = prepare("cnf_hypernet", None, torch.float64)
    made = build(field, y, split=True, gradients=True)
    assert made.split and made.program.size == 3


def refused(case: Case, name: str, batch_dim: int | None, split: bool) -> str:
    field, y = prepare(name, batch_dim, torch.float64)
    with pytest.raises(CannotLower) as info:
        build(field, y, split=split, gradients=True)
    return str(info.value)


@pytest.mark.parametrize("name", [n for n, c in FIELDS.items() if not c.rows])
def test_what_must_not_be_lowered_is_refused(name: str) -> None:
    case = FIELDS[name]
    assert refused(case, name, 0, True)
    if not case.joint:
        assert refused(case, name, None, False)


def test_at_least_four_fifths_of_forty_fields_are_lowered() -> None:
    lowered = [name for name, case in FIELDS.items() if case.rows]
    assert len(FIELDS) >= 40 and len(lowered) / len(FIELDS) >= 0.8
