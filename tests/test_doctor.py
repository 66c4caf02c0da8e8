"""What `neurode doctor` says, with and without library, compiler and extras."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import neurode
from neurode import cli
from neurode.fused import native


def test_it_reports_this_process(capsys: pytest.CaptureFixture[str]) -> None:
    found = neurode.doctor()
    assert (found.version, found.torch, found.threads) == (
        neurode.__version__,
        torch.__version__,
        torch.get_num_threads(),
    )
    assert found.fused == native.available() and found.abi == native.ABI
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out == f"{found}\n"
    assert cli.main(["doctor", "please"]) == 2


@pytest.mark.skipif(not native.available(), reason="the native library is not built")
def test_it_names_library_and_instruction_sets() -> None:
    found = neurode.doctor()
    assert found.library == native.search().path
    assert found.isa in found.isas and str(found.library) in str(found) and f"fused, on {found.isa}" in str(found)


def doctor(**environment: str) -> str:
    command = [sys.executable, "-m", "neurode.cli", "doctor"]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_without_a_library_it_says_why_and_that_eager_runs() -> None:
    said = doctor(NEURODE_NATIVE="/no/such.so")
    assert "engine    eager alone\nlibrary   none\n" in said
    assert "The fused engine is off: NEURODE_NATIVE names '/no/such.so', and there is no such file.\n" in said


def test_it_says_what_to_type_where_there_is_neither_library_nor_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = native.Found(None, None, "the native library is not built")
    monkeypatch.delenv("NEURODE_NATIVE", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(native, "search", lambda: absent)
    found = neurode.doctor()
    assert not found.fused and found.compiler is None
    assert [line.split(":")[0] for line in found.advice[:2]] == [
        "A C++ compiler, to build the native library with",
        "Then build it",
    ]
    monkeypatch.setattr(native, "checkout", lambda: None)
    assert any("pip install --force-reinstall" in line for line in neurode.doctor().advice)


def test_it_names_missing_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else there(name))
    found = neurode.doctor()
    assert found.missing["plot"] == ("matplotlib",)
    assert "plot: without matplotlib" in str(found) and "pip install 'neurode[plot]'" in found.advice[-1]
