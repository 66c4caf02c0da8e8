"""A call like one before goes the short way: with the same results and errors, never stale, and keeping no model alive."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import partial
from typing import Any

import pytest
import test_guards
import torch
from engines import eager
from test_guards import CHANGES, Counted, Model
from torch import Tensor, nn

import neurode
from neurode import InputError, SolveError, _solve
from neurode.fused import native, plan, programs, watch
from neurode.nn import NeuralODE

pytestmark = pytest.mark.skipif(not native.available(), reason="the native library is not built (make native)")
RK4 = {"method": "rk4", "steps": 4, "batch_dim": 0}
DOPRI5 = {"method": "dopri5", "rtol": 1e-6, "atol": 1e-8, "batch_dim": 0}
restored = test_guards.fresh  # forgets programs before a test, puts globals back behind it


@pytest.fixture
def long_ways(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows with every call that is read anew."""
    seen: list[Any] = []
    first = _solve._first

    def noted(f: Any, *rest: Any) -> Any:
        seen.append(f)
        return first(f, *rest)

    monkeypatch.setattr(_solve, "_first", noted)
    return seen


def fused(f: Any, y: Any, t_span: Any = (0.0, 1.0), **options: Any) -> Any:
    return neurode.solve(f, y, t_span, engine="fused", **{**RK4, **options})


def linear(t: Tensor, y: Tensor) -> Tensor:
    return -0.5 * y + torch.sin(t)


