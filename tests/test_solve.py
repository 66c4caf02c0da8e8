"""`solve` against closed forms, its counts, its shapes, and the edges of its input."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

import neurode
from neurode import Status, solve

FIXED = {"euler": 1, "midpoint": 2, "heun": 2, "ralston": 2, "rk4": 4}
STAGES = {"euler": 1, "midpoint": 2, "heun": 2, "ralston": 2, "rk4": 4}
ADAPTIVE = ("bosh3", "dopri5", "tsit5")

decay = lambda t, y: -y


def stacked(*parts: torch.Tensor) -> torch.Tensor:
    return torch.stack(parts, -1)


# name: (f, y0, end, exact solution at the end)
CLOSED = {
    "oscillator": (lambda t, y: stacked(y[..., 1], -y[..., 0]), [1.0, 0.0], 10.0, lambda t: [math.cos(t), -math.sin(t)]),
    "y cos t": (lambda t, y: y * torch.cos(t), [1.0], 8.0, lambda t: [math.exp(math.sin(t))]),
    "logistic": (lambda t, y: y * (1 - y), [0.1], 8.0, lambda t: [1 / (1 + 9 * math.exp(-t))]),
    "Riccati": (lambda t, y: -2 * t * y * y, [1.0], 3.0, lambda t: [1 / (1 + t * t)]),
    "damped": (
        lambda t, y: stacked(y[..., 1], -1.01 * y[..., 0] - 0.2 * y[..., 1]), [0.0, 1.0], 6.0,
        lambda t: [math.exp(-0.1 * t) * math.sin(t), math.exp(-0.1 * t) * (math.cos(t) - 0.1 * math.sin(t))],
    ),
}  # fmt: skip


# ---- accuracy


@pytest.mark.parametrize("method", FIXED)
def test_fitted_order(method: str) -> None:
    f, y0, _, exact = CLOSED["y cos t"]
    target = torch.tensor(exact(2.0))
    steps = torch.tensor([40, 80, 160, 320])
    errors = torch.stack(
        [(solve(f, y0, (0, 2.0), method=method, steps=int(n)).y1 - target).abs().amax() for n in steps]
    )
    x, y = -(steps.double().log()), errors.log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert abs(float(slope) - FIXED[method]) < 0.1


@pytest.mark.parametrize("tolerance", [1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("problem", CLOSED)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_global_error_is_bounded_by_the_tolerance(method: str, problem: str, tolerance: float) -> None:
    f, y0, end, exact = CLOSED[problem]
    y1 = solve(f, y0, (0, end), method=method, rtol=tolerance, atol=tolerance).y1
    target = torch.tensor(exact(end))
    assert ((y1 - target).abs() <= 50 * (tolerance + tolerance * target.abs())).all()


@pytest.mark.parametrize("batch_dim", [None, 0])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_backward_in_time_returns(method: str, batch_dim: int | None) -> None:
    f, y0, end, _ = CLOSED["oscillator"]
    start = torch.tensor([y0])
    there = solve(f, start, (0, end), method=method, rtol=1e-9, atol=1e-9, batch_dim=batch_dim).y1
    back = solve(f, there, (end, 0), method=method, rtol=1e-9, atol=1e-9, batch_dim=batch_dim).y1
    torch.testing.assert_close(back, start, rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch_dim", [None, 0])
@pytest.mark.parametrize("method", [*FIXED, *ADAPTIVE])
def test_outputs_lie_on_the_solution(method: str, batch_dim: int | None) -> None:
    options = {"steps": 400} if method in FIXED else {"rtol": 1e-7, "atol": 1e-7}
    times = torch.tensor([0.0, 0.0, 0.3, 1.0, 1.7, 1.7, 2.0])
    ys = solve(decay, torch.ones(3, 1), (0, 2), method=method, t_eval=times, batch_dim=batch_dim, **options).ys
    assert ys.shape == (7, 3, 1)
    error = (ys - (-times).exp()[:, None, None]).abs().max()
    assert error < (3e-3 if method == "euler" else 1e-5)


# ---- counts


@pytest.mark.parametrize("method", FIXED)
def test_costs_of_twenty_steps(method: str) -> None:
    calls = []
    stats = solve(lambda t, y: calls.append(t) or -y, 1.0, (0, 1), method=method, steps=20).stats
    assert len(calls) == stats.num_calls == stats.num_evaluations == stats.nfe == 20 * STAGES[method]
    assert (stats.num_accepted, stats.num_rejected) == (20, 0)


@pytest.mark.parametrize(("method", "per_step"), [("bosh3", 3), ("dopri5", 6), ("tsit5", 6)])
def test_first_same_as_last_is_used(method: str, per_step: int) -> None:
    calls = []
    f = lambda t, y: calls.append(t) or stacked(y[..., 1], 5 * (1 - y[..., 0] ** 2) * y[..., 1] - y[..., 0])
    stats = solve(f, [2.0, 0.0], (0, 10), method=method, rtol=1e-6, atol=1e-6).stats
    attempts = stats.num_accepted + stats.num_rejected
    assert stats.num_rejected > 0
    assert len(calls) == stats.num_calls == 2 + per_step * attempts  # two to begin: f(t0) and the first step's


def test_first_step_given_saves_an_evaluation() -> None:
    assert solve(decay, 1.0, (0, 1), method="dopri5", first_step=0.1).stats.num_calls % 6 == 1


def test_counts_of_rows_are_those_of_a_batch_of_one() -> None:
    torch.manual_seed(1)
    f = lambda t, y: stacked(y[:, 1], 5 * (1 - y[:, 0] ** 2) * y[:, 1] - y[:, 0])
    y0, ends = 2 * torch.randn(24, 2), torch.linspace(0, 8, 24)
    together = solve(f, y0, (0, ends), method="dopri5", batch_dim=0)
    for row in range(24):
        alone = solve(f, y0[row : row + 1], (0, float(ends[row])), method="dopri5", batch_dim=0)
        for name in ("num_evaluations", "num_accepted", "num_rejected"):
            assert int(getattr(alone.stats, name)) == int(getattr(together.stats, name)[row]), (name, row)
        torch.testing.assert_close(alone.y1[0], together.y1[row], rtol=1e-12, atol=1e-12)


# ---- what f receives


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_time_is_a_tensor_of_the_states_dtype(dtype: torch.dtype) -> None:
    seen = []
    f = lambda t, y: seen.append((type(t), t.shape, t.dtype)) or -y
    for options in ({"method": "rk4", "steps": 2}, {"method": "dopri5"}):
        solve(f, torch.ones(4, 4, dtype=dtype), (0, 1), **options)
        assert set(seen) == {(torch.Tensor, torch.Size([]), dtype)}
        seen.clear()
        solve(f, torch.ones(4, 4, dtype=dtype), (0, 1), batch_dim=0, **options)
        assert set(seen) == {(torch.Tensor, torch.Size([4, 1]), dtype)}
        seen.clear()
        solve(f, torch.ones(5, 2, 3, dtype=dtype), (0, torch.linspace(1, 2, 5)), batch_dim=0, **options)
        assert set(seen) == {(torch.Tensor, torch.Size([5, 1, 1]), dtype)}
        seen.clear()


def test_complex_state_gets_real_time() -> None:
    f = lambda t, y: 1j * y + 0 * t
    for batch_dim in (None, 0):
        y1 = solve(f, torch.ones(2, 1, dtype=torch.complex128), (0, 1), rtol=1e-9, atol=1e-9, batch_dim=batch_dim).y1
        assert (y1 - complex(math.cos(1), math.sin(1))).abs().max() < 1e-7


@dataclass
class Body:
    position: torch.Tensor
    velocity: torch.Tensor


torch.utils._pytree.register_dataclass(Body)


@pytest.mark.parametrize("batch_dim", [None, 0])
def test_pytrees_go_in_and_come_out(batch_dim: int | None) -> None:
    a, b = torch.randn(4, 3), torch.randn(4)
    options = {"method": "dopri5", "rtol": 1e-8, "atol": 1e-8, "t_eval": [0.0, 1.0], "batch_dim": batch_dim}
    whole = solve(lambda t, y: {"a": -y["a"], "b": (y["b"][0] * 2,)}, {"a": a, "b": (b,)}, (0, 1), **options)
    assert set(whole.y1) == {"a", "b"} and isinstance(whole.y1["b"], tuple)
    assert whole.ys["a"].shape == (2, 4, 3) and whole.ys["b"][0].shape == (2, 4)
    torch.testing.assert_close(whole.y1["a"], a * math.exp(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(whole.y1["b"][0], b * math.exp(2), rtol=1e-6, atol=1e-6)
    moved = solve(
        lambda t, y: Body(y.velocity, -y.position), Body(a, 0 * a), (0, math.pi), **{**options, "t_eval": None}
    )
    assert isinstance(moved.y1, Body)
    torch.testing.assert_close(moved.y1.position, -a, rtol=1e-6, atol=1e-6)


def test_lower_precision_of_f_is_cast_up() -> None:
    linear = torch.nn.Linear(3, 3).float()

    def f(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = linear(y)
        assert out.dtype is torch.bfloat16
        return out

    y1 = solve(f, torch.ones(2, 3, dtype=torch.float32), (0, 1), method="rk4", steps=4).y1
    assert y1.dtype is torch.float32


# ---- edges


@pytest.mark.parametrize("options", [{"method": "rk4", "steps": 5}, {"method": "dopri5"}])
@pytest.mark.parametrize("batch_dim", [None, 0])
def test_zero_length_interval_costs_nothing(options: dict, batch_dim: int | None) -> None:
    y0 = torch.randn(3, 2)
    solution = solve(decay, y0, (1.0, 1.0), batch_dim=batch_dim, **options)
    assert torch.equal(solution.y1, y0)
    if batch_dim is None and "steps" not in options:
        assert solution.stats.num_calls == 0


def test_zero_length_interval_of_a_grid_costs_nothing() -> None:
    assert solve(decay, 1.0, (1.0, 1.0), method="rk4", steps=5).stats.num_calls == 0


@pytest.mark.parametrize("options", [{"method": "rk4", "steps": 5}, {"method": "dopri5"}])
def test_no_rows_give_an_empty_solution(options: dict) -> None:
    solution = solve(decay, torch.ones(0, 3), (0, 1), batch_dim=0, t_eval=[0.0, 1.0], **options)
    assert solution.y1.shape == (0, 3) and solution.ys.shape == (2, 0, 3) and len(solution.status) == 0


@pytest.mark.parametrize("batch_dim", [None, 0])
def test_no_output_times(batch_dim: int | None) -> None:
    solution = solve(decay, torch.ones(2, 1), (0, 1), method="dopri5", t_eval=[], batch_dim=batch_dim)
    assert solution.ys.shape == (0, 2, 1) and solution.y1.shape == (2, 1)


def test_without_output_times_the_end_alone() -> None:
    solution = solve(decay, torch.ones(2), (0, 1), method="dopri5")
    assert solution.ts.tolist() == [1.0] and torch.equal(solution.ys[0], solution.y1)


@pytest.mark.parametrize("batch_dim", [None, 0])
def test_all_accepted_steps(batch_dim: int | None) -> None:
    solution = solve(decay, torch.ones(2, 1), (0, 1), method="dopri5", t_eval="steps", batch_dim=batch_dim)
    saved = solution.num_saved if batch_dim is None else int(solution.num_saved[0])
    accepted = solution.stats.num_accepted if batch_dim is None else int(solution.stats.num_accepted[0])
    assert saved == accepted + 1 == len(solution.ts)
    assert torch.equal(solution.ys[0], torch.ones(2, 1)) and torch.equal(solution.ys[-1], solution.y1)


def test_float32_time_does_not_drift() -> None:
    """1e5 steps of 1e-5 end exactly on 1, in float32 too."""
    last = []
    f = lambda t, y: last.append(float(t)) or torch.ones_like(y)
    solution = solve(f, torch.zeros(1, dtype=torch.float32), (0, 1), method="euler", steps=100_000)
    assert float(solution.t1) == 1.0 and len(last) == 100_000
    assert abs(last[-1] - 0.99999) < 1e-7


def test_last_step_is_shorter() -> None:
    times = solve(decay, 1.0, (0, 1), method="euler", step_size=0.3, t_eval="steps").ts
    torch.testing.assert_close(times, torch.tensor([0, 0.3, 0.6, 0.9, 1.0]))
    assert len(solve(decay, 1.0, (0, 0.3), method="euler", step_size=0.1, t_eval="steps").ts) == 4


@pytest.mark.parametrize("grid", [[0.0, 0.1, 0.5, 1.0], lambda t0, t1: torch.tensor([t0, 0.1, 0.5, t1])])
def test_grid_of_ones_own(grid: object) -> None:
    solution = solve(decay, 1.0, (0, 1), method="euler", grid=grid, t_eval="steps")
    assert solution.ts.tolist() == [0.0, 0.1, 0.5, 1.0]
    assert abs(float(solution.y1) - 0.9 * 0.6 * 0.5) < 1e-15


def test_numbers_become_tensors_of_the_default_dtype() -> None:
    assert solve(decay, 1, (0, 1), method="rk4", steps=1).y1.dtype is torch.get_default_dtype()
    assert solve(decay, [1, 2], (0, 1), method="rk4", steps=1).y1.shape == (2,)


def test_tolerance_of_each_leaf_and_element() -> None:
    f = lambda t, y: {"fast": -y["fast"], "slow": -y["slow"]}
    y0 = {"fast": torch.ones(2), "slow": torch.ones(3)}
    loose = solve(f, y0, (0, 1), method="dopri5", rtol=1e-3, atol=1e-3).stats.num_accepted
    mixed = solve(f, y0, (0, 1), method="dopri5", rtol={"fast": 1e-10, "slow": 1e-3}, atol=1e-10).stats.num_accepted
    assert mixed > loose
    each = torch.tensor([[1e-3], [1e-9]])
    rows = solve(decay, torch.ones(2, 2), (0, 1), method="dopri5", rtol=each, atol=each, batch_dim=0).stats.num_accepted
    assert rows[1] > rows[0]


@pytest.mark.parametrize("norm", ["max", lambda x: x.abs().amax()])
def test_norms(norm: object) -> None:
    strict = solve(decay, torch.tensor([1.0, 0.0, 0.0, 0.0]), (0, 1), method="dopri5", rtol=1e-9, atol=1e-9, norm=norm)
    mean = solve(decay, torch.tensor([1.0, 0.0, 0.0, 0.0]), (0, 1), method="dopri5", rtol=1e-9, atol=1e-9)
    assert strict.stats.num_accepted > mean.stats.num_accepted


def test_status_is_its_message() -> None:
    solution = solve(decay, torch.ones(2, 1), (0, 1), method="dopri5", batch_dim=0)
    assert list(solution.status) == [Status.SUCCESS] * 2
    assert str(solution.status[0]) == Status.SUCCESS.value == "reached the end of t_span"
    assert solution.success


def test_underflow_names_its_time() -> None:
    """y' = y^2 blows up at t = 1."""
    with pytest.raises(neurode.SolveError, match=r"t = 1\b|t = 0\.99999"):
        solve(lambda t, y: y * y, 1.0, (0, 2), method="dopri5", rtol=1e-6)


