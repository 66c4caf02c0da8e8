"""`make bench-engine` in small: rows of every kind run, every library's numbers are right, and absent peers are named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from neurode.fused.native import available

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not available(), reason="the native library is not built; type make native")
def test_rows_run_and_every_library_agrees(tmp_path):
    out = tmp_path / "engine.json"
    command = [sys.executable, "benchmarks/engine.py", "--small", "--seconds", "0", "--out", str(out)]
    command += ["--rows", "P1 gradients", "P1a", "one row, forward"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert len(found["rows"]) == 3
    for row in found["rows"]:
        assert "neurode" in row["results"]
        for name, result in row["results"].items():
            # torchode and torchdiffeq take few, large steps at their tolerance of 1e-5; all others are at rounding
            assert max(result["errors"]) < (1e-3 if "P1a" in row["row"] else 1e-5), (row["row"], name, result)
            assert result["milliseconds"] > 0
        for peer in row["absent"]:
            assert f"{peer:22s} not installed" in done.stdout
        asked = {bar["peer"] for bar in row["bars"]} - {"peak", "GFLOP/s"}
        assert all(bar in row["results"] or bar.split(",")[0] in row["absent"] for bar in asked)


@pytest.mark.skipif(not available(), reason="the native library is not built; type make native")
def test_the_parts_of_a_call_are_told_apart(tmp_path):
    out = tmp_path / "overhead.json"
    command = [sys.executable, "benchmarks/overhead.py", "--small", "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 4
    for row in rows:
        assert 0 < row["guards"] < row["whole"] and 0 < row["native"] < row["whole"]


def test_every_candidate_is_first_in_its_turn_and_as_warm_as_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import contest

    monkeypatch.setattr(contest, "peak", lambda double: 1.0)
    monkeypatch.setattr(contest, "_repeats", lambda run: 2)
    ran: list[str] = []
    candidates = {name: contest.Candidate(lambda name=name: ran.append(name), lambda _: []) for name in "abc"}
    contest.contest(candidates, [], rounds=3, seconds=1e9)
    rounds = ran[-3 * 12 :]  # two runs to warm up, two timed, of three candidates
    assert rounds[::4] == list("abcbcacab") and all(len(set(rounds[i : i + 4])) == 1 for i in range(0, 36, 4))
