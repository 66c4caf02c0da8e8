"""The scripts in examples/ run as they stand, with small settings, and what they print is right already then."""

from __future__ import annotations

import pathlib
import re
import runpy
import sys

import pytest
import torch

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    torch.set_default_dtype(torch.float32)

    def script(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return script


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found is not None, text
    return float(found[1])


def test_spiral_classifier(run) -> None:
    said = run("spiral_classifier", "6")
    accuracy = number(r"accuracy on fresh points ([\d.]+)%", said)
    assert 55 < accuracy < number(r"reaches more than ([\d.]+)%", said) + 1
    assert "This model is" in said


def test_fit_time_series(run) -> None:
    said = run("fit_time_series", "50")
    assert number(r"error of the fit ([\d.]+)", said) < 0.6  # the states themselves are of the size of 1


def test_continuous_flow(run) -> None:
    said = run("continuous_flow", "6")
    ours, best = number(r"points: ([\d.]+) nats", said), number(r"density has ([\d.]+)", said)
    assert ours > best, "no density is nearer to the samples than the true one"
    assert abs(number(r"integrates to ([\d.]+)", said) - 1) < 0.01


def test_every_example_is_tested() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {name.removeprefix("test_") for name in globals() if name.startswith("test_")} - {
        "every_example_is_tested"
    }
