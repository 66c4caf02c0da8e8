"""`gradient="auto"` with `memory=`: what it chooses, that it fits and says so, and that nothing else changes by it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import neurode
from neurode.gradients import budget
from neurode.report.memory import peak_memory


class Net(nn.Module):
    """A field of one hidden layer."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner, self.outer = nn.Linear(size, 32), nn.Linear(32, size)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(y)))


FIELD, Y0 = Net(), torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CASES = {
    "rk4": dict(method="rk4", steps=40),
    "euler": dict(method="euler", steps=200),
    "rows": dict(method="rk4", steps=40, batch_dim=0),
    "dopri5": dict(method="dopri5", rtol=1e-6),
    "dopri5, rows": dict(method="dopri5", rtol=1e-6, batch_dim=0),
    "explicit adams": dict(method="explicit_adams", steps=200),
    "implicit adams": dict(method="implicit_adams", steps=40),
    "a coupling": dict(method=neurode.Reversible("rk4"), steps=40),
}


def solved(memory: Any, gradient: Any = "auto", f: Any = None, **options: Any) -> Any:
    field = (FIELD if f is None else f).double()
    solution = neurode.solve(field, Y0, (0.0, 2.0), gradient=gradient, memory=memory, engine="eager", **options)
    return solution, torch.autograd.grad(solution.y1.square().sum(), list(field.parameters()))


def equal(a: Any, b: Any, limit: float = 1e-12) -> None:
    a, b = (torch.cat([x.flatten() for x in grads]) for grads in (a, b))
    assert (a - b).norm() <= limit * a.norm()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("memory", [10**10, 10**6, 300_000, 230_000])
def test_fits_and_changes_no_number(case: str, memory: int) -> None:
    plain, exact = solved(None, **CASES[case])
    assert plain.stats.gradient.startswith("autograd (auto")
    kept: list[Any] = []

    def run() -> Any:
        kept.append(solved(memory, **CASES[case]))
        return kept[-1][0].y1

    peak = peak_memory(run, excluding=list(FIELD.parameters()))
    (solution, grads), said = kept[0], kept[0][0].stats.gradient
    assert torch.equal(solution.y1, plain.y1)
    equal(exact, grads)
    assert said.startswith("autograd" if memory == 10**10 and "steps" in CASES[case] else "discrete"), said
    assert peak <= memory, said


def test_says_what_and_why() -> None:
    said = lambda memory, **options: solved(memory, **options)[0].stats.gradient
    assert said(10**9, **CASES["rk4"]).startswith("autograd (auto: ")
    assert "of tape do not fit 1 MB" in said(10**6, **CASES["rk4"]) and "of states do)" in said(10**6, **CASES["rk4"])
    assert "at most" in said(250_000, **CASES["euler"]) and "states of 1.54 KB fit" in said(250_000, **CASES["euler"])
    assert "an adaptive method does not say how many steps" in said(10**6, **CASES["dopri5"])
    few = solved(10**6, gradient="discrete", **CASES["rk4"])[0].stats.gradient
    assert few.startswith("discrete (memory=: ")


def test_tiny_steps_may_fit_the_tape_even_unknown_in_number() -> None:
    w = torch.tensor(0.5, requires_grad=True)
    solution = neurode.solve(
        lambda t, y: w * y, [1.0], (0.0, 1.0), method="dopri5", max_steps=100, memory=10**8, engine="eager"
    )
    assert solution.stats.gradient.startswith("autograd (auto: ")


def test_fractions_are_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "free_memory", lambda device: 2_000_000)
    assert "do not fit 1 MB" in solved(0.5, **CASES["rk4"])[0].stats.gradient
    monkeypatch.setattr(budget, "free_memory", lambda device: None)
    with pytest.raises(neurode.InputError, match="number of bytes"):
        solved(0.5, **CASES["rk4"])


def test_free_memory_is_within_the_machine() -> None:
    free = budget.free_memory(torch.device("cpu"))
    assert free is None or 10**6 < free < 10**14


@pytest.mark.parametrize("memory", [0, -5, True, "2GB", 1, float("nan")])
def test_what_is_no_memory_is_refused(memory: Any) -> None:
    with pytest.raises(neurode.InputError, match="bytes"):
        solved(memory, **CASES["rk4"])


@pytest.mark.parametrize("gradient", ["autograd", "continuous", neurode.Discrete(checkpoints=3)])
def test_memory_beside_a_strategy_that_does_not_read_it_is_refused(gradient: Any) -> None:
    with pytest.raises(neurode.InputError, match="gradient='auto'"):
        solved(10**6, gradient=gradient, **CASES["rk4"])


def test_too_little_for_any_strategy_warns_with_the_least() -> None:
    with pytest.warns(RuntimeWarning, match="are the least that any strategy keeps") as record:
        solution, grads = solved(1000, **CASES["rk4"])
    assert record[0].filename == __file__
    assert "one stage alive, at most 1 states" in solution.stats.gradient
    equal(solved(None, **CASES["rk4"])[1], grads)


# ---- what replays cannot take keeps the tape, and no evaluation leaves a trace


