"""What installing and importing the package promises."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import neurode


def test_version_is_that_of_the_distribution() -> None:
    assert neurode.__version__ == importlib.metadata.version("neurode")


def test_core_needs_torch_alone() -> None:
    requires = importlib.metadata.requires("neurode") or []
    assert [r for r in requires if "extra ==" not in r] == ["torch>=2.11"]


def test_import_is_lean() -> None:
    """The core imports no extra, and none of torch's slow corners."""
    code = "import sys, torch; before = set(sys.modules); import neurode; print(*sorted(set(sys.modules) - before))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    roots = {name.split(".")[0] for name in out}
    assert not roots & {"matplotlib", "scipy", "tyro", "tqdm", "safetensors", "PIL"}
    tracers = ("torch._dynamo", "torch._inductor", "torch.fx.experimental.proxy_tensor")
    assert not {name for name in out if name.startswith(tracers)}


EXTRAS = ("numpy", "scipy", "matplotlib", "PIL", "tyro", "tqdm", "safetensors", "torchdiffeq", "jaxtyping")

TORCH_ALONE = f"""
import sys
for name in {EXTRAS}:
    sys.modules[name] = None  # importing it raises, as if it were not installed
import torch, neurode, neurode.torchdiffeq, neurode.data
y0 = torch.ones(3, 2, requires_grad=True)
neurode.solve(lambda t, y: -y, y0, (0, 1), method="tsit5", t_eval=[0.0, 0.5], batch_dim=0).ys.sum().backward()
layer = neurode.nn.NeuralODE(neurode.nn.MLP(2, (8,)), method="rk4", steps=3)
layer(y0).sum().backward()
neurode.torchdiffeq.odeint(lambda t, y: -y, y0, torch.tensor([0.0, 1.0]))
print("fine")
"""


def test_runs_with_torch_alone() -> None:
    """Where no extra is installed, solver, layers and drop-in run all the same."""
    ran = subprocess.run([sys.executable, "-c", TORCH_ALONE], capture_output=True, text=True)
    assert ran.stdout == "fine\n", ran.stderr


def test_missing_extra_is_one_sentence() -> None:
    code = "import sys; sys.modules['tyro'] = None; from neurode.cli import main; sys.exit(main(['spirals']))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr == "`neurode spirals` needs tyro, which is not installed. Type: pip install 'neurode[study]'\n"


def test_everything_exported_exists() -> None:
    assert all(hasattr(neurode, name) for name in neurode.__all__)
