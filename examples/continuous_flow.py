"""A continuous normalizing flow: learn a density from its samples, and check it against the true one.

A flow moves points z along dz/dt = f(t, z). The logarithm of their density changes by minus the divergence of f on the
way (Chen et al. 2018), so that a second state carries it along. The data are eight Gaussians on a circle, whose density
is known: the flow's can be compared with it.

Run: python examples/continuous_flow.py [updates]
"""

import math
import sys

import torch
from torch import nn

import neurode

updates = int(sys.argv[1]) if len(sys.argv) > 1 else 600
torch.manual_seed(0)

ANGLES = torch.arange(8) * math.pi / 4
CENTRES = 2.0 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)
WIDTH = 0.3


def sample(count):
    return CENTRES[torch.randint(8, (count,))] + WIDTH * torch.randn(count, 2)


def true_log_density(x):
    distance = (x[:, None] - CENTRES).square().sum(-1)
    return torch.logsumexp(-0.5 * distance / WIDTH**2, 1) - math.log(8 * 2 * math.pi * WIDTH**2)


class Flow(nn.Module):
    """The field on (z, log density): f and minus its divergence, which is exact in two dimensions."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))

    def forward(self, t, state):
        z, _ = state
        velocity = lambda t, z: self.net(torch.cat([z, t]))
        # One row's Jacobian, then all rows at once; with batch_dim=0 every row brings its own time, (rows, 1).
        with_value = lambda t, z: (velocity(t, z),) * 2
        jacobian, dz = torch.func.vmap(torch.func.jacrev(with_value, argnums=1, has_aux=True))(t, z)
        return dz, -jacobian.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)


flow = Flow()


def log_density(x, **solver):
    """Carry data (t = 1) back to the Gaussian (t = 0), counting how volumes change on the way."""
    z, change = neurode.solve(flow, (x, torch.zeros(len(x), 1)), (1, 0), batch_dim=0, **solver).y1
    gaussian = -0.5 * z.square().sum(1) - math.log(2 * math.pi)
    return gaussian - change[:, 0]


optimizer = torch.optim.Adam(flow.parameters(), lr=0.005)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
for update in range(updates):
    optimizer.zero_grad()
    loss = -log_density(sample(512), method="rk4", steps=8).mean()
    loss.backward()
    optimizer.step()
    schedule.step()
    if (update + 1) % 100 == 0:
        print(f"update {update + 1:4}  negative log-likelihood {loss.item():.3f}")

with torch.no_grad():
    fresh = sample(5000)
    ours, best = (-value.mean().item() for value in (log_density(fresh, method="dopri5"), true_log_density(fresh)))
    print(f"on fresh points: {ours:.3f} nats, the true density has {best:.3f}; the difference is the divergence KL")
    axis = torch.linspace(-5, 5, 101)
    mass = log_density(torch.cartesian_prod(axis, axis), method="dopri5").exp().sum().item() * 0.1**2
    print(f"the density integrates to {mass:.4f}")
    start = torch.randn(8, 2)  # sampling is the same flow, forward in time
    drawn, _ = neurode.solve(flow, (start, torch.zeros(8, 1)), (0, 1), batch_dim=0, method="dopri5").y1
    nearest = torch.cdist(drawn, CENTRES).min(1).values
    print("distance of eight samples from their nearest centre:", [round(d, 2) for d in nearest.tolist()])
