"""Training that can be stopped and resumed, bit for bit."""

from __future__ import annotations

import os
import pathlib
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from neurode._errors import InputError
from neurode.data import spirals
from neurode.studies.spirals.models import Classifier, build, engine_of, evaluations
from neurode.studies.spirals.settings import LABELS, Settings

SAVE_EVERY = 20  # epochs: a killed run loses seconds


class Interrupted(Exception):
    """The run was stopped by Ctrl-C, and is saved."""


def progress(**options: Any) -> Any:
    """A progress bar: lively on a terminal, a line every ten seconds in a log."""
    lively = sys.stderr.isatty()
    return tqdm(mininterval=0.1 if lively else 10.0, ascii=None if lively else True, dynamic_ncols=lively, **options)


def training_data(settings: Settings, seed: int) -> tuple[Tensor, Tensor]:
    """The training points of a seed."""
    return spirals(settings.num_points, generator=torch.Generator().manual_seed(seed))


def test_data(settings: Settings, seed: int) -> tuple[Tensor, Tensor]:
    """Fresh points, independent of the training points."""
    return spirals(settings.num_test, generator=torch.Generator().manual_seed(1_000_003 + seed))


@contextmanager
def stop_on_ctrl_c() -> Iterator[dict[str, bool]]:
    """Within, Ctrl-C sets a flag in place of tearing through an update."""
    flag = {"stop": False}

    def handler(signum: int, frame: Any) -> None:
        flag["stop"] = True

    try:
        before = signal.signal(signal.SIGINT, handler)
    except ValueError:  # not in the main thread: the caller handles interrupts
        yield flag
        return
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)


def train(name: str, settings: Settings, seed: int) -> tuple[Classifier, dict[str, Any]]:
    """Train one model, or finish what an earlier run began.

    Returns:
        The model, and `updates`, `evaluations` (counted by the solver), `seconds`, the `losses` of the epochs, and the
        `engines` that computed them: one, unless the run was resumed where `"auto"` chose another.

    Raises:
        Interrupted: Ctrl-C; the state is saved.
        InputError: the folder holds a training under other settings.
    """
    points, labels = training_data(settings, seed)
    model = build(name, settings, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    path = checkpoint(settings, name, seed)
    record = _load(path, parts, settings) or dict(epoch=0, updates=0, evaluations=0, seconds=0.0, losses=[], engines=[])
    bar = progress(total=settings.epochs, initial=record["epoch"], desc=f"{LABELS[name]}, seed {seed}", unit="epoch")
    with bar, stop_on_ctrl_c() as flag:
        while record["epoch"] < settings.epochs:
            started = time.perf_counter()
            loss = _epoch(model, optimizer, points, labels, settings, seed, record)
            schedule.step()
            record["epoch"] += 1
            if engine_of(model) not in record["engines"]:
                record["engines"].append(engine_of(model))
            record["losses"].append(loss)
            record["seconds"] += time.perf_counter() - started
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            if flag["stop"] or record["epoch"] % SAVE_EVERY == 0 or record["epoch"] == settings.epochs:
                _save(path, parts, record, settings)
            if flag["stop"]:
                raise Interrupted(f"{LABELS[name]}, seed {seed}, after epoch {record['epoch']} of {settings.epochs}")
    return model, record


def _epoch(
    model: Classifier,
    optimizer: Any,
    points: Tensor,
    labels: Tensor,
    settings: Settings,
    seed: int,
    record: dict[str, Any],
) -> float:
    """One pass; the order depends on seed and epoch alone, so that a resumed run repeats it."""
    generator = torch.Generator().manual_seed(7919 * (seed + 1) + record["epoch"])
    order = torch.randperm(len(points), generator=generator)
    total = 0.0
    for index in order.split(settings.batch_size):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(points[index]), labels[index])
        record["evaluations"] += evaluations(model)
        loss.backward()
        optimizer.step()
        record["updates"] += 1
        total += float(loss.detach()) * len(index)
    return total / len(points)


def checkpoint(settings: Settings, name: str, seed: int) -> pathlib.Path:
    """Where a training is kept."""
    return settings.out / "checkpoints" / f"{name}-{seed}.pt"


def _save(path: pathlib.Path, parts: dict[str, Any], record: dict[str, Any], settings: Settings) -> None:
    """Write a checkpoint whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: part.state_dict() for name, part in parts.items()}
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save({"key": settings.training_key(), "record": record, **state}, file)
        file.flush()
        os.fsync(file.fileno())  # the new name must not reach the disk before what it names
    os.replace(temporary, path)


def _load(path: pathlib.Path, parts: dict[str, Any], settings: Settings) -> dict[str, Any] | None:
    saved = _read(path, settings)
    if saved is None:
        return None
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return saved["record"]


def _read(path: pathlib.Path, settings: Settings) -> dict[str, Any] | None:
    """A checkpoint of these settings, or None where there is none yet."""
    if not path.exists():
        return None
    saved = torch.load(path, weights_only=True)
    wanted = settings.training_key()
    if saved["key"] != wanted:
        other = {name: saved["key"].get(name) for name in wanted if saved["key"].get(name) != wanted[name]}
        raise InputError(
            f"{path.parent.parent} holds a training with {other}, not { ({n: wanted[n] for n in other}) }. Give those settings"
            " to continue it, or another --out."
        )
    return saved


def refuse_other(settings: Settings) -> None:
    """Refuse a folder with trainings under other settings, before anything in it is touched."""
    for path in sorted((settings.out / "checkpoints").glob("*.pt")):
        _read(path, settings)
