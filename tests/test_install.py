"""The build's own decisions; `make check-install` goes the whole way through pip, which takes minutes."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = {name: shutil.which(name) for name in ("cmake", "ninja")}
needs_tools = pytest.mark.skipif(
    not all(TOOLS.values()), reason="needs cmake and ninja on the path (the dev group has them)"
)


def configure(build: Path, path: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [str(TOOLS["cmake"]), "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
               f"-DCMAKE_MAKE_PROGRAM={TOOLS['ninja']}", *options]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "CC")} | {"PATH": path}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@needs_tools
def test_without_a_compiler_the_build_succeeds_and_says_so(tmp_path: Path) -> None:
    ran = configure(tmp_path / "build", str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    assert "without the native engine: no C++ compiler was found" in " ".join(ran.stderr.split())


@needs_tools
def test_wheels_for_the_index_insist_on_the_engine(tmp_path: Path) -> None:
    ran = configure(tmp_path / "build", str(tmp_path), "-DNEURODE_NATIVE=REQUIRED")
    assert ran.returncode != 0
    assert "The native engine is required, but no C++ compiler was found." in " ".join(ran.stderr.split())


def test_the_import_needs_no_compiler() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]
    assert settings["editable"]["rebuild"] is False and settings["wheel"]["py-api"] == "py3"
