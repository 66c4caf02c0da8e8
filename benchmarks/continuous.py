"""How wrong the continuous adjoint is on a trained field: plain, interpolated and quadrature forms against the exact gradient.

    python benchmarks/continuous.py [--small] [--out continuous.json] [--plot continuous.png]

The spiral classifier is trained through RK4 with 20 steps. Then the gradient of its loss with respect to everything that the
solve depends on is taken in float64, with 20 to 640 steps of RK4, and of Euler's method, forward and as many backward, and
compared with the exact gradient of the same numbers. Before training the field is smooth and the adjoint flatters itself:
that is printed too. Beside the errors stand the evaluations of `f` in the backward pass and the peak of live tensor storage.
"""

from __future__ import annotations

import argparse
import copy
import json
import pathlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import neurode
from neurode.data import spirals
from neurode.report.memory import peak_memory

STEPS, BATCH, SPAN = (20, 40, 80, 160, 320, 640), 128, (0.0, 1.0)
FORMS = {
    "plain": neurode.Continuous(),
    "interpolate": neurode.Continuous(interpolate=True),
    "quadrature": neurode.Continuous(quadrature=True),
    "both": neurode.Continuous(interpolate=True, quadrature=True),
}


@dataclass(frozen=True)
class Classifier:
    """The spiral classifier: a lift, a field, a head, and points with their classes."""

    lift: nn.Module
    field: nn.Module
    head: nn.Module
    points: Tensor
    labels: Tensor

    def loss(self, rows: slice, steps: int, gradient: Any, method: str = "rk4") -> Tensor:
        """The loss on some of the points; keeps the statistics of the solve."""
        y0 = self.lift(self.points[rows])
        solution = neurode.solve(self.field, y0, SPAN, method=method, steps=steps, gradient=gradient, engine="eager")
        object.__setattr__(self, "stats", solution.stats)
        return nn.functional.cross_entropy(self.head(solution.y1), self.labels[rows])

    def gradient(self, steps: int, gradient: Any, method: str = "rk4") -> Tensor:
        """The gradient with respect to the field's parameters and the lift, as one vector."""
        weights = [*self.field.parameters(), *self.lift.parameters()]
        grads = torch.autograd.grad(self.loss(slice(BATCH), steps, gradient, method), weights)
        return torch.cat([g.reshape(-1) for g in grads])


def classifier(hidden: int, points: int) -> Classifier:
    """A fresh one, with torch's default initialization."""
    torch.manual_seed(0)
    lift, head = nn.Linear(2, 6), nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 2))
    field = neurode.nn.MLP(6, (hidden, hidden), zero_init=False)
    where, labels = spirals(points, generator=torch.Generator().manual_seed(0))
    return Classifier(lift, field, head, where.to(torch.get_default_dtype()), labels)


def train(model: Classifier, epochs: int) -> float:
    """Train through RK4 with 20 steps; returns the last epoch's mean loss."""
    weights = [*model.field.parameters(), *model.lift.parameters(), *model.head.parameters()]
    optimizer = torch.optim.Adam(weights, lr=1e-2)
    losses: list[float] = []
    for _ in range(epochs):
        losses = []
        for start in range(0, len(model.points), BATCH):
            loss = model.loss(slice(start, start + BATCH), STEPS[0], "autograd")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


def in_double(model: Classifier) -> Classifier:
    """The same in float64."""
    parts = (copy.deepcopy(part).double() for part in (model.lift, model.field, model.head))
    return Classifier(*parts, model.points.double(), model.labels)


def errors(model: Classifier, steps: tuple[int, ...], method: str = "rk4") -> dict[str, list[float]]:
    """The error of every form, as a share of the exact gradient's norm, for every number of steps."""
    found: dict[str, list[float]] = {name: [] for name in FORMS}
    for count in steps:
        exact = model.gradient(count, "autograd", method)
        for name, form in FORMS.items():
            found[name].append(float((model.gradient(count, form, method) - exact).norm() / exact.norm()))
    return found


def costs(model: Classifier, steps: int) -> dict[str, tuple[int, float]]:
    """Evaluations of `f` in the backward pass, and peak kilobytes of forward and backward, at one number of steps."""
    found = {}
    for name, form in FORMS.items():
        peak = peak_memory(
            lambda form=form: [model.gradient(steps, form)], excluding=[model.points, *model.field.parameters()]
        )
        found[name] = (model.stats.backward.num_evaluations, peak / 1e3)  # type: ignore[attr-defined]
    return found


def show(title: str, steps: tuple[int, ...], found: dict[str, list[float]]) -> None:
    """One table of errors."""
    print(f"\n{title}\n  {'steps':12s}" + "".join(f"{count:>10d}" for count in steps))
    for name, values in found.items():
        print(f"  {name:12s}" + "".join(f"{value:10.1e}" for value in values))


def plot(steps: tuple[int, ...], tables: dict[str, dict[str, list[float]]], path: pathlib.Path) -> None:
    """Errors against the number of steps, in logarithms."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    colours = dict(zip(FORMS, ("#1f4e9c", "#b5342b", "#2c7d4f", "#8a5a00"), strict=True))
    for title, found in tables.items():
        for name, values in found.items():
            shown = {"trained": "-", "euler": "--", "untrained": ":"}[title]
            label = f"{name}, {title if title != 'euler' else 'trained, Euler'}"
            axes.loglog(steps, values, shown, color=colours[name], marker="o", markersize=3, label=label)
    axes.set(
        xlabel="steps forward and backward, RK4 unless it says Euler", ylabel="error of the gradient, share of its norm"
    )
    axes.set_xticks(steps, [str(count) for count in steps], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_title("The continuous adjoint against the exact gradient")
    axes.grid(True, color="#dddddd", linewidth=0.6)
    figure.legend(fontsize=7, ncols=3, loc="outside lower center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def run(hidden: int, points: int, epochs: int, steps: tuple[int, ...]) -> dict[str, Any]:
    """Everything that is printed, plotted and written."""
    model = classifier(hidden, points)
    untrained = errors(in_double(model), steps)
    loss = train(model, epochs)
    trained = in_double(model)
    return {
        "steps": steps,
        "loss": loss,
        "untrained": untrained,
        "trained": errors(trained, steps),
        "euler": errors(trained, steps, "euler"),
        "costs": costs(trained, steps[len(steps) // 2]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a smaller field, trained for a moment, at few steps")
    parser.add_argument("--out", type=pathlib.Path, help="where to write the numbers as JSON")
    parser.add_argument("--plot", type=pathlib.Path, help="where to write the figure")
    asked = parser.parse_args()
    found = run(16, 256, 10, (20, 40)) if asked.small else run(64, 1024, 60, STEPS)
    steps = found["steps"]
    show("untrained field, float64", steps, found["untrained"])
    show(f"trained field (loss {found['loss']:.3f}), float64", steps, found["trained"])
    show("the same field, Euler's method", steps, found["euler"])
    print(f"\nbackward pass of the trained field, {steps[len(steps) // 2]} steps")
    for name, (evaluations, kilobytes) in found["costs"].items():
        print(f"  {name:12s}{evaluations:8d} evaluations of f  {kilobytes:10.0f} KB at the peak")
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1))
    if asked.plot:
        plot(steps, {name: found[name] for name in ("trained", "euler", "untrained")}, asked.plot)


if __name__ == "__main__":
    main()