@pytest.mark.parametrize("wrapped", [False, True], ids=["module", "closure"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_by_the_plan_too(change: str, wrapped: bool, long_ways: list[Any]) -> None:
    torch.manual_seed(0)
    model, y = Model(), torch.rand(4, 3)
    field = (lambda: lambda t, y: model(t, y)) if wrapped else (lambda: model)
    for _ in range(4):
        before = fused(field(), y).y1
    assert len(long_ways) == 2, "the third call is not planned, so the test shows nothing"
    CHANGES[change](model)
    if change == "double precision":
        y, model.extra = y.double(), model.extra.double()
    theirs = eager(model, y, (0.0, 1.0), **RK4).y1
    assert torch.allclose(fused(field(), y).y1, theirs, atol=1e-6)
    if change not in ("a frozen weight", "parametrized weights", "double precision"):
        assert not torch.allclose(theirs, before, atol=1e-4)


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize(
    "options", [{}, DOPRI5, {"method": "euler", "steps": None, "step_size": 0.3}], ids=["rk4", "dopri5", "size"]
)
def test_the_short_way_gives_what_the_long_way_gives(options: Any, batch_dim: int | None, long_ways: list[Any]) -> None:
    options = {**options, "batch_dim": batch_dim}
    options = {**options, "steps": None} if "rtol" in options else options
    for outputs in (None, torch.tensor([0.1, 0.4], dtype=torch.float32), torch.tensor([0.1, 0.4], dtype=torch.float64)):
        y = torch.rand(3, 2, 2)
        solve = lambda: fused(linear, y, t_eval=outputs, **options)  # noqa: B023
        first, _, again = solve(), solve(), solve()
        for name in [f.name for f in fields(first) if f.name not in ("status", "stats")]:
            one, other = getattr(first, name), getattr(again, name)
            same = torch.equal(one, other) and one.dtype is other.dtype if isinstance(one, Tensor) else one == other
            assert same, name
        for name in [f.name for f in fields(first.stats)]:
            one, other = getattr(first.stats, name), getattr(again.stats, name)
            assert torch.equal(one, other) if isinstance(one, Tensor) else one == other, name
        assert list(first.status) == list(again.status) if batch_dim == 0 else first.status is again.status
    assert len(long_ways) == 3 + 1  # each kind of call once, and once more for the field to be watched


def test_values_are_those_of_the_call(long_ways: list[Any]) -> None:
    for n in range(6):
        y, span = torch.rand(4, 3), (0.5 * n, 2.0 - n) if n != 1 else (1, 3)
        for options in (RK4, {**DOPRI5, "steps": None}):
            mine, theirs = (neurode.solve(linear, y, span, engine=e, **{**RK4, **options}) for e in ("fused", "eager"))
            assert torch.allclose(mine.y1, theirs.y1, rtol=1e-6, atol=1e-6)
            assert torch.allclose(mine.t1, theirs.t1) and torch.equal(mine.ts, theirs.ts)
    assert len(long_ways) == 12 + 3  # those on eager; one before the field was watched, and the first of each kind


def test_equal_numbers_of_another_class_are_read_anew() -> None:
    y = torch.rand(4, 3)
    for _ in range(3):
        fused(linear, y, steps=1, max_steps=1)
    for wrong in (
        {"steps": 1.0},
        {"steps": True},
        {"max_steps": True},
        {"batch_dim": False},
        {"rtol": True},
        {"stepz": 1},
    ):
        with pytest.raises(ValueError):
            fused(linear, y, **{"steps": 1, **wrong})


def test_errors_are_those_of_the_long_way() -> None:
    y, times = torch.rand(4, 3), torch.tensor([0.2, 0.7])
    for _ in range(3):
        fused(linear, y)
        fused(linear, y, t_eval=times)
    nan, inf = float("nan"), float("inf")
    bad = y.clone()
    bad[1, 2] = nan
    for state in (bad, y * inf):
        with pytest.raises(InputError, match="NaN or infinite"):
            fused(linear, state)
    for span in ((0.0, nan), (inf, 1.0), (0.0, 10**400), (0.0,)):
        with pytest.raises((InputError, OverflowError)):
            fused(linear, y, span)
    for outside in ([0.7, 0.2], [0.2, 1.5], [-0.1, 0.5], [0.1, nan]):
        with pytest.raises(InputError, match="t_eval"):
            fused(linear, y, t_eval=torch.tensor(outside))


def test_a_solve_that_fails_says_so() -> None:
    explodes = lambda t, y: y**2
    good, bad = torch.full((2, 1), 0.1), torch.tensor([[0.1], [4.0]])
    options = {**DOPRI5, "steps": None}
    for _ in range(3):
        fused(explodes, good, **options)
        fused(explodes, good, on_failure="nan", **options)
    with pytest.raises(SolveError, match="1 of 2 rows"):
        fused(explodes, bad, **options)
    found = fused(explodes, bad, on_failure="nan", **options)
    assert found.status[1].failed and bool(found.y1[1].isnan()) and torch.isfinite(found.y1[0]).all()


def test_gradients_of_first_and_second_order() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    field = lambda t, y: net(y) * torch.cos(t)
    found = []
    for engine in ("fused", "fused", "fused", "eager"):
        x = torch.rand(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
        inputs = [x, *net.parameters()]
        y1 = neurode.solve(field, x, (0.0, 1.0), engine=engine, **RK4).y1
        grads = torch.autograd.grad(y1.sin().sum(), inputs, create_graph=True)
        found.append([*grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), inputs, allow_unused=True)])
    for mine in found[:3]:
        for a, b in zip(mine, found[3], strict=True):
            assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_what_is_recorded_follows_the_mode() -> None:
    layer, y = NeuralODE(Counted(), method="rk4", steps=4), torch.rand(4, 3)
    for _ in range(4):
        assert layer(y).requires_grad
        with torch.no_grad():
            assert not layer(y).requires_grad
        with torch.inference_mode():
            assert layer(y).is_inference()
        solution = layer.solve(y)
        with torch.no_grad():
            later = solution.ys
        assert later.requires_grad, "read in another mode than it was solved in"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in layer.solve(y).stats.engine
    assert layer.f.nfe == 16 * 4 * 4 + 16


def test_a_baked_tensor_that_changes_in_place() -> None:
    index, y = torch.tensor([2, 0, 1]), torch.rand(4, 3)
    f = lambda t, y: -y[:, index]
    for permutation in ([2, 0, 1], [1, 2, 0]):
        index.copy_(torch.tensor(permutation))
        for _ in range(3):
            assert torch.allclose(fused(f, y).y1, eager(f, y, (0.0, 1.0), **RK4).y1, atol=1e-6)


def test_counters_count() -> None:
    model = Counted()
    for n in range(1, 7):
        fused(model, torch.rand(4, 3))
        assert model.nfe == 16 * n
    model.nfe = 5
    fused(model, torch.rand(4, 3))
    assert model.nfe == 21


def cycle() -> nn.Module:
    model = Counted()
    model.me = [model]  # type: ignore[assignment]
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]] = {
    "a module": (Counted, lambda m: m),
    "a closure": (Counted, lambda m: lambda t, y: m(t, y)),
    "a default": (Counted, lambda m: lambda t, y, m=m: m(t, y)),
    "a method": (Counted, lambda m: m.forward),
    "one that holds itself": (cycle, lambda m: m),
}


