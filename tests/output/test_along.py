"""Beside the states: statistics kept in their place, auxiliary values, running integrals."""

from __future__ import annotations

import math

import pytest
import torch

import neurode

FIXED, ADAPTIVE = dict(method="rk4", steps=40), dict(method="dopri5", rtol=1e-8, atol=1e-10)
BOTH = pytest.mark.parametrize("options", [FIXED, ADAPTIVE], ids=["fixed", "adaptive"])
BATCH = pytest.mark.parametrize("batch_dim", [None, 0])
TIMES = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)


@BOTH
@BATCH
def test_save_keeps_a_statistic_in_place_of_the_state(options, batch_dim):
    seen = set()

    def norm(t, y, k):
        seen.add((tuple(t.shape), tuple(y.shape)))
        return {"norm": y.square().sum(-1).sqrt(), "time": t.reshape(-1)}

    y0 = torch.randn(4, 3)
    plain = neurode.solve(lambda t, y, k: -k * y, y0, (0, 1), t_eval=TIMES, args=(2.0,), batch_dim=batch_dim, **options)
    kept = neurode.solve(
        lambda t, y, k: -k * y, y0, (0, 1), t_eval=TIMES, args=(2.0,), batch_dim=batch_dim, save=norm, **options
    )
    assert kept.ys["norm"].shape == (3, 4) and torch.equal(kept.ys["norm"], plain.ys.square().sum(-1).sqrt())
    assert torch.equal(kept.ys["time"][:, 0], TIMES) and torch.equal(kept.y1, plain.y1)
    assert kept.stats.num_calls == plain.stats.num_calls
    assert seen == {((), (4, 3)) if batch_dim is None else ((4, 1), (4, 3))}


def test_save_without_t_eval_and_with_steps_and_with_none():
    f, y0 = lambda t, y: -y, torch.ones(2)
    assert neurode.solve(f, y0, (0, 1), save=lambda t, y: y.sum(), **ADAPTIVE).ys.shape == (1,)
    steps = neurode.solve(f, y0, (0, 1), save=lambda t, y: y.sum(), t_eval="steps", **ADAPTIVE)
    assert len(steps.ys) == steps.num_saved
    assert neurode.solve(f, y0, (0, 1), save=lambda t, y: y.sum(), t_eval=[], **ADAPTIVE).ys.shape == (0,)


@BOTH
@BATCH
def test_aux_is_that_of_f_at_the_outputs(options, batch_dim):
    calls = []

    def f(t, y):
        calls.append(1)
        return -y, {"rate": (t * y).sum(-1), "when": t}

    y0 = torch.randn(4, 3)
    sol = neurode.solve(f, y0, (0, 1), t_eval=TIMES, has_aux=True, batch_dim=batch_dim, **options)
    assert sol.aux["rate"].shape == (3, 4)
    assert torch.allclose(sol.aux["rate"], TIMES[:, None] * sol.ys.sum(-1), rtol=1e-13)
    assert sol.stats.num_calls == len(calls)
    if batch_dim is None:
        assert sol.stats.num_evaluations == len(calls) and sol.aux["when"].shape == (3,)


def test_aux_has_gradients_and_failures_do_not_spoil_them():
    a = torch.tensor(-1.0, requires_grad=True)

    def f(t, y, bad):
        return a * y + torch.where((bad > 0) & (t > 0.4), torch.nan, 0.0), a * y * y

    bad = neurode.per_row(torch.tensor([[0.0], [1.0]]))
    sol = neurode.solve(
        f,
        torch.ones(2, 1),
        (0, 1),
        args=(bad,),
        t_eval=[0.2, 0.8],
        has_aux=True,
        batch_dim=0,
        on_failure="nan",
        **ADAPTIVE,
    )
    assert (
        torch.isnan(sol.aux).squeeze(-1).tolist() == [[False, False], [False, True]] or torch.isnan(sol.aux[1, 1]).all()
    )
    (grad,) = torch.autograd.grad(sol.aux[1, 0].sum(), a)  # a exp(2 a t)
    assert grad.item() == pytest.approx(math.exp(-1.6) * (1 - 1.6), rel=1e-6)


def test_outputs_behind_a_terminal_event_are_nan():
    stop = neurode.Event(lambda t, y: y[0] - 0.5, terminal=True)
    f = lambda t, y: (-y, y.sum())
    sol = neurode.solve(
        f, [1.0], (0, 5), t_eval=[0.1, 3.0], events=[stop], has_aux=True, save=lambda t, y: 2 * y, **ADAPTIVE
    )
    assert torch.isnan(sol.aux).tolist() == [False, True]
    assert torch.isnan(sol.ys).flatten().tolist() == [False, True]
    assert sol.ys[0].item() == pytest.approx(2 * math.exp(-0.1))


