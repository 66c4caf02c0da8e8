"""Edge cases, each a promise: the title of a test is what a user may rely on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import neurode

DECAY = lambda t, y: -y
FIXED, ADAPTIVE = dict(method="rk4", steps=5), dict(method="dopri5", rtol=1e-6, atol=1e-8)
BOTH = pytest.mark.parametrize("options", [FIXED, ADAPTIVE], ids=["fixed", "adaptive"])
BATCH = pytest.mark.parametrize("batch_dim", [None, 0])


@BOTH
@BATCH
def test_a_span_of_zero_length_gives_y0_without_an_evaluation(options, batch_dim):
    def never(t, y):
        raise AssertionError("f was called")

    y0 = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    sol = neurode.solve(never, y0, (0.5, 0.5), batch_dim=batch_dim, **options)
    assert torch.equal(sol.y1, y0) and torch.equal(sol.ys[0], y0) and sol.success
    assert sol.stats.num_calls == 0
    times = torch.tensor([0.5, 0.5])
    sol = neurode.solve(never, y0, (0.5, 0.5), t_eval=times, batch_dim=batch_dim, **options)
    assert torch.equal(sol.ys, torch.stack([y0, y0]))


@BOTH
@BATCH
def test_a_span_of_zero_length_passes_gradients(options, batch_dim):
    y0 = torch.ones(2, 2, requires_grad=True)
    neurode.solve(DECAY, y0, (0.5, 0.5), batch_dim=batch_dim, **options).y1.sum().backward()
    assert torch.equal(y0.grad, torch.ones(2, 2))


@BOTH
@BATCH
def test_an_empty_t_eval_gives_empty_outputs_and_the_end(options, batch_dim):
    sol = neurode.solve(DECAY, torch.ones(3, 2), (0, 1), t_eval=[], batch_dim=batch_dim, **options)
    assert sol.ys.shape == (0, 3, 2) and sol.ts.shape[0] == 0
    assert torch.allclose(sol.y1, torch.full((3, 2), math.exp(-1)), rtol=1e-3)


@BOTH
@BATCH
def test_time_may_run_backward(options, batch_dim):
    times = torch.tensor([1.0, 0.7, 0.2, 0.0])
    sol = neurode.solve(DECAY, torch.ones(3, 2), (1, 0), t_eval=times, batch_dim=batch_dim, **options)
    want = torch.exp(1 - times).reshape(-1, 1, 1).expand(4, 3, 2)
    assert torch.allclose(sol.ys, want, rtol=1e-4)
    assert torch.equal(sol.ys[-1], sol.y1)


@BOTH
def test_rows_may_run_in_opposite_directions(options):
    t0, t1 = torch.tensor([0.0, 1.0, 0.3]), torch.tensor([1.0, 0.0, 0.3])
    sol = neurode.solve(DECAY, torch.ones(3, 1), (t0, t1), batch_dim=0, **options)
    assert torch.allclose(sol.y1.flatten(), torch.tensor([math.exp(-1), math.e, 1.0]), rtol=1e-4)
    assert sol.stats.num_accepted[2] == 0


@BOTH
def test_one_row_is_a_batch(options):
    sol = neurode.solve(DECAY, torch.ones(1, 2), (0, 1), batch_dim=0, **options)
    assert sol.y1.shape == (1, 2) and len(sol.status) == 1 and sol.status[0] is neurode.Status.SUCCESS


@BOTH
@pytest.mark.parametrize("outputs", [dict(), dict(t_eval=[0.0, 0.5]), dict(t_eval="steps"), dict(dense=True)])
def test_zero_rows_give_an_empty_solution(options, outputs):
    sol = neurode.solve(DECAY, torch.ones(0, 2), (0, 1), batch_dim=0, **options, **outputs)
    assert sol.y1.shape == (0, 2) and sol.ys.shape[1:] == (0, 2)
    assert len(sol.status) == 0 and sol.success and sol.stats.num_evaluations.shape == (0,)


@pytest.mark.parametrize("on_failure", ["raise", "nan"])
def test_nan_from_f_in_the_middle_names_the_time(on_failure):
    def f(t, y):
        return torch.where(t > 0.5, torch.nan, -y)

    y0 = torch.ones(2, requires_grad=True)
    if on_failure == "raise":
        with pytest.raises(neurode.SolveError, match=r"t = 0\.(4|5).*NaN") as caught:
            neurode.solve(f, y0, (0, 1), **ADAPTIVE)
        assert caught.value.solution.status is neurode.Status.NON_FINITE
        return
    sol = neurode.solve(f, y0, (0, 1), t_eval=[0.1, 0.9], on_failure="nan", **ADAPTIVE)
    assert torch.isnan(sol.y1).all() and torch.isnan(sol.ys[1]).all() and not torch.isnan(sol.ys[0]).any()
    assert abs(float(sol.t1) - 0.5) < 1e-6


@BOTH
def test_nan_in_one_row_leaves_the_others_and_the_shared_gradient_bitwise(options):
    """f of adds and products, so that rows are bitwise independent of the batch."""
    rate = torch.tensor(-0.7, requires_grad=True)

    def f(t, y, bad):
        return rate * y + torch.where((t > 0.4) & (bad > 0), torch.nan, 0.0)

    bad = torch.tensor([[0.0], [1.0], [0.0]])
    y0 = torch.tensor([[1.0], [2.0], [3.0]])
    args = (neurode.per_row(bad),)
    sol = neurode.solve(f, y0, (0, 1), args=args, batch_dim=0, on_failure="nan", **options)
    good = torch.tensor([0, 2])
    (grad,) = torch.autograd.grad(sol.y1[good].sum(), rate)
    clean = neurode.solve(f, y0[good], (0, 1), args=(neurode.per_row(bad[good]),), batch_dim=0, **options)
    (want,) = torch.autograd.grad(clean.y1.sum(), rate)
    assert torch.equal(sol.y1[good], clean.y1) and torch.isnan(sol.y1[1]).all()
    assert torch.equal(grad, want)
    (all_of_it,) = torch.autograd.grad(
        neurode.solve(f, y0, (0, 1), args=args, batch_dim=0, on_failure="nan", **options).y1.sum(), rate
    )
    assert torch.equal(all_of_it, want)  # the failed row's own gradient is zero
    assert [s.name for s in sol.status] == ["SUCCESS", "NON_FINITE", "SUCCESS"]


@BOTH
@pytest.mark.parametrize("number", [2, 3, 4])
def test_outputs_beside_a_failed_row_are_differentiated_at_their_times(options, number):
    """Also where there are as many output times as rows."""
    a = torch.tensor(-1.0, requires_grad=True)

    def f(t, y, bad):
        return a * y + torch.where((bad > 0) & (t > 0.4), torch.nan, 0.0)

    bad = neurode.per_row(torch.tensor([[0.0], [1.0], [0.0]]))
    times = torch.linspace(0.2, 0.9, number)
    sol = neurode.solve(
        f, torch.ones(3, 1), (0, 1), args=(bad,), t_eval=times, batch_dim=0, on_failure="nan", **options
    )
    for i, t in enumerate(times.tolist()):
        (grad,) = torch.autograd.grad(sol.ys[i, 2].sum(), a, retain_graph=True)
        assert grad.item() == pytest.approx(t * math.exp(-t), rel=1e-3)


@BOTH
@BATCH
def test_times_in_t_eval_may_repeat(options, batch_dim):
    times = torch.tensor([0.0, 0.0, 0.5, 0.5, 0.5, 1.0, 1.0])
    ys = neurode.solve(DECAY, torch.ones(2, 1), (0, 1), t_eval=times, batch_dim=batch_dim, **options).ys
    assert ys.shape == (7, 2, 1)
    for first, second in ((0, 1), (2, 3), (3, 4), (5, 6)):
        assert torch.equal(ys[first], ys[second])
    assert torch.allclose(ys[:, 0, 0], torch.exp(-times), rtol=1e-4)


def test_a_float32_solve_over_1e5_steps_ends_exactly_on_t1():
    t1 = 0.1 + 1e5 * 1e-3
    f = lambda t, y: torch.zeros_like(y) + 1.0
    y0 = torch.zeros(1, dtype=torch.float32)
    seen = []

    def watch(t, y):
        seen.append(float(t))
        return f(t, y)

    with torch.no_grad():
        sol = neurode.solve(watch, y0, (0.1, t1), method="euler", steps=100_000)
    assert float(sol.ts[-1]) == t1 and sol.stats.num_accepted == 100_000
    assert seen[-1] == torch.tensor(0.1 + (t1 - 0.1) * 99_999 / 100_000, dtype=torch.float32).item()
    assert sorted(seen) == seen


def test_a_float32_adaptive_solve_ends_exactly_on_t1():
    f = lambda t, y: torch.cos(t).expand(1)
    for t1 in (97.3, 1234.567):
        sol = neurode.solve(
            f, torch.zeros(1, dtype=torch.float32), (0.1, t1), method="bosh3", max_step=0.25, t_eval="steps"
        )
        assert float(sol.ts[-1]) == t1 and float(sol.t1) == t1
        assert (sol.ts[1:] > sol.ts[:-1]).all()


def test_a_span_far_from_zero_in_float32():
    """Times are float64 inside: a span that float32 could not hold still has its length."""
    sol = neurode.solve(
        lambda t, y: torch.ones_like(y), torch.zeros(1, dtype=torch.float32), (1e8, 1e8 + 1), method="rk4", steps=4
    )
    assert sol.y1.item() == 1.0 and sol.ts[-1].item() == 1e8 + 1


@BATCH
def test_max_steps_is_a_status_that_says_what_to_do(batch_dim):
    with pytest.raises(neurode.SolveError, match="max_steps") as caught:
        neurode.solve(DECAY, torch.ones(2, 1), (0, 1), max_steps=3, batch_dim=batch_dim, method="dopri5", rtol=1e-10)
    solution = caught.value.solution
    assert torch.isnan(solution.y1).all()
    taken = solution.stats.num_accepted + solution.stats.num_rejected
    assert taken == 3 if batch_dim is None else taken.tolist() == [3, 3]


@BATCH
def test_a_singularity_underflows_and_names_its_time(batch_dim):
    """y' = y^2, y(0) = 1, is infinite at t = 1."""
    with pytest.raises(neurode.SolveError, match=r"t = (0\.99|1\b)") as caught:
        neurode.solve(lambda t, y: y * y, torch.ones(1, 1), (0, 2), batch_dim=batch_dim, method="dopri5", rtol=1e-8)
    assert float(caught.value.solution.t1) == pytest.approx(1.0, abs=1e-3)


