"""A small run of the spirals study: the whole of it, resumed and not, and what it says of itself."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from neurode import cli
from neurode.studies.spirals import Settings, models, run, train

SMALL = {
    "epochs": 3,
    "num_points": 256,
    "num_test": 400,
    "toy_updates": 3,
    "max_memory_steps": 10,
    "steps": 4,
    "hidden": 16,
}


@pytest.fixture(autouse=True)
def _float32() -> None:
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    torch.set_default_dtype(torch.float32)
    out = tmp_path_factory.mktemp("study")
    run(Settings(out=out, seeds=(0, 1), **SMALL))
    return out


def test_writes_everything(finished: pathlib.Path) -> None:
    page = (finished / "report.html").read_text()
    assert [int(n) for n in re.findall(r'<h2 id="s\d+">(\d)\.', page)] == list(range(1, 10))
    assert page.count("data:image/png") == 10 and page.count("data:image/gif") == 1
    assert not re.search(r'(src|href)="(?!data:|#)', page), "the page must not fetch anything"
    assert {p.name for p in (finished / "weights").iterdir()} == {
        f"{name}-{seed}.safetensors" for name in ("ode-euler", "ode-rk4", "resnet") for seed in (0, 1)
    }
    assert json.loads((finished / "settings.json").read_text())["epochs"] == 3


def test_counts_are_of_the_solver(finished: pathlib.Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    updates = 3 * 2  # epochs, batches of 128 in 256 points
    assert results["models"]["ode-euler"]["updates"] == [updates, updates]
    assert results["models"]["ode-euler"]["evaluations"] == [updates * 4] * 2
    assert results["models"]["ode-rk4"]["evaluations"] == [updates * 4 * 4] * 2


def test_resnet_is_euler_to_the_bit(finished: pathlib.Path) -> None:
    assert json.loads((finished / "results.json").read_text())["bridge"] == {"outputs": 0.0, "gradients": 0.0}


def test_fitted_orders(finished: pathlib.Path) -> None:
    for name, each in json.loads((finished / "results.json").read_text())["orders"]["methods"].items():
        assert abs(each["slope"] - each["order"]) < 0.1, name


def test_memory_of_the_adjoint_is_constant(finished: pathlib.Path) -> None:
    found = json.loads((finished / "results.json").read_text())["memory"]["bytes"]
    for method in ("euler", "rk4"):
        five, ten = found[method]["autograd"]
        assert ten > 1.5 * five
        five, ten = found[method]["continuous"]
        assert ten < 1.1 * five


def test_parameter_counts() -> None:
    settings = Settings()
    counts = {name: models.build(name, settings, 0).num_parameters for name in ("ode-euler", "ode-rk4", "resnet")}
    assert counts == {"ode-euler": 18_906, "ode-rk4": 18_906, "resnet": 364_236}
    assert round(counts["resnet"] / counts["ode-rk4"], 1) == 19.3


def test_full_run_makes_4000_updates() -> None:
    settings = Settings()
    batches = len(torch.arange(settings.num_points).split(settings.batch_size))
    assert settings.epochs * batches == 4000


def test_resumed_training_is_the_same_to_the_bit(tmp_path: pathlib.Path) -> None:
    whole = Settings(out=tmp_path / "whole", **SMALL)
    model, record = train.train("ode-rk4", whole, 0)

    class Stop(Exception):
        pass

    parts = Settings(out=tmp_path / "parts", **SMALL)
    real, calls = train._epoch, []

    def breaking(*args: object) -> float:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C in the middle: this epoch still ends, and is saved
        return real(*args)

    train._epoch = breaking
    try:
        with pytest.raises(train.Interrupted, match="after epoch 2 of 3"):
            train.train("ode-rk4", parts, 0)
    finally:
        train._epoch = real
    resumed, again = train.train("ode-rk4", parts, 0)
    assert len(calls) == 2
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in record.items() if k != "seconds"}


def test_weights_are_those_of_the_model(finished: pathlib.Path) -> None:
    settings = Settings(out=finished, seeds=(0, 1), **SMALL)
    model, _ = train.train("resnet", settings, 0)  # finished: loads the checkpoint, trains nothing
    saved = load_file(finished / "weights" / "resnet-0.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())


def test_other_settings_are_refused(finished: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"--{k.replace('_', '-')}={v}" for k, v in {**SMALL, "hidden": 8}.items()]
    assert cli.main(["spirals", "--out", str(finished), *options]) == 2
    assert "'hidden': 16" in capsys.readouterr().err


def test_killed_process_resumes(tmp_path: pathlib.Path) -> None:
    """SIGKILL loses at most the epochs since the last checkpoint, and nothing of what was saved."""
    code = (
        "from neurode.studies.spirals import Settings, train; import pathlib, sys\n"
        f"train.SAVE_EVERY = 1; settings = Settings(out=pathlib.Path(sys.argv[1]), **{ {**SMALL, 'epochs': 400} })\n"
        "train.train('ode-euler', settings, 0)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "checkpoints" / "ode-euler-0.pt"
    for _ in range(600):
        if checkpoint.exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert torch.load(checkpoint, weights_only=True)["record"]["epoch"] >= 1


def test_help_reads_well(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["spirals", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for option in ("--out", "--seeds", "--epochs", "--learning-rate"):
        assert option in text


def test_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["spiral"]) == 2
    assert "Did you mean 'spirals'?" in capsys.readouterr().err


def test_methods_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods"]) == 0
    assert "dopri5" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"seeds": ()}, {"seeds": (1, 1)}, {"learning_rate": 0.0}])
def test_settings_refuse_nonsense(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)
