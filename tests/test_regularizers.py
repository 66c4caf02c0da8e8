"""Regularizers against closed forms, finite differences, and every gradient strategy against the tape."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import neurode
from neurode import Continuous, Discrete, solve
from neurode.fused.native import library
from neurode.fused.refusal import CannotLower
from neurode.methods import METHODS
from neurode.regularizers import jacobian_frobenius, kinetic_energy, random_end_time, random_step

RATES = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
STRATEGIES = {"discrete": "discrete", "stage": Discrete(alive="stage"), "three": Discrete(checkpoints=3)}
TIMES = dict(t_eval=[0.0, 0.3, 1.0], rtol=1e-9, atol=1e-9)


def energy(y0: Tensor, t: float) -> Tensor:
    """The integral of |A y|^2 for y' = A y with the diagonal RATES."""
    return RATES.square() * y0.square() * ((2 * RATES * t).exp() - 1) / (2 * RATES)


@pytest.mark.parametrize("options", [dict(method="dopri5"), dict(method="dop853"), dict(method="rk4", steps=400)])
@pytest.mark.parametrize("batch_dim", [None, 0])
def test_kinetic_energy_is_the_closed_form(options: Any, batch_dim: int | None) -> None:
    y0 = torch.randn(5, 3)
    f = lambda t, y: RATES * y
    outputs = TIMES if "steps" not in options else dict(t_eval=TIMES["t_eval"])
    sol = solve(
        f, y0, (0.0, 1.0), integrate=kinetic_energy(), steer_integrals=True, batch_dim=batch_dim, **options, **outputs
    )
    for i, t in enumerate(TIMES["t_eval"]):
        exact = energy(y0, t).sum(1)
        torch.testing.assert_close(sol.integrals[i], exact if batch_dim == 0 else exact.sum(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("batch_dim", [None, 0])
def test_jacobian_of_a_linear_field(batch_dim: int | None) -> None:
    a, y0 = torch.randn(3, 3), torch.randn(5, 3)
    noise = torch.randn(5, 3)
    sol = solve(
        lambda t, y: y @ a,
        y0,
        (0.0, 2.0),
        method="rk4",
        steps=3,
        batch_dim=batch_dim,
        integrate=jacobian_frobenius(noise),
    )
    exact = 2 * (noise @ a.T).square()
    torch.testing.assert_close(sol.integrals[-1], exact.sum(1) if batch_dim == 0 else exact.sum())


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_jacobian_estimate_has_the_right_mean_and_one_noise_a_solve(distribution: str) -> None:
    a, generator = torch.randn(3, 3), torch.Generator().manual_seed(0)
    size = jacobian_frobenius(distribution=distribution, generator=generator)
    rows = torch.ones(40_000, 3)
    sol = solve(lambda t, y: y @ a, rows, (0.0, 1.0), method="euler", steps=2, batch_dim=0, integrate=size)
    values = sol.integrals[-1]
    assert abs(values.mean() - a.square().sum()) < 5 * values.std() / math.sqrt(len(rows))
    again = solve(lambda t, y: y @ a, rows, (0.0, 1.0), method="euler", steps=2, batch_dim=0, integrate=size)
    assert not torch.equal(values, again.integrals[-1])
    linear = solve(
        lambda t, y: y @ a, rows, (0.0, 1.0), method="euler", steps=5, t_eval=[0.5, 1.0], batch_dim=0, integrate=size
    )
    torch.testing.assert_close(linear.integrals[1], 2 * linear.integrals[0])  # held: the integrand is constant


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(2, 6), nn.Linear(6, 2)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(y))) * torch.cos(t)


