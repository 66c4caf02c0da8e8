"""Rows that fail beside good ones: what they reached, what the others' gradients are, and what users read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import neurode

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
    with pytest.raises(neurode.InputError, match=r"row 0 is known between t = 0 and t = 0\.4\d*; asked at 0.8"):
        solution(0.8)
