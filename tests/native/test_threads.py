"""Native solves on several threads, in several Python threads, in a child of `fork`, and ended by a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import neurode
from neurode.fused.native import library

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "fused"))
from engines import fused  # noqa: E402

FIXED = {"method": "rk4", "steps": 4}
ADAPTIVE = {"method": "dopri5", "rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def model(seed: int = 0, width: int = 64) -> torch.nn.Module:
    torch.manual_seed(seed)
    return neurode.nn.MLP(6, (width, width), zero_init=False)


def gradients(field, y0, threads, **how):
    """The state at the end and all gradients, on so many threads."""
    torch.set_num_threads(threads)
    y0 = y0.clone().requires_grad_()
    y1 = fused(field, y0, (0.0, 1.0), batch_dim=0, **how).y1
    return [y1.detach(), *torch.autograd.grad(y1.square().sum(), [y0, *field.parameters()])]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_on_a_grid_nothing_depends_on_the_number_of_threads():
    field, y0 = model(), torch.randn(301, 6)
    alone = gradients(field, y0, 1, **FIXED)
    assert all(same(alone, gradients(field, y0, n, **FIXED)) for n in (2, 3, 2))


def test_with_own_steps_states_do_not_depend_on_it_and_gradients_by_rounding():
    field, y0 = model(), 3 * torch.randn(301, 6)
    alone, beside = gradients(field, y0, 1, **ADAPTIVE), gradients(field, y0, 2, **ADAPTIVE)
    assert same(alone[:2], beside[:2])  # the gradient of y0 belongs to its row
    for x, y in zip(alone[2:], beside[2:], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5 * float(x.abs().max()))
    assert same(beside, gradients(field, y0, 2, **ADAPTIVE))


def test_a_failed_row_changes_no_bit_of_what_the_others_share():
    field, y0 = model(), torch.randn(131, 6)
    y0[70] = float("nan")
    without = torch.cat([y0[:70], y0[71:]])
    spoiled = gradients(field, y0, 2, on_failure="nan", **FIXED)
    assert same(spoiled[2:], gradients(field, without, 2, **FIXED)[2:])


class Alarm(Exception):
    pass


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timers")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_a_signal_ends_a_long_solve(threads, way):
    field, y0 = model(), torch.randn(256, 6)

    def ring(*_):
        raise Alarm

    torch.set_num_threads(threads)
    steps, cut = (100_000, 0.2) if way == "forward" else (400, 0.01)
    y = y0.clone().requires_grad_(way == "backward")
    if way == "backward":  # nothing kept would be in the way of a long enough pass
        y1 = fused(field, y, (0.0, 1.0), batch_dim=0, method="rk4", steps=steps).y1
    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, cut)
        start = time.perf_counter()
        with pytest.raises(Alarm):
            if way == "forward":
                fused(field, y, (0.0, 1.0), batch_dim=0, method="rk4", steps=steps)
            else:
                while True:
                    torch.autograd.grad(y1.sum(), [y], retain_graph=True)
        assert time.perf_counter() - start < 30  # the whole would take minutes
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert same(gradients(field, y0, 2, **FIXED), gradients(field, y0, 1, **FIXED))


def test_python_goes_on_while_a_solve_runs():
    field, y0 = model(), torch.randn(256, 6)
    fused(field, y0, (0.0, 1.0), batch_dim=0, **FIXED)
    done, counted = threading.Event(), 0

    def solve():
        for _ in range(3):
            fused(field, y0, (0.0, 1.0), batch_dim=0, method="rk4", steps=300)
        done.set()

    other = threading.Thread(target=solve)
    other.start()
    while not done.is_set():
        counted += 1
        time.sleep(0.001)
    other.join()
    assert counted > 10


def test_four_python_threads_may_solve_at_once():
    fields = [model(seed, 16 + 8 * seed) for seed in range(4)]
    y0, wrong = torch.randn(128, 6), []
    truth = [gradients(field, y0, 2, **FIXED) for field in fields]

    def work(k):
        for _ in range(20):
            if not same(gradients(fields[k], y0, 2, **FIXED), truth[k]):
                wrong.append(k)

    team = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for one in team:
        one.start()
    for one in team:
        one.join()
    assert not wrong


CHILD = """
import os, signal, sys, torch
sys.path[:0] = ["tests/native", "tests/fused"]
from test_threads import FIXED, gradients, model, same
field, y0 = model(), torch.randn(256, 6)
truth = gradients(field, y0, 2, **FIXED)
pid = os.fork()
if pid == 0:
    signal.alarm(60)  # a solve that waits for threads that are not there ends here
    os._exit(0 if all(same(gradients(field, y0, 2, **FIXED), truth) for _ in range(3)) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert same(gradients(field, y0, 2, **FIXED), truth)
"""


def run(script: str, **env: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "2", **env}
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_of_fork_solves_right():
    done = run(CHILD)
    assert done.returncode == 0, done.stderr


def test_without_openmp_threads_of_our_own_give_the_same():
    script = """
import sys, torch
sys.path[:0] = ["tests/native", "tests/fused"]
from test_threads import FIXED, gradients, model, same
from neurode.fused.native import library
assert library().nd_team() == b"own threads"
field, y0 = model(), torch.randn(256, 6)
assert same(gradients(field, y0, 2, **FIXED), gradients(field, y0, 1, **FIXED))
"""
    done = run(script, NEURODE_OWN_THREADS="1")
    assert done.returncode == 0, done.stderr


def test_threads_are_pytorch_s_own():
    names = {path.name for path in Path(torch.__file__).parent.glob("lib/*omp*")}
    if not any("gomp" in name for name in names):
        pytest.skip(f"this PyTorch brings no GCC OpenMP runtime: {sorted(names)}")
    assert library().nd_team() == b"OpenMP (GOMP)"
