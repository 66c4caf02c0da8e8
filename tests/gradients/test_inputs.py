"""Every way in which a tensor that needs a gradient can enter `f`: its gradient is right, or an error is raised."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import STRATEGIES
from torch import Tensor, nn

import neurode
from neurode import Event, GradientError

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


FIXED = {"method": "rk4", "steps": 6}
# The continuous adjoint at finer steps; reversible, which finds states again to rounding.
LIMITS = {name: max(row.limits[0], 1e-10 if row.retraces else 0.0) for name, row in STRATEGIES.items()}


def options_of(strategy: str, on_tape: bool, options: dict[str, Any]) -> dict[str, Any]:
    """What to type for a strategy, or for the solve on PyTorch's tape that it must agree with."""
    row = STRATEGIES[strategy]
    options = row.options(options)
    return {**row.baseline(options), "gradient": "autograd"} if on_tape else {**options, "gradient": row.gradient}


def hold(strategy: str, grads: Callable[[dict[str, Any]], tuple[Tensor, ...]], options: dict[str, Any]) -> None:
    """The gradients are those of the tape."""
    exact, other = (grads(options_of(strategy, on_tape, options)) for on_tape in (True, False))
    for a, b in zip(exact, other, strict=True):
        assert (a - b).norm() <= LIMITS[strategy] * max(float(a.norm()), 1e-3)


# Variants that find and swap inputs in the same lines of code as another are left out of the longest product.
DISTINCT = ("discrete", "discrete, one stage alive", "reversible", "continuous", "continuous, both")


@pytest.mark.parametrize("strategy", DISTINCT)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("maker_too", [False, True])
def test_gradient_is_right_or_refused(strategy: str, way: str, origin: str, maker_too: bool) -> None:
    torch.manual_seed(0)
    p, y0 = torch.randn(3, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)

    def grads(options: dict[str, Any]) -> tuple[Tensor, ...]:
        inner, args = WAYS[way](ORIGINS[origin](p))
        f = (lambda t, y, *a: inner(t, y, *a) + 0.1 * y @ p) if maker_too else inner
        solution = neurode.solve(f, y0, (0.0, 1.0), args=args, **options)
        return torch.autograd.grad(solution.y1.sin().sum(), (p, y0))

    if way == "custom function" and origin == "computed":
        with pytest.raises(GradientError, match="autograd"):
            grads(options_of(strategy, False, FIXED))
        return
    hold(strategy, grads, FIXED)


def at_t0(p: Tensor, **options: Any) -> Any:
    return neurode.solve(field, START, (p, 1.0), **options)


def at_t1(p: Tensor, **options: Any) -> Any:
    return neurode.solve(field, START, (0.0, p), **options)


def at_t_eval(p: Tensor, **options: Any) -> Any:
    return neurode.solve(field, START, (0.0, 1.0), t_eval=torch.stack([p, 2 * p]), **options)


def per_row(p: Tensor, **options: Any) -> Any:
    f = lambda t, y, x: torch.tanh(y) * x
    return neurode.solve(f, START, (0.0, 1.0), args=(neurode.per_row(p * START),), batch_dim=0, **options)


def in_event(p: Tensor, **options: Any) -> Any:
    return neurode.solve(field, START, (0.0, 1.0), events=[Event(lambda t, y: y[0, 0] - p, terminal=True)], **options)


def in_apply(p: Tensor, **options: Any) -> Any:
    bounce = Event(lambda t, y: y[0, 0] - 0.45, apply=lambda t, y: -p * y)
    return neurode.solve(field, START, (0.0, 1.0), events=[bounce], **options)


def in_save(p: Tensor, **options: Any) -> Any:
    return neurode.solve(field, START, (0.0, 1.0), save=lambda t, y: (p * y).sum(), t_eval=[0.3, 0.8], **options)


def in_integral(p: Tensor, **options: Any) -> Any:
    return neurode.solve(field, START, (0.0, 1.0), integrate=lambda t, y: (p * y).square().sum(), **options)


def in_aux(p: Tensor, **options: Any) -> Any:
    return neurode.solve(lambda t, y: (field(t, y), p * y), START, (0.0, 1.0), has_aux=True, **options)


def as_it_is(p: Tensor, **options: Any) -> Any:
    return neurode.solve(lambda t, y: p, torch.zeros(()), (0.0, 1.0), **options)


def field(t: Tensor, y: Tensor) -> Tensor:
    return torch.sin(y) + 0.3 * t