NOISE = torch.randn(4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def regularized(gradient: Any, **options: Any) -> list[Tensor]:
    field, y0 = Net(), torch.randn(4, 2, generator=torch.Generator().manual_seed(2)).requires_grad_()
    mine = lambda t, y: y.square().sum(-1).sum() if options.get("batch_dim") is None else y.square().sum(-1)
    both = {"energy": kinetic_energy(), "jacobian": jacobian_frobenius(NOISE), "mine": mine}
    sol = solve(field, y0, (0.0, 1.0), integrate=both, gradient=gradient, **options)
    assert set(sol.integrals) == set(both)
    loss = sol.y1.sin().sum() + sum(x[-1].sum() * (i + 1) for i, x in enumerate(sol.integrals.values()))
    return [loss.detach(), *torch.autograd.grad(loss, [y0, *field.parameters()])]


CASES = [
    dict(method="rk4", steps=5),
    dict(method="rk4", steps=5, batch_dim=0),
    dict(method="dopri5", rtol=1e-5, batch_dim=0),
    dict(method="bosh3", rtol=1e-3),
]


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_exact_strategy_gives_the_gradient_of_the_tape(strategy: str, options: Any) -> None:
    for x, y in zip(regularized("autograd", **options), regularized(STRATEGIES[strategy], **options), strict=True):
        assert (x - y).norm() <= 1e-11 * max(1.0, float(x.norm()))


def test_the_continuous_adjoint_comes_near() -> None:
    options = dict(method="dopri5", rtol=1e-8, atol=1e-8, steer_integrals=True)
    for x, y in zip(regularized("autograd", **options), regularized(Continuous(), **options), strict=True):
        assert (x - y).norm() <= 1e-5 * max(1.0, float(x.norm()))


def test_within_a_memory() -> None:
    options = dict(method="rk4", steps=40)
    for x, y in zip(regularized("autograd", **options), regularized("auto", memory=100_000, **options), strict=True):
        assert (x - y).norm() <= 1e-11 * max(1.0, float(x.norm()))


@pytest.mark.parametrize("batch_dim", [None, 0])
def test_gradcheck(batch_dim: int | None) -> None:
    field, y0 = Net(), torch.randn(4, 2, requires_grad=True)

    def values(y0: Tensor, *weights: Tensor) -> Tensor:
        f = lambda t, y: torch.func.functional_call(field, dict(zip(names, weights, strict=True)), (t, y))
        both = [kinetic_energy(), jacobian_frobenius(NOISE)]
        integrals = solve(f, y0, (0.0, 1.0), method="rk4", steps=2, integrate=both, batch_dim=batch_dim).integrals
        return torch.stack([x[-1].sum() for x in integrals])

    names = [name for name, _ in field.named_parameters()]
    assert torch.autograd.gradcheck(values, (y0, *field.parameters()))


def test_costs_no_further_evaluation() -> None:
    calls = []

    def f(t: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        return -y

    sol = solve(
        f, torch.ones(3), (0.0, 1.0), method="rk4", steps=10, integrate=[kinetic_energy(), jacobian_frobenius()]
    )
    assert len(calls) == sol.stats.num_calls == 41 and sol.stats.num_evaluations == 40  # one to learn the shapes


def test_pytrees_arguments_aux_and_rows_that_leave() -> None:
    rate = torch.linspace(0.1, 2.0, 30).reshape(-1, 1)

    def f(t: Tensor, y: Any, k: Tensor) -> Any:
        return {"a": -k * y["a"], "b": y["b"] * 0 + 1}, {"t": t}

    y0 = {"a": torch.ones(30, 1), "b": torch.zeros(30, 2)}
    t1 = torch.where(torch.arange(30) % 2 == 0, 0.5, 6.0)
    sol = solve(
        f, y0, (torch.zeros(30), t1), args=(neurode.per_row(rate),), has_aux=True, batch_dim=0, method="dopri5", rtol=1e-8,
        atol=1e-8, steer_integrals=True, compact=True, integrate=(kinetic_energy(), jacobian_frobenius()),
    )  # fmt: skip
    k = rate.squeeze(1)
    torch.testing.assert_close(sol.integrals[0][-1], k * (1 - (-2 * k * t1).exp()) / 2 + 2 * t1, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(sol.integrals[1][-1], k.square() * t1, rtol=1e-6, atol=1e-7)
    assert sol.aux["t"].shape == (1, 30, 1)


def test_inference_and_constant_fields() -> None:
    field = Net()
    with torch.inference_mode():
        sol = solve(field, torch.ones(4, 2), (0.0, 1.0), method="rk4", steps=3, integrate=jacobian_frobenius(NOISE))
    assert sol.integrals[-1] > 0 and not sol.integrals.requires_grad
    still = solve(
        lambda t, y: torch.ones(2), torch.zeros(2), (0.0, 1.0), method="rk4", steps=3, integrate=jacobian_frobenius()
    )
    assert still.integrals[-1] == 0


@pytest.mark.parametrize(
    ("integrate", "match"),
    [(kinetic_energy, r"Call it: kinetic_energy\(\)"), (3.0, "regularizer such as"),
     ([kinetic_energy(), 1], "regularizer such as"), (jacobian_frobenius(torch.ones(2)), "shapes of|must have those of y0")],
)  # fmt: skip
def test_what_is_no_integrand_is_refused(integrate: Any, match: str) -> None:
    with pytest.raises(neurode.InputError, match=match):
        solve(lambda t, y: -y, torch.ones(3), (0.0, 1.0), method="rk4", steps=3, integrate=integrate)


def test_transforms_are_refused_where_f_is_differentiated_and_work_where_not() -> None:
    field, y0 = Net(), torch.randn(4, 2)

    def total(y: Tensor, integrate: Any) -> Tensor:
        return solve(field, y, (0.0, 1.0), method="rk4", steps=2, integrate=integrate).integrals.sum()

    with pytest.raises(neurode.GradientError, match=r"torch\.autograd\.grad"):
        torch.func.grad(total)(y0, jacobian_frobenius(NOISE))
    moving = y0.clone().requires_grad_()
    exact = torch.autograd.grad(total(moving, kinetic_energy()), moving)[0]
    torch.testing.assert_close(torch.func.grad(total)(y0, kinetic_energy()), exact)


def test_the_fused_engine_takes_both_where_it_is_built() -> None:
    try:
        library()
    except CannotLower as error:
        pytest.skip(f"no native engine: {error}")
    field, y0 = Net(), torch.randn(4, 2)
    results = []
    for engine in ("eager", "fused"):
        sizes = [kinetic_energy(), jacobian_frobenius(NOISE)]
        sol = solve(field, y0, (0.0, 1.0), method="rk4", steps=6, batch_dim=0, integrate=sizes, engine=engine)
        loss = sum(x.sum() for x in sol.integrals) + sol.y1.sin().sum()
        results.append(torch.autograd.grad(loss, list(field.parameters())))
    for x, y in zip(*results, strict=True):
        assert (x - y).norm() <= 1e-11 * max(1.0, float(x.norm()))


# ---- what the steps themselves estimate


def test_local_error_is_the_embedded_error_of_every_step() -> None:
    """Heun's method with Euler's inside, y' = a y: each error is h^2 a^2 y / 2."""
    a, h, n = torch.tensor(-0.7, requires_grad=True), 0.1, 10
    f = lambda t, y: a * y
    options = dict(method="adaptive_heun", first_step=h, min_step=h, max_step=h)
    sol = solve(f, torch.ones(4), (0.0, 1.0), estimates="local_error", **options)
    assert sol.stats.num_accepted == n
    growth = 1 + h * a + (h * a) ** 2 / 2
    exact = sum(growth**k for k in range(n)) * h * (h * a) ** 2 / 2
    torch.testing.assert_close(sol.local_error, exact)
    torch.testing.assert_close(*torch.autograd.grad(sol.local_error, a), *torch.autograd.grad(exact, a))


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if m.kind == "explicit" and m.adaptive])
@pytest.mark.parametrize("batch_dim", [None, 0])
def test_stiffness_of_a_linear_field_is_its_rate(method: str, batch_dim: int | None) -> None:
    able = neurode.output.estimates.estimated("stiffness", METHODS[method])
    run = lambda: solve(
        lambda t, y: -30 * y, torch.ones(3, 1), (0.0, 1.0), method=method, estimates="stiffness", batch_dim=batch_dim
    )
    if not able:
        with pytest.raises(neurode.InputError, match="tsit5"):
            run()
        return
    sol = run()
    torch.testing.assert_close(
        sol.stiffness, 30.0 * torch.as_tensor(sol.stats.num_accepted).double(), rtol=1e-3, atol=0.0
    )


@pytest.mark.parametrize("method", ["tsit5", "dopri5", "dop853"])
def test_rows_are_as_alone_and_gradcheck(method: str) -> None:
    field, y0 = Net(), torch.randn(5, 2, requires_grad=True)
    t1 = torch.tensor([0.2, 0.9, 1.5, 0.0, 3.0])
    # The two stages that stiffness is told from differ by less than the tolerance: of DOP853's, 1e-9 would leave rounding alone.
    options = dict(method=method, rtol=1e-6, atol=1e-6, estimates=("local_error", "stiffness"))
    rows = solve(field, y0, (torch.zeros(5), t1), batch_dim=0, compact=True, **options)
    for i in (0, 1, 2, 4):
        alone = solve(field, y0[i], (0.0, float(t1[i])), **options)
        torch.testing.assert_close(rows.local_error[i], alone.local_error, rtol=1e-3, atol=1e-16)
        torch.testing.assert_close(rows.stiffness[i], alone.stiffness, rtol=1e-3, atol=0.0)
    assert rows.local_error[3] == rows.stiffness[3] == 0
    grads = torch.autograd.grad(rows.local_error.sum() + rows.stiffness.sum(), [y0, *field.parameters()])
    assert all(torch.isfinite(g).all() for g in grads)

    def step(y0: Tensor) -> Tensor:
        grid = dict(method=method, first_step=0.5, min_step=0.5, max_step=0.5, estimates=("local_error", "stiffness"))
        sol = solve(field, y0, (0.0, 1.0), **grid)
        return torch.stack([1e3 * sol.local_error, sol.stiffness])

    # DOP853's two stages at one time differ by 1e-7: differences over less than 1e-4 would be rounding.
    assert torch.autograd.gradcheck(step, (y0[:2].detach().requires_grad_(),), eps=1e-4, atol=1e-4)


def test_failed_rows_have_no_estimate_and_spoil_no_gradient() -> None:
    k, a = torch.tensor([1.0, 40.0, 1.0]).reshape(-1, 1), torch.ones(1, requires_grad=True)
    f = lambda t, y, k: a * k * (0.1 + torch.sqrt(1.5 - 0.1 * y))
    sol = solve(
        f, torch.ones(3, 1), (0.0, 2.0), args=(neurode.per_row(k),), batch_dim=0, on_failure="nan", method="dopri5",
        estimates=("local_error", "stiffness"),
    )  # fmt: skip
    assert sol.local_error.isnan().tolist() == sol.stiffness.isnan().tolist() == [False, True, False]
    assert torch.isfinite(torch.autograd.grad(sol.local_error.nansum() + sol.stiffness.nansum(), a)[0]).all()


@pytest.mark.parametrize("gradient", ["discrete", "continuous"])
def test_other_strategies_name_what_can(gradient: str) -> None:
    with pytest.raises(neurode.GradientError, match=r"random_step.*gradient='autograd'"):
        solve(Net(), torch.ones(4, 2), (0.0, 1.0), method="tsit5", estimates="local_error", gradient=gradient)


def test_estimates_keep_the_tape_where_memory_would_not() -> None:
    with pytest.warns(RuntimeWarning, match="estimates="):
        sol = solve(Net(), torch.ones(4, 2), (0.0, 1.0), method="rk4", steps=40, estimates="stiffness", memory=20_000)
    assert sol.stats.gradient.startswith("autograd (auto") and sol.stiffness.requires_grad


@pytest.mark.parametrize(
    ("options", "match"),
    [(dict(method="rk4", steps=2, estimates="local_error"), "tsit5"),
     (dict(estimates="local_eror"), "Did you mean 'local_error'"),
     (dict(method="bosh3", estimates="stiffness"), "hold no estimate"),
     (dict(method="explicit_adams", steps=4, estimates="stiffness"), "hold no")],
)  # fmt: skip
def test_estimates_that_there_are_not(options: Any, match: str) -> None:
    with pytest.raises(neurode.InputError, match=match):
        solve(lambda t, y: -y, torch.ones(3), (0.0, 1.0), **options)


@pytest.mark.parametrize("gradient", ["autograd", "discrete", "continuous"])
@pytest.mark.parametrize("batch_dim", [None, 0])
def test_one_random_step_goes_with_every_strategy(gradient: str, batch_dim: int | None) -> None:
    field, y0 = Net(), torch.randn(4, 2, generator=torch.Generator().manual_seed(3))
    values = []
    for strategy in ("autograd", gradient):
        sol = solve(
            field,
            y0,
            (0.0, 1.0),
            method="rk4",
            steps=40,
            t_eval=torch.linspace(0, 1, 6),
            batch_dim=batch_dim,
            gradient=strategy,
        )
        step = random_step(field, sol, length=0.2, batch_dim=batch_dim, generator=torch.Generator().manual_seed(4))
        assert torch.as_tensor(step.stats.num_accepted).eq(1).all()
        values.append(torch.autograd.grad((step.local_error * 1e4 + step.stiffness).sum(), list(field.parameters())))
    limit = 1e-3 if gradient == "continuous" else 1e-11
    for x, y in zip(*values, strict=True):
        assert (x - y).norm() <= limit * max(1.0, float(x.norm()))


def test_random_steps_are_unbiased_and_go_along_time() -> None:
    f = lambda t, y: -torch.ones_like(y) * t
    sol = solve(f, torch.ones(2), (2.0, 0.0), method="rk4", steps=8, t_eval=torch.linspace(2, 0, 9))
    generator = torch.Generator().manual_seed(0)
    starts = {float(random_step(f, sol, length=0.25, generator=generator).t1) + 0.25 for _ in range(80)}
    assert starts == {2.0 - 0.25 * i for i in range(8)}
    with pytest.raises(neurode.InputError, match="length"):
        random_step(f, sol, length=0.0)


def test_random_end_times() -> None:
    generator = torch.Generator().manual_seed(0)
    ends = random_end_time(0.0, 2.0, 0.5, rows=10_000, generator=generator)
    assert ends.dtype == torch.float64 and ends.min() >= 1.5 and ends.max() <= 2.5
    assert abs(ends.mean() - 2.0) < 0.02 and abs(ends.std() - 0.5 / math.sqrt(3)) < 0.01
    backward = random_end_time(1.0, 0.0, 1.0, rows=100, generator=generator)
    assert (backward <= 1.0).all()
    solve(lambda t, y: -y, torch.ones(3, 1), (0.0, random_end_time(0.0, 1.0, 0.5, rows=3)), batch_dim=0)
    for width in (0.0, -1.0, 3.0):
        with pytest.raises(neurode.InputError, match="width"):
            random_end_time(0.0, 2.0, width)
