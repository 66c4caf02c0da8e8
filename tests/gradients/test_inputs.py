"""Every way in which a tensor that needs a gradient can enter `f`: its gradient is right, or an error is raised."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import neurode
from neurode import Continuous, Discrete, GradientError

STRATEGIES = {
    "discrete": ("discrete", 1e-12),
    "stage": (Discrete(alive="stage"), 1e-12),
    "checkpoints": (Discrete(checkpoints=2), 1e-12),
    "continuous": (Continuous(), 1e-6),
}
GLOBAL = torch.zeros(3, 3)


class Holder:
    """An object with tensors in attributes and a method that is a field."""

    def __init__(self, w: Tensor) -> None:
        self.deep = {"list": [w]}

    def field(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ self.deep["list"][0])


class Buffered(nn.Module):
    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.register_buffer("w", w)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ self.w)


def through_global(w: Tensor) -> tuple[Any, Any]:
    global GLOBAL
    GLOBAL = w
    return (lambda t, y: torch.tanh(y @ GLOBAL)), ()


def partial(w: Tensor) -> tuple[Any, Any]:
    return functools.partial(lambda t, y, w: torch.tanh(y @ w), w=w), ()


def default(w: Tensor) -> tuple[Any, Any]:
    def f(t: Tensor, y: Tensor, w: Tensor = w) -> Tensor:
        return torch.tanh(y @ w)

    return f, ()


def functional(w: Tensor) -> tuple[Any, Any]:
    lin = nn.Linear(3, 3, bias=False)
    return (lambda t, y: torch.tanh(torch.func.functional_call(lin, {"weight": w}, (y,)))), ()


class Hidden(torch.autograd.Function):
    """A product whose operands no operation shows."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(y, w)
        return y @ w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        y, w = ctx.saved_tensors
        return g @ w.T, y.T @ g


WAYS: dict[str, Callable[[Tensor], tuple[Any, Any]]] = {
    "args": lambda w: (lambda t, y, w: torch.tanh(y @ w), (w,)),
    "args in a tree": lambda w: (lambda t, y, d: torch.tanh(y @ d["w"][0]), ({"w": [w]},)),
    "closure": lambda w: (lambda t, y: torch.tanh(y @ w), ()),
    "global": through_global,
    "partial": partial,
    "default": default,
    "bound method": lambda w: (Holder(w).field, ()),
    "buffer": lambda w: (Buffered(w), ()),
    "functional_call": functional,
    "view inside": lambda w: (lambda t, y: torch.tanh(y @ w.T), ()),
    "twice": lambda w: (lambda t, y, v: torch.tanh(y @ w) + y @ v, (w,)),
    "custom function": lambda w: (lambda t, y: torch.tanh(Hidden.apply(y, w)), ()),
}

# A leaf; a tensor computed outside; one whose maker `f` uses too, which must not be counted twice.
ORIGINS: dict[str, Callable[[Tensor], Tensor]] = {"leaf": lambda p: p, "computed": lambda p: (p * p).sin().T}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("maker_too", [False, True])
def test_gradient_is_right_or_refused(strategy: str, way: str, origin: str, maker_too: bool) -> None:
    torch.manual_seed(0)
    p, y0 = torch.randn(3, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)

    def grads(gradient: Any) -> tuple[Tensor, ...]:
        inner, args = WAYS[way](ORIGINS[origin](p))
        f = (lambda t, y, *a: inner(t, y, *a) + 0.1 * y @ p) if maker_too else inner
        solution = neurode.solve(f, y0, (0.0, 1.0), method="rk4", steps=30, args=args, gradient=gradient)
        return torch.autograd.grad(solution.y1.sin().sum(), (p, y0))

    gradient, limit = STRATEGIES[strategy]
    exact = grads("autograd")
    if way == "custom function" and origin == "computed":
        with pytest.raises(GradientError, match="autograd"):
            grads(gradient)
        return
    for a, b in zip(exact, grads(gradient), strict=True):
        assert (a - b).norm() <= limit * a.norm()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "make", [nn.utils.parametrizations.weight_norm, lambda m: nn.utils.parametrizations.orthogonal(m)]
)
def test_parametrizations(strategy: str, make: Any) -> None:
    torch.manual_seed(0)
    lin, y0 = make(nn.Linear(3, 3)), torch.randn(4, 3)
    gradient, limit = STRATEGIES[strategy]
    exact, other = (
        torch.autograd.grad(
            neurode.solve(lambda t, y: torch.tanh(lin(y)), y0, (0, 1), method="rk4", steps=30, gradient=g).y1.sum(),
            list(lin.parameters()),
        )
        for g in ("autograd", gradient)
    )
    for a, b in zip(exact, other, strict=True):
        assert (a - b).norm() <= limit * (1 + a.norm())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_autocast_is_the_same_backward(strategy: str) -> None:
    """Under autocast the replayed evaluations are those of the forward pass: each alone, without the cache of casts."""
    torch.manual_seed(0)
    lin, y0 = nn.Linear(3, 3).float(), torch.randn(64, 3).float()
    gradient, _ = STRATEGIES[strategy]
    results = []
    for g in ("autograd", gradient):
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=g != "autograd"):
            lin(y0)  # fills the cache
            y1 = neurode.solve(lambda t, y: torch.tanh(lin(y)), y0, (0, 1), method="rk4", steps=4, gradient=g).y1
        results.append((y1.detach(), *torch.autograd.grad(y1.square().sum(), list(lin.parameters()))))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0)
    eps = torch.finfo(torch.bfloat16).eps  # the order in which rounded cotangents are summed differs
    for a, b in zip(results[0][1:], results[1][1:], strict=True):
        assert (a - b).norm() <= eps * a.norm()