START = torch.tensor([[0.4, 0.7], [1.0, -0.3]], dtype=torch.float64)
ENTRIES = (at_t0, at_t1, at_t_eval, per_row, in_event, in_apply, in_save, in_integral, in_aux, as_it_is)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.__name__)
def test_wherever_a_tensor_enters(strategy: str, entry: Any) -> None:
    p = torch.tensor(0.5, requires_grad=True)

    def grads(options: dict[str, Any]) -> tuple[Tensor, ...]:
        solution = entry(p, **options)
        parts = (solution.y1, solution.ys, solution.ts, solution.t1, solution.aux, solution.integrals)
        loss = sum(x.sin().sum() for x in parts if isinstance(x, Tensor) and x.requires_grad)
        return torch.autograd.grad(loss, (p,))

    if entry in (in_event, in_apply) and "events" not in STRATEGIES[strategy].handles:
        with pytest.raises(GradientError, match="autograd"):
            entry(p, **options_of(strategy, False, FIXED))
        return
    hold(strategy, grads, FIXED)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "make", [nn.utils.parametrizations.weight_norm, lambda m: nn.utils.parametrizations.orthogonal(m)]
)
def test_parametrizations(strategy: str, make: Any) -> None:
    torch.manual_seed(0)
    lin, y0 = make(nn.Linear(3, 3)), torch.randn(4, 3)

    def grads(options: dict[str, Any]) -> tuple[Tensor, ...]:
        y1 = neurode.solve(lambda t, y: torch.tanh(lin(y)), y0, (0, 1), **options).y1
        return torch.autograd.grad(y1.sin().sum(), list(lin.parameters()))

    hold(strategy, grads, FIXED)


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if "continuous" not in name])
def test_autocast_is_the_same_backward(strategy: str) -> None:
    """Under autocast the replayed evaluations are those of the forward pass: each alone, without the cache of casts."""
    torch.manual_seed(0)
    lin, y0 = nn.Linear(3, 3).float(), torch.randn(64, 3).float()
    results = []
    for on_tape in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=not on_tape):
            lin(y0)  # fills the cache
            options = options_of(strategy, on_tape, {"method": "rk4", "steps": 4})
            y1 = neurode.solve(lambda t, y: torch.tanh(lin(y)), y0, (0, 1), **options).y1
        results.append((y1.detach(), *torch.autograd.grad(y1.square().sum(), list(lin.parameters()))))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0)
    eps = torch.finfo(torch.bfloat16).eps  # the order in which rounded cotangents are summed differs
    for a, b in zip(results[0][1:], results[1][1:], strict=True):
        assert (a - b).norm() <= eps * a.norm()


def draws(net: nn.Module) -> Any:
    return lambda t, y: nn.functional.dropout(net(y))


def adds_noise(net: nn.Module) -> Any:
    return lambda t, y: net(y) + torch.randn(3)


def draws_its_own(net: nn.Module) -> Any:
    generator = torch.Generator()
    return lambda t, y: net(y) + torch.randn(3, generator=generator)


def normalizes(net: nn.Module) -> Any:
    norm = nn.BatchNorm1d(3)
    return lambda t, y: norm(net(y))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("make", [draws, adds_noise, draws_its_own, normalizes], ids=lambda m: m.__name__)
def test_an_f_that_cannot_be_evaluated_again_is_refused(strategy: str, make: Any) -> None:
    f = make(nn.Linear(3, 3))
    with pytest.raises(GradientError, match="gradient='autograd'"):
        neurode.solve(f, torch.ones(4, 3), (0.0, 1.0), **options_of(strategy, False, {"method": "rk4", "steps": 2}))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_f_that_overwrites_y_is_refused(strategy: str) -> None:
    """The solver goes on using y: no strategy goes through this, and the message says what to write."""
    net = nn.Linear(3, 3)
    with pytest.raises(neurode.FieldError, match=r"in place.*Return a new tensor"):
        options = options_of(strategy, False, {"method": "rk4", "steps": 2})
        neurode.solve(lambda t, y: net(y.mul_(0.5)), torch.ones(4, 3), (0.0, 1.0), **options)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_f_that_overwrites_t_is_refused_where_it_is_evaluated_again(strategy: str) -> None:
    net = nn.Linear(3, 3)
    with pytest.raises(GradientError, match=r"changes t in place.*t = t\.clone\(\)"):
        options = options_of(strategy, False, {"method": "rk4", "steps": 2})
        neurode.solve(lambda t, y: net(y) * t.add_(1.0), torch.ones(4, 3), (0.0, 1.0), **options)
