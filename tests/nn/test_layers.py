"""The layers: sizes, the bridge to residual networks, inverses, other solvers, and a model's whole life."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import neurode
from neurode.nn import MLP, Augment, Lift, NeuralODE, ResNet, as_resnet, check_depth


def count(module):
    return sum(p.numel() for p in module.parameters())


def classifier():
    return nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 2))


def spiral_model(method="euler"):
    return nn.Sequential(Lift(2, 6), NeuralODE(MLP(6, (128, 128)), method=method, steps=20), classifier())


def test_parameter_counts_of_the_study():
    resnet = nn.Sequential(Lift(2, 6), ResNet(6, (128, 128), num_blocks=20), classifier())
    assert count(spiral_model()) == 18_906
    assert count(resnet) == 364_236
    shared = nn.Sequential(Lift(2, 6), ResNet(6, (128, 128), num_blocks=20, shared=True), classifier())
    assert count(shared) == 18_906 - 128  # no time in the blocks


def test_the_field_of_the_study_is_three_linear_layers():
    f = MLP(6, (128, 128))
    sizes = [(layer.in_features, layer.out_features) for layer in f.layers if isinstance(layer, nn.Linear)]
    assert sizes == [(7, 128), (128, 128), (128, 6)]
    assert [type(layer) for layer in f.layers] == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]


@pytest.mark.parametrize("time", [True, False])
@pytest.mark.parametrize("widths", [(), (8,), (8, 16, 8)])
def test_mlp_shapes_and_time(time, widths):
    f = MLP(3, widths, activation=nn.Softplus, time=time, zero_init=False)
    y = torch.randn(5, 3)
    early, late = f(torch.tensor(0.0), y), f(torch.tensor(2.0), y)
    assert early.shape == (5, 3) and torch.equal(early, late) != time
    rows = f(torch.tensor([[0.0], [2.0], [0.0], [2.0], [0.0]]), y)
    assert torch.allclose(rows[::2], early[::2]) and torch.allclose(rows[1::2], late[1::2])


def test_zero_init_starts_as_the_identity():
    y = torch.randn(4, 6)
    assert torch.equal(NeuralODE(MLP(6), method="rk4", steps=3)(y), y)
    assert torch.equal(ResNet(6, num_blocks=3)(y), y)
    assert not torch.equal(NeuralODE(MLP(6, zero_init=False), method="rk4", steps=3)(y), y)


def test_augment_and_remove():
    y = torch.randn(4, 3)
    augment = Augment(2)
    assert augment(y).shape == (4, 5) and torch.equal(augment.remove(augment(y)), y)
    assert torch.equal(augment(y)[:, 3:], torch.zeros(4, 2))
    with pytest.raises(neurode.InputError, match="at least 1"):
        Augment(0)


@pytest.mark.parametrize("span", [(0.0, 1.0), (1.0, -0.5), (0.0, 0.7)])
@pytest.mark.parametrize("steps", [1, 7, 20])
@pytest.mark.parametrize("batch_dim", [0, None])
def test_as_resnet_is_the_euler_discretization_bit_for_bit(span, steps, batch_dim):
    torch.manual_seed(3)
    layer = NeuralODE(
        MLP(6, (32, 32), zero_init=False), span, method="euler", steps=steps, batch_dim=batch_dim, engine="eager"
    )
    network = as_resnet(layer)
    assert len(network) == steps and network[0].f is layer.f
    results = []
    for model in (layer, network):
        y = torch.randn(9, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
        layer.zero_grad()
        out = model(y)
        out.square().sum().backward()
        results.append((out.detach(), y.grad, *[p.grad.clone() for p in layer.parameters()]))
    for ode, resnet in zip(*results, strict=True):
        assert torch.equal(ode, resnet)
    chosen = layer.with_solver(engine="auto")(y)  # the fused engine, where it is built, rounds in another order
    assert torch.allclose(chosen, results[1][0], rtol=1e-12, atol=1e-13)


def test_as_resnet_refuses_other_solvers():
    with pytest.raises(neurode.InputError, match="with_solver"):
        as_resnet(NeuralODE(MLP(2), method="rk4", steps=4))
    with pytest.raises(neurode.InputError, match="euler"):
        as_resnet(NeuralODE(MLP(2)))


def test_resnet_by_hand():
    net = ResNet(3, (4,), num_blocks=2, zero_init=False, step=0.5)
    y = torch.randn(5, 3)
    z = y
    for block in net.blocks:
        z = z + 0.5 * block.layers(z)
    assert torch.allclose(net(y), z, rtol=1e-14)
    shared = ResNet(3, (4,), num_blocks=2, zero_init=False, shared=True)
    z = y
    for _ in range(2):
        z = z + shared.blocks[0].layers(z)
    assert len(shared.blocks) == 1 and torch.allclose(shared(y), z, rtol=1e-14)


def test_inverse_undoes_forward_to_the_accuracy_of_the_solver():
    torch.manual_seed(0)
    field, y = MLP(3, (16,), zero_init=False), torch.randn(6, 3)
    errors = []
    for steps in (5, 10, 20):
        layer = NeuralODE(field, method="rk4", steps=steps)
        errors.append(float((layer.inverse(layer(y)) - y).abs().max().detach()))
    assert errors[2] < 1e-6 and errors[0] > 10 * errors[1] > 100 * errors[2]
    accurate = NeuralODE(field, rtol=1e-10, atol=1e-10, method="dopri5")
    assert torch.allclose(accurate.inverse(accurate(y)), y, atol=1e-8)
    points = torch.tensor([0.0, 0.2, 0.3, 1.0])
    layer = NeuralODE(field, method="rk4", grid=points)
    assert (layer.inverse(layer(y)) - y).abs().max() < 1e-2
    assert layer.last_stats.num_accepted[0] == 3


def test_with_solver_shares_parameters_and_keeps_the_layer():
    layer = NeuralODE(MLP(2, zero_init=False), method="euler", steps=4)
    y = torch.randn(3, 2)
    before = layer(y)
    deep = layer.with_solver(steps=4000)
    exact = layer.with_solver(method="dopri5", rtol=1e-9, atol=1e-9)
    assert deep.f is layer.f and exact.f is layer.f
    assert torch.allclose(deep(y), exact(y), atol=1e-3) and not torch.allclose(before, exact(y), atol=1e-4)
    assert torch.equal(layer(y), before) and layer.options["steps"] == 4
    assert layer.with_solver(step_size=0.25)(y).equal(before)
    exact(y).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_trajectory():
    layer = NeuralODE(MLP(2, zero_init=False), method="rk4", steps=10)
    y = torch.randn(3, 2)
    path = layer.trajectory(y, torch.linspace(0, 1, 6))
    assert path.shape == (6, 3, 2) and torch.equal(path[0], y) and torch.equal(path[-1], layer(y))


def test_learned_end_time():
    t1 = nn.Parameter(torch.tensor(0.5))
    layer = NeuralODE(lambda t, y: -y, (0.0, t1), method="rk4", steps=20)
    layer(torch.ones(1, 1)).sum().backward()
    assert "t1" in dict(layer.named_parameters())
    assert t1.grad.item() == pytest.approx(-math.exp(-0.5), rel=1e-5)


def test_check_depth_tells_an_ode_from_a_residual_network():
    y = torch.randn(20, 2)
    coarse = NeuralODE(lambda t, y: -3 * y, method="euler", steps=2)
    fine = coarse.with_solver(method="rk4", steps=50)
    verdict = check_depth(coarse, y, steps=(1, 2, 100), score=lambda out: float(out.abs().mean()))
    assert not verdict.is_ode and "residual network" in str(verdict)
    assert verdict.deviations[1] == verdict.deviation > 10 * verdict.deviations[2]
    assert verdict.score == pytest.approx(0.25 * float(y.abs().mean()))
    assert verdict.score_exact == pytest.approx(math.exp(-3) * float(y.abs().mean()), rel=1e-6)
    assert check_depth(fine, y, steps=(5,)).is_ode


@pytest.mark.parametrize(
    "options", [dict(method="rk4", steps=5), dict(method="dopri5", rtol=1e-6)], ids=["rk4", "dopri5"]
)
def test_a_model_s_whole_life(options, tmp_path):
    """Shapes, a gradient for every parameter, training, save, load, repr, copies."""
    torch.manual_seed(0)
    model = nn.Sequential(Lift(2, 4), NeuralODE(MLP(4, (8,)), **options), nn.Linear(4, 3))
    x, target = torch.randn(16, 2), torch.randint(3, (16,))
    assert model(x).shape == (16, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    text = repr(model)
    assert options["method"] in text and "t_span=(0.0, 1.0)" in text and "MLP" in text

    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = nn.Sequential(Lift(2, 4), NeuralODE(MLP(4, (8,)), **options), nn.Linear(4, 3))
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        next(twin.parameters()).add_(1.0)
    assert not torch.equal(twin(x), model(x))


def test_a_model_moves_to_another_dtype():
    layer = NeuralODE(MLP(2, zero_init=False), method="dopri5", rtol=1e-4).float()
    assert layer(torch.ones(3, 2, dtype=torch.float32)).dtype == torch.float32


def test_train_and_eval_reach_the_field():
    layer = NeuralODE(MLP(2), method="euler", steps=2)
    layer.eval()
    assert not layer.f.training
    assert layer.with_solver(steps=3).f.training is False


def test_a_layer_takes_a_pytree():
    f = lambda t, y: {"q": y["p"], "p": -y["q"]}
    out = NeuralODE(f, (0, math.pi), method="rk4", steps=50)({"q": torch.ones(3, 1), "p": torch.zeros(3, 1)})
    assert torch.allclose(out["q"], -torch.ones(3, 1), atol=1e-5)