@pytest.mark.parametrize("batch_dim", [None, 0])
def test_dense_output_and_its_derivative(batch_dim: int | None) -> None:
    y0 = torch.ones(3, 1)
    solution = solve(decay, y0, (0, 2), method="dopri5", rtol=1e-8, atol=1e-8, dense=True, batch_dim=batch_dim)
    t = torch.linspace(0, 2, 12).reshape(4, 3)
    exact = (-t).exp()
    if batch_dim == 0:
        torch.testing.assert_close(solution(t)[..., 0], exact, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(solution.derivative(t)[..., 0], -exact, rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(solution(t), exact[..., None, None].expand(4, 3, 3, 1), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(solution.derivative(t)[..., 0, 0], -exact, rtol=1e-4, atol=1e-5)
    assert solution(0.5).shape == (3, 1)
    with pytest.raises(ValueError, match=r"asked at 2\.5"):
        solution(2.5)
    with pytest.raises(ValueError, match="dense=True"):
        solve(decay, y0, (0, 2), method="dopri5")(1.0)


# ---- rows


@pytest.mark.parametrize("method", [*ADAPTIVE, "rk4"])
def test_bad_rows_leave_the_others_and_their_gradients_untouched(method: str) -> None:
    """Rows that become NaN, have no span, or run out of steps: the rest is the same to the bit."""
    w = torch.tensor([1.3, 0.7], requires_grad=True)

    def f(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        dy = stacked(y[:, 1] * w[0], -y[:, 0] * w[1] + 0 * torch.sqrt(150 - y[:, 0]))
        return torch.where((y[:, :1] > 100) | (y[:, 1:].abs() > 20), torch.nan, dy)

    options = {"steps": 20} if method == "rk4" else {"rtol": 1e-5, "atol": 1e-5, "max_steps": 400}

    def run(y0: torch.Tensor, ends: torch.Tensor) -> tuple:
        y0 = y0.clone().requires_grad_()
        solution = solve(f, y0, (0.0, ends), method=method, batch_dim=0, on_failure="nan", **options)
        loss = (solution.y1[:64] * torch.arange(128.0).reshape(64, 2)).sum()
        grads = torch.autograd.grad(loss, (w, y0))
        return solution, solution.y1[:64].detach(), grads[0], grads[1][:64], grads[1][64:]

    good, ends = torch.randn(64, 2), torch.full((64,), 3.0)
    bad = torch.tensor([[200.0, 0.0], [45.0, 5.0], [1.0, 1.0], [float("nan"), 0.0], [1e-3, 1e-3]])
    _, *clean = run(good, ends)
    solution, *mixed = run(torch.cat([good, bad]), torch.cat([ends, torch.tensor([3.0, 3.0, 0.0, 3.0, 3e4])]))
    for a, b in zip(clean[:3], mixed[:3], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(mixed[3], torch.zeros_like(mixed[3]))
    assert solution.status[64] is Status.NON_FINITE and solution.status[65] is Status.NON_FINITE
    assert solution.status[66] is Status.SUCCESS and solution.status[67] is Status.NON_FINITE
    if method != "rk4":
        assert solution.status[68] is Status.MAX_STEPS
    assert torch.isnan(solution.y1[[64, 65, 67]]).all() and torch.isfinite(solution.y1[:64]).all()


def test_rows_that_are_done_cost_nothing() -> None:
    """The number of rows that f sees falls as rows end."""
    sizes = []
    f = lambda t, y: sizes.append(len(y)) or -y
    ends = torch.tensor([1.0] * 60 + [50.0] * 4)
    solution = solve(f, torch.ones(64, 2), (0, ends), method="dopri5", batch_dim=0)
    assert sizes[0] == 64 and sizes[-1] == 4
    assert int(solution.stats.num_evaluations.sum()) < 0.2 * 64 * max(solution.stats.num_evaluations)


@pytest.mark.parametrize("grad", [False, True])
def test_fields_that_couple_rows_or_close_over_them_keep_all_rows(grad: bool) -> None:
    rate, sizes = torch.linspace(0.5, 2, 64)[:, None], []
    w = torch.ones((), requires_grad=grad)
    ends = torch.cat([torch.full((60,), 0.5), torch.full((4,), 5.0)])

    def closing(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        sizes.append(len(y))
        return -rate * y * w

    y1 = solve(closing, torch.ones(64, 1), (0, ends), method="dopri5", rtol=1e-8, atol=1e-8, batch_dim=0).y1
    torch.testing.assert_close(y1, torch.exp(-rate * ends[:, None]), rtol=1e-6, atol=1e-6)
    assert sizes[-1] == 64

    def coupling(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        sizes.append(len(y))
        return -y * w + y.mean(0)

    sizes.clear()
    solve(coupling, torch.randn(64, 1), (0, ends), method="dopri5", batch_dim=0)
    assert sum(size != 64 for size in sizes) == 1  # the probe, once
    assert sizes[-1] == 64


def test_a_coupling_that_only_gradients_show_keeps_all_rows() -> None:
    last = torch.nn.Linear(4, 2)
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(last.bias)
    first, sizes = torch.nn.Linear(2, 4), []

    def f(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        sizes.append(len(y))
        hidden = first(y)
        return last(hidden - hidden.mean(0))

    ends = torch.cat([torch.full((60,), 0.5), torch.full((4,), 5.0)])
    solve(f, torch.randn(64, 2), (0, ends), method="dopri5", batch_dim=0, max_step=0.2)
    assert sizes[-1] == 64


def test_per_row_data_follows_the_rows() -> None:
    rate = torch.linspace(0.5, 2, 64)[:, None]
    ends = torch.cat([torch.full((60,), 0.5), torch.full((4,), 5.0)])
    f = lambda t, y, k, c: -c * k * y
    args = (neurode.per_row(rate), 1.0)
    y1 = solve(f, torch.ones(64, 1), (0, ends), method="dopri5", rtol=1e-8, atol=1e-8, batch_dim=0, args=args).y1
    torch.testing.assert_close(y1, torch.exp(-rate * ends[:, None]), rtol=1e-6, atol=1e-6)


# ---- control


@pytest.mark.parametrize("batch_dim", [None, 0])
@pytest.mark.parametrize("end", [1.0, -1.0])
def test_times_that_must_be_hit(batch_dim: int | None, end: float) -> None:
    stops = [0.25 * end, 0.7 * end]
    solution = solve(
        decay, torch.ones(1, 1), (0, end), method="dopri5", step_at=stops, t_eval="steps", batch_dim=batch_dim
    )
    assert set(stops) <= set(solution.ts.flatten().tolist())


@pytest.mark.parametrize("batch_dim", [None, 0])
def test_jumps_are_seen_from_both_sides(batch_dim: int | None) -> None:
    f = lambda t, y: torch.where(t < 0.5, torch.ones_like(y), -2 * torch.ones_like(y))
    solution = solve(f, torch.zeros(1, 1), (0, 1), method="dopri5", jump_at=[0.5], batch_dim=batch_dim)
    assert abs(float(solution.y1) + 0.5) < 1e-12 and int(solution.stats.num_rejected) == 0


@pytest.mark.parametrize("controller", [neurode.PID.i(), neurode.PID.pi(), neurode.PID.pi34(), neurode.PID.h312()])
@pytest.mark.parametrize("batch_dim", [None, 0])
def test_controllers(controller: neurode.PID, batch_dim: int | None) -> None:
    f, y0, end, exact = CLOSED["oscillator"]
    y0 = torch.tensor([y0])
    y1 = solve(f, y0, (0, end), method="dopri5", rtol=1e-7, atol=1e-7, controller=controller, batch_dim=batch_dim).y1
    assert (y1[0] - torch.tensor(exact(end))).abs().max() < 50e-7


@pytest.mark.parametrize("batch_dim", [None, 0])
def test_bounds_of_the_step(batch_dim: int | None) -> None:
    options = {"method": "dopri5", "batch_dim": batch_dim, "t_eval": "steps"}
    short = solve(decay, torch.ones(1, 1), (0, 1), max_step=0.05, **options)
    assert float(short.ts.flatten().diff().max()) <= 0.05 * 1.02
    forced = solve(decay, torch.ones(1, 1), (0, 1), min_step=0.25, rtol=1e-12, atol=1e-12, **options)
    assert int(forced.stats.num_accepted if batch_dim is None else forced.stats.num_accepted[0]) == 4


def test_one_event_needs_no_list() -> None:
    event = neurode.Event(lambda t, y: y - 0.5, terminal=True)
    assert neurode.solve(lambda t, y: -y, 1.0, (0, 5), events=event).success
