"""The study from end to end: train, measure, write."""

from __future__ import annotations

import json
import os
import pathlib
import platform
import time
from typing import Any

import torch
from safetensors.torch import save_file

import neurode
from neurode._errors import InputError
from neurode.data import bayes_accuracy
from neurode.nn import NeuralODE
from neurode.studies.spirals import depth, engines, flows, pictures, solvers, story
from neurode.studies.spirals.models import Classifier, accuracy
from neurode.studies.spirals.settings import MODELS, Settings
from neurode.studies.spirals.train import refuse_other, test_data, train, training_data

NUM_SHOWN = 160  # points whose trajectories are drawn


def run(settings: Settings) -> pathlib.Path:
    """Train what is not trained yet, measure everything, and write the folder.

    Args:
        settings: a `Settings`.

    Returns:
        The path of `report.html`.

    Raises:
        Interrupted: Ctrl-C while training; giving the same settings again goes on from there.
    """
    torch.set_num_threads(settings.threads)
    started = time.perf_counter()
    _make_folder(settings.out)
    refuse_other(settings)
    _write(settings.out / "settings.json", settings.as_json())
    trained = {seed: {name: train(name, settings, seed) for name in MODELS} for seed in settings.seeds}
    _free(trained)
    results = measure(trained, settings)
    results["seconds_in_all"] = time.perf_counter() - started
    figures = draw(trained, results, settings)
    _write(settings.out / "results.json", json.dumps(results, indent=1) + "\n")
    _save_weights(trained, settings.out)
    page = story.write(results, figures)
    footer = (
        f"neurode {neurode.__version__}, torch {torch.__version__}, Python {platform.python_version()},"
        f" {settings.threads} thread(s),"
        f" {results['seconds_in_all']:.0f} s in the run that wrote this page. To make it again: `{settings.command()}`"
        " (all settings are in `settings.json`, all numbers in `results.json`)."
    )
    report = settings.out / "report.html"
    _write(report, page.render(footer))
    print(summary(results), report, sep="\n")
    return report


def _free(trained: dict[int, Any]) -> None:
    """Trained on the fused engine and no other, models are measured on any: some measurements only PyTorch can take."""
    for models in trained.values():
        for model, _ in models.values():
            if isinstance(model.body, NeuralODE) and model.body.options["engine"] == "fused":
                model.body = model.body.with_solver(engine="auto")


def _make_folder(out: pathlib.Path) -> None:
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}. Give another --out.") from error


def _write(path: pathlib.Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _stage(label: str) -> None:
    print(f"measuring: {label}", flush=True)


def measure(trained: dict[int, Any], settings: Settings) -> dict[str, Any]:
    """Every number of the report."""
    seed = settings.seeds[0]
    models: dict[str, Classifier] = {name: model for name, (model, _) in trained[seed].items()}
    points, labels = training_data(settings, seed)
    fresh, fresh_labels = test_data(settings, seed)
    _stage("accuracy")
    results: dict[str, Any] = {
        "settings": json.loads(settings.as_json()),
        "bayes": bayes_accuracy(),
        "models": {name: _model_numbers(name, trained, settings) for name in MODELS},
    }
    _stage("the engines, in turns")
    results["engines"] = engines.compare(models, settings, points, labels)
    _stage("orders, the bridge to residual networks")
    results["orders"] = solvers.orders()
    results["bridge"] = solvers.bridge(models["ode-euler"], points)
    _stage("memory")
    results["memory"] = solvers.memory(settings)
    _stage("the adjoint's gradient")
    results["adjoint"] = solvers.adjoint_error(models["ode-rk4"], points[:256], labels[:256])
    _stage("depth at test time, invertibility")
    results["depth"] = {n: depth.depths(models[n], fresh, fresh_labels) for n in ("ode-euler", "ode-rk4")}
    for each in results["depth"].values():
        each["trained_steps"] = settings.steps
    results["inverse"] = solvers.inversion(models, points)
    _stage("crossing and augmentation")
    results["reflection"] = flows.reflection(settings)
    results["rings"] = flows.rings(settings)
    results["plane_spirals"] = flows.plane_spirals(settings, points, labels, fresh, fresh_labels)
    return results


def _model_numbers(name: str, trained: dict[int, Any], settings: Settings) -> dict[str, Any]:
    runs = [trained[seed][name] for seed in settings.seeds]
    return {
        "parameters": runs[0][0].num_parameters,
        "train_accuracy": [
            accuracy(m, *training_data(settings, s)) for s, (m, _) in zip(settings.seeds, runs, strict=True)
        ],
        "test_accuracy": [accuracy(m, *test_data(settings, s)) for s, (m, _) in zip(settings.seeds, runs, strict=True)],
        "updates": [record["updates"] for _, record in runs],
        "evaluations": [record["evaluations"] for _, record in runs],
        "seconds": [record["seconds"] for _, record in runs],
        "engines": sorted({engine for _, record in runs for engine in record["engines"]}),
        "losses": runs[0][1]["losses"],
    }


def draw(trained: dict[int, Any], results: dict[str, Any], settings: Settings) -> dict[str, pathlib.Path]:
    """All figures, by name."""
    _stage("figures")
    seed = settings.seeds[0]
    models = {name: model for name, (model, _) in trained[seed].items()}
    points, labels = training_data(settings, seed)
    some, some_labels = points[:NUM_SHOWN], labels[:NUM_SHOWN]
    folder = settings.out / "figures"
    losses = {name: results["models"][name]["losses"] for name in MODELS}
    return {
        "loss": pictures.loss_figure(losses, folder / "loss.png"),
        "orders": pictures.order_figure(results["orders"], folder / "orders.png"),
        "memory": pictures.memory_figure(results["memory"], folder / "memory.png"),
        "adjoint": pictures.adjoint_figure(results["adjoint"], folder / "adjoint.png"),
        "depth": pictures.depth_figure(results["depth"], folder / "depth.png"),
        "inverse": pictures.inverse_figure(results["inverse"], folder / "inverse.png"),
        "reflection": pictures.reflection_figure(results["reflection"], folder / "reflection.png"),
        "rings": pictures.ring_figure(results["rings"], folder / "rings.png"),
        "boundaries": pictures.boundary_figure(models, points, labels, folder / "boundaries.png"),
        "trajectories": pictures.trajectory_figure(models, some, some_labels, folder / "trajectories.png"),
        "flow": pictures.flow_animation(models["ode-rk4"], some, some_labels, folder / "flow.gif"),
    }


def _save_weights(trained: dict[int, Any], out: pathlib.Path) -> None:
    (out / "weights").mkdir(exist_ok=True)
    for seed, models in trained.items():
        for name, (model, _) in models.items():
            save_file(model.state_dict(), out / "weights" / f"{name}-{seed}.safetensors")


def summary(results: dict[str, Any]) -> str:
    """The table of models as plain text."""
    rows = [story.HEAD, *story.summary_rows(results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(story.HEAD))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells))
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join([*lines, f"Bayes accuracy of this data: {100 * results['bayes']:.2f} %"])
