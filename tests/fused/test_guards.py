"""A changed model never meets a stale program; what must not be captured runs on eager, and nothing is disturbed."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engines import eager, fused
from torch import Tensor, nn

from neurode import EngineError, solve
from neurode.fused import native, programs
from neurode.nn import NeuralODE

pytestmark = pytest.mark.skipif(not native.available(), reason="the native library is not built (make native)")
SETTINGS = SimpleNamespace(scale=1.0)
SCALE = 1.0


def helper(x: Tensor) -> Tensor:
    return torch.tanh(x)


class Model(nn.Module):
    """Something to change in twenty ways."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3))
        self.gain, self.flags, self.table = 1.0, {"on": True, "powers": [1, 2]}, (0.5, 2.0)
        self.config = SimpleNamespace(shift=0.1, nested=[SimpleNamespace(x=1.0)])
        self.act: Callable[[Tensor], Tensor] = torch.sin
        self.extra = torch.tensor([0.1, 0.2, 0.3])
        self.register_buffer("offset", torch.zeros(3))
        self.norm = nn.BatchNorm1d(3).eval()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        x = self.net(y) * self.gain * SETTINGS.scale * SCALE + self.config.shift * self.config.nested[0].x
        if self.flags["on"]:
            x = x + self.table[0] * y ** self.flags["powers"][0]
        return helper(x) + self.act(y) * self.extra + self.norm(self.offset + y) * 0.1


def weights(m: Model) -> None:
    m.net[0].weight = nn.Parameter(torch.full_like(m.net[0].weight, 0.3))


def data(m: Model) -> None:
    m.net[0].weight.data = torch.full_like(m.net[0].weight, 0.2)


def patched(m: Model) -> None:
    m.forward = lambda t, y: -y  # type: ignore[method-assign]


def set_global(m: Model) -> None:
    global SCALE
    SCALE = 0.5


def set_helper(m: Model) -> None:
    global helper
    helper = torch.sigmoid


def class_method(m: Model) -> None:
    Model.forward = lambda self, t, y: self.net(y) * 2.0  # type: ignore[method-assign]


CHANGES: dict[str, Callable[[Model], Any]] = {
    "a float attribute": lambda m: setattr(m, "gain", 0.7),
    "an item of a dict": lambda m: m.flags.update(on=False),
    "an item of a list in a dict": lambda m: m.flags["powers"].__setitem__(0, 2),
    "a tuple": lambda m: setattr(m, "table", (0.9, 2.0)),
    "a namespace": lambda m: setattr(m.config, "shift", 0.4),
    "a namespace in a list in a namespace": lambda m: setattr(m.config.nested[0], "x", 3.0),
    "a function attribute": lambda m: setattr(m, "act", torch.cos),
    "a plain tensor replaced": lambda m: setattr(m, "extra", torch.tensor([1.0, 0.0, 0.0])),
    "a plain tensor in place": lambda m: m.extra.mul_(3.0),
    "a buffer in place": lambda m: m.offset.add_(1.0),
    "a weight replaced": weights,
    "a weight's data": data,
    "an optimizer's step": lambda m: [p.data.add_(0.1) for p in m.parameters()],
    "loading a state": lambda m: m.load_state_dict(Model().state_dict()),
    "a layer replaced": lambda m: m.net.__setitem__(1, nn.ReLU()),
    "a layer appended": lambda m: m.net.append(nn.Tanh()),
    "parametrized weights": lambda m: nn.utils.parametrizations.weight_norm(m.net[0]),
    "a frozen weight": lambda m: m.net[0].weight.requires_grad_(False),
    "a forward hook of a submodule": lambda m: m.net[1].register_forward_hook(lambda mod, i, o: o * 2),
    "a patched forward": patched,
    "a global": set_global,
    "a helper function rebound": set_helper,
    "an attribute of a global object": lambda m: setattr(SETTINGS, "scale", 0.25),
    "evaluation mode of a layer with statistics": lambda m: m.norm.running_mean.fill_(1.0),
    "double precision": lambda m: m.double(),
    "a method of the class": class_method,
}


@pytest.fixture(autouse=True)
def fresh() -> Any:
    global SCALE, helper
    programs.clear()
    old = helper, Model.forward
    yield
    helper, SCALE, SETTINGS.scale, Model.forward = old[0], 1.0, 1.0, old[1]  # type: ignore[method-assign]


