"""Gradients through PyTorch's tape, and the continuous adjoint beside them, against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import neurode
from neurode import Event, solve

FIXED = ("euler", "midpoint", "heun", "ralston", "rk4")
ADAPTIVE = ("bosh3", "dopri5", "tsit5")
OPTIONS = {m: {"method": m, "steps": 6} for m in FIXED} | {
    m: {"method": m, "rtol": 1e-9, "atol": 1e-9} for m in ADAPTIVE
}


def f(t: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(y @ w) * torch.cos(t) - 0.1 * y


def inputs(rows: int = 2) -> tuple[Tensor, ...]:
    torch.manual_seed(3)
    y0, w = torch.randn(rows, 3), torch.randn(3, 3)
    return tuple(x.requires_grad_() for x in (y0, w, torch.tensor(0.1), torch.tensor(1.3)))


@pytest.mark.parametrize("method", OPTIONS)
def test_gradcheck_state_args_and_times(method: str) -> None:
    def end(y0: Tensor, w: Tensor, t0: Tensor, t1: Tensor) -> Tensor:
        return solve(f, y0, (t0, t1), args=(w,), gradient="autograd", **OPTIONS[method]).y1

    assert torch.autograd.gradcheck(end, inputs())


@pytest.mark.parametrize("method", OPTIONS)
def test_gradcheck_rows_with_spans_of_their_own(method: str) -> None:
    y0, w, *_ = inputs(3)
    t0, t1 = torch.tensor([0.0, 0.2, 0.1], requires_grad=True), torch.tensor([1.0, 0.7, -0.9], requires_grad=True)

    def end(y0: Tensor, w: Tensor, t0: Tensor, t1: Tensor) -> Tensor:
        return solve(f, y0, (t0, t1), args=(w,), batch_dim=0, **OPTIONS[method]).y1

    assert torch.autograd.gradcheck(end, (y0, w, t0, t1))


@pytest.mark.parametrize("method", OPTIONS)
def test_gradcheck_parameters(method: str) -> None:
    """Parameters that f reaches as a module, not through args."""
    torch.manual_seed(0)
    field = neurode.nn.MLP(2, (4,), zero_init=False)
    names = [name for name, _ in field.named_parameters()]
    y0 = torch.randn(3, 2)

    def end(*values: Tensor) -> Tensor:
        g = lambda t, y: torch.func.functional_call(field, dict(zip(names, values, strict=True)), (t, y))
        return solve(g, y0, (0.0, 1.0), **OPTIONS[method]).y1

    values = tuple(p.detach().clone().requires_grad_() for p in field.parameters())
    assert torch.autograd.gradcheck(end, values)
    direct = torch.autograd.grad(
        solve(field, y0, (0.0, 1.0), **OPTIONS[method]).y1.square().sum(), list(field.parameters())
    )
    called = torch.autograd.grad(end(*values).square().sum(), values)
    for a, b in zip(direct, called, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("batch_dim", [None, 0])
@pytest.mark.parametrize("method", OPTIONS)
def test_gradcheck_output_times(method: str, batch_dim: int | None) -> None:
    y0, w, *_ = inputs()
    times = torch.tensor([0.01, 0.3, 0.3001, 0.9], requires_grad=True)

    def outputs(y0: Tensor, times: Tensor) -> Tensor:
        return solve(f, y0, (0.0, 1.0), args=(w,), t_eval=times, batch_dim=batch_dim, **OPTIONS[method]).ys

    assert torch.autograd.gradcheck(outputs, (y0, times))


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_second_derivatives(method: str) -> None:
    y0, w, *_ = inputs()
    assert torch.autograd.gradgradcheck(
        lambda y0, w: solve(f, y0, (0.0, 1.0), args=(w,), **OPTIONS[method]).y1, (y0, w), atol=1e-4
    )


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_forward_and_reverse_mode_agree(method: str) -> None:
    y0, w, *_ = (x.detach() for x in inputs())
    end = lambda y: solve(f, y, (0.0, 1.0), args=(w,), **OPTIONS[method]).y1
    torch.testing.assert_close(torch.func.jacfwd(end)(y0), torch.func.jacrev(end)(y0))


def test_vmap_of_fixed_steps() -> None:
    y0, w, *_ = (x.detach() for x in inputs(7))
    end = lambda y: solve(f, y, (0.0, 1.0), args=(w,), **OPTIONS["rk4"]).y1
    torch.testing.assert_close(torch.vmap(end)(y0), end(y0))


def test_vmap_of_adaptive_steps_says_what_to_type() -> None:
    y0, w, *_ = (x.detach() for x in inputs(7))
    with pytest.raises(neurode.InputError, match="batch_dim=0"):
        torch.vmap(lambda y: solve(f, y, (0.0, 1.0), args=(w,), **OPTIONS["dopri5"]).y1)(y0)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lift = neurode.nn.Lift(2, 6)
        self.flow = neurode.nn.NeuralODE(neurode.nn.MLP(6, (8,), zero_init=False), method="rk4", steps=3)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flow(self.lift(x)))


@pytest.mark.parametrize(("dynamic", "compiled"), [(None, 2), (True, 1)])
def test_torch_compile_recompiles_once_for_another_batch_size(dynamic: bool | None, compiled: int) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, counter = Model(), CompileCounter()
    fast = torch.compile(model, fullgraph=True, backend=counter, dynamic=dynamic)
    for rows in (8, 9, 10, 33):
        x = torch.randn(rows, 2)
        torch.testing.assert_close(fast(x), model(x))
    assert counter.frame_count == compiled


@pytest.mark.parametrize("options", [dict(steps=4, t_eval=[0.1, 0.5, 1.0]), dict(grid=[0.0, 0.2, 1.0])])
def test_torch_compile_takes_times_as_lists(options: dict) -> None:
    field = neurode.nn.MLP(3, (8,), zero_init=False)
    run = lambda x: solve(field, x, (0, 1), method="rk4", **options).ys
    x = torch.randn(4, 3)
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))


def test_torch_compile_gives_the_same_gradients() -> None:
    torch._dynamo.reset()
    model, x = Model(), torch.randn(5, 2)
    grads = [
        torch.autograd.grad(m(x).square().sum(), list(model.parameters()))
        for m in (model, torch.compile(model, fullgraph=True, backend="aot_eager"))
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


# ---- the continuous adjoint


@pytest.mark.parametrize("method", ["bosh3", "dopri5", "tsit5"])
def test_adjoint_converges_to_the_exact_gradient(method: str) -> None:
    y0, w, t0, t1 = inputs()
    times = torch.tensor([0.2, 0.7, 1.1])

    def loss(gradient: str) -> Tensor:
        solution = solve(
            f, y0, (t0, t1), args=(w,), t_eval=times, method=method, rtol=1e-10, atol=1e-10, gradient=gradient
        )
        return solution.ys.square().sum() + solution.y1.sum()

    exact = torch.autograd.grad(loss("autograd"), (y0, w, t0, t1))
    adjoint = torch.autograd.grad(loss("continuous"), (y0, w, t0, t1))
    for a, b in zip(exact, adjoint, strict=True):
        assert (a - b).norm() < 1e-6 * a.norm()


def test_adjoint_with_few_steps_is_not_exact() -> None:
    """One Euler step of y' = w y: the adjoint's error is that of its own step, and not zero."""
    w = torch.tensor(-0.7, requires_grad=True)
    y0 = torch.tensor([3.0])
    grads = {}
    for gradient in ("autograd", "continuous"):
        y1 = solve(lambda t, y, w: w * y, y0, (0.0, 1.0), args=(w,), method="euler", steps=1, gradient=gradient).y1
        (grads[gradient],) = torch.autograd.grad(y1.sum(), w)
    assert float(grads["autograd"]) == pytest.approx(3.0)
    assert float(grads["continuous"]) == pytest.approx(0.9)  # y(1) = 0.3 y0 = 0.9: where the backward step evaluates


def test_adjoint_of_a_complex_state() -> None:
    w = torch.tensor(0.3 + 0.8j, requires_grad=True)
    y0 = torch.tensor([1.0 + 0.5j], requires_grad=True)
    grads = []
    for gradient in ("autograd", "continuous"):
        options = {"method": "dopri5", "rtol": 1e-10, "atol": 1e-10, "gradient": gradient}
        y1 = solve(lambda t, y, w: w * y * torch.cos(t), y0, (0.0, 1.0), args=(w,), **options).y1
        grads.append(torch.autograd.grad(y1.abs().square().sum(), (w, y0)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


def test_adjoint_reports_its_work() -> None:
    y0, w, *_ = inputs()
    solution = solve(f, y0, (0.0, 1.0), args=(w,), method="rk4", steps=5, gradient="continuous")
    assert solution.stats.backward is None
    solution.y1.sum().backward()
    assert solution.stats.backward.num_accepted == 5 and solution.stats.backward.num_evaluations == 20


# ---- events


def test_event_time_gradient_is_that_of_the_closed_form() -> None:
    """A stone falls from height h: t = sqrt(2 h / g)."""
    h, g = torch.tensor(10.0, requires_grad=True), torch.tensor(9.81, requires_grad=True)
    fall = lambda t, y, g: torch.stack([y[1], -g + 0 * y[1]])
    ground = Event(lambda t, y, g: y[0], direction=-1, terminal=True)
    solution = solve(fall, torch.stack([h, 0 * h]), (0, 50), args=(g,), events=[ground], method="dopri5")
    exact = torch.sqrt(2 * h / g)
    torch.testing.assert_close(solution.t1, exact, rtol=1e-9, atol=0)
    for a, b in zip(
        torch.autograd.grad(solution.t1, (h, g), retain_graph=True), torch.autograd.grad(exact, (h, g)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=0)
    speed = torch.autograd.grad(solution.y1[1], (h, g))
    for a, b in zip(speed, torch.autograd.grad(-torch.sqrt(2 * h * g), (h, g)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=0)


def test_grazing_event_refuses_its_gradient() -> None:
    """y = (t - 1)^2 + c only touches zero for c = 0, seen from a step that ends there."""
    c = torch.zeros((), requires_grad=True)
    touch = Event(lambda t, y: y[0] - 1.0, direction=0)
    solution = solve(
        lambda t, y: torch.stack([3 * (t - 1) ** 2 + 0 * y[0]]), torch.stack([c]), (0.0, 2.0), events=[touch],
        method="rk4", steps=8,
    )  # fmt: skip
    assert solution.events[0].count == 1
    with pytest.raises(neurode.GradientError, match="grazing"):
        solution.events[0].t.sum().backward()


@pytest.mark.parametrize("batch_dim", [None, 0])
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_torch_compile_of_a_continuous_solution(batch_dim: int | None) -> None:
    field = neurode.nn.MLP(3, (8,), zero_init=False)

    def run(x: Tensor) -> Tensor:
        sol = solve(field, x, (0.0, 1.0), method="rk4", steps=4, dense=True, batch_dim=batch_dim)
        return torch.stack([sol(0.0), sol(0.3), sol.derivative(0.3), sol(1.0)])

    x = torch.randn(4, 3)
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))
