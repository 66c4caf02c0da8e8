"""What a stranger's machine does (`make check-install`): installs the package in fresh environments and uses it.

The source archive becomes a wheel, in the time that is printed; the wheel runs the fused engine. Then the same installation with
no compiler on the path: it must succeed too, run everything on the eager engine, and say so. torch comes from the environment
that runs this script; build tools come from the package index, as they would for a stranger.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
SITE = Path(torch.__file__).parents[1]
USE = """
import torch, neurode
y0 = torch.ones(5, 2, requires_grad=True)
solution = neurode.solve(lambda t, y: -y, y0, (0, 1), method="tsit5", batch_dim=0)
solution.y1.sum().backward()
assert torch.allclose(y0.grad, torch.tensor(-1.0).exp().expand(5, 2), atol=1e-3)
print(neurode.doctor())
print("fused:", neurode.doctor().fused, "in", neurode.__file__)
"""


def run(*command: str | Path, path: str | None = None, cwd: Path | None = None) -> str:
    """Run a command, with its own PATH; its output. What it says is shown where it fails."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHONPATH", "NEURODE", "CXX", "CC"))}
    if path is not None:
        environment["PATH"] = path
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, cwd=cwd)
    if ran.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{ran.stdout}\n{ran.stderr}")
    return ran.stdout


def environment(folder: Path) -> Path:
    """A fresh virtual environment that sees this one's torch; its Python."""
    run(sys.executable, "-m", "venv", folder)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # Its packages, not its neurode: an editable install there would hide this one.
    (Path(site) / "torch_from_outside.pth").write_text(f"{SITE}\n")
    return python


def check(title: str, condition: bool, said: object = "") -> None:
    print(f"{'ok  ' if condition else 'FAIL'} {title}", flush=True)
    if not condition:
        sys.exit(str(said))


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = environment(folder / "builder")
        run(python, "-m", "pip", "install", "--quiet", "build")
        run(python, "-m", "build", "--sdist", "--outdir", folder, ROOT)
        archive = next(folder.glob("*.tar.gz"))
        start = time.perf_counter()
        run(python, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, archive)
        seconds = time.perf_counter() - start
        wheel = next(folder.glob("*.whl"))
        inside = [n for n in zipfile.ZipFile(wheel).namelist() if "/_native" in n]
        check(f"the source archive becomes {wheel.name} in {seconds:.0f} s ({os.cpu_count()} cores)", True)
        check(
            "a wheel for every Python 3 of the platform, with the library inside",
            "-py3-none-" in wheel.name and bool(inside),
        )

        python = environment(folder / "with")
        run(python, "-m", "pip", "install", "--no-deps", wheel)
        said = run(python, "-c", USE, cwd=folder)
        check("installed from the wheel, the fused engine is there", "fused: True" in said, said)

        python = environment(folder / "without")
        bare = str(python.parent)  # no compiler, no CMake, no Ninja, no make
        run(python, "-m", "pip", "install", "--no-deps", archive, path=bare)
        said = run(python, "-c", USE, path=bare, cwd=folder)
        check("installed without a compiler, solve and its gradients run on eager", "fused: False" in said, said)
        check("and neurode doctor says what to do", "A C++ compiler, to build the native library with" in said, said)
        print(said)


if __name__ == "__main__":
    main()