def both(f: Any, y: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    options = {"method": "rk4", "steps": 4, "batch_dim": 0, **options}
    return tuple(s(f, y, (0.0, 1.0), **options).y1 for s in (fused, eager))  # type: ignore[return-value]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_never_met_by_a_stale_program(change: str) -> None:
    torch.manual_seed(0)
    model, y = Model(), torch.rand(4, 3)
    mine, theirs = both(model, y)
    assert torch.allclose(mine, theirs, atol=1e-6)
    CHANGES[change](model)
    if change == "double precision":
        y = y.double()
        model.extra = model.extra.double()
    again, expected = both(model, y)
    assert torch.allclose(again, expected, atol=1e-6)
    if change != "a frozen weight" and change not in ("parametrized weights", "double precision"):
        assert not torch.allclose(expected, theirs, atol=1e-4), "the change changed nothing, so the test shows nothing"
    for p in model.parameters():
        p.grad = None
    grads = []
    for solver in (fused, eager):
        model.zero_grad()
        loss = solver(model, y.clone().requires_grad_(), (0.0, 1.0), method="rk4", steps=4, batch_dim=0).y1.sum()
        loss.backward()
        grads.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert (a is None or not a.any()) if b is None else torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("options", [{"method": "rk4", "steps": 4}, {"method": "dopri5"}], ids=["rk4", "dopri5"])
@pytest.mark.parametrize("change", CHANGES)
def test_nor_inside_a_compiled_model(change: str, options: Any) -> None:
    """Under `torch.compile(fullgraph=True)` a solve is one operator, which looks at f at every call."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer, y = NeuralODE(Model(), (0.0, 0.5), rtol=1e-7, atol=1e-9, **options), torch.rand(4, 3)
    compiled = torch.compile(lambda y: layer(y * 2.0) + 1.0, fullgraph=True, backend="eager")
    reference = layer.with_solver(engine="eager")
    for _ in range(2):
        theirs = reference(y * 2.0) + 1.0
        assert torch.allclose(compiled(y), theirs, atol=1e-6)
    CHANGES[change](layer.f)
    if change == "double precision":
        y, layer.f.extra = y.double(), layer.f.extra.double()
    expected = reference(y * 2.0) + 1.0
    assert torch.allclose(compiled(y), expected, atol=1e-6)
    if change == "a patched forward":
        return  # it uses no weight
    wanted = [p for p in layer.parameters() if p.requires_grad]
    mine, theirs = (
        torch.autograd.grad(out.square().sum(), wanted, allow_unused=True) for out in (compiled(y), expected)
    )
    for a, b in zip(mine, theirs, strict=True):
        assert (a is None or not a.any()) if b is None else torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_train_mode_leaves_the_program() -> None:
    model = Model()
    both(model, torch.rand(4, 3))
    model.train()
    before = model.norm.running_mean.clone()
    with pytest.raises(EngineError):
        fused(model, torch.rand(4, 3), (0.0, 1.0), method="rk4", steps=2, batch_dim=0)
    assert torch.equal(model.norm.running_mean, before)


def test_forty_models_of_one_class() -> None:
    torch.manual_seed(1)
    models = [nn.Sequential(nn.Linear(3, 4 + i % 5), nn.Tanh(), nn.Linear(4 + i % 5, 3)) for i in range(40)]
    y = torch.rand(4, 3)
    for _ in range(2):
        for net in models:
            mine, theirs = both(lambda t, y, net=net: net(y), y)
            assert torch.allclose(mine, theirs, atol=1e-6)


def test_a_lambda_made_again_is_captured_once() -> None:
    net, y = nn.Linear(3, 3), torch.rand(4, 3)
    for _ in range(6):
        both(lambda t, y: torch.tanh(net(y)) * 0.5, y)
    assert len(programs._entries) == 1


def test_lambdas_with_changing_numbers_are_right() -> None:
    y = torch.rand(4, 3)
    for k in range(6):
        scale = 1.0 + 0.1 * k
        mine, theirs = both(lambda t, y: -scale * y, y)  # noqa: B023
        assert torch.allclose(mine, theirs, atol=1e-6)


def test_partials_and_bound_methods() -> None:
    class Field:
        k = 2.0

        def rate(self, t: Tensor, y: Tensor, gain: float = 1.0) -> Tensor:
            return -self.k * gain * torch.sin(y)

    y, field = torch.rand(4, 3), Field()
    for f in (field.rate, functools.partial(field.rate, gain=0.3)):
        for k in (2.0, 3.0):
            field.k = k
            mine, theirs = both(f, y)
            assert torch.allclose(mine, theirs, atol=1e-6)


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.nfe = nn.Linear(3, 3), 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.nfe += 1
        return torch.tanh(self.net(y))


def test_a_counter_of_evaluations_stays_right() -> None:
    model, y = Counted(), torch.rand(4, 3)
    for expected in (16, 32, 48):
        fused(model, y, (0.0, 1.0), method="rk4", steps=4, batch_dim=0)
        assert model.nfe == expected
    other = Counted()
    fused(other, y, (0.0, 1.0), method="rk4", steps=4, batch_dim=0)
    assert other.nfe == 16 and len(programs._entries) <= 2


class LazyNoise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.noise: Any = None

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        if self.noise is None:
            self.noise = torch.randn_like(y)
        return y * self.noise


class Appends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.seen.append(t)
        return -y


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nfe = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.nfe += 1
        return -y if self.nfe < 10 else y


@pytest.mark.parametrize("make", [LazyNoise, Appends, Branches])
def test_side_effects_are_refused_and_undone(make: Callable[[], nn.Module]) -> None:
    model = make()
    before = dict(model.__dict__), len(getattr(model, "seen", []))
    with pytest.raises(EngineError):
        fused(model, torch.rand(4, 3), (0.0, 1.0), method="rk4", steps=2, batch_dim=0)
    assert model.__dict__ == before[0] and len(getattr(model, "seen", [])) == before[1]


def test_printing_global_hooks_and_autocast_are_refused() -> None:
    y = torch.rand(4, 3)

    def talks(t: Tensor, y: Tensor) -> Tensor:
        print("called")
        return -y

    solve = lambda f: fused(f, y, (0.0, 1.0), method="rk4", steps=2, batch_dim=0)
    with pytest.raises(EngineError, match="print"):
        solve(talks)
    net = nn.Linear(3, 3)
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: o * 2)
    try:
        with pytest.raises(EngineError, match="hooks"):
            solve(lambda t, y: net(y))
    finally:
        handle.remove()
    with torch.autocast("cpu"), pytest.raises(EngineError, match="autocast"):
        solve(lambda t, y: net(y))


def test_a_baked_index_that_changes_in_place_is_noticed() -> None:
    index, y = torch.tensor([2, 0, 1]), torch.rand(4, 3)
    f = lambda t, y: -y[:, index] * math.pi
    for permutation in ([2, 0, 1], [1, 2, 0], [0, 1, 2]):
        index.copy_(torch.tensor(permutation))
        mine, theirs = both(f, y)
        assert torch.allclose(mine, theirs, atol=1e-6)


def test_zero_initialised_last_layers_do_not_hide_coupled_rows() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 3)
            nn.init.zeros_(self.b.weight)

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            h = F.softplus(self.a(y))
            return self.b(h - h.mean(0))

    with pytest.raises(EngineError, match="coupled"):
        fused(Hidden(), torch.rand(4, 3), (0.0, 1.0), method="rk4", steps=2, batch_dim=0)


class _ReadsNumbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rate", torch.tensor(2.0))
        self.register_buffer("sign", torch.tensor(1.0))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return -y * self.rate.item() if self.sign > 0 else y * float(self.rate)


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f.rate.fill_(5.0),
        lambda f: f.sign.neg_(),
        lambda f: setattr(f, "rate", torch.tensor(5.0)),
        lambda f: f.load_state_dict({"rate": torch.tensor(5.0), "sign": torch.tensor(-1.0)}),
    ],
    ids=["in place", "the branch", "replaced", "loaded"],
)
def test_a_number_that_python_reads_from_a_buffer_is_watched(change: Any) -> None:
    f, y = _ReadsNumbers(), torch.rand(4, 3)
    both(f, y)
    change(f)
    mine, theirs = both(f, y)
    assert torch.allclose(mine, theirs, atol=1e-6)


def test_a_tensor_with_the_numbers_of_before_needs_no_new_program() -> None:
    f = lambda t, y, index: -y[:, index]
    y, made = torch.rand(4, 3), []
    for _ in range(40):  # more than the limit of programs for one function
        made.append(fused(f, y, (0.0, 1.0), args=(torch.tensor([2, 0, 1]),), method="rk4", steps=4, batch_dim=0).y1)
    assert all(torch.equal(x, made[0]) for x in made)


class Baked(nn.Module):
    """Numbers of tensors that become part of a program."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.on, self.index = torch.tensor(1.0), torch.tensor(True), torch.tensor([0, 1, 2])

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        rate = self.k.item()
        return -y[:, self.index] * rate if self.on else y


def test_numbers_that_change_behind_the_version_counter() -> None:
    """`.data` and NumPy write to a tensor without raising its version."""
    model, y = Baked(), torch.rand(4, 3)
    changes = [
        lambda: model.k.data.fill_(3.0),
        lambda: model.k.numpy().fill(2.0),
        lambda: setattr(model.k, "data", torch.tensor(0.5)),
        lambda: model.index.data.copy_(torch.tensor([2, 0, 1])),
        lambda: model.on.numpy().fill(False),
    ]
    for change in [lambda: None, *changes]:
        change()
        for _ in range(3):  # by capture, and then by plan
            mine, theirs = both(model, y)
            assert torch.allclose(mine, theirs, atol=1e-6)


def test_the_environment_is_not_watched() -> None:
    f = lambda t, y: -y * float(os.environ.get("NO_SUCH_RATE", "1"))
    with pytest.raises(EngineError, match=r"reads os\.environ"):
        fused(f, torch.rand(4, 3), (0.0, 1.0), method="rk4", steps=2)


def test_other_uses_of_the_operating_system_are_no_hindrance() -> None:
    class Stored(Model):
        def store(self, folder: str) -> None:
            torch.save(self.state_dict(), os.path.join(folder, "weights.pt"))

    mine, theirs = both(Stored(), torch.rand(4, 3))
    assert torch.allclose(mine, theirs, atol=1e-6)


def test_a_lazy_module_is_eager_until_it_has_its_shapes() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.LazyLinear(3)

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return self.net(y)

    model, y = Lazy(), torch.rand(4, 3)
    with pytest.raises(EngineError, match="no shape yet"):
        fused(model, y, (0.0, 1.0), method="rk4", steps=2)
    found = [solve(model, y, (0.0, 1.0), method="rk4", steps=2).stats.engine.split()[0] for _ in range(2)]
    assert found == ["eager", "fused"]
