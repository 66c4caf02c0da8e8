"""What the engine is worth: the same training on both engines, in turns, and how far their numbers are apart."""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

import neurode
from neurode.studies.spirals.models import Classifier, build
from neurode.studies.spirals.settings import Settings

ROUNDS = 5  # of as many updates as an epoch has, on each engine in turn; the median counts
ODES = ("ode-euler", "ode-rk4")


def compare(models: dict[str, Classifier], settings: Settings, points: Tensor, labels: Tensor) -> dict[str, Any]:
    """Milliseconds of a training update on either engine, for each neural ODE.

    Args:
        models: the trained ones, by name.
        settings: the run's.
        points, labels: the training points.

    Returns:
        For each the milliseconds on `"eager"` and, where it can be used, `"fused"`, with the relative differences of the
        trained model's `"outputs"` and `"gradients"` between them, also in float64; else `"refusal"`, why it cannot.
    """
    return {name: _compare(name, models[name], settings, points, labels) for name in ODES}


def _compare(name: str, model: Classifier, settings: Settings, points: Tensor, labels: Tensor) -> dict[str, Any]:
    sides = {engine: _Training(name, engine, settings, points, labels) for engine in ("eager", "fused")}
    found: dict[str, Any] = {}
    try:
        sides["fused"].update(0)
    except neurode.EngineError as error:
        found["refusal"] = str(error)
        del sides["fused"]
    sides["eager"].update(0)
    rounds: dict[str, list[float]] = {engine: [] for engine in sides}
    for _ in range(ROUNDS):
        for engine, side in sides.items():
            rounds[engine].append(side.epoch())
    found |= {engine: 1000 * statistics.median(seconds) for engine, seconds in rounds.items()}
    if "refusal" not in found:
        found |= _difference(model, points, labels)
        double = _difference(copy.deepcopy(model).double(), points.double(), labels)
        found |= {f"{what} in float64": value for what, value in double.items()}
    return found


class _Training:
    """A model on one engine, trained as the study trains it."""

    def __init__(self, name: str, engine: str, settings: Settings, points: Tensor, labels: Tensor) -> None:
        self.model = _on(engine, build(name, settings, seed=0))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=settings.learning_rate)
        self.batches = list(zip(points.split(settings.batch_size), labels.split(settings.batch_size), strict=True))

    def update(self, number: int) -> None:
        points, labels = self.batches[number]
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(points), labels).backward()
        self.optimizer.step()

    def epoch(self) -> float:
        """Seconds of an update, on average over an epoch."""
        started = time.perf_counter()
        for number in range(len(self.batches)):
            self.update(number)
        return (time.perf_counter() - started) / len(self.batches)


def _on(engine: str, model: Classifier) -> Classifier:
    model.body = model.body.with_solver(engine=engine)
    return model


def _difference(model: Classifier, points: Tensor, labels: Tensor) -> dict[str, float]:
    """How far outputs and gradients of one model are apart when it is solved on either engine."""
    results = []
    for engine in ("eager", "fused"):
        each = _on(engine, copy.deepcopy(model))
        out = each(points)
        grads = torch.autograd.grad(nn.functional.cross_entropy(out, labels), list(each.body.parameters()))
        results.append((out.detach(), torch.cat([g.flatten() for g in grads])))
    (out, grad), (other, other_grad) = results
    return {
        "outputs": float((out - other).norm() / out.norm()),
        "gradients": float((grad - other_grad).norm() / grad.norm()),
    }
