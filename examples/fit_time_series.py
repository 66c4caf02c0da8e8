"""Learn dynamics from one noisy, irregularly sampled time series, and forecast beyond it.

A damped pendulum is observed at random times. A small network learns its vector field, and the initial state with it;
the forecast is then held against the truth, which the observations never showed.

Run: python examples/fit_time_series.py [updates]
"""

import sys

import torch

import neurode

updates = int(sys.argv[1]) if len(sys.argv) > 1 else 400
torch.manual_seed(0)


def pendulum(t, y):
    """The truth: y = (angle, velocity), with gravity and friction."""
    angle, velocity = y.unbind(-1)
    return torch.stack([velocity, -torch.sin(angle) - 0.15 * velocity], -1)


SEEN, END, NOISE = 10.0, 15.0, 0.05
start = torch.tensor([2.0, 0.0])
times = (SEEN * torch.rand(80)).sort().values
later = torch.linspace(SEEN, END, 50)
truth = neurode.solve(pendulum, start, (0, END), t_eval=torch.cat([times, later]), rtol=1e-6).ys
observed = truth[: len(times)] + NOISE * torch.randn(len(times), 2)

# The model: a field without explicit time, and the state at t = 0. `solve` gives gradients to both.
field = neurode.nn.MLP(2, (32, 32), time=False)
y0 = observed[0].clone().requires_grad_()
optimizer = torch.optim.Adam([*field.parameters(), y0], lr=0.02)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)

for update in range(updates):
    # A long horizon has many bad minima: begin with the first seconds, and let the window grow over half the training.
    horizon = min(SEEN, 2.0 + 2 * SEEN * update / updates)
    window = int((times <= horizon).sum())
    optimizer.zero_grad()
    solution = neurode.solve(field, y0, (0, SEEN), t_eval=times[:window], method="tsit5", rtol=1e-4)
    loss = (solution.ys - observed[:window]).square().mean()
    loss.backward()
    optimizer.step()
    schedule.step()
    if (update + 1) % 50 == 0:
        print(f"update {update + 1:4}  {window} observations  root mean squared error {loss.sqrt().item():.3f}")

with torch.no_grad():
    path = neurode.solve(field, y0, (0, END), t_eval=torch.cat([times, later]), method="tsit5").ys
fit, forecast = (
    (path - truth)[part].square().mean().sqrt().item() for part in (slice(len(times)), slice(len(times), None))
)
print(f"noise {NOISE}; error of the fit {fit:.3f}, of the forecast from t = {SEEN:g} to {END:g}: {forecast:.3f}")
