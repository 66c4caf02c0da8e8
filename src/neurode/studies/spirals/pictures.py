"""The figures of the report."""

from __future__ import annotations

import pathlib
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib import animation
from torch import Tensor

from neurode.nn import NeuralODE
from neurode.report.figures import BLACK, BLUE, MARKERS, ORANGE, RED, panels, save
from neurode.studies.spirals.models import Classifier
from neurode.studies.spirals.settings import LABELS

SHADES = mpl.colors.LinearSegmentedColormap.from_list("classes", ["#8ec3e6", "#ffffff", "#f4b08c"])
POINT_COLOURS = [BLUE, RED]
FRAMES = 60
SINGLE = {"width": 8.4, "height": 3.9}  # one panel as wide as two: letters of one size all down the page


def _colours(labels: Any) -> list[str]:
    return [POINT_COLOURS[int(label)] for label in labels]


def _plain_ticks(axes: Any, steps: list[int]) -> None:
    """The numbers of steps themselves on a logarithmic axis."""
    axes.set_xticks(steps, [str(n) for n in steps])
    axes.minorticks_off()


def order_figure(found: dict[str, Any], path: pathlib.Path) -> pathlib.Path:
    figure, axes = panels(**SINGLE)
    for marker, (name, each) in zip(MARKERS, found["methods"].items(), strict=False):
        label = f"{name}: slope {each['slope']:.2f} (order {each['order']})"
        axes.loglog(found["sizes"], each["errors"], marker=marker, label=label)
    axes.set(xlabel="step size h", ylabel="error at the end", title="Orders of the fixed-step methods")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return save(figure, path)


def memory_figure(found: dict[str, Any], path: pathlib.Path) -> pathlib.Path:
    figure, both = panels(2, sharey=True)
    for axes, (method, strategies) in zip(both, found["bytes"].items(), strict=True):
        for marker, (name, values) in zip(MARKERS, strategies.items(), strict=False):
            axes.loglog(found["steps"], [v / 2**20 for v in values], marker=marker, label=name)
        _plain_ticks(axes, found["steps"])
        axes.set(xlabel="steps", title={"euler": "Euler", "rk4": "RK4"}[method])
        axes.legend(title="gradient")
    both[0].set_ylabel("peak live storage, MiB")
    return save(figure, path)


def adjoint_figure(found: dict[str, Any], path: pathlib.Path) -> pathlib.Path:
    figure, axes = panels(**SINGLE)
    for name in ("untrained euler", "untrained rk4", "trained euler", "trained rk4"):
        state, method = name.split()
        style = {"color": BLUE if method == "euler" else RED, "linestyle": "-" if state == "trained" else "--"}
        label = f"{'Euler' if method == 'euler' else 'RK4'}, {state}"
        axes.loglog(found["steps"], found[name], marker="o", label=label, **style)
    _plain_ticks(axes, found["steps"])
    axes.set(xlabel="steps, forward and backward", ylabel="relative error of the gradient")
    axes.set_title("The continuous adjoint against the exact gradient")
    axes.legend()
    return save(figure, path)


def depth_figure(found: dict[str, Any], path: pathlib.Path) -> pathlib.Path:
    figure, axes = panels(**SINGLE)
    for name, colour in (("ode-euler", BLUE), ("ode-rk4", RED)):
        each = found[name]
        axes.semilogx(
            each["steps"], [100 * a for a in each["accuracies"]], marker="o", color=colour, label=LABELS[name]
        )
        axes.axhline(100 * each["accuracy_exact"], color=colour, linestyle=":", label=f"{LABELS[name]}: dopri5 at 1e-8")
    axes.axvline(found["ode-rk4"]["trained_steps"], color=BLACK, linewidth=0.8, label="trained with")
    _plain_ticks(axes, found["ode-rk4"]["steps"])
    axes.set(xlabel="steps at test time", ylabel="test accuracy, %", title="Depth chosen at test time")
    axes.legend()
    return save(figure, path)


def inverse_figure(found: dict[str, Any], path: pathlib.Path) -> pathlib.Path:
    figure, axes = panels(**SINGLE)
    for name, marker, colour in (("ode-euler", "o", BLUE), ("ode-rk4", "s", RED)):
        axes.loglog(found["steps"], found[name], marker=marker, color=colour, label=f"{LABELS[name]}, trained")
        untrained = found[f"{name} untrained"]
        axes.loglog(
            found["steps"], untrained, marker=marker, color=colour, linestyle="--", label=f"{LABELS[name]}, untrained"
        )
    _plain_ticks(axes, found["steps"])
    axes.set(xlabel="steps, each way", ylabel="relative reconstruction error", title="Forward, then backward")
    axes.legend()
    return save(figure, path)


def reflection_figure(found: dict[str, Any], path: pathlib.Path) -> pathlib.Path:
    figure, both = panels(2, sharey=True)
    titles = {"line": "On the line", "augmented": "With one more dimension"}
    for axes, (key, title) in zip(both, titles.items(), strict=True):
        paths = np.array(found[key]["path"])[..., 0]
        colours = plt.get_cmap("viridis")(np.linspace(0.05, 0.9, paths.shape[1]))
        for i in range(paths.shape[1]):
            axes.plot(np.linspace(0, 1, len(paths)), paths[:, i], color=colours[i], linewidth=1.2)
        axes.scatter([1] * paths.shape[1], [-y for y in found["start"]], color=BLACK, s=12, zorder=3, label="target -y")
        axes.set(xlabel="t", title=f"{title}\nmean squared error {found[key]['mse']:.2g}", xlim=(-0.02, 1.04))
    both[0].set_ylabel("y")
    both[0].legend(loc="upper center")
    return save(figure, path)