def test_a_row_that_fails_is_named_and_the_rest_is_kept():
    y0 = torch.tensor([[0.1], [1.0], [0.2], [2.0]])
    options = dict(batch_dim=0, method="dopri5", rtol=1e-6)
    with pytest.raises(neurode.SolveError, match=r"2 of 4 rows \(rows 1, 3"):
        neurode.solve(lambda t, y: y * y, y0, (0, 2), **options)
    sol = neurode.solve(lambda t, y: y * y, y0, (0, 2), on_failure="nan", **options)
    assert torch.isnan(sol.y1).flatten().tolist() == [False, True, False, True]
    assert torch.allclose(sol.y1[[0, 2], 0], 1 / (1 / y0[[0, 2], 0] - 2), rtol=1e-4)


def test_a_constant_solution_takes_few_steps():
    sol = neurode.solve(lambda t, y: torch.zeros_like(y), torch.ones(3), (0, 1e6), method="dopri5")
    assert torch.equal(sol.y1, torch.ones(3)) and sol.stats.num_accepted < 30


def test_a_zero_state_and_a_zero_atol_is_no_division_by_zero():
    sol = neurode.solve(lambda t, y: torch.ones_like(y), torch.ones(2), (0, 1), method="dopri5", atol=0.0, rtol=1e-6)
    assert torch.allclose(sol.y1, torch.full((2,), 2.0))


