"""Two processes train as one: DistributedDataParallel and FSDP2, with every strategy or an error that names the one to use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

SCRIPT = Path(__file__).with_name("parallel.py")


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs the gloo backend")
def test_two_processes_give_the_gradients_of_one() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    verdicts = [line.split() for line in done.stdout.splitlines() if line]
    assert len(verdicts) == 4 * 2 * 10
    for strategy, solve, kind, verdict in verdicts:
        refuses = strategy not in ("autograd", "auto", "fused") and kind in ("f", "layers")
        assert verdict == ("refused" if refuses else "equal"), (strategy, solve, kind)
