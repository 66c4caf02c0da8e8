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
    assert not {name for name in out if name.startswith(("torch._dynamo", "torch._inductor"))}


def test_everything_exported_exists() -> None:
    assert all(hasattr(neurode, name) for name in neurode.__all__)