@pytest.mark.parametrize("name", MODELS)
def test_no_model_is_kept_alive(name: str) -> None:
    make, field = MODELS[name]
    model = make()
    for _ in range(4):
        fused(field(model), torch.rand(4, 3))
    if name != "one that holds itself":
        assert any(w is not None and w.plans for w in watch._watches.values())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert not any(w is not None and w.references for w in watch._watches.values())


def test_watches_are_bounded() -> None:
    models = [Counted() for _ in range(watch.MOST_WATCHES + 5)]
    for model in models:
        for _ in range(3):
            fused(model, torch.rand(2, 3))
    assert len(watch._watches) <= watch.MOST_WATCHES and len(programs._entries) <= 2


def test_a_solution_that_was_not_looked_at_yet_can_be_copied() -> None:
    y = torch.rand(4, 3)
    for _ in range(3):
        fused(linear, y)
    for copied in (
        pickle.loads(pickle.dumps(fused(linear, y))),
        copy.deepcopy(fused(linear, y)),
        copy.copy(fused(linear, y)),
    ):
        assert copied.success and copied.stats.num_calls == 16 and copied.ts.tolist() == [1.0]
    assert "num_calls=16" in repr(fused(linear, y).stats) and "SUCCESS" in repr(fused(linear, y))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = fused(linear, y).nonsense


def test_options_that_may_change_are_never_planned(long_ways: list[Any]) -> None:
    rtol, y = torch.tensor(1e-3), torch.rand(4, 3)
    options = {**DOPRI5, "steps": None}
    for _ in range(4):
        fused(linear, y, **{**options, "rtol": rtol})
    assert len(long_ways) == 4
    coarse = fused(linear, y, **{**options, "rtol": rtol}).stats.num_calls
    rtol.fill_(1e-8)
    assert fused(linear, y, **{**options, "rtol": rtol}).stats.num_calls > coarse


def test_a_plan_serves_one_kind_of_state(long_ways: list[Any]) -> None:
    state = torch.rand(4, 3, dtype=torch.float32)
    kinds = [
        state,
        state[:2],
        state.double(),
        state.clone().requires_grad_(),
        nn.Parameter(state),
        state.t().contiguous().t(),
    ]
    for y in kinds:
        for _ in range(3):
            expected = neurode.solve(linear, y, (0.0, 1.0), engine="eager", **RK4).y1
            mine = fused(linear, y).y1
            assert mine.dtype is y.dtype and mine.shape == y.shape and torch.allclose(mine, expected, atol=1e-6)
            assert mine.requires_grad == y.requires_grad
    known = {plan.ticket(y, (0.0, 1.0), None, ()) for y in kinds}
    assert len(known) == 4  # a parameter is like the tensor before it, and strides are read at every call


def test_four_threads_solve_by_one_plan_at_once(long_ways: list[Any]) -> None:
    torch.manual_seed(0)
    model, states = Model(), [torch.rand(4, 3) for _ in range(4)]
    expected = [fused(model, y).y1 for y in states]
    fused(model, states[0])
    seen = len(long_ways)

    def work(i: int) -> bool:
        found = []
        for _ in range(100):
            solution = fused(model, states[i], (0.0, 1.0) if i % 2 else (0, 1))
            found.append(torch.equal(solution.y1, expected[i]) and solution.status.codes.tolist() == [0] * 4)
        return all(found)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    assert len(long_ways) == seen


