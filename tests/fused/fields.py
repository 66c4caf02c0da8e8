"""Vector fields as their users write them, most after models of the literature; each says whether it can be lowered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FIELDS: dict[str, Case] = {}


@dataclass(frozen=True)
class Case:
    """A field: `make() -> f`, the shape of one row, and whether rows, or at least one whole state, are lowered."""

    make: Callable[[], Any]
    shape: tuple[int, ...]
    rows: bool = True
    joint: bool = True
    why: str = ""
    per_row_time: bool = True


def case(shape: tuple[int, ...], **options: Any) -> Callable[[Any], Any]:
    """Register a factory under its own name."""

    def add(make: Callable[[], Any]) -> Callable[[], Any]:
        FIELDS[make.__name__] = Case(make, shape, **options)
        return make

    return add


def mlp(sizes: list[int], act: Callable[[], nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1])


class WithTime(nn.Module):
    """`net(cat(t, y))`."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(torch.cat([t.expand(y.shape[0], 1) if t.ndim == 0 else t, y], -1))


class NoTime(nn.Module):
    """`net(y)`."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


for _name, _act in {
    "tanh": nn.Tanh, "relu": nn.ReLU, "softplus": nn.Softplus, "silu": nn.SiLU, "gelu": nn.GELU, "elu": nn.ELU,
    "sigmoid": nn.Sigmoid, "leaky": nn.LeakyReLU, "mish": nn.Mish, "sine": Sine, "hardtanh": nn.Hardtanh,
}.items():  # fmt: skip
    FIELDS[f"mlp_{_name}"] = Case(lambda act=_act: WithTime(mlp([5, 12, 12, 4], act)), (4,))

FIELDS["gelu_tanh"] = Case(lambda: NoTime(mlp([4, 9, 4], lambda: nn.GELU("tanh"))), (4,))


@case((2,))
def spiral_cubed() -> Any:
    """torchdiffeq's ode_demo.py: `net(y**3)`."""
    net = mlp([2, 10, 2], nn.Tanh)
    return lambda t, y: net(y**3)


@case((2,))
def linear_matrix() -> Any:
    A = nn.Parameter(torch.tensor([[-0.1, 2.0], [-2.0, -0.1]]))
    return lambda t, y: y**3 @ A


class ConcatLinear(nn.Module):
    """FFJORD's layer: the time is one more input."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.layer = nn.Linear(a + 1, b)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.layer(torch.cat([torch.ones_like(x[:, :1]) * t, x], 1))


class ConcatSquash(nn.Module):
    """FFJORD's layer: the time gates and shifts."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.layer, self.bias, self.gate = nn.Linear(a, b), nn.Linear(1, b, bias=False), nn.Linear(1, b)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        t = t.view(-1, 1)
        return self.layer(x) * torch.sigmoid(self.gate(t)) + self.bias(t)


