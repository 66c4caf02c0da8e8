"""Laws that hold for every batch: permuting, splitting, rows against rows alone, reversing time, splitting an interval."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import neurode
from neurode.fused import native

ADAPTIVE = dict(method="dopri5", rtol=1e-6, atol=1e-8)
OPTIONS = {"fixed": dict(method="rk4", steps=9), "adaptive": ADAPTIVE, "tsit5": dict(method="tsit5", rtol=1e-5)}
EACH = pytest.mark.parametrize("name", OPTIONS)
quick = settings(max_examples=8, deadline=None, derandomize=True)


def polynomial(t, y, k):
    """Adds and products only: rows are bitwise what they are alone."""
    return k * y - 0.3 * y * y * y + t * 0.1


def batch(seed, rows):
    generator = torch.Generator().manual_seed(seed)
    y0 = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
    k = -4 * torch.rand(rows, 1, generator=generator, dtype=torch.float64)
    t1 = 0.2 + 2 * torch.rand(rows, generator=generator, dtype=torch.float64)
    return y0, k, t1 * torch.where(torch.rand(rows, generator=generator) < 0.2, -0.05, 1.0)  # a cubic explodes backward


def solve(y0, k, t1, name, **more):
    times = torch.linspace(0, 1, 6, dtype=torch.float64).unsqueeze(1) * t1
    span = (torch.zeros_like(t1), t1)
    return neurode.solve(
        polynomial, y0, span, args=(neurode.per_row(k),), t_eval=times, batch_dim=0, **OPTIONS[name], **more
    )


def same(one, other, index=slice(None)):
    """Rows `index` of one solution are all of the other, bit for bit.

    Outputs between steps are products of matrices, which round differently with their sizes.
    """
    assert torch.equal(one.y1[index], other.y1)
    assert torch.allclose(one.ys[:, index], other.ys, rtol=1e-12, atol=1e-13)
    for count in ("num_accepted", "num_rejected", "num_evaluations"):
        assert torch.equal(getattr(one.stats, count)[index], getattr(other.stats, count))


@EACH
@quick
@given(seed=st.integers(0, 1000), rows=st.integers(2, 20))
def test_permuting_a_batch_permutes_its_solution(name, seed, rows):
    y0, k, t1 = batch(seed, rows)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    same(solve(y0, k, t1, name), solve(y0[order], k[order], t1[order], name), order)


@EACH
@quick
@given(seed=st.integers(0, 1000), rows=st.integers(2, 20), at=st.floats(0.1, 0.9))
def test_splitting_a_batch_changes_no_row(name, seed, rows, at):
    y0, k, t1 = batch(seed, rows)
    cut = max(1, min(rows - 1, int(at * rows)))
    whole = solve(y0, k, t1, name)
    same(whole, solve(y0[:cut], k[:cut], t1[:cut], name), slice(None, cut))
    same(whole, solve(y0[cut:], k[cut:], t1[cut:], name), slice(cut, None))


@EACH
def test_gradients_of_a_batch_are_those_of_its_rows(name):
    y0, k, t1 = batch(3, 12)
    y0.requires_grad_(), k.requires_grad_(), t1.requires_grad_()
    whole = torch.autograd.grad(solve(y0, k, t1, name).ys.sin().sum(), (y0, k, t1))
    for row in range(12):
        mine = slice(row, row + 1)
        alone = torch.autograd.grad(solve(y0[mine], k[mine], t1[mine], name).ys.sin().sum(), (y0, k, t1))
        for a, b in zip(whole, alone, strict=True):
            assert torch.allclose(a[mine], b[mine], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("compact", [True, False, None])
def test_leaving_the_batch_changes_no_row(compact):
    y0, k, t1 = batch(5, 64)
    t1 = torch.where(torch.arange(64) % 3 == 0, t1, 0.01 * t1)  # most are done at once
    with_all = solve(y0, k, t1, "adaptive", compact=False)
    same(with_all, solve(y0, k, t1, "adaptive", compact=compact))


def test_a_field_that_closes_over_the_batch_and_one_that_couples_rows():
    y0, k, t1 = batch(6, 40)
    t1 = torch.where(torch.arange(40) < 10, t1, 0.01 * t1)
    span = (torch.zeros(40), t1)
    closed = neurode.solve(lambda t, y: polynomial(t, y, k), y0, span, batch_dim=0, **ADAPTIVE)
    given_ = neurode.solve(polynomial, y0, span, args=(neurode.per_row(k),), batch_dim=0, **ADAPTIVE)
    assert torch.equal(closed.y1, given_.y1)
    coupled = lambda t, y: -y + 0.1 * y.mean(0)
    free = neurode.solve(coupled, y0, (0.0, 1.0), batch_dim=0, rtol=1e-9, atol=1e-11, method="dopri5")
    joint = neurode.solve(coupled, y0, (0.0, 1.0), rtol=1e-10, atol=1e-12, method="dopri5")
    assert (free.y1 - joint.y1).abs().max() < 0.02  # rows at times of their own see a mean of mixed times


@EACH
@quick
@given(seed=st.integers(0, 1000))
def test_reversing_time_returns_to_the_start(name, seed):
    y0, k, t1 = batch(seed, 5)
    t1 = t1.abs().clamp_max(1.0)
    zero = torch.zeros_like(t1)
    options = OPTIONS[name] if name == "fixed" else dict(method=OPTIONS[name]["method"], rtol=1e-9, atol=1e-10)
    there = neurode.solve(polynomial, y0, (zero, t1), args=(neurode.per_row(k),), batch_dim=0, **options).y1
    back = neurode.solve(polynomial, there, (t1, zero), args=(neurode.per_row(k),), batch_dim=0, **options).y1
    assert (back - y0).abs().max() < (2e-2 if name == "fixed" else 1e-5)


@quick
@given(seed=st.integers(0, 1000), at=st.integers(1, 7))
def test_splitting_a_fixed_grid_at_one_of_its_points_changes_nothing(seed, at):
    y0, k, _ = batch(seed, 3)
    grid = torch.linspace(0, 1, 9, dtype=torch.float64)
    whole = neurode.solve(polynomial, y0, (0.0, 1.0), args=(k,), method="rk4", grid=grid).y1
    half = neurode.solve(polynomial, y0, (0.0, float(grid[at])), args=(k,), method="rk4", grid=grid[: at + 1]).y1
    rest = neurode.solve(polynomial, half, (float(grid[at]), 1.0), args=(k,), method="rk4", grid=grid[at:]).y1
    assert torch.equal(whole, rest)


@quick
@given(shift=st.floats(-50, 50), seed=st.integers(0, 1000))
def test_an_autonomous_system_does_not_know_the_time(shift, seed):
    y0, k, _ = batch(seed, 3)
    f = lambda t, y, k: k * y - y * y * y
    here = neurode.solve(f, y0, (0.0, 1.0), args=(k,), **ADAPTIVE)
    there = neurode.solve(f, y0, (shift, shift + 1.0), args=(k,), **ADAPTIVE)
    assert torch.allclose(here.y1, there.y1, rtol=1e-8, atol=1e-10)
    assert here.stats.num_accepted == there.stats.num_accepted


@pytest.mark.skipif(not native.available(), reason="the native library is not built (make native)")
@EACH
def test_on_the_fused_engine_permuting_and_splitting_change_rounding_at_most(name):
    """Tiles of one sample and of many round differently; rows know nothing of each other in either."""
    y0, k, t1 = batch(11, 37)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    run = lambda rows: neurode.solve(
        polynomial, y0[rows], (torch.zeros(len(rows)), t1[rows]), args=(neurode.per_row(k[rows]),), batch_dim=0,
        engine="fused", **OPTIONS[name],
    )  # fmt: skip
    whole, shuffled = run(torch.arange(37)), run(order)
    assert torch.allclose(whole.y1[order], shuffled.y1, rtol=1e-10, atol=1e-12)
    assert torch.equal(whole.stats.num_accepted[order], shuffled.stats.num_accepted)
    for row in (0, 20, 36):
        alone = run(torch.tensor([row]))
        assert torch.allclose(whole.y1[row], alone.y1[0], rtol=1e-10, atol=1e-12)
        assert int(alone.stats.num_accepted[0]) == int(whole.stats.num_accepted[row])


def test_van_der_pol_rows_take_the_steps_that_they_take_alone():
    """mu = 25, y0 ~ N(0, 1), batch 256, [0, 50], 2,048 outputs: every row as in a batch of one (a sample of rows)."""

    def f(t, y):
        x, v = y.unbind(-1)
        return torch.stack([v, 25 * (1 - x * x) * v - x], -1)

    y0 = torch.randn(256, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times = torch.linspace(0, 50, 2048, dtype=torch.float64)
    options = dict(method="dopri5", rtol=1e-5, atol=1e-5, t_eval=times, batch_dim=0)
    with torch.no_grad():
        together = neurode.solve(f, y0, (0.0, 50.0), **options)
        for row in (0, 77, 255):
            alone = neurode.solve(f, y0[row : row + 1], (0.0, 50.0), **options)
            for count in ("num_accepted", "num_rejected", "num_evaluations"):
                one, many = int(getattr(alone.stats, count)[0]), int(getattr(together.stats, count)[row])
                assert abs(one - many) <= 0.05 * one, (row, count, one, many)
            assert torch.equal(alone.y1[0], together.y1[row])
    assert not torch.isnan(together.ys).any()


@pytest.mark.parametrize("name", ["fixed", "adaptive"])
def test_bad_rows_in_a_batch_of_64(name):
    """A row that goes NaN, one whose span is zero, one that hits max_steps: the rest as without them, bit for bit."""
    y0, k, t1 = batch(8, 64)
    t1, shared = t1.abs(), torch.tensor(-0.3, requires_grad=True)
    t1[20] = 0.0
    trouble = torch.zeros(64, 1)
    trouble[10], trouble[30] = 1.0, 2.0

    def f(t, y, k, trouble):
        wild = torch.where(trouble == 2, 2000.0 * (t * 1000).remainder(1.0), 0.0)
        return k * y + shared * y * y * y + torch.where((trouble == 1) & (t > 0.1), torch.nan, 0.0) + wild

    def run(rows):
        args = (neurode.per_row(k[rows]), neurode.per_row(trouble[rows]))
        span = (torch.zeros(len(rows)), t1[rows])
        options = OPTIONS[name] | dict(max_steps=200) if name == "adaptive" else OPTIONS[name]
        sol = neurode.solve(f, y0[rows], span, args=args, batch_dim=0, on_failure="nan", **options)
        return sol, sol.y1[torch.tensor([r not in (10, 20, 30) for r in rows])]

    everything, good = run(list(range(64)))
    _, clean = run([r for r in range(64) if r not in (10, 20, 30)])
    assert everything.status[10] is neurode.Status.NON_FINITE
    assert everything.status[20] is neurode.Status.SUCCESS and torch.equal(everything.y1[20], y0[20])
    if name == "adaptive":
        assert everything.status[30] is neurode.Status.MAX_STEPS
    assert torch.equal(good, clean)
    (with_bad,) = torch.autograd.grad(good.sum(), shared)
    (without,) = torch.autograd.grad(clean.sum(), shared)
    assert torch.allclose(with_bad, without, rtol=1e-13, atol=0)
