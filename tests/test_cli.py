"""The command: its help, its errors, Ctrl-C, and an extra that is missing."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from neurode import cli

OPTIONS = ["--num-points", "256", "--num-test", "400", "--toy-updates", "3", "--max-memory-steps", "10", "--steps", "4",
           "--hidden", "16"]  # fmt: skip


def test_version_and_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert cli.main(["--help"]) == 0
    assert cli.main([]) == 2
    assert "neurode spirals" in capsys.readouterr().out


def test_missing_extra_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)  # what an import of a missing package meets
    assert cli.main(["spirals"]) == 1
    said = capsys.readouterr().err.strip()
    assert "tyro" in said and "pip install 'neurode[study]'" in said and len(said.splitlines()) == 1


def test_errors_of_the_library_itself_are_not_missing_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "neurode.studies.spirals", None)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["spirals"])


def _start(out: pathlib.Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "neurode.cli", "spirals", "--out", str(out), *OPTIONS, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: pathlib.Path) -> None:
    process = _start(tmp_path, "--epochs", "100000")
    for _ in range(1200):  # until the first checkpoint, twenty epochs in
        if (tmp_path / "checkpoints" / "ode-euler-0.pt").exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    said, complaints = process.communicate(timeout=60)
    assert process.returncode == 130, complaints
    assert "The state is saved; the same command goes on from there." in said
    assert "Traceback" not in complaints
    again = _start(tmp_path, "--epochs", "7")
    _, complaints = again.communicate(timeout=60)
    assert again.returncode == 2 and "'epochs': 100000" in complaints
