"""Gradients on PyTorch's tape: gradcheck for every input of a solve, fixed and adaptive, joint and in rows."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import neurode
from neurode.fused.native import available

WEIGHT = torch.tensor([[-0.4, 0.9], [-1.1, -0.2]], dtype=torch.float64)
METHODS = {
    "euler": dict(method="euler", steps=6),
    "midpoint": dict(method="midpoint", steps=5),
    "heun": dict(method="heun", steps=5),
    "ralston": dict(method="ralston", step_size=0.17),
    "rk4": dict(method="rk4", steps=4),
    "bosh3": dict(method="bosh3", rtol=1e-9, atol=1e-9),
    "dopri5": dict(method="dopri5", rtol=1e-9, atol=1e-9),
    "tsit5": dict(method="tsit5", rtol=1e-9, atol=1e-9),
    "dop853": dict(method="dop853", rtol=1e-9, atol=1e-9),
}
# With steps that vary from call to call, finite differences see the change of the grid: an error of the order of rtol.
SIZES = dict(eps=1e-4, atol=2e-5, rtol=1e-4)


def field(t, y, w, shift):
    return torch.tanh(y @ w.T) * (1 + 0.5 * torch.sin(2 * t)) + shift


def inputs(rows):
    y0 = torch.tensor([[0.3, -0.8], [1.1, 0.4]])[: rows or 1]
    y0 = y0 if rows else y0[0]
    t0, t1 = torch.tensor(0.2), torch.tensor(1.0)
    if rows:
        t0, t1 = torch.tensor([0.2, 0.0]), torch.tensor([1.0, 0.7])
    leaves = (y0, WEIGHT.clone(), torch.tensor([0.1, -0.2]), t0, t1)
    return tuple(x.clone().requires_grad_() for x in leaves)


@pytest.mark.parametrize("name", METHODS)
def test_gradcheck_joint(name):
    def run(y0, w, shift, t0, t1):
        return neurode.solve(field, y0, (t0, t1), args=(w, shift), gradient="autograd", **METHODS[name]).y1

    assert gradcheck(run, inputs(None), **SIZES)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "bosh3"])  # thousands of steps at 1e-9
def test_gradcheck_rows_with_spans_of_their_own(name):
    def run(y0, w, shift, t0, t1):
        options = METHODS[name]
        return neurode.solve(field, y0, (t0, t1), args=(w, shift), batch_dim=0, gradient="autograd", **options).y1

    assert gradcheck(run, inputs(2), **SIZES)


@pytest.mark.parametrize("rows", [None, 2])
@pytest.mark.parametrize("name", ["rk4", "tsit5", "dop853"])
def test_gradcheck_of_outputs_and_of_their_times(name, rows):
    y0, w, shift, t0, t1 = inputs(rows)
    share = torch.tensor([0.0, 0.21, 0.64, 1.0])
    times = (t0 + share.reshape(-1, *[1] * t0.ndim) * (t1 - t0)).detach().requires_grad_()
    span = (t0.detach(), t1.detach())
    batch_dim = None if rows is None else 0

    def run(y0, w, times):
        options = METHODS[name]
        return neurode.solve(field, y0, span, args=(w, shift.detach()), t_eval=times, batch_dim=batch_dim, **options).ys

    # An output at an end of the span has a derivative from inside only: finite differences need room, so move the ends in.
    inner = times.detach()[1:3].requires_grad_()
    assert gradcheck(run, (y0, w, inner), **SIZES)
    ys = neurode.solve(
        field, y0, span, args=(w, shift), t_eval=times, batch_dim=batch_dim, **METHODS[name]
    ).ys  # fmt: skip
    (slope,) = torch.autograd.grad(ys.sum(), times)
    dy = field(times.detach().unsqueeze(-1), ys.detach(), WEIGHT, shift.detach()).sum(-1)
    # The slope of a cubic in a coarse step of rk4 is off by its own third order.
    assert torch.allclose(slope, dy, rtol=1e-5 if name != "rk4" else 3e-2, atol=1e-5)


@pytest.mark.parametrize("rows", [None, 2])
def test_parameters_of_a_module_without_being_told(rows):
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
    y0 = torch.randn(2, 2)
    options = dict(method="rk4", steps=5, batch_dim=None if rows is None else 0)

    def loss():
        return neurode.solve(lambda t, y: net(y), y0, (0, 1), **options).y1.square().sum()

    loss().backward()
    for parameter in net.parameters():
        index = parameter.numel() // 2
        flat, grad = parameter.data.view(-1), parameter.grad.view(-1)
        keep, eps = flat[index].item(), 1e-6
        flat[index] = keep + eps
        up = loss().item()
        flat[index] = keep - eps
        down = loss().item()
        flat[index] = keep
        assert grad[index].item() == pytest.approx((up - down) / (2 * eps), rel=1e-6, abs=1e-9)


def test_gradients_against_a_closed_form():
    """y = y0 exp(a (t1 - t0)), so every derivative is known."""
    y0, a, t0, t1 = (torch.tensor(v, requires_grad=True) for v in (2.0, -0.7, 0.3, 1.9))
    y1 = neurode.solve(lambda t, y, a: a * y, y0, (t0, t1), args=(a,), method="dopri5", rtol=1e-10, atol=1e-12).y1
    grads = torch.autograd.grad(y1, (y0, a, t0, t1))
    y = 2 * torch.exp(torch.tensor(-0.7 * 1.6)).item()
    assert y1.item() == pytest.approx(y, rel=1e-9)
    assert [g.item() for g in grads] == pytest.approx([y / 2, 1.6 * y, 0.7 * y, -0.7 * y], rel=1e-8)


def test_the_shift_of_a_whole_grid():
    """An autonomous field does not see where the grid lies: both ends together have no gradient."""
    t0 = torch.tensor(0.4, requires_grad=True)
    y1 = neurode.solve(lambda t, y: torch.sin(y), torch.ones(2), (t0, t0 + 1), method="rk4", steps=7).y1
    (grad,) = torch.autograd.grad(y1.sum(), t0)
    assert abs(grad.item()) < 1e-14


@pytest.mark.parametrize("options", [METHODS["rk4"], METHODS["tsit5"]], ids=["rk4", "tsit5"])
def test_double_backward(options):
    w = WEIGHT.clone().requires_grad_()
    y0 = torch.tensor([0.3, -0.8], requires_grad=True)

    def run(y0, w):
        shift = torch.tensor([0.1, -0.2])
        return neurode.solve(field, y0, (0.0, 0.6), args=(w, shift), **options).y1

    assert gradgradcheck(run, (y0, w), eps=1e-4, atol=1e-4, rtol=1e-3)


def test_jacobians_by_both_modes():
    from torch.func import jacfwd, jacrev

    def run(y0):
        return neurode.solve(field, y0, (0.0, 0.6), args=(WEIGHT, torch.zeros(2)), method="rk4", steps=4).y1

    y0 = torch.tensor([0.3, -0.8])
    plain = torch.autograd.functional.jacobian(run, y0)
    assert torch.allclose(jacrev(run)(y0), plain, rtol=1e-12)
    assert torch.allclose(jacfwd(run)(y0), plain, rtol=1e-12)


def test_vmap_over_a_fixed_grid():
    y0 = torch.randn(5, 2)

    def run(y0):
        return neurode.solve(field, y0, (0.0, 0.6), args=(WEIGHT, torch.zeros(2)), method="rk4", steps=4).y1

    assert torch.allclose(torch.vmap(run)(y0), torch.stack([run(y) for y in y0]), rtol=1e-13)


@pytest.mark.parametrize("state", ["dict", "tuple"])
def test_gradients_through_a_pytree(state):
    a, b = torch.tensor([0.5, 1.0], requires_grad=True), torch.tensor(0.3, requires_grad=True)

    def run(a, b):
        if state == "dict":
            y0, f = {"a": a, "b": b}, lambda t, y: {"a": -y["a"] * y["b"], "b": y["a"].sum()}
            y1 = neurode.solve(f, y0, (0, 1), method="rk4", steps=4).y1
            return y1["a"], y1["b"]
        y1 = neurode.solve(lambda t, y: (-y[0] * y[1], y[0].sum()), (a, b), (0, 1), method="rk4", steps=4).y1
        return y1[0], y1[1]

    assert gradcheck(run, (a, b))


def test_complex_gradients():
    y0 = torch.tensor([1.0 + 0.5j], requires_grad=True)
    a = torch.tensor(-0.3 + 2.0j, requires_grad=True)

    def run(y0, a):
        return neurode.solve(lambda t, y, a: a * y * y.conj() + t, y0, (0, 0.5), args=(a,), method="rk4", steps=4).y1

    assert gradcheck(run, (y0, a))


def test_a_rejected_step_leaves_no_gradient():
    """A first step far too long is rejected; the gradient is that of the accepted steps alone."""
    y0 = torch.tensor([1.0], requires_grad=True)
    sol = neurode.solve(lambda t, y: -8 * y, y0, (0, 1), method="dopri5", rtol=1e-8, atol=1e-10, first_step=1.0)
    assert sol.stats.num_rejected > 0
    (grad,) = torch.autograd.grad(sol.y1.sum(), y0)
    assert grad.item() == pytest.approx(sol.y1.item(), rel=1e-12)  # linear: dy1/dy0 = y1 / y0


@pytest.mark.parametrize("batch_dim", [None, 0])
@pytest.mark.parametrize("options", [dict(method="rk4", steps=20), dict(method="dopri5", rtol=1e-9, atol=1e-9)])
def test_both_modes_follow_output_times(options, batch_dim):
    """d/dt of exp(-t) at each output, forward and reverse."""
    from torch.func import jacfwd, jacrev

    times = torch.tensor([0.2, 0.5, 0.9])
    run = lambda t: neurode.solve(
        lambda t, y: -y, torch.ones(1, 1), (0, 1), t_eval=t, batch_dim=batch_dim, **options
    ).ys.flatten()
    for jacobian in (jacfwd, jacrev) if "steps" in options else (jacfwd,):
        assert torch.allclose(jacobian(run)(times), torch.diag(-torch.exp(-times)), atol=1e-4)


def test_vmap_over_events_says_what_to_type():
    event = neurode.Event(lambda t, y: y[0])
    with pytest.raises(neurode.InputError, match="batch_dim=0"):
        torch.vmap(lambda y: neurode.solve(lambda t, y: -y, y, (0, 1), method="rk4", steps=3, events=[event]).y1)(
            torch.ones(2, 2)
        )


class Decay(torch.nn.Module):
    def forward(self, t, y):
        return -y


STRATEGIES = ["autograd", "discrete", "continuous", "reversible", "fused"]


@pytest.mark.parametrize("batch_dim", [None, 0])
@pytest.mark.parametrize("name", ["rk4", "dopri5", "dop853"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_output_is_a_time_of_its_own(strategy, name, batch_dim):
    """At t0, at t1 and on a point of the grid it stays where it is when an end of the span moves: y = y0 exp(t0 - t)."""
    how = dict(engine="fused") if strategy == "fused" else dict(engine="eager", gradient=strategy)
    options = dict(method="rk4", steps=40) if name == "rk4" else METHODS[name]
    if how["engine"] == "fused" and not available():
        pytest.skip("the native library is not built")
    times = torch.tensor([0.0, 0.75, 1.5])
    t0, t1 = torch.tensor(0.0, requires_grad=True), torch.tensor(1.5, requires_grad=True)
    y0 = torch.tensor([[2.0, 3.0]])
    ys = neurode.solve(Decay(), y0, (t0, t1), t_eval=times, batch_dim=batch_dim, **options, **how).ys
    slopes = [torch.autograd.grad(y.sum(), (t0, t1), retain_graph=True, allow_unused=True) for y in ys]
    by_t0, by_t1 = (torch.stack([g[i] if g[i] is not None else torch.tensor(0.0) for g in slopes]) for i in (0, 1))
    assert torch.allclose(by_t0, 5 * torch.exp(-times), atol=1e-5)
    assert torch.allclose(by_t1, torch.zeros(3), atol=1e-5)


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("batch_dim", [None, 0])
@pytest.mark.parametrize("strategy", STRATEGIES[:-1])
def test_outputs_of_an_empty_span_whose_ends_move(strategy, batch_dim, moving):
    y0, end = torch.tensor([[2.0, 3.0]], requires_grad=True), torch.tensor(1.0, requires_grad=True)
    times = torch.tensor([1.0, 1.0], requires_grad=moving)
    options = dict(method="dopri5", batch_dim=batch_dim, gradient=strategy, engine="eager")
    ys = neurode.solve(Decay(), y0, (end, end.detach()), t_eval=times, **options).ys
    assert torch.equal(ys.detach(), y0.detach().expand(2, 1, 2))
    assert torch.equal(torch.autograd.grad(ys.sum(), y0)[0], torch.full((1, 2), 2.0))


def test_vmap_over_the_span_of_equal_steps():
    f = lambda t, y: -t * y
    end = lambda y, t0, t1: neurode.solve(f, y, (t0, t1), method="rk4", steps=8).y1
    y0, t0, t1 = torch.randn(3, 2), torch.tensor([0.0, 0.5, 1.0]), torch.tensor([1.0, -2.0, 1.0])
    each = torch.stack([end(*row) for row in zip(y0, t0, t1, strict=True)])
    assert torch.allclose(torch.vmap(end)(y0, t0, t1), each, rtol=1e-14)
    slopes = torch.vmap(torch.func.jacrev(end, argnums=2))(y0, t0, t1)
    assert torch.allclose(slopes, torch.stack([f(b, y) for b, y in zip(t1, each, strict=True)]), atol=1e-2)


@pytest.mark.parametrize(
    "options",
    [dict(step_size=0.1), dict(steps=3, t_eval=[0.5]), dict(steps=3, dense=True), dict(steps=3, batch_dim=0)],
)
def test_vmap_over_a_span_whose_values_count_is_refused(options):
    end = lambda y, t1: neurode.solve(lambda t, y: -y, y, (0.0, t1), method="rk4", **options).y1
    with pytest.raises(neurode.InputError, match="steps=n and the state at the end alone"):
        torch.vmap(end)(torch.randn(3, 2), torch.tensor([1.0, 2.0, 3.0]))


def test_vmap_and_jacobian_of_a_continuous_solution():
    sol = neurode.solve(lambda t, y: -t * y, torch.randn(2), (0.0, 1.0), method="rk4", steps=8, dense=True)
    times = torch.rand(5)
    assert torch.allclose(torch.vmap(sol)(times), sol(times), rtol=1e-14)
    assert torch.allclose(torch.func.jacfwd(sol)(times[0]), sol.derivative(times[0]), rtol=1e-12)