def test_no_solution_shares_memory_with_another(long_ways: list[Any]) -> None:
    y, times = torch.rand(4, 3), torch.tensor([0.2, 0.7])
    solutions = [fused(linear, y, t_eval=times) for _ in range(6)]
    assert len(long_ways) == 2
    before = [(s.y1.clone(), s.ys.clone(), s.status.codes.clone(), s.stats.num_evaluations.clone()) for s in solutions]
    for s in solutions[::2]:
        for x in (s.y1, s.ys, s.status.codes, s.stats.num_evaluations):
            x.zero_()
    for s, then in list(zip(solutions, before, strict=True))[1::2]:
        now = (s.y1, s.ys, s.status.codes, s.stats.num_evaluations)
        assert all(map(torch.equal, now, then))


def test_gradients_of_solves_by_one_plan_are_apart(long_ways: list[Any]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    field = lambda t, y: model(y)
    states = [torch.rand(4, 3, requires_grad=True) for _ in range(6)]
    solutions = [fused(field, y) for y in states]
    assert len(long_ways) == 2
    for y, solution in list(zip(states, solutions, strict=True))[::-1]:
        mine = torch.autograd.grad(solution.y1.square().sum(), [y, *model.parameters()])
        theirs = torch.autograd.grad(eager(field, y, (0.0, 1.0), **RK4).y1.square().sum(), [y, *model.parameters()])
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(mine, theirs, strict=True))
        assert solution.stats.backward.num_calls > 0


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = [1.0, 2.0], [3.0]

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return -y * sum(self.one) / sum(self.two)


class Tables(nn.Module):
    rate = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = {"a": 1.0, "b": 2.0}, {"c": 3.0}
        self.ordered = OrderedDict(a=1.0, b=2.0)
        self.net = nn.Sequential(nn.Linear(3, 3), nn.Tanh())

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        first, _ = self.ordered.values()
        return -self.net(y) * sum(self.one.values()) / sum(self.two.values()) * self.rate * first


def moved(model: nn.Module) -> None:
    model.two.insert(0, model.one.pop())


def moved_entry(model: nn.Module) -> None:
    value = model.one.pop("b")
    held = dict(model.two)
    model.two.clear()
    model.two.update({"b": value, **held})


def replaced_state(model: nn.Module) -> None:
    model.net.__dict__ = {**model.net.__dict__, "_modules": {"0": nn.Linear(3, 3)}}


def replaced_own_state(model: nn.Module) -> None:
    model.__dict__ = {**model.__dict__, "one": {"a": 7.0}}


SMALL: dict[str, tuple[type[nn.Module], Callable[[Any], Any]]] = {
    "an item that goes from list to list": (Lists, moved),
    "an entry that goes from table to table": (Tables, moved_entry),
    "the order of a table": (Tables, lambda m: m.ordered.move_to_end("a")),
    "an equal number of another class": (Tables, lambda m: m.one.update(a=True)),
    "a number of the class": (Tables, lambda m: setattr(Tables, "rate", 2.0)),
    "the attributes of a part": (Tables, replaced_state),
    "its own attributes": (Tables, replaced_own_state),
    "a part renamed": (Tables, lambda m: m.net._modules.update({"9": m.net._modules.pop("1")})),
    "the class of a weight": (Tables, lambda m: m.net[0]._parameters.update(weight=m.net[0].weight.detach() * 2)),
    "the memory of a weight": (Tables, lambda m: setattr(m.net[0].weight, "data", torch.rand(3, 3).t())),
    "a number of a weight": (Tables, lambda m: m.net[0].weight.data.fill_(2.0)),
}


@pytest.mark.parametrize("name", SMALL)
def test_small_changes_are_seen(name: str, long_ways: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tables, "rate", 1.0)
    torch.manual_seed(0)
    kind, change = SMALL[name]
    model, y = kind(), torch.rand(4, 3)
    for _ in range(4):
        fused(model, y)
    assert len(long_ways) == 2
    change(model)
    expected, seen = eager(model, y, (0.0, 1.0), **RK4).y1, len(long_ways)
    assert torch.allclose(fused(model, y).y1, expected, atol=1e-6)
    assert (len(long_ways) > seen) == (name != "a number of a weight"), "numbers are read, everything else is guarded"
    for _ in range(3):
        assert torch.allclose(fused(model, y).y1, expected, atol=1e-6)


