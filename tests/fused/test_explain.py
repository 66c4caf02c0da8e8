"""`explain` shows the program, or the operation and the line of the user's code that cannot be lowered."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

import neurode
from neurode.fused import native
from neurode.fused.assemble import Assembler
from neurode.fused.explain import explain


def test_a_network_is_shown_with_its_cost() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
    made = explain(lambda t, y: net(y), torch.rand(4, 3), batch_dim=0)
    assert made.program is not None and made.flops[0] == 2 * (3 * 8 + 8 * 3)
    assert made.flops[1] >= 2 * made.flops[0]
    text = str(made)
    assert "product 8 x 3, bias, then tanh" in text and "weight gradient 8 x 3" in text


def test_the_line_that_cannot_be_lowered_is_named() -> None:
    def f(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        order = y.argsort(-1)
        return torch.gather(y, 1, order)

    made = explain(f, torch.rand(4, 3), batch_dim=0)
    assert made.engine == "eager" and made.program is None
    assert "test_explain.py" in made.reason and "argsort" in made.reason


def test_rows_that_are_coupled_are_one_sample_under_one_step() -> None:
    made = explain(lambda t, y: y - y.mean(0), torch.rand(4, 3))
    assert made.program is not None and made.form.startswith("one sample") and made.program.size == 12


def test_what_cannot_be_watched_is_a_reason_too() -> None:
    made = explain(lambda t, y: -y * time.time(), torch.rand(4, 3))
    assert made.engine == "eager" and "module time" in made.reason


@pytest.mark.skipif(not native.available(), reason="the native library is not built (make native)")
def test_a_defect_of_the_lowering_is_named_and_auto_solves_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Assembler) -> None:
        raise KeyError("a row")

    monkeypatch.setattr(Assembler, "program", broken)
    field = Autonomous(nn.Linear(3, 3))
    assert "a defect to report: 'a row' [KeyError]" in explain(field, torch.rand(4, 3)).reason
    solution = neurode.solve(field, torch.ones(2, 3), (0.0, 1.0), method="rk4", steps=2)
    assert solution.stats.engine.startswith("eager") and "a defect to report" in solution.stats.engine


class Autonomous(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.net(y)
