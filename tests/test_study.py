"""A small run of the spirals study: the whole of it, resumed and not, and what it says of itself."""

from __future__ import annotations

import html
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest
import torch
import tyro
from safetensors.torch import load_file

from neurode import cli
from neurode.fused import native
from neurode.studies.spirals import Settings, models, pictures, run, solvers, train

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
    """On the eager engine, which does the network's own operations; the fused one is apart by rounding."""
    found = json.loads((finished / "results.json").read_text())["bridge"]
    assert found.pop("outputs") == found.pop("gradients") == 0.0
    assert all(0 < gap < 1e-4 for gap in found.values())


def test_engines_are_timed_in_the_run_and_differ_by_rounding(finished: pathlib.Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    page = (finished / "report.html").read_text()
    for name, each in results["engines"].items():
        assert each["eager"] > 0
        if "refusal" in each:
            assert each["refusal"][:60] in html.unescape(page) and results["models"][name]["engines"] == ["eager"]
        else:
            assert each["fused"] > 0 and each["outputs"] < 1e-5 and each["gradients"] < 1e-4
            assert each["outputs in float64"] < 1e-13 and each["gradients in float64"] < 1e-12
            assert results["models"][name]["engines"] == ["fused"]
    assert results["models"]["resnet"]["engines"] == ["PyTorch"]


def test_a_study_that_asks_for_the_fused_engine_can_measure_everything(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some measurements only PyTorch can take: they do, whatever the engine of the training."""
    _need_fused()
    monkeypatch.setattr(pictures, "FRAMES", 3)  # how many of each is the matter of the tests of the whole run
    monkeypatch.setattr(solvers, "ADJOINT_STEPS", (20, 40))
    run(Settings(out=tmp_path, engine="fused", **{**SMALL, "epochs": 1}))
    assert json.loads((tmp_path / "results.json").read_text())["models"]["ode-rk4"]["engines"] == ["fused"]


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
    _equal_trainings((model, record), (resumed, again))


def test_weights_are_those_of_the_model(finished: pathlib.Path) -> None:
    settings = Settings(out=finished, seeds=(0, 1), **SMALL)
    model, _ = train.train("resnet", settings, 0)  # finished: loads the checkpoint, trains nothing
    saved = load_file(finished / "weights" / "resnet-0.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())


def test_other_settings_are_refused(finished: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"--{k.replace('_', '-')}={v}" for k, v in {**SMALL, "hidden": 8}.items()]
    assert cli.main(["spirals", "--out", str(finished), *options]) == 2
    assert "'hidden': 16" in capsys.readouterr().err
    assert json.loads((finished / "settings.json").read_text())["hidden"] == 16, "a refused run must leave no trace"


def test_page_says_how_to_make_it_again(finished: pathlib.Path) -> None:
    command = re.search(r"<code>(neurode spirals[^<]*)</code>", (finished / "report.html").read_text())
    assert command is not None
    again = tyro.cli(Settings, args=command[1].split()[2:])
    assert again.as_json() == Settings(seeds=(0, 1), **SMALL).as_json()


def test_folder_that_cannot_be_made(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert cli.main(["spirals", "--out", str(tmp_path / "file")]) == 2
    assert "cannot write to" in capsys.readouterr().err


# A child process that trains, and stops still at the point to be killed at: `stand_still` never returns.
CHILD = """
import pathlib, sys, time
import torch
from neurode.studies.spirals import Settings, train

def stand_still(*_):
    print("here", flush=True)
    time.sleep(600)

def at_call(number, function, then):
    calls = iter(range(1, number + 1))
    return lambda *args: then(*args) if next(calls) == number else function(*args)

train.SAVE_EVERY = 2
torch.set_num_threads(1)
{place}
train.train({model!r}, Settings(out=pathlib.Path(sys.argv[1]), **{settings}), 0)
"""
PLACES = {
    # The tenth update of twelve: epoch 4 is saved, epoch 5 half done, its gradient not yet formed.
    "between forward and backward": "train.evaluations = at_call(10, train.evaluations, stand_still)",
    # The second checkpoint: half of it is on the disk.
    "half a checkpoint": (
        "save = torch.save\n"
        "torch.save = at_call(2, save, lambda state, file: (file.write(b'half'), file.flush(), stand_still()))"
    ),
}


@pytest.mark.parametrize(
    "place, engine",
    [
        ("between forward and backward", "fused"),
        ("between forward and backward", "eager"),
        ("half a checkpoint", "eager"),
    ],
)
def test_killed_process_resumes_bit_for_bit(place: str, engine: str, tmp_path: pathlib.Path) -> None:
    """SIGKILL, in the middle of an update and in the middle of writing: what follows equals a run that was never killed."""
    if engine == "fused":
        _need_fused()
    settings = {**SMALL, "epochs": 6, "engine": engine}
    code = CHILD.format(place=PLACES[place], model="ode-rk4", settings=settings)
    out = tmp_path / "killed"
    command = [sys.executable, "-c", code, str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None and process.stdout.readline() == b"here\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    saved = torch.load(train.checkpoint(Settings(out=out), "ode-rk4", 0), weights_only=True)["record"]
    assert saved["epoch"] == {"between forward and backward": 4, "half a checkpoint": 2}[place]

    torch.set_num_threads(1)
    model, record = train.train("ode-rk4", Settings(out=tmp_path / "whole", **settings), 0)
    resumed, again = train.train("ode-rk4", Settings(out=out, **settings), 0)
    assert record["engines"] == again["engines"] == [engine]
    assert record["epoch"] == again["epoch"] == 6 and record["evaluations"] == again["evaluations"] == 6 * 2 * 4 * 4
    _equal_trainings((model, record), (resumed, again))


def _need_fused() -> None:
    if not native.available():
        pytest.skip("the native library is not built (make native)")


def _equal_trainings(one: tuple, other: tuple) -> None:
    """Equal weights, losses and counts, to the bit; the seconds may differ."""
    pairs = zip(one[0].state_dict().values(), other[0].state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert {k: v for k, v in one[1].items() if k != "seconds"} == {k: v for k, v in other[1].items() if k != "seconds"}


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


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"seeds": ()},
        {"seeds": (1, 1)},
        {"learning_rate": 0.0},
        {"num_test": 1},
        {"max_memory_steps": 4},
        {"engine": "warp"},
    ],
)
def test_settings_refuse_nonsense(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)