def test_a_huge_first_step_is_cut_and_a_tiny_one_grows():
    for first in (1e3, 1e-9):
        sol = neurode.solve(DECAY, torch.ones(1), (0, 1), first_step=first, **ADAPTIVE)
        assert sol.y1.item() == pytest.approx(math.exp(-1), rel=1e-5)


def test_y0_and_args_are_not_changed():
    y0, a = torch.ones(3), torch.tensor([1.0, 2.0, 3.0])
    neurode.solve(lambda t, y, a: -a * y, y0, (0, 1), args=(a,), **ADAPTIVE)
    assert torch.equal(y0, torch.ones(3)) and a.tolist() == [1, 2, 3]


def test_no_grad_and_inference_mode():
    y0 = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        assert not neurode.solve(DECAY, y0, (0, 1), **ADAPTIVE).y1.requires_grad
    with torch.inference_mode():
        assert neurode.solve(DECAY, torch.ones(2, 1), (0, 1), batch_dim=0, t_eval=[0.5], **ADAPTIVE).ys.shape == (
            1,
            2,
            1,
        )


def test_steps_as_outputs():
    sol = neurode.solve(DECAY, torch.ones(2), (0, 1), t_eval="steps", **ADAPTIVE)
    assert len(sol.ts) == sol.num_saved == sol.stats.num_accepted + 1
    assert sol.ts[0] == 0 and sol.ts[-1] == 1 and torch.equal(sol.ys[-1], sol.y1)
    y0 = torch.tensor([[1.0], [1.0]])
    rate = neurode.per_row(torch.tensor([[1.0], [50.0]]))
    sol = neurode.solve(lambda t, y, k: -k * y, y0, (0, 1), args=(rate,), batch_dim=0, t_eval="steps", **ADAPTIVE)
    assert sol.num_saved.tolist() == (sol.stats.num_accepted + 1).tolist()
    for row, saved in enumerate(sol.num_saved.tolist()):
        assert not torch.isnan(sol.ys[:saved, row]).any() and torch.isnan(sol.ys[saved:, row]).all()
        assert torch.equal(sol.ys[saved - 1, row], sol.y1[row]) and sol.ts[saved - 1, row] == 1


