"""Callbacks at steps, and the arguments of `solve` that came with them."""

from __future__ import annotations

import pytest
import torch

import neurode


def oscillator(t, y):
    return {"q": y["p"], "p": -y["q"]}


Y0 = {"q": torch.zeros(2, dtype=torch.float64), "p": torch.ones(2, dtype=torch.float64)}


def test_steps_are_announced_and_judged():
    log = {"step": [], "accept": [], "reject": []}
    watch = neurode.Callbacks(**{name: lambda *call, name=name: log[name].append(call) for name in log})
    sol = neurode.solve(oscillator, Y0, (3, 0), method="dopri5", rtol=1e-8, first_step=2.0, callbacks=watch)
    assert len(log["accept"]) == sol.stats.num_accepted and len(log["reject"]) == sol.stats.num_rejected > 0
    assert len(log["step"]) == len(log["accept"]) + len(log["reject"])
    times = [float(t0) for t0, _, _ in log["accept"]]
    lengths = [float(dt) for _, _, dt in log["accept"]]
    assert times[0] == 3.0 and min(lengths) > 0 and sum(lengths) == pytest.approx(3.0)
    assert set(log["step"][0][1]) == {"q", "p"} and log["step"][0][1]["p"].shape == (2,)


def test_what_a_callback_raises_ends_the_solve():
    def stop(t0, y0, dt):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        neurode.solve(oscillator, Y0, (0, 3), method="rk4", steps=3, callbacks=neurode.Callbacks(step=stop))


def test_refusals():
    with pytest.raises(neurode.InputError, match="Callbacks"):
        neurode.solve(oscillator, Y0, (0, 3), callbacks=print)
    with pytest.raises(neurode.InputError, match="batch_dim"):
        neurode.solve(oscillator, Y0, (0, 3), method="dopri5", batch_dim=0, callbacks=neurode.Callbacks())


def test_a_tolerance_below_the_dtype_on_request():
    y0 = torch.ones(2, dtype=torch.float32)
    with pytest.raises(neurode.InputError, match="dtype"):
        neurode.solve(lambda t, y: -y, y0, (0, 1), method="dopri5", rtol=1e-9)
    sol = neurode.solve(lambda t, y: -y, y0, (0, 1), method="dopri5", rtol=1e-8, atol=1e-7, check_tolerance=False)
    assert sol.success


def test_jumps_on_a_grid_are_seen_from_inside():
    times = []

    def f(t, y):
        times.append(float(t))
        return torch.where(t < 0.5, 1.0, -1.0).to(y) * torch.ones_like(y)

    y0 = torch.zeros(1, dtype=torch.float64)
    sol = neurode.solve(f, y0, (0, 1), method="heun", steps=2, jump_at=[0.5])
    assert float(sol.y1) == 0.0  # exact: each step sees one side
    assert 0.5 not in times
    assert float(neurode.solve(f, y0, (0, 1), method="heun", steps=2).y1) == -0.5


def test_a_grid_carries_gradients():
    grid = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64, requires_grad=True)
    y0 = torch.ones((), dtype=torch.float64)

    def end(grid):
        return neurode.solve(lambda t, y: -y, y0, (grid[0], grid[-1]), method="euler", grid=grid).y1

    assert torch.autograd.gradcheck(end, (grid,))


def test_reusing_the_last_stage_saves_an_evaluation_and_keeps_the_order():
    from dataclasses import replace

    method = replace(neurode.methods.get("adaptive_heun"), reuse_last=True)
    y0 = torch.ones((), dtype=torch.float64)
    errors = []
    for rtol in (1e-4, 1e-6):
        sol = neurode.solve(lambda t, y: -y, y0, (0, 1), method=method, rtol=rtol, atol=rtol)
        assert sol.stats.nfe == 2 + sol.stats.num_accepted + sol.stats.num_rejected
        errors.append(abs(float(sol.y1) - 0.36787944117144233) * sol.stats.num_accepted**2)
    assert errors[1] == pytest.approx(errors[0], rel=0.3)  # error ~ steps^-2
    with pytest.raises(neurode.InputError, match="reuse_last"):
        replace(neurode.methods.get("bosh3"), a=((), (1 / 2,), (0, 3 / 4)), b=(2 / 9, 1 / 3, 4 / 9), c=(0, 1 / 2, 3 / 4),
                b_error=None, order_error=None, reuse_last=True)  # fmt: skip