@BOTH
@BATCH
def test_running_integrals_against_closed_forms(options, batch_dim):
    y0 = torch.tensor([[1.0], [2.0]])

    def integrand(t, y):
        return {"y": y, "work": (y * y).squeeze(-1), "t": t.expand(2, 1)}

    sol = neurode.solve(lambda t, y: -y, y0, (0, 1), t_eval=TIMES, integrate=integrand, batch_dim=batch_dim, **options)
    decay = torch.exp(-TIMES)
    assert torch.allclose(sol.integrals["y"], y0 * (1 - decay)[:, None, None], atol=2e-6)
    assert torch.allclose(sol.integrals["work"], (y0 * y0).squeeze(-1) * (1 - decay**2)[:, None] / 2, atol=2e-6)
    assert torch.allclose(sol.integrals["t"], (TIMES**2 / 2)[:, None, None].expand(3, 2, 1), atol=1e-6)
    assert sol.ys.shape == (3, 2, 1) and torch.allclose(sol.ys, y0 * decay[:, None, None], rtol=1e-6)


@BATCH
def test_integrals_change_no_step_unless_asked(batch_dim):
    y0 = torch.tensor([[1.0], [2.0]])
    f, fast = lambda t, y: -y, lambda t, y: torch.sin(60 * t) + 0 * y
    options = dict(method="dopri5", rtol=1e-6, atol=1e-8, batch_dim=batch_dim)
    plain = neurode.solve(f, y0, (0, 3), **options)
    along = neurode.solve(f, y0, (0, 3), integrate=fast, **options)
    steered = neurode.solve(f, y0, (0, 3), integrate=fast, steer_integrals=True, **options)
    assert torch.equal(plain.y1, along.y1)
    assert torch.equal(torch.as_tensor(plain.stats.num_evaluations), torch.as_tensor(along.stats.num_evaluations))
    assert torch.as_tensor(steered.stats.num_accepted).max() > 3 * torch.as_tensor(plain.stats.num_accepted).max()
    true = (1 - math.cos(180)) / 60
    assert (steered.integrals[-1] - true).abs().max() < 1e-5 < (along.integrals[-1] - true).abs().max()


def test_integrals_know_norms_tolerances_events_and_dense_output():
    shapes = []

    def norm(y):
        shapes.append(y.shape)
        return y.abs().amax()

    fall = lambda t, y: torch.stack([y[1], torch.full_like(y[1], -10.0)])
    bounce = neurode.Event(
        lambda t, y: y[0], direction=-1, apply=lambda t, y: torch.stack([torch.zeros_like(y[0]), -0.5 * y[1]])
    )
    sol = neurode.solve(
        fall, [5.0, 0.0], (0, 1.8), events=[bounce], integrate=lambda t, y: y[1].abs(), norm=norm, dense=True,
        rtol=torch.tensor([1e-8, 1e-7]), atol=1e-9, method="dopri5",
    )  # fmt: skip
    assert set(shapes) == {(2,)}
    assert sol.events[0].y.shape == (1, 2) and sol.events[0].t.item() == pytest.approx(1.0)
    way = 5.0 + 1.25 + (1.25 - (5 * 0.8 - 5 * 0.64))  # down, up, and a little down again
    assert sol.integrals[-1].item() == pytest.approx(way, rel=2e-2)  # |v| has a kink
    assert sol(torch.tensor([0.5, 0.6])).shape == (2, 2) and sol.derivative(0.5)[0].item() == pytest.approx(-5.0)


@BOTH
def test_gradients_of_integrals(options):
    a = torch.tensor(0.7, requires_grad=True)
    sol = neurode.solve(lambda t, y: -a * y, torch.ones(1), (0, 1), integrate=lambda t, y: y * y, **options)
    (grad,) = torch.autograd.grad(sol.integrals[-1].sum(), a)
    e = math.exp(-1.4)
    assert sol.integrals[-1].item() == pytest.approx((1 - e) / 1.4, rel=1e-5)
    assert grad.item() == pytest.approx(e / 0.7 - (1 - e) / (2 * 0.49), rel=1e-4)


def test_a_pytree_state_sees_its_own_structure_and_time():
    def f(t, y):
        assert set(y) == {"a", "b"} and t.shape == (3,)  # leaves of different rank
        return {"a": -y["a"], "b": -y["b"]}

    y0 = {"a": torch.ones(3, 2), "b": torch.ones(3)}
    sol = neurode.solve(f, y0, (0, 1), batch_dim=0, integrate=lambda t, y: y["b"], **ADAPTIVE)
    assert torch.allclose(sol.integrals[-1], torch.full((3,), 1 - math.exp(-1)), atol=1e-7)
    assert sol.y1["a"].shape == (3, 2)


def test_integrals_refuse_what_they_cannot_do():
    f, y0 = lambda t, y: -y, torch.ones(2)
    with pytest.raises(neurode.InputError, match="integrate is of type int"):
        neurode.solve(f, y0, (0, 1), integrate=3)
    with pytest.raises(neurode.InputError, match="returned float"):
        neurode.solve(f, y0, (0, 1), integrate=lambda t, y: 1.0)
    with pytest.raises(neurode.InputError, match="2 rows"):
        neurode.solve(f, torch.ones(2, 1), (0, 1), integrate=lambda t, y: y.sum(), batch_dim=0)
    with pytest.raises(neurode.InputError, match="symplectic"):
        neurode.solve(
            lambda t, s: (s[1], -s[0]), (y0, y0), (0, 1), method="leapfrog", steps=3, integrate=lambda t, s: s[0]
        )
    with pytest.raises(neurode.FieldError, match=r"shape \(1, 2\), but the state has shape \(2,\)"):
        neurode.solve(lambda t, y: y[None], y0, (0, 1), integrate=lambda t, y: y)
