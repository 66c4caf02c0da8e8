"""The reversible gradient beyond the contract: rounding, memory, counts, rows that fail or leave, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from contract import Field, trained
from torch import nn

import neurode
from neurode import Reversible
from neurode.gradients.reversible import Retrace
from neurode.report.memory import peak_memory


def problem(dtype=torch.float64, rows=32):
    """A trained field, far from its initial values, and a batch of states."""
    model = Field()
    model.load_state_dict(trained(Field))
    generator = torch.Generator().manual_seed(3)
    y0 = torch.randn(rows, 2, generator=generator, dtype=torch.float64).to(dtype)
    return model.to(dtype), y0, (torch.eye(2, dtype=dtype), torch.zeros(1, 2, dtype=dtype))


def gradient(gradient, dtype=torch.float64, t1=1.0, **options):
    model, y0, args = problem(dtype)
    y0.requires_grad_()
    y1 = neurode.solve(model, y0, (0.0, t1), args=args, gradient=gradient, **options).y1
    return torch.cat([g.flatten() for g in torch.autograd.grad(y1.square().mean(), [y0, *model.parameters()])])


@pytest.mark.parametrize("steps", [20, 160])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_rounding_against_the_number_of_steps(dtype, limit, steps, record_property):
    exact = gradient("autograd", dtype, method=Reversible("rk4"), steps=steps)
    off = float((gradient("reversible", dtype, method="rk4", steps=steps) - exact).norm() / exact.norm())
    record_property("off by", off)
    assert off <= limit


def test_a_method_that_is_coupled_already_keeps_its_coupling():
    method = Reversible("bosh3", 0.8)
    exact, found = (gradient(name, method=method, rtol=1e-4) for name in ("autograd", "reversible"))
    assert float((found - exact).norm() / exact.norm()) <= 1e-12


def test_without_gradients_the_numbers_are_the_same():
    model, y0, args = problem()
    solve = lambda: neurode.solve(model, y0, (0, 1), args=args, method="rk4", steps=9, gradient="reversible")
    with torch.no_grad():
        plain = solve()
    assert torch.equal(plain.y1, solve().y1) and plain.stats.method == "reversible(rk4)"


def test_memory_does_not_grow_with_the_steps():
    """The bar is ten per cent from 20 to 2,560 steps (`benchmarks/gradients.py`); here fewer, so that the test is short."""
    model, y0, args = problem(torch.float32, 128)

    def peak(steps):
        def run():
            y1 = neurode.solve(model, y0, (0, 1), args=args, method="rk4", steps=steps, gradient="reversible").y1
            return torch.autograd.grad(y1.square().mean(), list(model.parameters()))

        return peak_memory(run, excluding=list(model.parameters()))

    assert peak(160) <= 1.1 * peak(20)


@pytest.mark.parametrize("batch_dim", [None, 0])
def test_what_an_adaptive_solve_keeps_are_eight_bytes_a_step_and_row(batch_dim, monkeypatch):
    tracks = []
    kept = neurode.gradients.reversible._Trace.forward

    def forward(work, y0):
        out = kept(work, y0)
        tracks.append(work.record)
        return out

    monkeypatch.setattr("neurode.gradients.reversible._Trace.forward", forward)
    model, y0, args = problem()
    sol = neurode.solve(
        model,
        y0,
        (0, 1),
        args=args,
        method="dopri5",
        rtol=1e-9,
        batch_dim=batch_dim,
        gradient="reversible",
        compact=False,
    )
    (track,) = tracks
    if batch_dim is None:
        assert track.ends.itemsize * len(track.ends) == 8 * (sol.stats.num_accepted + 1)
    else:
        ends = [end for end, _, _ in track.attempts]
        attempts = int((sol.stats.num_accepted + sol.stats.num_rejected).max())
        assert sum(end.nbytes for end in ends) == 8 * attempts * len(y0)
        assert len({id(rows) for _, rows, _ in track.attempts}) == 1


def test_counts_of_the_backward_pass():
    model, y0, args = problem()
    y0.requires_grad_()
    sol = neurode.solve(model, y0, (0, 1), args=args, method="rk4", steps=7, gradient="reversible")
    assert sol.stats.num_evaluations == 7 * 8 and sol.stats.backward is None
    sol.y1.sum().backward()
    back = sol.stats.backward
    assert (back.num_evaluations, back.num_calls, back.num_accepted) == (7 * 8, 7 * 8, 7)
    assert back.gradient == "reversible" and back.method == "reversible(rk4)"


def test_two_backward_passes_and_a_result_that_the_user_changes_in_place():
    model, y0, args = problem()
    y0.requires_grad_()
    sol = neurode.solve(model, y0, (0, 1), args=args, method="rk4", steps=5, gradient="reversible")
    (first,) = torch.autograd.grad(sol.y1.sum(), y0, retain_graph=True)
    with torch.no_grad():
        sol.y1.zero_()
    assert torch.equal(first, torch.autograd.grad(sol.y1.sum(), y0)[0])


def test_complex_states():
    w = torch.tensor(0.3 + 1j, dtype=torch.complex128, requires_grad=True)

    def run(gradient):
        y1 = neurode.solve(
            lambda t, y: w * y * (1 + t),
            torch.tensor([1 + 0.5j]),
            (0, 1),
            method=Reversible("rk4"),
            steps=5,
            gradient=gradient,
        ).y1
        return torch.autograd.grad((y1 * (2 - 1j)).real.sum(), w)[0]

    torch.testing.assert_close(run("reversible"), run("autograd"), rtol=1e-13, atol=1e-13)


def test_gradcheck_of_everything_on_a_fixed_grid():
    weight = torch.tensor([[-0.4, 0.9], [-1.1, -0.2]]).requires_grad_()
    y0, t0, t1 = (
        torch.tensor([0.3, -0.8]).requires_grad_(),
        torch.tensor(0.2).requires_grad_(),
        torch.tensor(1.0).requires_grad_(),
    )
    times = torch.tensor([0.33, 0.78]).requires_grad_()

    def run(y0, w, t0, t1, times):
        f = lambda t, y, w: torch.tanh(y @ w.T) * (1 + 0.5 * torch.sin(2 * t))
        sol = neurode.solve(f, y0, (t0, t1), args=(w,), t_eval=times, method="rk4", steps=4, gradient="reversible")
        return sol.y1, sol.ys

    assert torch.autograd.gradcheck(run, (y0, weight, t0, t1, times), eps=1e-5, atol=1e-7)


# ---- rows


def rows_field(t, y, w, x):
    return torch.tanh(y @ w) * x + 0.1 * y


def rows_problem(rows=24):
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    return draw(rows, 2), draw(2, 2), draw(rows, 2), torch.linspace(0.1, 2.0, rows)


@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("compact", [None, False])
def test_rows_that_leave_keep_their_gradients(compact, outputs):
    def run(gradient, compact):
        y0, w, x, t1 = (leaf.requires_grad_() for leaf in rows_problem())
        times = torch.linspace(0, 1, 4).unsqueeze(1) * t1.detach() if outputs else None
        sol = neurode.solve(
            rows_field, y0, (torch.zeros(24), t1), args=(w, neurode.per_row(x)), t_eval=times, method=Reversible("tsit5"),
            batch_dim=0, compact=compact, gradient=gradient, rtol=1e-6,
        )  # fmt: skip
        return torch.autograd.grad(sol.ys.square().sum(), (y0, w, x, t1))

    for a, b in zip(run("autograd", False), run("reversible", compact), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "options", [dict(method="rk4", steps=12), dict(method="dopri5"), dict(method="rk4", steps=12, own=True)], ids=str
)
@pytest.mark.parametrize("outputs", [False, True])
def test_rows_that_fail_leave_shared_gradients_alone(options, outputs):
    """The gradients of what rows share are those of the batch without the row that becomes NaN."""
    options = dict(options)
    own = options.pop("own", False)

    y0, w, x, t1 = rows_problem(6)
    x[2] = 1e4  # marks the row that fails

    def run(keep):
        leaves = [leaf.clone().requires_grad_() for leaf in (y0[keep], w, x[keep])]
        f = lambda t, y, w, x: torch.where(
            (x[:, :1] > 1e3) & (t > 0.3), torch.log(-y.square() - 1), rows_field(t, y, w, x)
        )
        span = (torch.zeros(len(keep)), t1[keep]) if own or "steps" not in options else (0.0, 1.0)
        sol = neurode.solve(
            f, leaves[0], span, args=(leaves[1], neurode.per_row(leaves[2])), batch_dim=0, on_failure="nan",
            gradient="reversible", t_eval=torch.linspace(0, 0.1, 3) if outputs else None, **options,
        )  # fmt: skip
        return sol, torch.autograd.grad(torch.cat([sol.ys, sol.y1[None]]).square().nansum(), leaves)

    good = [0, 1, 3, 4, 5]
    (sol, (gy0, gw, gx)), (_, (ry0, rw, rx)) = run([*range(6)]), run(good)
    assert sol.status.failed.tolist() == [False, False, True, False, False, False]
    torch.testing.assert_close(gw, rw, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gy0[good], ry0, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gx[good], rx, rtol=1e-10, atol=1e-12)
    assert not gy0[2].any() and not gx[2].any()


# ---- refusals


def test_methods_that_cannot_be_coupled_name_strategies_that_can():
    with pytest.raises(neurode.GradientError, match=r"multistep method 'explicit_adams'.*gradient='autograd'"):
        neurode.solve(lambda t, y: -y, [1.0], (0, 1), method="explicit_adams", steps=9, gradient="reversible")
    with torch.no_grad(), pytest.raises(neurode.InputError, match="couples explicit one-step methods"):
        neurode.solve(lambda t, y: -y, [1.0], (0, 1), method="explicit_adams", steps=9, gradient="reversible")


@pytest.mark.parametrize("batch_dim", [None, 0])
def test_rounding_that_would_drown_the_gradient_is_an_error(batch_dim):
    """0.9 ** -320 times the rounding of float64 is 0.1 of the states: measured, the gradient is off by a hundredth."""
    solve = lambda coupling, steps: neurode.solve(
        lambda t, y: -y, torch.ones(2, 1), (0, 1), method=Reversible("rk4", coupling), steps=steps, gradient="reversible",
        batch_dim=batch_dim,
    )  # fmt: skip
    with pytest.raises(neurode.GradientError, match=r"over 320 steps with coupling=0.9 .*nearer to 1"):
        solve(0.9, 320)
    solve(0.9, 160), solve(0.999, 320), solve(1.0, 320)


def test_second_derivatives_name_the_tape():
    w = torch.tensor(0.5, requires_grad=True)
    sol = neurode.solve(lambda t, y: w * y, [1.0], (0, 1), method="rk4", steps=3, gradient="reversible")
    with pytest.raises(neurode.GradientError, match=r"gradient='autograd', with method=neurode.Reversible"):
        torch.autograd.grad(sol.y1.sum(), w, create_graph=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), "draws random numbers"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "changes a tensor"),
    ],
    ids=["dropout", "batch norm"],
)
def test_fields_that_cannot_be_evaluated_again_are_refused(make, message):
    net = make()
    with pytest.raises(neurode.GradientError, match=f"{message}.*gradient='autograd'"):
        neurode.solve(lambda t, y: net(y), torch.randn(4, 2), (0, 1), method="rk4", steps=3, gradient="reversible")


def test_a_tensor_that_f_uses_only_later_is_an_error():
    a, b = torch.tensor(0.5, requires_grad=True), torch.tensor(0.7, requires_grad=True)
    f = lambda t, y: a * y if float(t.detach()) < 0.5 else b * y
    sol = neurode.solve(f, [1.0], (0, 1), method="rk4", steps=4, gradient="reversible")
    with pytest.raises(neurode.GradientError, match="at some times but not at the start"):
        sol.y1.sum().backward()


def test_it_is_what_is_registered():
    assert isinstance(neurode.gradients.STRATEGIES["reversible"], Retrace)
