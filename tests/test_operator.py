"""A solve inside `torch.compile(fullgraph=True)`: one operator, with the gradients and the guards of the solve itself."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import neurode
from neurode import _operator
from neurode.nn import MLP, NeuralODE

RK4 = {"method": "rk4", "steps": 5}
DOPRI5 = {"method": "dopri5", "rtol": 1e-6, "atol": 1e-8}


class Model(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.ode, self.head = (
            nn.Linear(2, 3),
            NeuralODE(MLP(3, (8,), zero_init=False), **options),
            nn.Linear(3, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.ode(self.up(x)))


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def gradients(model: Any, x: Tensor, parameters: Any) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = model(x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *parameters])]


@pytest.mark.parametrize("options", [RK4, DOPRI5, {**DOPRI5, "batch_dim": None}], ids=["rk4", "dopri5", "joint"])
def test_values_and_gradients_are_those_outside_for_any_batch(options: Any) -> None:
    model = Model(**options)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for rows in (4, 9, 5):
        x = torch.randn(rows, 2)
        for a, b in zip(*(gradients(m, x, model.parameters()) for m in (compiled, model)), strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-13)
    with torch.no_grad():
        assert torch.allclose(compiled(x), model(x), rtol=1e-12)


@pytest.mark.parametrize(("dynamic", "graphs"), [(None, 2), (True, 1)])
def test_batch_sizes_recompile_once_or_not_at_all(dynamic: bool | None, graphs: int) -> None:
    model, made = Model(**DOPRI5), []

    def backend(graph: Any, inputs: Any) -> Any:
        made.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)
    for rows in (4, 9, 5, 17):
        compiled(torch.randn(rows, 2))
    assert len(made) == graphs
    assert any(node.target is torch.ops.neurode.solve for node in made[0].graph.nodes)


def test_outputs_tuples_arguments_and_moving_times() -> None:
    class Forced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor(0.7))

        def forward(self, t: Tensor, y: Any, rate: Tensor, gain: Tensor) -> Any:
            q, p = y
            return p * gain, -self.w * q * rate + torch.sin(t)

    f, q, rate = Forced(), torch.randn(4, 2), torch.rand(4, 1).requires_grad_()
    gain, t1 = torch.tensor(1.1, requires_grad=True), torch.tensor(0.9, requires_grad=True)
    t_eval = torch.tensor([0.1, 0.5])

    def loss(q: Tensor) -> Tensor:
        solution = neurode.solve(
            f, (q, q * 2), (0.0, t1), args=(neurode.per_row(rate), gain), t_eval=t_eval, batch_dim=0, **DOPRI5
        )
        return solution.ys[0].square().sum() + solution.y1[1].sin().sum() + 0.0 * solution.stats.num_calls

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = [f.w, rate, gain, t1]
    mine, theirs = (torch.autograd.grad(g(q), inputs) for g in (compiled, loss))
    for a, b in zip(mine, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


def test_another_module_in_the_same_place_makes_another_graph() -> None:
    model, x = Model(**RK4), torch.randn(4, 2)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled(x)
    model.ode.f = MLP(3, (8,), zero_init=False)
    assert torch.allclose(compiled(x), model(x), rtol=1e-12)


def test_functional_calls_bring_their_own_parameters() -> None:
    model, x = Model(**RK4), torch.randn(4, 2)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    other = {name: p.detach() * 0.5 for name, p in model.named_parameters()}
    mine, theirs = (torch.func.functional_call(m, other, (x,)) for m in (compiled, model))
    assert torch.allclose(mine, theirs, rtol=1e-12)


def test_no_module_is_kept_alive() -> None:
    model, x = Model(**RK4), torch.randn(4, 2)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    before = set(_operator._store.requests)
    compiled(x).sum().backward()
    assert len(set(_operator._store.requests) - before) == 1
    gone = weakref.ref(model.ode.f)
    del model, compiled
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None and set(_operator._store.requests) <= before


def test_a_failed_solve_raises_through_the_compiled_model() -> None:
    class Explodes(nn.Module):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return y**2

    layer = NeuralODE(Explodes(), (0.0, 3.0), **DOPRI5)
    with pytest.raises(neurode.SolveError):
        torch.compile(layer, fullgraph=True, backend="eager")(torch.ones(2, 1))


def test_more_solves_than_are_remembered_are_solved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_operator, "MOST_WAITING", 2)
    model, x = Model(**RK4), torch.randn(4, 2)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    losses = [compiled(x * k).square().sum() for k in range(1, 5)]
    for k, value in enumerate(losses, 1):
        mine = torch.autograd.grad(value, model.up.weight)[0]
        theirs = torch.autograd.grad(model(x * k).square().sum(), model.up.weight)[0]
        assert torch.allclose(mine, theirs, rtol=1e-12)


def test_the_operator_keeps_to_pytorchs_rules() -> None:
    f = MLP(3, (8,), zero_init=False)
    torch.compile(lambda y: neurode.solve(f, y, (0.0, 1.0), batch_dim=0, **RK4).y1, fullgraph=True, backend="eager")(
        torch.randn(2, 3)
    )
    handle = max(_operator._store.requests)
    tensors = [torch.randn(4, 3).requires_grad_(), *f.parameters(), torch.tensor(0.0), torch.tensor(1.0)]
    needs = [x.requires_grad for x in tensors]
    request = _operator._store.requests[handle]
    known = {"steps": 5, "max_steps": 100, "rtol": 1e-4, "atol": 1e-6, "min_step": 0.0, "max_step": float("inf")}
    numbers = [[known[name] for name in names] for names in (request.integers, request.floats)]
    arguments = (tensors, [1, len(tensors) - 3, 0, 0], needs, *numbers, handle, True)
    torch.library.opcheck(torch.ops.neurode.solve, arguments, test_utils=("test_schema", "test_faketensor"))
