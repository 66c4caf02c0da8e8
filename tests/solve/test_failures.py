"""Rows that fail beside good ones: what they reached, what the others' gradients are, and what users read."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import neurode
from neurode.fused import native

SPAN = (0.0, 1.0)
STRATEGIES: dict[str, Any] = {
    "autograd": "autograd", "discrete": "discrete", "one stage": neurode.Discrete(alive="stage"),
    "checkpoints": neurode.Discrete(checkpoints=3), "reversible": "reversible", "continuous": "continuous",
}  # fmt: skip
ENDS = torch.tensor([[0.45], [10.0]], dtype=torch.float64)  # where the logarithm below ends
Y0 = torch.tensor([[0.2], [0.3]], dtype=torch.float64)
BOTH = {"rk4": {"method": "rk4", "steps": 10}, "tsit5": {"method": "tsit5"}}


def method_for(gradient: Any, method: str = "tsit5") -> Any:
    return neurode.Reversible(method) if gradient == "reversible" else method


@pytest.mark.parametrize("max_steps", [60, 10_000])
@pytest.mark.parametrize("gradient", STRATEGIES)
def test_an_f_that_closes_over_the_data_of_rows(gradient: str, max_steps: int) -> None:
    """A failed row stands in for itself: a good one's state would meet its closed-over data."""
    w = torch.ones(1, dtype=torch.float64, requires_grad=True)

    def solve(ends: torch.Tensor, y0: torch.Tensor) -> torch.Tensor:
        solution = neurode.solve(
            lambda t, y, w: w * y + torch.log((ends - t) * w), y0, SPAN, method=method_for(gradient), args=(w,), batch_dim=0,
            on_failure="nan", max_steps=max_steps, gradient=STRATEGIES[gradient], engine="eager",
        )  # fmt: skip
        return torch.autograd.grad(solution.y1[-1].sum(), w)[0]

    torch.testing.assert_close(solve(ENDS, Y0), solve(ENDS[1:], Y0[1:]), rtol=1e-10, atol=0)


@pytest.mark.parametrize("y0, rate", [(float("nan"), 1.0), (1e200, 300.0)])
def test_a_statistic_of_a_failed_row_spoils_no_gradient(y0: float, rate: float) -> None:
    """The square of the second start is infinite, and its derivative as well."""
    w = torch.ones(1, dtype=torch.float64, requires_grad=True)
    start, rates = torch.tensor([[0.3], [y0]]).double(), torch.tensor([[1.0], [rate]]).double()

    def solve(keep: slice) -> neurode.Solution:
        return neurode.solve(
            lambda t, y, w, r: w * r * y, start[keep], SPAN, method="tsit5", args=(w, neurode.per_row(rates[keep])),
            batch_dim=0, on_failure="nan", max_steps=20, t_eval=[0.0, 1.0], save=lambda t, y, w, r: w * y**2,
        )  # fmt: skip

    solution, alone = solve(slice(None)), solve(slice(1))
    found, exact = (torch.autograd.grad(s.ys[:, 0].sum(), w)[0] for s in (solution, alone))
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=0)
    assert not solution.ys[0, 1].isfinite() and solution.ys[1, 1].isnan()


def test_a_statistic_of_all_rows_has_the_gradients_of_the_good_ones() -> None:
    w, rates = torch.ones(1, dtype=torch.float64, requires_grad=True), torch.tensor([[1.0], [300.0]]).double()
    solution = neurode.solve(
        lambda t, y, w, r: w * r * y, torch.ones(2, 1).double(), SPAN, method="tsit5", args=(w, neurode.per_row(rates)),
        batch_dim=0, on_failure="nan", max_steps=20, rtol=1e-9, t_eval=[1e-4, 1.0], save=lambda t, y, w, r: y.sum(),
    )  # fmt: skip
    assert solution.status.failed.tolist() == [False, True] and solution.ys[1].isnan()
    assert solution.ys[0].item() == pytest.approx(1.0001 + 1.0304545, rel=1e-6)
    assert torch.autograd.grad(solution.ys[0], w)[0].item() == pytest.approx(1e-4, rel=1e-3)


