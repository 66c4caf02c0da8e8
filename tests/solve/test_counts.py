"""Exact counts: evaluations of f, accepted and rejected steps, never by formula."""

from __future__ import annotations

import pytest
import torch

import neurode
from neurode.methods import METHODS


class Counted:
    def __init__(self, f):
        self.f, self.calls = f, 0

    def __call__(self, t, y, *args):
        self.calls += 1
        return self.f(t, y, *args)


STAGES = {"euler": 1, "midpoint": 2, "heun": 2, "ralston": 2, "heun3": 3, "ssprk3": 3, "rk4": 4, "rk4_38": 4}


@pytest.mark.parametrize(("method", "stages"), STAGES.items())
@pytest.mark.parametrize("batch_dim", [None, 0])
def test_fixed_grids(method, stages, batch_dim):
    f = Counted(lambda t, y: -y)
    sol = neurode.solve(f, torch.ones(3, 2), (0, 1), method=method, steps=20, batch_dim=batch_dim)
    assert f.calls == sol.stats.num_calls == 20 * stages
    if batch_dim is None:
        assert (sol.stats.num_evaluations, sol.stats.num_accepted, sol.stats.num_rejected) == (20 * stages, 20, 0)
    else:
        assert sol.stats.num_evaluations.tolist() == [20 * stages] * 3 and sol.stats.num_accepted.tolist() == [20] * 3
    assert sol.stats.nfe is sol.stats.num_evaluations


@pytest.mark.parametrize(
    "outputs", [dict(), dict(t_eval=torch.linspace(0, 5, 40)), dict(dense=True), dict(t_eval="steps")]
)
@pytest.mark.parametrize("batch_dim", [None, 0])
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.adaptive])
def test_adaptive_counts_are_the_calls(method, batch_dim, outputs):
    f = Counted(lambda t, y: torch.cos(3 * t) - y)
    sol = neurode.solve(
        f, torch.ones(4, 1), (0, 5), method=method, rtol=1e-3, atol=1e-4, batch_dim=batch_dim, **outputs
    )
    assert sol.stats.num_calls == f.calls
    if batch_dim is None:
        assert sol.stats.num_evaluations == f.calls


@pytest.mark.parametrize("method", ["bosh3", "dopri5", "tsit5"])
def test_fsal_saves_the_first_stage(method):
    """Two evaluations choose the first step; every attempt, accepted or not, costs the stages behind the first."""
    tableau = METHODS[method]
    sol = neurode.solve(lambda t, y: -30 * y, torch.ones(1), (0, 1), method=method, rtol=1e-5, first_step=0.5)
    attempts = sol.stats.num_accepted + sol.stats.num_rejected
    assert sol.stats.num_rejected > 0
    assert sol.stats.num_evaluations == 1 + attempts * (tableau.num_stages - 1)
    free = neurode.solve(lambda t, y: -30 * y, torch.ones(1), (0, 1), method=method, rtol=1e-5)
    attempts = free.stats.num_accepted + free.stats.num_rejected
    assert free.stats.num_evaluations == 2 + attempts * (tableau.num_stages - 1)


def test_dense_output_of_an_extended_tableau_costs_its_stages():
    f = lambda t, y: -y
    plain = neurode.solve(f, torch.ones(1), (0, 3), method="dop853", rtol=1e-8)
    dense = neurode.solve(f, torch.ones(1), (0, 3), method="dop853", rtol=1e-8, dense=True)
    extra = len(METHODS["dop853"].extra_A)
    assert dense.stats.num_evaluations == plain.stats.num_evaluations + extra * plain.stats.num_accepted
    one = neurode.solve(f, torch.ones(1), (0, 3), method="dop853", rtol=1e-8, t_eval=[1.5])
    assert one.stats.num_evaluations == plain.stats.num_evaluations + extra  # only the step that holds the output


def test_rows_pay_for_their_own_steps():
    """A stiff row and an easy row: counts are each row's own, and the calls those of the longest."""
    rate = torch.tensor([[1.0], [200.0]])
    options = dict(method="dopri5", rtol=1e-6, atol=1e-8)
    sol = neurode.solve(
        lambda t, y, k: -k * y, torch.ones(2, 1), (0, 5), args=(neurode.per_row(rate),), batch_dim=0, **options
    )
    for row in (0, 1):
        alone = neurode.solve(lambda t, y: -rate[row] * y, torch.ones(1), (0, 5), **options)  # noqa: B023
        assert int(sol.stats.num_accepted[row]) == alone.stats.num_accepted
        assert int(sol.stats.num_rejected[row]) == alone.stats.num_rejected
        assert int(sol.stats.num_evaluations[row]) == alone.stats.num_evaluations
    assert sol.stats.num_accepted[1] > 5 * sol.stats.num_accepted[0]


def test_the_study_s_evaluations():
    """Euler x 20 is 20 evaluations a solve and RK4 x 20 is 80: 4,000 updates make 80,000 and 320,000."""
    layer = neurode.nn.NeuralODE(neurode.nn.MLP(6, (128, 128)), method="euler", steps=20)
    deep = layer.with_solver(method="rk4", steps=20)
    y = torch.ones(4, 6)
    total = [0, 0]
    for _ in range(3):
        layer(y), deep(y)
        total = [total[0] + layer.last_stats.num_calls, total[1] + deep.last_stats.num_calls]
    assert total == [3 * 80_000 // 4000, 3 * 320_000 // 4000]


def test_the_choice_of_a_method_is_said():
    sol = neurode.solve(lambda t, y: -y, torch.ones(1), (0, 1))
    assert "chosen" in sol.stats.method and "rtol" in sol.stats.method
    for rtol, name in ((1e-3, "tsit5"), (1e-7, "tsit5"), (1e-9, "dop853"), (torch.tensor([1e-3, 1e-9]), "dop853")):
        y0 = torch.ones(2)
        assert neurode.solve(lambda t, y: -y, y0, (0, 1), rtol=rtol).stats.method.startswith(name)
    assert neurode.solve(lambda t, y: -y, torch.ones(1), (0, 1), rtol=0.0).stats.method.startswith("tsit5")
    assert "rk4" in neurode.solve(lambda t, y: -y, torch.ones(1), (0, 1), steps=3).stats.method
