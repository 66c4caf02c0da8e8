"""Which engine takes a solve, what it says of it, and that the choice changes no result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import neurode
from neurode import _engines
from neurode.fused import native

needs_native = pytest.mark.skipif(not native.available(), reason="the native library is not built (make native)")
RK4 = {"method": "rk4", "steps": 5}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 3)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(y))) * torch.cos(t)


@needs_native
def test_a_module_is_fused_at_its_first_solve_and_a_plain_function_once_it_paid() -> None:
    y = torch.randn(4, 3)
    assert neurode.solve(Net(), y, (0, 1), **RK4).stats.engine.startswith("fused")
    f = lambda t, y: -y
    engines = [neurode.solve(f, y, (0, 1), method="rk4", steps=125).stats.engine for _ in range(3)]
    assert engines[0].startswith("eager (a plain function") and engines[1].startswith("eager")
    assert engines[2].startswith("fused")  # 125 steps of 4 evaluations, twice, are 1,000


@needs_native
def test_auto_takes_the_exact_gradient_of_the_engine_and_says_so() -> None:
    net, y = Net(), torch.randn(4, 3)
    fused, eager = (neurode.solve(net, y, (0, 1), engine=e, **RK4).stats for e in ("auto", "eager"))
    assert fused.gradient.startswith("discrete") and eager.gradient.startswith("autograd")
    assert eager.engine == "eager (asked for)"


@needs_native
@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("options", [RK4, {"method": "dopri5", "rtol": 1e-9, "atol": 1e-9}], ids=["rk4", "dopri5"])
def test_second_derivatives_come_from_the_tape(options: Any, batch_dim: int | None) -> None:
    torch.manual_seed(0)
    net, y = Net(), torch.randn(3, 3)
    t1 = torch.tensor(0.9, requires_grad=True)
    t_eval = torch.tensor([0.2, 0.5], requires_grad=True)
    rate = torch.rand(3, 1, requires_grad=True)
    f = lambda t, y, k: net(t, y) * k
    args = (neurode.per_row(rate),) if batch_dim == 0 else (rate,)
    seconds = []
    for engine in ("fused", "eager"):
        x = y.clone().requires_grad_()
        sol = neurode.solve(
            f, x, (0.0, t1), args=args, t_eval=t_eval, engine=engine, gradient="auto", batch_dim=batch_dim, **options
        )
        inputs = [x, t1, t_eval, rate, *net.parameters()]
        loss = sol.y1.square().sum() + sol.ys.sin().sum()
        grads = torch.autograd.grad(loss, inputs, create_graph=True)
        if engine == "fused":
            assert sol.stats.backward.gradient == "autograd (create_graph=True)"
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), inputs, allow_unused=True)
        seconds.append([*grads, *(torch.zeros(()) if g is None else g for g in second)])
    for a, b in zip(*seconds, strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-9)


@needs_native
def test_the_discrete_gradient_by_name_refuses_second_derivatives() -> None:
    y = torch.randn(4, 3, requires_grad=True)
    sol = neurode.solve(Net(), y, (0, 1), gradient="discrete", engine="fused", **RK4)
    with pytest.raises(neurode.GradientError, match="gradient='autograd'"):
        torch.autograd.grad(sol.y1.sum(), y, create_graph=True)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a branch": (lambda t, y: y if float(y.sum()) > 0 else -y, {}, "branch"),
    "coupled rows": (lambda t, y: y - y.mean(0), {"batch_dim": 0}, r"coupled.*test_engines.py.*line \d+"),
    "noise": (lambda t, y: y + torch.randn_like(y), {}, "random"),
    "autograd by name": (Net, {"gradient": "autograd"}, "autograd"),
    "continuous by name": (Net, {"gradient": "continuous"}, "continuous"),
    "checkpoints": (Net, {"gradient": neurode.Discrete(checkpoints=3)}, "discrete"),
    "events": (Net, {"events": [neurode.Event(lambda t, y: y.sum())]}, "events"),
    "dense output": (Net, {"dense": True}, "dense"),
    "an Adams method": (Net, {"method": "explicit_adams", "steps": 5}, "explicit Runge-Kutta"),
    "half precision": (lambda t, y: -y, {"y0": torch.ones(2, dtype=torch.complex64)}, "complex64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_fused_engine_cannot_take_is_an_error_that_says_why(name: str) -> None:
    f, options, reason = REFUSED[name]
    f = f() if f is Net else f
    options = {**RK4, **options}
    y0 = options.pop("y0", torch.ones(2, 3, requires_grad=True))
    if not native.available() and "by name" not in name and name not in ("checkpoints", "events"):
        reason = reason + "|not built"
    with pytest.raises(neurode.EngineError, match=f"(?s){reason}.*engine='auto'"):
        neurode.solve(f, y0, (0, 1), engine="fused", **options)
    assert neurode.solve(f, y0, (0, 1), **options).stats.engine.startswith("eager (")


@needs_native
def test_inference_uses_the_fused_engine_whatever_gradient_is_named() -> None:
    with torch.no_grad():
        for gradient in ("autograd", "continuous", "auto"):
            assert neurode.solve(Net(), torch.ones(2, 3), (0, 1), gradient=gradient, **RK4).stats.engine.startswith(
                "fused"
            )


def test_transforms_and_autocast_run_on_eager() -> None:
    net, y = Net().float(), torch.randn(4, 3, dtype=torch.float32)
    solve = lambda x: neurode.solve(net, x, (0, 1), **RK4).y1
    jacobian = torch.func.jacrev(solve)(y)
    assert jacobian.shape == (4, 3, 4, 3)
    _, tangent = torch.func.jvp(solve, (y,), (torch.ones_like(y),))
    assert torch.allclose(tangent, torch.einsum("abcd,cd->ab", jacobian, torch.ones_like(y)), atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in neurode.solve(net, y, (0, 1), **RK4).stats.engine


@needs_native
def test_explain_says_what_auto_does() -> None:
    y = torch.ones(4, 3)
    module = neurode.explain(Net(), y, batch_dim=0)
    assert module.engine == "fused" and "product 8 x 3" in str(module)
    assert f"after {_engines.CAPTURE_AFTER:,} evaluations" in neurode.explain(lambda t, y: -y, y).reason
    assert "randn" in (reason := neurode.explain(lambda t, y: torch.randn_like(y), y).reason) or "random" in reason


def test_a_state_without_dimensions() -> None:
    for engine in ("eager", "fused") if native.available() else ("eager",):
        y1 = neurode.solve(lambda t, y: -y, 1.0, (0, 1), method="dopri5", rtol=1e-8, atol=1e-8, engine=engine).y1
        assert y1.shape == () and abs(float(y1) - 0.36787944117) < 1e-7


@needs_native
@pytest.mark.parametrize("rows", [1, 2, 37])
def test_the_norm_by_leaf_takes_the_same_steps_on_both_engines(rows: int) -> None:
    w = torch.nn.Parameter(torch.tensor([[0.0, 2.0], [-2.0, -0.1]]))
    f = lambda t, y: (y[0] @ w, 30.0 * torch.cos(9.0 * t) * y[0].sum(-1, keepdim=True))
    y0, found = (torch.rand(rows, 2), torch.zeros(rows, 1)), {}
    for norm in ("leaf-rms", "rms"):
        for engine in ("fused", "eager"):
            sol = neurode.solve(f, y0, (0.0, 2.0), method="dopri5", rtol=1e-6, atol=1e-8, norm=norm, engine=engine)
            found[norm, engine] = sol.stats.num_accepted, sol.stats.num_rejected
            assert torch.allclose(sol.y1[1], found.setdefault(norm, sol.y1[1]), rtol=1e-9)
        assert found[norm, "fused"] == found[norm, "eager"]
    assert found["rms", "eager"] != found["leaf-rms", "eager"]


@needs_native
@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("options", [RK4, {"method": "dopri5", "rtol": 1e-9, "atol": 1e-9}], ids=["rk4", "dopri5"])
def test_second_derivatives_count_nothing_twice(options: Any, batch_dim: int | None) -> None:
    """The state, per-row data and the end of the span are computed from what f uses too."""
    torch.manual_seed(0)
    net, gain = Net(), torch.rand(3, requires_grad=True)
    f = lambda t, y, k: net(t, y) * k * hyper[0]
    found = []
    for engine in ("fused", "eager", "fused"):
        w, hyper = net.a.weight, [gain.exp() * 0.5]
        y0, rate = torch.ones(4, 3) @ w[:3], (w[:4, :1] + 1.0).sigmoid()
        if batch_dim is None:  # shared by all rows it is read by f as the weight is, and the engine takes no such field
            rate = rate.detach()
        t1 = 0.5 + gain.square().sum() * 0.1
        args = (neurode.per_row(rate),) if batch_dim == 0 else (rate,)
        y1 = neurode.solve(f, y0, (0.0, t1), args=args, engine=engine, batch_dim=batch_dim, **options).y1
        wanted = [*net.parameters(), gain]
        grads = torch.autograd.grad(y1.sin().sum(), wanted, create_graph=engine != "fused" or len(found) == 0)
        if engine == "fused" and len(found) == 2:
            found.append(grads)  # first order alone, by the native backward pass
            continue
        more = torch.autograd.grad(sum(g.square().sum() for g in grads), wanted)
        found.append((*grads, *more))
    for mine, theirs, first in zip(*found[:2], [*found[2], *found[1][len(found[2]) :]], strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-7, atol=1e-9) and torch.allclose(
            first, theirs, rtol=1e-7, atol=1e-9
        )