@BATCH
def test_a_span_shorter_than_a_step_can_be_is_one_step(batch_dim):
    for t1 in (1.0 + 1e-15, 1.0 + 4e-15):
        sol = neurode.solve(DECAY, torch.ones(2, 1), (1.0, t1), batch_dim=batch_dim, method="dopri5")
        assert torch.allclose(sol.y1, torch.ones(2, 1), rtol=1e-14, atol=0)


def test_a_grid_of_every_row_sees_jumps_from_inside():
    """y' = 1 before t = 0.5 and -1 from there: exact on a grid that has the jump, for rows that run either way."""
    f = lambda t, y: torch.where(t < 0.5, 1.0, -1.0) + 0 * y
    span = (torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 2.0]))
    sol = neurode.solve(f, torch.zeros(3, 1), span, batch_dim=0, method="rk4", steps=4, jump_at=[0.5])
    assert sol.y1.flatten().tolist() == pytest.approx([0.0, 0.0, -1.0], abs=1e-15)


def test_no_rows_have_statistics_too():
    sol = neurode.solve(DECAY, torch.ones(0, 3), (0, 1), batch_dim=0, method="dopri5", save=lambda t, y: y.sum(-1))
    assert sol.ys.shape == (1, 0)


def test_times_that_f_changes_or_follows_do_not_reach_the_next_solve():
    """The times of a grid's stages are kept from one solve to the next."""
    plain = lambda t, y: t * y

    def rude(t, y):
        out = t * y
        t.mul_(3.0)
        return out

    def greedy(t, y):
        return t.requires_grad_() * y

    y0 = torch.ones(2)
    solve = lambda f: neurode.solve(f, y0, (0.0, 0.875), method="rk4", steps=7, engine="eager")
    want = solve(plain).y1
    for f in (rude, greedy, plain):
        assert torch.equal(solve(f).y1, want)
    assert not solve(plain).y1.requires_grad