@pytest.mark.parametrize("y0", [0.2, float("nan")])
def test_an_output_at_the_start_keeps_the_gradient_of_a_good_row(y0: float) -> None:
    """Also where the stand-in fails too: what f closes over makes it so."""
    start = torch.tensor([[y0], [0.3]], dtype=torch.float64, requires_grad=True)
    ends = torch.tensor([[-1.0], [10.0]], dtype=torch.float64)
    solution = neurode.solve(
        lambda t, y: 0 * y + torch.log(ends - t), start, SPAN, method="tsit5", batch_dim=0, on_failure="nan",
        t_eval=[0.0, 1.0], gradient="autograd", engine="eager",
    )  # fmt: skip
    assert torch.autograd.grad(solution.ys[0, 1].sum(), start)[0].tolist() == [[0.0], [1.0]]


@pytest.mark.parametrize("batch_dim", [None, 0])
def test_dense_output_and_statistics_of_a_solve_that_failed_whole_are_constants(batch_dim: int | None) -> None:
    y, t = torch.tensor([[0.2]], requires_grad=True), torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    solution = neurode.solve(
        lambda t, y: 100 * y, y, SPAN, method="tsit5", on_failure="nan", max_steps=5, dense=True, batch_dim=batch_dim,
        t_eval=[0.0, 1.0], save=lambda t, y: 2 * y, engine="eager",
    )  # fmt: skip
    assert solution.ys[0].item() == pytest.approx(0.4) and 0.53 < solution(t).item() < 0.55
    found = torch.autograd.grad(solution(t).sum() + solution.derivative(t).sum() + solution.ys[0].sum(), (y, t))
    assert not any(g.any() for g in found)


@pytest.mark.parametrize("gradient", ["autograd", "discrete"])
@pytest.mark.parametrize("method", BOTH)
def test_an_output_at_the_start_is_there_where_output_times_move(method: str, gradient: str) -> None:
    ends, times = (
        torch.tensor([[-1.0], [10.0]]).double(),
        torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True),
    )
    solution = neurode.solve(
        lambda t, y, c: y + torch.log(c - t), Y0, SPAN, t_eval=times, args=(neurode.per_row(ends),), batch_dim=0,
        on_failure="nan", gradient=gradient, engine="eager", **BOTH[method],
    )  # fmt: skip
    assert torch.equal(solution.ys[0], Y0) and solution.ys[1].isnan().tolist() == [[True], [False]]
    assert torch.autograd.grad(solution.ys.nansum(), times)[0].isfinite().all()


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd])
def test_transforms_keep_the_promise(transform: Any, method: str) -> None:
    def last(w: torch.Tensor) -> torch.Tensor:
        return neurode.solve(
            lambda t, y, w, c: w * y + torch.log((c - t) * w), Y0, SPAN, args=(w, neurode.per_row(ENDS)), batch_dim=0,
            on_failure="nan", gradient="autograd", engine="eager", **BOTH[method],
        ).y1[1].sum()  # fmt: skip

    def outputs(y0: torch.Tensor) -> torch.Tensor:
        return neurode.solve(
            lambda t, y, c: y + torch.log(c - t), y0, SPAN, args=(neurode.per_row(ENDS),), batch_dim=0, on_failure="nan",
            gradient="autograd", engine="eager", t_eval=[0.005, 1.0], **BOTH[method],
        ).ys.nan_to_num()[:, :, 0].sum(0)  # fmt: skip

    w = torch.ones(1, dtype=torch.float64)
    torch.testing.assert_close(transform(last)(w), torch.autograd.functional.jacobian(last, w), rtol=1e-10, atol=0)
    jacobian = transform(outputs)(Y0)[:, :, 0]
    assert jacobian[1, 1] > 3 and not jacobian[0].any() and not jacobian[:, 0].any()