class Noisy(Net):
    """A field with everything that must not be evaluated once more."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(32), nn.Dropout(0.3)
        self.register_buffer("calls", torch.zeros(()))
        self.own = torch.Generator().manual_seed(3)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        noise = torch.randn(y.shape, generator=self.own, dtype=y.dtype)
        return self.outer(self.drop(self.norm(torch.tanh(self.inner(y))))) + 0.1 * noise


@pytest.mark.parametrize("options", [CASES["rk4"], dict(method="dopri5", rtol=1.0, atol=100.0)])
def test_side_effects_keep_the_tape_and_happen_as_without_memory(options: Any) -> None:
    results = []
    for memory in (None, 10**6):
        field = Noisy()
        torch.manual_seed(5)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            solution, grads = solved(memory, f=field, **options)
        results.append((solution.y1, grads, field.norm.running_mean, field.calls, torch.get_rng_state()))
        if memory is not None:
            assert solution.stats.gradient.startswith("autograd (auto: ") and "random" in solution.stats.gradient
            assert len(caught) == ("steps" in options)  # of an adaptive solve nobody knows whether it fits
    (y1, exact, *state), (other, grads, *after) = results
    assert torch.equal(y1, other) and all(torch.equal(a, b) for a, b in zip(state, after, strict=True))
    equal(exact, grads, 0.0)


def test_without_gradients_nothing_is_measured() -> None:
    calls = []

    def f(t: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        return -y

    with torch.no_grad():
        solution = neurode.solve(f, Y0, (0.0, 1.0), method="rk4", steps=3, memory=10, engine="eager")
    assert len(calls) == 12 and "gradients are off" in solution.stats.gradient


# ---- derivatives that replays do not give


def hypernetwork(gradient: Any, memory: Any, order: int, **options: Any) -> list[Tensor]:
    """Derivatives of a solve whose weight and state are computed from one tensor, which f reaches too."""
    generator = torch.Generator().manual_seed(2)
    p = torch.randn(3, 3, dtype=torch.float64, generator=generator).mul_(0.3).requires_grad_()
    y0 = torch.randn(4, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    t1 = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
    state = y0 @ p + y0
    f = lambda t, y, w: torch.tanh(y @ w) + 0.1 * y @ p + 0.1 * t * y0
    t_eval = None if options.pop("ends", True) else torch.tensor([0.3, 0.5, 1.0], dtype=torch.float64).requires_grad_()
    solution = neurode.solve(
        f, state, (0.0, t1), args=(p.T * 2,), t_eval=t_eval, gradient=gradient, memory=memory, **options
    )
    if memory is not None:
        assert solution.stats.gradient.startswith("discrete"), solution.stats.gradient
    wanted = [p, y0, t1] + ([t_eval] if t_eval is not None else [])
    value = solution.ys.pow(3).sum() + solution.y1.sin().sum()
    for _ in range(order):
        grads = torch.autograd.grad(value, wanted, create_graph=True, allow_unused=True, materialize_grads=True)
        value = sum((torch.tanh(0.1 * g) * (i + 1)).sum() for i, g in enumerate(grads))
    if memory is not None:
        assert "create_graph=True" in solution.stats.backward.gradient
    return list(torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        dict(method="rk4", steps=12, memory=16_000),
        dict(method="rk4", steps=12, memory=16_000, batch_dim=0),
        dict(method="bosh3", rtol=1e-2, atol=1e-2, memory=30_000),
        dict(method="bosh3", rtol=1e-2, atol=1e-2, memory=30_000, batch_dim=0),
    ],
    ids=["fixed", "fixed rows", "adaptive", "adaptive rows"],
)
def test_higher_derivatives_are_computed_on_the_tape(options: Any, ends: bool, order: int) -> None:
    options = dict(options)
    memory = options.pop("memory")
    exact = hypernetwork("autograd", None, order, ends=ends, **options)
    for x, y in zip(exact, hypernetwork("auto", memory, order, ends=ends, **options), strict=True):
        assert (x - y).norm() <= 1e-11 * max(1.0, float(x.norm()))


def test_by_name_higher_derivatives_are_refused_still() -> None:
    w = torch.tensor(0.5, requires_grad=True)
    solve = lambda **how: neurode.solve(lambda t, y: w * y, torch.ones(2), (0.0, 1.0), method="rk4", steps=4, **how).y1
    for how in (dict(gradient="discrete"), dict(gradient="discrete", memory=10**6)):
        with pytest.raises(neurode.GradientError, match="autograd"):
            torch.autograd.grad(solve(**how).sum(), w, create_graph=True)


def test_transforms_keep_the_tape() -> None:
    field, said = FIELD.double(), []

    def loss(params: Any, y0: Tensor) -> Tensor:
        f = lambda t, y: torch.func.functional_call(field, params, (t, y))
        solution = neurode.solve(f, y0, (0.0, 1.0), method="rk4", steps=4, memory=100_000)
        said.append(solution.stats.gradient)
        return solution.y1.square().sum()

    params = dict(field.named_parameters())
    grads = torch.func.grad(loss)({k: v.detach() for k, v in params.items()}, Y0)
    assert "torch.func" in said[0]
    exact = torch.autograd.grad(loss(params, Y0), list(params.values()))
    assert said[1].startswith("discrete")
    equal(exact, [grads[name] for name in params])
    _, tangent = torch.func.jvp(lambda y: loss(params, y), (Y0,), (torch.ones_like(Y0),))
    assert torch.isfinite(tangent) and "torch.func" in said[2]


def test_layers_take_it() -> None:
    layer = neurode.nn.NeuralODE(FIELD.double(), method="rk4", steps=40, memory=300_000)
    layer(Y0).sum().backward()
    assert layer.last_stats.gradient.startswith("discrete")
    FIELD.zero_grad(set_to_none=True)
