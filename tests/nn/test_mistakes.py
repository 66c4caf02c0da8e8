"""A new user's mistakes with the layers: each is met early, by a sentence that says what to type."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import neurode
from neurode.nn import MLP, Augment, NeuralODE, ResNet, as_resnet, check_depth


class Autonomous(nn.Module):
    def forward(self, y):
        return -y


def layer(features: int = 3, **options) -> NeuralODE:
    return NeuralODE(MLP(features, (4,), zero_init=False), **{"method": "rk4", "steps": 4, **options})


Y = torch.ones(5, 3, dtype=torch.float64)

# what is wrong: (what does it; words that the message must hold)
TABLE = {
    "a keyword that does not exist": (lambda: layer(step=4), ["'step'", "Did you mean 'steps'?"]),
    "a method that does not exist": (lambda: layer(method="rk44"), ["'rk44'", "Did you mean 'rk4'?"]),
    "a fixed method without steps": (lambda: layer(steps=None), ["'rk4'", "Type steps=20"]),
    "steps with an adaptive method": (lambda: layer(method="dopri5"), ["steps=4", "'dopri5'", "rtol"]),
    "t_span of one number": (lambda: layer(t_span=1.0), ["t_span=1.0", "(0.0, 1.0)"]),
    "t_span of three": (lambda: layer(t_span=(0, 1, 2)), ["(0, 1, 2)", "two times"]),
    "a class as the field": (lambda: NeuralODE(MLP), ["class MLP", "MLP(...)"]),
    "a number as the field": (lambda: NeuralODE(3.0), ["of type float", "f(t, y)"]),
    "a field without time": (lambda: NeuralODE(nn.Sequential(nn.Linear(3, 3))), ["f(t, y)", "Sequential takes (input)"]),
    "a module without time": (lambda: NeuralODE(Autonomous()), ["f(t, y)", "Autonomous takes (y)"]),
    "a field without its args": (lambda: NeuralODE(lambda t, y: y, args=(1.0,)), ["f(t, y, args[0])"]),
    "with_solver: a keyword": (lambda: layer().with_solver(metod="rk4"), ["'metod'", "Did you mean 'method'?"]),
    "with_solver: back to fixed steps": (
        lambda: layer().with_solver(method="dopri5").with_solver(method="rk4"), ["Type steps=20"],
    ),
    "with_solver: a depth for an adaptive layer": (
        lambda: layer(method="dopri5", steps=None).with_solver(steps=5), ["steps=5", "method='rk4'"],
    ),
    "other features": (lambda: layer()(torch.ones(5, 4)), ["(5, 4)", "3 features", "MLP(4, ...)"]),
    "other features, backward": (lambda: layer().inverse(torch.ones(5, 2)), ["(5, 2)", "3 features"]),
    "rows without features": (lambda: layer()(torch.ones(3)), ["(3,)", "3 rows without features", "unsqueeze(0)"]),
    "the same without time in the field": (
        lambda: NeuralODE(MLP(3, time=False), steps=2)(torch.ones(3)), ["3 rows without features"],
    ),
    "a state before the time": (lambda: MLP(3)(torch.ones(5, 3), torch.tensor(0.0)), ["time first"]),
    "times of rows as columns": (lambda: MLP(3)(torch.zeros(5), torch.ones(5, 3)), ["(5,)", "(..., 1)"]),
    "t_eval outside": (lambda: layer().trajectory(Y, [0.0, 2.0]), ["holds 2", "(0, 1)"]),
    "t_eval a number of points": (lambda: layer().trajectory(Y, 5), ["t_eval has shape ()"]),
    "one hidden size without a tuple": (lambda: MLP(3, 64), ["widths=64", "(64,)"]),
    "features that are no number": (lambda: MLP("3"), ["features='3'"]),
    "no features": (lambda: MLP(0), ["features=0"]),
    "an activation that is made already": (lambda: MLP(3, (4,), nn.Tanh()), ["not torch.nn.Tanh()"]),
    "an activation that is a function": (lambda: MLP(3, (4,), torch.tanh), ["torch.nn.Tanh"]),
    "half a feature": (lambda: Augment(1.5), ["num_features=1.5"]),
    "no blocks": (lambda: ResNet(3, num_blocks=0), ["num_blocks=0"]),
    "residual blocks on other features": (lambda: ResNet(3, (4,))(torch.ones(5, 4)), ["(5, 4)", "3 features"]),
    "as_resnet of a field": (lambda: as_resnet(MLP(3)), ["of type MLP", "NeuralODE"]),
    "as_resnet of rk4": (lambda: as_resnet(layer()), ["'rk4'", "with_solver(method='euler', steps=20)"]),
    "as_resnet of learned times": (
        lambda: as_resnet(layer(method="euler", t_span=(0.0, nn.Parameter(torch.tensor(1.0))))), ["t1 requires a gradient"],
    ),
    "as_resnet of a time for each row": (
        lambda: as_resnet(layer(method="euler", t_span=(0.0, torch.ones(5)))), ["t1 has shape (5,)"],
    ),
    "as_resnet of a field with args": (
        lambda: as_resnet(NeuralODE(lambda t, y, k: y, method="euler", steps=2, args=(1.0,))), ["args"],
    ),
    "check_depth of a model": (lambda: check_depth(nn.Sequential(layer()), Y), ["of type Sequential", "of a model"]),
    "check_depth of a list": (lambda: check_depth(layer(), [1.0]), ["['float']", "tensors (rows, ...)"]),
    "check_depth of no rows": (lambda: check_depth(layer(), Y[:0]), ["(0, 3)"]),
    "check_depth of nan": (lambda: check_depth(layer(), Y * float("nan")), ["NaN"]),
    "check_depth at no depth": (lambda: check_depth(layer(), Y, steps=()), ["steps is empty"]),
    "check_depth with an adaptive method": (lambda: check_depth(layer(), Y, method="dopri5"), ["steps=1", "'dopri5'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_mistake_is_met_by_a_sentence(case: str) -> None:
    make, words = TABLE[case]
    with pytest.raises(neurode.InputError) as raised:
        make()
    for word in words:
        assert word in str(raised.value), str(raised.value)


def test_what_is_not_a_mistake() -> None:
    f = MLP(3, zero_init=False)
    assert torch.equal(f(0.5, Y), f(torch.tensor(0.5), Y)) and f(torch.zeros(1), Y).shape == (5, 3)
    assert NeuralODE(torch.mul, method="euler", steps=2)(Y).shape == (5, 3)  # a builtin keeps its signature to itself


def test_with_solver_takes_another_span() -> None:
    """The layer asked for it goes on to the new end, and its inverse comes back from there."""
    times = (0.0, nn.Parameter(torch.tensor(1.0)))
    one = NeuralODE(lambda t, y: -y, times, method="rk4", steps=100)
    two = one.with_solver(t_span=(0.0, 2.0))
    assert torch.allclose(two(Y), Y * torch.tensor(-2.0).exp(), atol=1e-8)
    assert torch.allclose(two.inverse(two(Y)), Y, atol=1e-8)
    assert one.t1 is times[1] and "t1" in dict(one.named_parameters()) and not list(two.parameters())


def test_inverse_walks_back_along_a_grid_given_as_a_list() -> None:
    flow = NeuralODE(lambda t, y: -y, method="rk4", grid=[0.0, 0.1, 0.5, 1.0], t_eval=[0.0, 0.5])
    assert torch.allclose(flow.inverse(flow(Y)), Y, atol=1e-2) and flow.last_stats.num_accepted[0] == 3


def test_repr_names_a_method_given_as_a_tableau() -> None:
    assert "method='rk4'" in repr(layer(method=neurode.methods.get("rk4")))


class TestCheckDepth:
    def test_a_flow_that_stands_still_has_no_verdict(self) -> None:
        report = check_depth(NeuralODE(MLP(3), method="euler", steps=2), Y)
        assert report.moved == 0.0 and "says nothing" in str(report)

    def test_a_flow_that_blows_up_when_solved_accurately_is_none(self) -> None:
        explodes = NeuralODE(lambda t, y: y * y, (0.0, 3.0), method="euler", steps=4)
        report = check_depth(explodes, Y, steps=(4, 40))
        assert not report.is_ode and report.deviation == float("inf")
        assert "does not reach the end: 5 of 5 rows" in str(report)

    def test_states_of_several_tensors(self) -> None:
        turn = NeuralODE(lambda t, y: {"q": y["p"], "p": -y["q"]}, method="rk4", steps=20)
        report = check_depth(turn, {"q": Y, "p": 0 * Y}, steps=5)
        assert report.is_ode and report.steps == (5,)

    def test_scores_are_of_each_depth(self) -> None:
        report = check_depth(
            NeuralODE(lambda t, y: -y, method="euler", steps=2), Y, steps=(1, 2), score=lambda y: y.mean()
        )
        assert report.scores == (0.0, 0.25) and report.score == 0.25
        assert report.score_exact == pytest.approx(0.36787944, abs=1e-7)