def test_forward_mode_holds_step_lengths_still() -> None:
    """As reverse mode does, with a step for each row and with one for all."""
    for batch_dim in (None, 0):
        end = lambda w, batch_dim=batch_dim: neurode.solve(
            lambda t, y, w: w * y, torch.tensor([[0.3]]).double(), SPAN, method="tsit5", args=(w,), batch_dim=batch_dim,
            gradient="autograd", engine="eager",
        ).y1.sum()  # fmt: skip
        w = torch.ones(1, dtype=torch.float64)
        torch.testing.assert_close(torch.func.jacfwd(end)(w), torch.func.jacrev(end)(w), rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", ["euler", "explicit_adams", "rk4"])
def test_an_event_beside_a_row_that_becomes_nan(method: str) -> None:
    solution = neurode.solve(
        lambda t, y, c: y + torch.log(c - t), Y0, SPAN, method=method, steps=17, args=(neurode.per_row(ENDS),), batch_dim=0,
        on_failure="nan", events=[neurode.Event(lambda t, y, c: y[:, 0] - 1)], engine="eager",
    )  # fmt: skip
    assert solution.status.failed.tolist() == [True, False] and solution.events[0].count.tolist() == [0, 1]


def test_a_grid_for_all_rows_with_events() -> None:
    grid = [0.0, 0.1, 0.3, 0.6, 1.0]
    event = neurode.Event(lambda t, y: y.reshape(-1)[0] - 0.5 if y.ndim == 1 else y[:, 0] - 0.5)
    rows = neurode.solve(lambda t, y: -y, torch.ones(2, 1), SPAN, method="rk4", grid=grid, batch_dim=0, events=[event])
    one = neurode.solve(lambda t, y: -y, torch.ones(1), SPAN, method="rk4", grid=grid, events=[event])
    assert rows.events[0].t[0].tolist() == pytest.approx([one.events[0].t[0].item()] * 2)


@pytest.mark.parametrize("span", [(0.0, 1.0), (torch.zeros(2), torch.ones(2))], ids=["shared", "own"])
@pytest.mark.parametrize("engine", ["eager", "fused"])
def test_what_a_row_reached_on_a_grid_is_the_same_on_both_engines(engine: str, span: Any) -> None:
    if engine == "fused" and not native.available():
        pytest.skip("the native library is not built (make native)")
    found = []
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            solution = neurode.solve(
                lambda t, y, c: y + torch.log(c - t), Y0.clone().requires_grad_(grad), span, method="rk4", steps=10,
                t_eval=[0.0, 0.2, 0.4, 1.0], args=(neurode.per_row(ENDS),), batch_dim=0, on_failure="nan", engine=engine,
            )  # fmt: skip
        found.append(solution.ys[:, 0, 0].tolist())
    for ys in found:
        assert ys[:3] == pytest.approx([0.2, 0.010894782013, -0.420765261193]) and ys[3] != ys[3]


@pytest.mark.parametrize("grad", [True, False])
def test_a_joint_solve_that_never_took_a_step_shows_its_start(grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        solution = neurode.solve(
            lambda t, y: y + torch.log(-1 - t), Y0[0].clone().requires_grad_(grad), SPAN, method="tsit5", t_eval=[0.0, 1.0],
            on_failure="nan", engine="eager",
        )  # fmt: skip
    assert solution.ys[0].item() == 0.2 and solution.ys[1].isnan()


@pytest.mark.parametrize("batch_dim", [None, 0])
def test_a_transform_leaves_nothing_behind(batch_dim: int | None) -> None:
    """Constants that were made within one must not be found by the next: the coefficients of a method that nobody has used."""
    y0, rows, c = torch.tensor([[0.2]], dtype=torch.float64), [0.3, 1.0], 0.61 if batch_dim is None else 0.62
    weights = (1 - 1 / (2 * c), 1 / (2 * c))
    odd = neurode.ButcherTableau(
        name=f"heun with c = {c}", order=2, a=((), (c,)), b=weights, c=(0.0, c), b_error=(weights[0] - 1, weights[1]),
        order_error=1, source="a test",
    )  # fmt: skip

    def end(w: torch.Tensor) -> torch.Tensor:
        return neurode.solve(
            lambda t, y, w: w * y, y0, SPAN, args=(w,), t_eval=rows, batch_dim=batch_dim, method=odd, gradient="autograd",
            engine="eager",
        ).ys.sum()  # fmt: skip

    w = torch.tensor(1.0, dtype=torch.float64)
    second = torch.func.hessian(end)(w)
    torch.testing.assert_close(torch.func.grad(end)(w), torch.autograd.functional.jacobian(end, w))
    torch.testing.assert_close(second, torch.autograd.functional.hessian(end, w))


def test_a_compiled_function_may_break_its_graph_at_a_solve() -> None:
    end = torch.compile(lambda y: neurode.solve(lambda t, y: -y, y, SPAN, method="tsit5").y1, backend="eager")
    assert end(torch.ones(2, dtype=torch.float64)).tolist() == pytest.approx([0.3679] * 2, rel=1e-3)


@pytest.mark.parametrize("shape", [(3,), (3, 2)])
def test_a_statistic_of_rows_of_any_rank(shape: tuple[int, ...]) -> None:
    found = neurode.solve(
        lambda t, y: -y, torch.ones(shape), SPAN, method="tsit5", batch_dim=0, save=lambda t, y: 2 * y
    )
    assert found.ys.shape == (1, *shape) and torch.allclose(found.ys[0], 2 * found.y1)


def test_what_transforms_cannot_do_is_said() -> None:
    event = neurode.Event(lambda t, y, w: y[0] - 0.5, terminal=True)
    y0, one = torch.tensor([0.2, 0.1]), torch.tensor(1.0)
    solve = lambda w, **more: neurode.solve(lambda t, y, w: w * y, y0, (0.0, 2.0), args=(w,), **more).y1.sum()
    with pytest.raises(neurode.GradientError, match=r"do not go through events. Type torch.autograd.grad"):
        torch.func.grad(lambda w: solve(w, events=[event], method="rk4", steps=20))(one)
    for more in ({}, {"method": "rk4", "steps": 20, "events": [event]}):
        with pytest.raises(neurode.InputError, match=r"Type batch_dim=0 and args=\(neurode.per_row"):
            torch.func.vmap(lambda w, more=more: solve(w, **more))(torch.stack([one, 2 * one]))


MISTAKES = {
    "max_step for rows": (dict(max_step=torch.tensor([0.1, 0.2])), ["max_step has shape (2,)", "one number"]),
    "no tolerance, as tensors": (dict(rtol=torch.tensor(0.0), atol=torch.tensor(0.0)), ["both 0"]),
    "an event's g": (dict(events=[neurode.Event(lambda y: y[0])]), ["an event's function", "takes (y)"]),
    "save": (dict(save=lambda y: y), ["save is called as save(t, y)", "takes (y)"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named(case: str) -> None:
    arguments, words = MISTAKES[case]
    with pytest.raises(neurode.InputError) as error:
        neurode.solve(lambda t, y: -y, torch.ones(2), SPAN, method="tsit5", **arguments)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_query_beyond_what_a_row_reached_names_the_row() -> None:
    solution = neurode.solve(
        lambda t, y: 1 / (ENDS - t) ** 2,
        Y0,
        SPAN,
        method="tsit5",
        batch_dim=0,
        dense=True,
        on_failure="nan",
        max_steps=30,
    )
    with pytest.raises(neurode.InputError, match="takes a number or a tensor of times"):
        solution("soon")
    with pytest.raises(neurode.InputError, match=r"row 0 is known between t = 0 and t = 0\.4\d*; asked at 0.8"):
        solution(0.8)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("method", ["bosh3", "dopri5", "tsit5", "dop853", "rk4"])
@pytest.mark.parametrize("engine", ["eager", "auto"])
def test_an_infinite_row_fails_though_f_is_finite_there(engine: str, method: str, value: float) -> None:
    """An error measured against an infinite tolerance is none."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    y0, options = torch.tensor([[0.5], [value], [-0.3]]), dict(steps=5) if method == "rk4" else {}
    field = Autonomous(net)
    sol = neurode.solve(field, y0, SPAN, method=method, batch_dim=0, on_failure="nan", engine=engine, **options)
    assert sol.status.failed.tolist() == [False, True, False] and bool(sol.y1[1].isnan())
    grads = torch.autograd.grad(sol.y1[[0, 2]].sum(), list(net.parameters()))
    alone = neurode.solve(field, y0[[0, 2]], SPAN, method=method, batch_dim=0, engine=engine, **options)
    for mine, theirs in zip(grads, torch.autograd.grad(alone.y1.sum(), list(net.parameters())), strict=True):
        torch.testing.assert_close(mine, theirs)


class Autonomous(torch.nn.Module):
    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)