@pytest.mark.parametrize("trusted", [True, False])
def test_facts_of_tensors_are_seen_with_and_without_the_look_of_pytorch(
    trusted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not trusted:
        monkeypatch.setattr(watch, "_trusted", lambda: None)
    rand = partial(torch.rand, dtype=torch.float32)
    x = rand(3, 3)
    made = watch.Watch(linear, watch.parts_of(linear), None)
    made.tensors = [x]
    made.settle(lambda _: None)
    parts = watch.parts_of(linear)
    assert made.holds(parts) and made.holds(parts)
    assert (made.alike is not None) == trusted, "PyTorch has changed what its guards look at"
    for data in (rand(3, 2), rand(3, 3).t(), rand(3, 3).double(), torch._neg_view(rand(3, 3))):
        kept, x.data = x.data, data
        assert not made.holds(parts)
        x.data = kept
        assert made.holds(parts)
    x.requires_grad_()
    assert not made.holds(parts)
    x.requires_grad_(False)
    with torch.inference_mode():
        assert made.holds(parts) and made.holds(parts)
    assert made.holds(parts)


@pytest.mark.parametrize("times", [[0.25, 1.0], (0, 0.5), [1]], ids=str)
@pytest.mark.parametrize("batch_dim", [0, None])
def test_output_times_may_be_numbers(times: Any, batch_dim: int | None, long_ways: list[Any]) -> None:
    y = torch.rand(4, 3)
    first = fused(linear, y, t_eval=times, batch_dim=batch_dim)
    fused(linear, y, t_eval=times, batch_dim=batch_dim)
    again = fused(linear, y, t_eval=type(times)(times), batch_dim=batch_dim)
    assert len(long_ways) == 2
    assert torch.equal(first.ys, again.ys) and torch.equal(first.ts, again.ts) and first.ts.dtype is again.ts.dtype
    other = [t / 2 for t in times]
    assert torch.equal(fused(linear, y, t_eval=other, batch_dim=batch_dim).ts, torch.tensor(other, dtype=torch.float64))
    for wrong in (
        [2.0] * len(times),
        [float("nan")] * len(times),
        [10**400] * len(times),
        [True] * len(times),
        ["a"],
        [],
    ):
        seen = len(long_ways)
        with contextlib.suppress(ValueError, OverflowError, TypeError, RuntimeError):
            fused(linear, y, t_eval=wrong, batch_dim=batch_dim)
        assert len(long_ways) > seen, "answered by the plan"


@pytest.mark.parametrize("looked", ["ys", "ts"])
def test_the_end_as_an_output_is_made_by_itself(looked: str) -> None:
    y = torch.tensor([[1.0, 2.0]], requires_grad=True)
    for _ in range(3):
        solution = fused(linear, y)
    getattr(solution, looked)
    assert ("_make" in vars(solution)) == (looked == "ys")
    assert torch.equal(solution.ys, solution.y1.unsqueeze(0)) and solution.ts.tolist() == [1.0]
    assert not [name for name in vars(solution) if name.startswith("_")]
    (grad,) = torch.autograd.grad(solution.ys.sum(), y)
    torch.testing.assert_close(grad, torch.full_like(y, 0.6065), rtol=1e-3, atol=0)


def test_the_end_as_an_output_is_of_the_mode_of_the_solve() -> None:
    y = torch.tensor([[1.0, 2.0]], requires_grad=True)
    for _ in range(3):
        with_tape, in_inference = fused(linear, y), fused(linear, y)
    with torch.no_grad():
        assert with_tape.ys.requires_grad
    with torch.inference_mode():
        assert in_inference.ys.requires_grad and not in_inference.ys.is_inference()


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("batch_dim", [None, 0])
def test_an_infinite_state_is_refused_by_plan_too(batch_dim: int | None, method: str) -> None:
    """Though f is finite there."""
    field = nn.Sequential(nn.Tanh(), nn.Linear(1, 1))
    f = Autonomous(field)
    options: dict[str, Any] = {"method": method, "batch_dim": batch_dim, **({"steps": 4} if method == "rk4" else {})}
    for _ in range(3):
        neurode.solve(f, torch.ones(3, 1), (0.0, 1.0), **options)
    with pytest.raises(InputError, match="must be finite"):
        neurode.solve(f, torch.tensor([[1.0], [float("inf")], [1.0]]), (0.0, 1.0), **options)


class Autonomous(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)