class Stack(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.second(t, F.softplus(self.first(t, x)))


@case((3,))
def ffjord_concat() -> Any:
    return Stack(ConcatLinear(3, 8), ConcatLinear(8, 3))


@case((3,))
def ffjord_squash() -> Any:
    return Stack(ConcatSquash(3, 8), ConcatSquash(8, 3))


class Film(nn.Module):
    """Sinusoidal time embedding, FiLM, LayerNorm: the velocity networks of flow matching."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("freq", torch.linspace(0.5, 4.0, 4))
        self.inner, self.film, self.out = nn.Linear(3, 8), nn.Linear(8, 16), nn.Linear(8, 3)
        self.norm = nn.LayerNorm(8)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        phase = t.reshape(-1, 1) * self.freq
        scale, shift = self.film(torch.cat([phase.sin(), phase.cos()], -1)).chunk(2, -1)
        return self.out(F.silu(self.norm(self.inner(y)) * (1 + scale) + shift))


@case((3,))
def film_layernorm() -> Any:
    return Film()


class Gru(nn.Module):
    """GRU-ODE (De Brouwer et al. 2019)."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.r, self.z, self.h = nn.Linear(n, n, bias=False), nn.Linear(n, n, bias=False), nn.Linear(n, n, bias=False)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        r, z = torch.sigmoid(self.r(y)), torch.sigmoid(self.z(y))
        return (1 - z) * (torch.tanh(self.h(r * y)) - y)


@case((5,))
def gru_ode() -> Any:
    return Gru(5)


@case((5,))
def gru_cell() -> Any:
    cell = nn.GRUCell(5, 5)
    return lambda t, y: cell(torch.tanh(y), y) - y


class Attention(nn.Module):
    """One head of attention over 4 tokens of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        q, k, v = self.qkv(y.view(-1, 4, 8)).chunk(3, -1)
        weights = torch.softmax(q @ k.transpose(1, 2) / 8**0.5, -1)
        return self.out(weights @ v).flatten(1)


@case((32,))
def attention() -> Any:
    return Attention()


@case((3, 8))
def multihead() -> Any:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    return lambda t, y: layer(y, y, y, need_weights=False)[0]


@case((3, 8))
def transformer_block() -> Any:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    return lambda t, y: layer(y) - y


@case((2, 9))
def conv1d() -> Any:
    a, b = nn.Conv1d(2, 4, 3, padding=1), nn.Conv1d(4, 2, 3, padding=1)
    return lambda t, y: b(torch.tanh(a(y)))


@case((2, 5, 5))
def conv2d() -> Any:
    """The ODE-Net's block (Chen et al. 2018), GroupNorm and the time as a channel."""
    norm, a = nn.GroupNorm(2, 4), nn.Conv2d(3, 4, 3, padding=1)
    b = nn.Conv2d(4, 2, 3, padding=1)

    def f(t: Tensor, y: Tensor) -> Tensor:
        return b(F.relu(norm(a(torch.cat([torch.ones_like(y[:, :1]) * t, y], 1)))))

    return f


@case((12,))
def heat_roll() -> Any:
    """Finite differences with periodic ends."""
    nu = nn.Parameter(torch.tensor(0.3))
    return lambda t, y: nu * (torch.roll(y, 1, -1) - 2 * y + torch.roll(y, -1, -1)) - y * (y - torch.roll(y, 1, -1))


@case((12,))
def heat_slices() -> Any:
    """Finite differences with zero ends, written into a new tensor in place."""
    nu = nn.Parameter(torch.tensor(0.3))

    def f(t: Tensor, y: Tensor) -> Tensor:
        dy = torch.zeros_like(y)
        dy[:, 1:-1] = nu * (y[:, 2:] - 2 * y[:, 1:-1] + y[:, :-2])
        return dy

    return f


@case((6,))
def kuramoto() -> Any:
    omega, strength = nn.Parameter(torch.linspace(-1, 1, 6)), nn.Parameter(torch.tensor(0.7))
    return lambda t, y: omega + strength * torch.sin(y[:, None, :] - y[:, :, None]).mean(-1)


@case((18,))
def n_body() -> Any:
    """Three bodies in space, softened gravity."""
    mass = nn.Parameter(torch.tensor([1.0, 0.5, 0.2]))

    def f(t: Tensor, y: Tensor) -> Tensor:
        x, v = y.reshape(-1, 2, 3, 3).unbind(1)
        gap = x[:, None, :, :] - x[:, :, None, :]
        cube = ((gap**2).sum(-1, keepdim=True) + 0.1) ** -1.5
        return torch.stack([v, (gap * cube * mass[:, None]).sum(2)], 1).reshape(y.shape)

    return f


@case((4,))
def weight_norm() -> Any:
    a = nn.utils.parametrizations.weight_norm(nn.Linear(4, 8))
    b = nn.utils.parametrizations.weight_norm(nn.Linear(8, 4))
    return lambda t, y: b(torch.tanh(a(y)))


@case((4,))
def antisymmetric() -> Any:
    """Stable by construction (Haber & Ruthotto 2017): the matrix is made from parameters."""
    W, b = nn.Parameter(torch.randn(4, 4) / 2), nn.Parameter(torch.randn(4))
    return lambda t, y: torch.tanh(y @ (W - W.T - 0.1 * torch.eye(4, dtype=y.dtype)) + b)


@case((4,))
def hamiltonian() -> Any:
    """Greydanus et al. 2019, with `torch.func.grad` inside f."""
    net = mlp([4, 10, 1], nn.Tanh)

    def f(t: Tensor, y: Tensor) -> Tensor:
        dq, dp = torch.func.grad(lambda s: net(s).sum())(y).chunk(2, -1)
        return torch.cat([dp, -dq], -1)

    return f


@case((4,))
def hamiltonian_autograd() -> Any:
    net = mlp([4, 10, 1], nn.Softplus)

    def f(t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            y = y if y.requires_grad else y.requires_grad_()
            grad = torch.autograd.grad(net(y).sum(), y, create_graph=True)[0]
        dq, dp = grad.chunk(2, -1)
        return torch.cat([dp, -dq], -1)

    return f


@case((2,))
def pendulum_lagrangian() -> Any:
    return lambda t, y: torch.stack([y[:, 1], -9.81 * torch.sin(y[:, 0]) - 0.1 * y[:, 1]], 1)


class Hypernet(nn.Module):
    """The network that torchdiffeq's cnf.py makes its weights with."""

    def __init__(self, dim: int, hidden: int, width: int) -> None:
        super().__init__()
        size = width * dim
        self.fc1, self.fc2, self.fc3 = (
            nn.Linear(1, hidden),
            nn.Linear(hidden, hidden),
            nn.Linear(hidden, 3 * size + width),
        )
        self.dim, self.width, self.size = dim, width, size

    def forward(self, t: Tensor) -> Any:
        p = torch.tanh(self.fc2(torch.tanh(self.fc1(t.reshape(1, 1))))).reshape(1, -1)
        p = self.fc3(p).reshape(-1)
        n = self.size
        W, U, G = (p[i * n : (i + 1) * n] for i in range(3))
        U = U.reshape(self.width, 1, self.dim) * torch.sigmoid(G.reshape(self.width, 1, self.dim))
        return W.reshape(self.width, self.dim, 1), p[3 * n :].reshape(self.width, 1, 1), U


class Cnf(nn.Module):
    """torchdiffeq's examples/cnf.py: the state is (z, log p) and the trace comes from `autograd.grad`."""

    def __init__(self) -> None:
        super().__init__()
        self.hyper, self.width = Hypernet(2, 8, 4), 4

    def forward(self, t: Tensor, states: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        z, batch = states[0], states[0].shape[0]
        with torch.set_grad_enabled(True):
            z.requires_grad_(True)
            W, B, U = self.hyper(t)
            Z = z.unsqueeze(0).repeat(self.width, 1, 1)
            h = torch.tanh(torch.matmul(Z, W) + B)
            dz = torch.matmul(h, U).mean(0)
            trace = 0.0
            for i in range(z.shape[1]):
                row = torch.autograd.grad(dz[:, i].sum(), z, create_graph=True)[0].contiguous()
                trace = trace + row[:, i].contiguous()
        return dz, -trace.view(batch, 1)


@case((2,), rows=False, why="the hypernetwork takes one time for all rows")
def cnf_hypernet() -> Any:
    return Cnf()


class CnfMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp([3, 8, 8, 2], nn.Tanh)

    def forward(self, t: Tensor, states: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        z = states[0]
        with torch.enable_grad():
            z = z.requires_grad_(True)
            dz = self.net(torch.cat([z, torch.ones_like(z[:, :1]) * t], 1))
            trace = 0.0
            for i in range(2):
                trace = trace + torch.autograd.grad(dz[:, i].sum(), z, create_graph=True)[0][:, i]
        return dz, -trace[:, None]


@case((2,))
def cnf_exact_trace() -> Any:
    return CnfMlp()


@case((4,))
def cnf_vmap_jacobian() -> Any:
    """Exact divergence by `vmap(jacrev)`, written into the last column."""
    net = mlp([3, 8, 3], nn.Tanh)

    def f(t: Tensor, y: Tensor) -> Tensor:
        z = y[:, :3]
        jacobian = torch.func.vmap(torch.func.jacrev(net))(z)
        return torch.cat([net(z), -jacobian.diagonal(dim1=1, dim2=2).sum(-1, keepdim=True)], 1)

    return f


@case((3,))
def forced_where() -> Any:
    net = mlp([3, 6, 3], nn.Tanh)
    return lambda t, y: net(y) + torch.where(t > 0.5, torch.sin(t), torch.zeros_like(t)) * y


@case((4,))
def einsum_field() -> Any:
    W, V = nn.Parameter(torch.randn(4, 4) / 2), nn.Parameter(torch.randn(4, 4, 4) / 4)
    return lambda t, y: torch.einsum("bi,ij->bj", y, W) + torch.einsum("bi,bj,ijk->bk", y, y, V)


@case((2,))
def lotka_volterra() -> Any:
    p = nn.Parameter(torch.tensor([1.5, 1.0, 3.0, 1.0]))

    def f(t: Tensor, y: Tensor) -> Tensor:
        u, v = y.unbind(-1)
        return torch.stack([p[0] * u - p[1] * u * v, -p[2] * v + p[3] * u * v], -1)

    return f


@case((3,))
def lorenz() -> Any:
    sigma, rho, beta = (nn.Parameter(torch.tensor(v)) for v in (10.0, 28.0, 8.0 / 3))

    def f(t: Tensor, y: Tensor) -> Tensor:
        x, w, z = y[..., 0], y[..., 1], y[..., 2]
        return torch.stack((sigma * (w - x), x * (rho - z) - w, x * w - beta * z), -1)

    return f


@case((2,))
def van_der_pol() -> Any:
    return lambda t, y: torch.stack([y[..., 1], 2.0 * (1 - y[..., 0] ** 2) * y[..., 1] - y[..., 0]], -1)


@case((3,))
def robertson() -> Any:
    def f(t: Tensor, y: Tensor) -> Tensor:
        a, b, c = y.unbind(1)
        r1, r2, r3 = 0.04 * a, 1e1 * b * c, 3.0 * b**2
        return torch.stack([-r1 + r2, r1 - r2 - r3, r3], 1)

    return f


@case((10,))
def lorenz96() -> Any:
    return lambda t, y: (y.roll(-1, 1) - y.roll(2, 1)) * y.roll(1, 1) - y + 8.0


@case((2,))
def universal_ode() -> Any:
    """Rackauckas et al. 2020: known physics and a network in place of a term."""
    net, a = mlp([2, 8, 1], nn.Tanh), nn.Parameter(torch.tensor(1.3))
    return lambda t, y: torch.cat([a * y[:, :1] - net(y), net(y) - 1.8 * y[:, 1:]], 1)


@case((4,))
def second_order() -> Any:
    """ANODE-like second order system (Norcliffe et al. 2020)."""
    net = mlp([5, 8, 2], nn.ELU)

    def f(t: Tensor, y: Tensor) -> Tensor:
        x, v = y[:, :2], y[:, 2:]
        return torch.cat([v, net(torch.cat([x, v, torch.ones_like(x[:, :1]) * t], 1))], 1)

    return f


@case((5,))
def anode_augmented() -> Any:
    """Dupont et al. 2019, zeros beside the data."""
    net = mlp([5, 8, 8, 5], nn.ReLU)
    return lambda t, y: net(y)


@case((4,))
def neural_cde() -> Any:
    """Kidger et al. 2020: a matrix of the state times the derivative of a control known in closed form."""
    net = mlp([4, 8, 12], nn.Tanh)

    def f(t: Tensor, y: Tensor) -> Tensor:
        t = t.reshape(-1, 1).expand(y.shape[0], 1)
        control = torch.cat([torch.ones_like(t), torch.cos(3 * t), torch.exp(-t)], 1)
        return (torch.tanh(net(y)).view(-1, 4, 3) @ control.unsqueeze(-1)).squeeze(-1)

    return f


@case((3,))
def sir_epidemic() -> Any:
    beta, gamma = nn.Parameter(torch.tensor(0.4)), nn.Parameter(torch.tensor(0.1))

    def f(t: Tensor, y: Tensor) -> Tensor:
        s, i, _ = y.chunk(3, dim=-1)
        flow = beta * s * i / y.sum(-1, keepdim=True)
        return torch.cat([-flow, flow - gamma * i, gamma * i], -1)

    return f


@case((4, 3))
def graph_network() -> Any:
    """Graph neural ODE (Poli et al. 2019) on a fixed graph."""
    adjacency = torch.tensor([[0.0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0]]) / 2
    a, b = nn.Linear(3, 6), nn.Linear(6, 3)
    return lambda t, y: b(torch.relu(adjacency.to(y.dtype) @ a(y))) - y


@case((6,))
def gathered_edges() -> Any:
    """Messages along an edge list: index_select and index_add."""
    src, dst = torch.tensor([0, 1, 2, 3, 4, 5, 0]), torch.tensor([1, 2, 3, 4, 5, 0, 3])
    k = nn.Parameter(torch.rand(7))

    def f(t: Tensor, y: Tensor) -> Tensor:
        flow = k * torch.tanh(y[:, src] - y[:, dst])
        return torch.zeros_like(y).index_add(1, dst, flow).index_add(1, src, -flow)

    return f


@case((4,))
def residual_norm() -> Any:
    """Unit-length features and a learned gain."""
    net, gain = mlp([4, 6, 4], nn.SiLU), nn.Parameter(torch.tensor(1.2))
    return lambda t, y: gain * F.normalize(net(y), dim=-1) - y


@case((4,))
def rms_norm_swiglu() -> Any:
    norm, a, b, c = nn.RMSNorm(4), nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

    def f(t: Tensor, y: Tensor) -> Tensor:
        x = norm(y)
        return c(F.silu(a(x)) * b(x))

    return f


@case((3,))
def mixture_of_experts() -> Any:
    """Soft gates over three linear fields."""
    gate, experts = nn.Linear(3, 3), nn.Parameter(torch.randn(3, 3, 3) / 2)
    return lambda t, y: torch.einsum("be,eij,bj->bi", torch.softmax(gate(y), -1), experts, y)


@case((4,))
def clamp_and_abs() -> Any:
    w = nn.Parameter(torch.randn(4))
    return lambda t, y: torch.clamp(w * y, -1.0, 0.7) - y.abs().sqrt() * 0.3 + torch.maximum(y, w)


@case((4,))
def log_sum_exp() -> Any:
    w = nn.Parameter(torch.randn(4, 4))
    return lambda t, y: torch.logsumexp(y[:, :, None] + w, 1) - torch.log_softmax(y, -1)


@case((4,))
def batch_norm_eval() -> Any:
    norm, layer = nn.BatchNorm1d(6).eval(), nn.Linear(4, 6)
    back = nn.Linear(6, 4)
    return lambda t, y: back(torch.tanh(norm(layer(y))))


@case((2, 3, 2))
def tucker() -> Any:
    """A small tensor state contracted on every side."""
    A, B = nn.Parameter(torch.randn(2, 2)), nn.Parameter(torch.randn(3, 3))
    return lambda t, y: torch.tanh(torch.einsum("bijk,il,jm->blmk", y, A, B))


@case((3,))
def no_dependence_on_y() -> Any:
    a = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    return lambda t, y: (a * torch.sin(t)).expand(y.shape[0], 3) if t.ndim == 0 else a * torch.sin(t)


# ---- what must not be lowered


@case((4,), rows=False, joint=True, why="rows coupled")
def mean_over_batch() -> Any:
    return lambda t, y: y - y.mean(0)


@case((4,), rows=False, joint=False, why="train-mode BatchNorm changes its buffers")
def batch_norm_train() -> Any:
    norm = nn.BatchNorm1d(4)
    return lambda t, y: norm(y)


@case((4,), rows=False, joint=False, why="a branch on a value")
def branch_on_value() -> Any:
    return lambda t, y: -y if y.sum() > 0 else y


@case((4,), rows=False, joint=False, why="random numbers")
def random_noise() -> Any:
    return lambda t, y: -y + torch.randn_like(y)


@case((4,), rows=False, joint=False, why="random numbers (dropout in training)")
def dropout() -> Any:
    layer = nn.Dropout(0.5)
    return lambda t, y: layer(y)


@case((4,), rows=False, joint=True, why="divides by the number of rows")
def counts_rows() -> Any:
    return lambda t, y: y / y.shape[0]


@case((4,), rows=False, joint=False, why="a table read at a computed position")
def interpolation() -> Any:
    table = torch.linspace(0, 1, 11)
    return lambda t, y: -y * table.to(y.dtype)[(t * 10).long().clamp(0, 10)]


@case((4,), rows=False, joint=False, why="values leave through NumPy")
def through_numpy() -> Any:
    return lambda t, y: y * torch.as_tensor(float(y.detach().numpy().sum()), dtype=y.dtype)