@pytest.mark.parametrize("method", ["rk4", "dopri5", "explicit_adams"])
@pytest.mark.parametrize("batch_dim", [None, 0])
def test_an_f_that_overwrites_what_it_returned_is_refused(method: str, batch_dim: int | None) -> None:
    """The solver combines several derivatives: a buffer that every call fills would be all of them."""
    buffer = torch.zeros(3, 2)
    constant = torch.ones(3, 2)
    options = {"method": method, "batch_dim": batch_dim} | ({} if method == "dopri5" else {"steps": 5})
    with torch.no_grad(), pytest.raises(neurode.FieldError, match=r"overwrote.*buffer\.clone\(\)"):
        neurode.solve(lambda t, y: buffer.copy_(-y), torch.ones(3, 2), (0.0, 1.0), **options)
    same = neurode.solve(lambda t, y: constant, torch.zeros(3, 2), (0.0, 1.0), **options).y1
    torch.testing.assert_close(same, torch.ones(3, 2))  # a tensor that nobody writes to may be returned again


@pytest.mark.parametrize("t_span", [(0.0, 1.0), (torch.tensor([0.0, 0.1]), torch.tensor([1.0, 2.0]))])
def test_an_f_that_overwrites_the_times_of_rows_is_refused(t_span: Any) -> None:
    """They are shared, or the user's own."""
    before = [torch.as_tensor(t).clone() for t in t_span]
    with pytest.raises(neurode.FieldError, match=r"changed t in place.*t = t"):
        neurode.solve(lambda t, y: -y * t.add_(1.0), torch.ones(2, 1), t_span, method="rk4", steps=3, batch_dim=0)
    assert all(torch.equal(torch.as_tensor(t), old) for t, old in zip(t_span, before, strict=True))


@BATCH
def test_without_atol_the_error_names_it_where_a_component_is_zero(batch_dim: int | None) -> None:
    y0 = torch.tensor([[0.0, 1.0]])
    with pytest.raises(neurode.SolveError, match="type atol=1e-8"):
        neurode.solve(lambda t, y: y * 0.0 + y.flip(-1) * 0.0, y0, (0.0, 1.0), rtol=1e-3, atol=0.0, batch_dim=batch_dim)
    with pytest.raises(neurode.SolveError) as caught:  # nothing of it where the tolerance is not to blame
        neurode.solve(lambda t, y: y / 0.0, y0, (0.0, 1.0), batch_dim=batch_dim)
    assert "atol" not in str(caught.value)


def test_a_time_as_text_is_refused() -> None:
    with pytest.raises(neurode.InputError, match="t0 is '0'; it must be a number"):
        neurode.solve(DECAY, torch.ones(2), ("0", "1"))


def test_times_to_be_hit_outside_the_span_are_passed_over() -> None:
    y0 = torch.ones(2)
    plain = neurode.solve(DECAY, y0, (0.0, 1.0), t_eval="steps", **ADAPTIVE)
    listed = neurode.solve(DECAY, y0, (0.0, 1.0), t_eval="steps", step_at=[-1.0, 7.0], jump_at=[-3.0, 2.0], **ADAPTIVE)
    assert torch.equal(plain.ts, listed.ts) and torch.equal(plain.ys, listed.ys)
