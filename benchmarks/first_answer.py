"""How long a fresh process takes to its first answer: the same solve by the fused engine, torch.compile and JAX.

    python benchmarks/first_answer.py [--rounds 3]

Each round starts every candidate in a process of its own. Times are wall-clock: the import of the library beyond its framework's,
the first solve with gradients (for us with the tracer's import in it), then the first solve of a further field of another depth.
Compilers' caches on disk are off for torch.compile and JAX, as for a model that is new; ours has none. Bars of the fused engine:
import 0.3 s beyond torch's own, first answer 3 s, every further field of up to 30 layers 0.3 s.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import subprocess
import sys
import tempfile

PROBLEM = (
    "MLP of 3 layers of 64, 128 rows of 8, with gradients: tsit5 at rtol 1e-5 (torch.compile: 20 compiled steps of RK4)"
)

TORCH = """
import time, torch
start = time.perf_counter()
{library}
imported = time.perf_counter() - start
def field(layers):
    parts = [torch.nn.Linear(8, 64), torch.nn.Tanh()]
    for _ in range(layers - 2):
        parts += [torch.nn.Linear(64, 64), torch.nn.Tanh()]
    return torch.nn.Sequential(*parts, torch.nn.Linear(64, 8))
y0 = torch.randn(128, 8)
{solve}
print(imported, flush=True)
for layers in (3, 5, 30):
    net = field(layers)
    start = time.perf_counter()
    solve(net, y0).square().sum().backward()
    print(time.perf_counter() - start, flush=True)
"""
OURS = dict(
    library="import neurode",
    solve="""
def solve(net, y0):
    return neurode.solve(lambda t, y: net(y), y0, (0, 1), method="tsit5", rtol=1e-5, batch_dim=0, engine="fused").y1
""",
)
COMPILED = dict(
    library="",
    solve="""
def solve(net, y0):
    @torch.compile
    def step(y, h=0.05):
        k1 = net(y); k2 = net(y + h / 2 * k1); k3 = net(y + h / 2 * k2); k4 = net(y + h * k3)
        return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    y = y0
    for _ in range(20):
        y = step(y)
    return y
""",
)
JAX = """
import time, jax, jax.numpy as jnp
jnp.zeros(1).block_until_ready()
start = time.perf_counter()
import diffrax, equinox as eqx
imported = time.perf_counter() - start
y0 = jax.random.normal(jax.random.PRNGKey(0), (128, 8))
def loss(net, y0):
    def one(y):
        made = diffrax.diffeqsolve(diffrax.ODETerm(lambda t, y, net: net(y)), diffrax.Tsit5(), 0.0, 1.0, None, y, args=net,
                                   stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-6))
        return made.ys[-1]
    return jnp.sum(jax.vmap(one)(y0) ** 2)
print(imported, flush=True)
for layers in (3, 5, 30):
    net = eqx.nn.MLP(8, 8, 64, layers - 1, activation=jnp.tanh, key=jax.random.PRNGKey(1))
    start = time.perf_counter()
    jax.block_until_ready(eqx.filter_jit(eqx.filter_grad(loss))(net, y0))
    print(time.perf_counter() - start, flush=True)
"""
CANDIDATES = {
    "neurode, fused": TORCH.format(**OURS),
    "torch.compile of a step": TORCH.format(**COMPILED),
    "diffrax, jitted": JAX,
}


def measure(code: str, seconds: float) -> list[float]:
    """Import, first answer, and the answers of two further fields, in a fresh process, as far as it came in that time."""
    with tempfile.TemporaryDirectory() as cache:
        fresh = {"TORCHINDUCTOR_CACHE_DIR": cache, "JAX_ENABLE_COMPILATION_CACHE": "0"}
        process = [sys.executable, "-c", code]
        try:
            ran = subprocess.run(process, capture_output=True, text=True, env=os.environ | fresh, timeout=seconds)
        except subprocess.TimeoutExpired as late:
            return [float(x) for x in (late.stdout or b"").split()]
    if ran.returncode:
        raise SystemExit(ran.stderr)
    return [float(x) for x in ran.stdout.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=120, help="the most for one process")
    options = parser.parse_args()
    rounds = [
        {name: measure(code, options.seconds) for name, code in CANDIDATES.items()} for _ in range(options.rounds)
    ]
    print(PROBLEM)
    print(f"{'seconds, medians':<28}{'import':>10}{'first':>10}{'5 layers':>10}{'30 layers':>10}")
    for name in CANDIDATES:
        columns = itertools.zip_longest(*(r[name] for r in rounds), [math.nan] * 4, fillvalue=math.inf)
        figures = [statistics.median(column[:-1]) for column in columns]
        print(f"{name:<28}" + "".join(f"{x:>10.2f}" if x < math.inf else f"{'> limit':>10}" for x in figures))


if __name__ == "__main__":
    main()