def ring_figure(found: dict[str, Any], path: pathlib.Path) -> pathlib.Path:
    figure, both = panels(2)
    titles = {"plane": "In the plane", "augmented": "With one more dimension (seen from the side)"}
    colours = _colours(found["labels"])
    for axes, (key, title) in zip(both, titles.items(), strict=True):
        paths = np.array(found[key]["path"])
        across = (0, 2) if key == "augmented" else (0, 1)
        for i, colour in enumerate(colours):
            axes.plot(paths[:, i, across[0]], paths[:, i, across[1]], color=colour, linewidth=0.6, alpha=0.5)
        ends = paths[-1]
        axes.scatter(ends[:, across[0]], ends[:, across[1]], color=colours, s=12, zorder=3)
        axes.set(xlabel="$y_1$", ylabel="$y_3$" if key == "augmented" else "$y_2$")
        axes.set_title(f"{title}\naccuracy {100 * found[key]['accuracy']:.1f} %")
    return save(figure, path)


@torch.no_grad()
def boundary_figure(models: dict[str, Classifier], points: Tensor, labels: Tensor, path: pathlib.Path) -> pathlib.Path:
    figure, axes = panels(len(models), width=4.0, height=4.0, sharey=True)
    axis = np.linspace(-1.45, 1.45, 180, dtype=np.float32)
    grid = torch.cartesian_prod(torch.from_numpy(axis), torch.from_numpy(axis))
    cloud = points.numpy()
    for each, (name, model) in zip(axes, models.items(), strict=True):
        share = model(grid).softmax(1)[:, 1].reshape(len(axis), len(axis)).T.numpy()
        each.imshow(share, origin="lower", extent=(-1.45, 1.45, -1.45, 1.45), cmap=SHADES, vmin=0, vmax=1)
        each.contour(axis, axis, share, levels=[0.5], colors=BLACK, linewidths=1.0)
        each.scatter(cloud[:, 0], cloud[:, 1], c=_colours(labels), s=4, alpha=0.8)
        each.set(title=LABELS[name], aspect="equal")
        each.grid(False)
    return save(figure, path)


@torch.no_grad()
def _principal_paths(model: Classifier, points: Tensor, count: int) -> np.ndarray:
    """Trajectories `(time, points, 2)` in the first two principal components of all states on the way."""
    path = model.body.trajectory(model.lift(points), torch.linspace(0, 1, count))
    flat = path.reshape(-1, path.shape[-1])
    centre = flat.mean(0)
    _, _, directions = torch.linalg.svd(flat - centre, full_matrices=False)
    return ((path - centre) @ directions[:2].T).numpy()


def trajectory_figure(
    models: dict[str, Classifier], points: Tensor, labels: Tensor, path: pathlib.Path
) -> pathlib.Path:
    flows = {name: model for name, model in models.items() if isinstance(model.body, NeuralODE)}
    figure, axes = panels(len(flows), height=4.2)
    for each, (name, model) in zip(axes, flows.items(), strict=True):
        # The states at the steps themselves: between them an interpolant would draw wiggles that the model has not.
        paths = _principal_paths(model, points, model.body.options["steps"] + 1)
        for i, colour in enumerate(_colours(labels)):
            each.plot(paths[:, i, 0], paths[:, i, 1], color=colour, linewidth=0.6, alpha=0.45)
        each.scatter(paths[0, :, 0], paths[0, :, 1], color=BLACK, s=5, zorder=3, label="t = 0")
        each.scatter(
            paths[-1, :, 0], paths[-1, :, 1], c=_colours(labels), s=14, zorder=3, edgecolors="white", linewidths=0.4
        )
        each.set(xlabel="first principal component", ylabel="second", title=LABELS[name])
        each.legend()
    return save(figure, path)


def flow_animation(model: Classifier, points: Tensor, labels: Tensor, path: pathlib.Path) -> pathlib.Path:
    """The points on their way from t = 0 to t = 1, as a GIF that rests at both ends."""
    paths = _principal_paths(model, points, FRAMES)
    figure, axes = panels(width=5.0, height=4.6)
    low, high = paths.reshape(-1, 2).min(0), paths.reshape(-1, 2).max(0)
    axes.set(xlim=(low[0] - 0.3, high[0] + 0.3), ylim=(low[1] - 0.3, high[1] + 0.3))
    axes.set(xlabel="first principal component", ylabel="second")
    dots = axes.scatter(paths[0, :, 0], paths[0, :, 1], c=_colours(labels), s=12)
    order = [0] * 8 + list(range(FRAMES)) + [FRAMES - 1] * 14

    def draw(frame: int) -> tuple[Any, ...]:
        dots.set_offsets(paths[order[frame]])
        axes.set_title(f"t = {order[frame] / (FRAMES - 1):.2f}")
        return (dots,)

    moving = animation.FuncAnimation(figure, draw, frames=len(order))
    moving.save(path, writer=animation.PillowWriter(fps=20), dpi=80)
    plt.close(figure)
    return path


def loss_figure(losses: dict[str, list[float]], path: pathlib.Path) -> pathlib.Path:
    figure, axes = panels(**SINGLE)
    for (name, values), colour in zip(losses.items(), (BLUE, RED, ORANGE), strict=False):
        axes.plot(range(1, len(values) + 1), values, color=colour, label=LABELS[name], linewidth=1.1)
    axes.set(xlabel="epoch", ylabel="training loss", title="Training", yscale="log")
    low, high = axes.get_ylim()
    ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 2, 5, 10) if low < t < high]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.legend()
    return save(figure, path)
