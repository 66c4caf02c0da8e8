"""Host reads: values that Python waits for. Control reads once a step, and nothing else reads at all."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode

import neurode

READS = {"item", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero", "equal", "numpy"}


class Counter(TorchFunctionMode):
    """Counts calls that copy a tensor's values to Python."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.reads += getattr(function, "__name__", "") in READS
        return function(*args, **(kwargs or {}))


def van_der_pol(t, y):
    return torch.stack([y[..., 1], 5 * (1 - y[..., 0] ** 2) * y[..., 1] - y[..., 0]], -1)


TIMES = torch.linspace(0, 20, 50)
ADAPTIVE = {
    "end": dict(method="dopri5"),
    "outputs": dict(method="dopri5", t_eval=TIMES),
    "extra stages": dict(method="dop853", t_eval=TIMES),
    "hermite": dict(method="bosh3", t_eval=TIMES, rtol=1e-3),
    "steps": dict(method="tsit5", t_eval="steps"),
    "dense": dict(method="tsit5", dense=True),
    "stops": dict(method="dopri5", step_at=[3.0, 4.0]),
    "jumps": dict(method="dopri5", jump_at=[3.0, 4.0]),
}
# Beyond the steps: reading y0 and the first step, a row that ends, a window of outputs that is emptied.
ONCE = 60


def measure(batch_dim, grad, options, f=van_der_pol):
    y0 = torch.tensor([[1.0, 1.0], [2.0, 0.0], [0.5, 0.1]], requires_grad=grad)
    with torch.set_grad_enabled(grad), Counter() as counter:
        stats = neurode.solve(f, y0, (0, 20), batch_dim=batch_dim, engine="eager", **options).stats
    attempts = torch.as_tensor(stats.num_accepted + stats.num_rejected)
    return counter.reads, int(attempts.max())


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("batch_dim", [None, 0])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_one_read_a_step(name, batch_dim, grad):
    reads, attempts = measure(batch_dim, grad, dict(rtol=1e-5) | ADAPTIVE[name])
    assert attempts > 100 and attempts <= reads <= attempts + ONCE


@pytest.mark.parametrize("batch_dim", [None, 0])
@pytest.mark.parametrize(("method", "more"), [("dopri5", 0), ("bosh3", 0), ("dop853", 1)])
def test_events_are_read_with_the_step_where_its_interpolant_costs_no_evaluation(method, more, batch_dim):
    g = (lambda t, y: y[0, 0] + 50) if batch_dim is None else (lambda t, y: y[:, 0] + 50)
    options = dict(method=method, rtol=1e-5, events=[neurode.Event(g)])
    reads, attempts = measure(batch_dim, False, options)
    assert attempts + more <= reads <= (1 + more) * attempts + ONCE


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("batch_dim", [None, 0])
@pytest.mark.parametrize("t_eval", [None, TIMES])
def test_a_fixed_grid_reads_nothing_on_its_way(batch_dim, grad, t_eval):
    f = lambda t, y: torch.cos(t) * y
    few, many = (measure(batch_dim, grad, dict(method="rk4", steps=n, t_eval=t_eval), f)[0] for n in (100, 400))
    assert many <= few + 15  # windows of outputs, not steps
