"""A short run of the engine's own tests; `make test-native` runs them for a minute, under sanitizers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from neurode.fused import native

FOUND = [p for p in Path(__file__).parents[2].glob("build/native/tests/engine_tests*") if os.access(p, os.X_OK)]
pytestmark = pytest.mark.skipif(not FOUND, reason="needs the engine's tests, which make native builds")


@pytest.mark.parametrize("isa", native.isas())
def test_random_programs_and_solves_against_the_slow_reference(isa: str) -> None:
    command = [str(FOUND[0]), "--isa", isa, "--cases", "150", "--seed", "7"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
    assert ran.stdout.startswith(isa) and "solves" in ran.stdout


def test_the_seed_decides_the_cases() -> None:
    run = lambda: subprocess.run([str(FOUND[0]), "--isa", "baseline", "--cases", "40"], capture_output=True, text=True)
    assert run().stdout.rsplit(";", 1)[0] == run().stdout.rsplit(";", 1)[0]
