"""The pictures of the gradient benchmark: memory against steps, and what time buys which memory."""

from __future__ import annotations

import math
import pathlib
from typing import Any

from neurode.report.figures import BLACK, BLUE, GREEN, PURPLE, RED, SKY, panels, save

GREY = "#8A8A8A"
# Colour and marker of each: ours in colour, peers in grey, told apart by their markers.
LOOK = {
    "autograd": (BLACK, "o"),
    "discrete": (BLUE, "s"),
    "discrete, one stage alive": (SKY, "P"),
    "checkpoints": (GREEN, "D"),
    "reversible": (PURPLE, "^"),
    "autograd of Reversible(method)": (PURPLE, "o"),
    "continuous": (RED, "v"),
    "torchdiffeq backpropagation": (GREY, "o"),
    "torchdiffeq adjoint": (GREY, "v"),
    "torchode autodiff": (GREY, "<"),
    "torchode backsolve": (GREY, ">"),
    "diffrax, all checkpoints": (GREY, "s"),
    "diffrax, default checkpoints": (GREY, "D"),
    "diffrax backsolve": (GREY, "X"),
}


def _look(name: str) -> tuple[str, str]:
    return LOOK.get(name, LOOK["checkpoints"])


def _apart(values: list[float], gap: float) -> list[float]:
    """Positions of labels (in log10) moved so that neighbours are `gap` apart, in the order of their values."""
    order = sorted(range(len(values)), key=values.__getitem__)
    placed = list(values)
    for low, high in zip(order, order[1:], strict=False):
        placed[high] = max(placed[high], placed[low] + gap)
    shift = (sum(placed) - sum(values)) / len(values)
    return [p - shift for p in placed]


def memory(results: dict[str, Any], path: pathlib.Path) -> None:
    """Peak memory against the number of steps, named at the end of each line."""
    steps, curves = results["memory"]["steps"], results["memory"]["rows"]
    figure, axes = panels(1, width=7.2, height=4.4)
    names = list(curves)
    at = _apart([math.log10(curves[name][-1]) for name in names], 0.155)
    for name, height in zip(names, at, strict=True):
        colour, marker = _look(name)
        mine = colour != GREY
        axes.loglog(
            steps[: len(curves[name])],
            curves[name],
            color=colour,
            marker=marker,
            lw=1.8 if mine else 1.0,
            ls="-" if mine else "--",
            ms=4.5,
        )
        last = (steps[len(curves[name]) - 1], curves[name][-1])
        line = {"arrowstyle": "-", "color": colour, "lw": 0.5, "shrinkB": 3}
        beside = {"color": colour, "va": "center", "fontsize": 8.5, "arrowprops": line}
        axes.annotate(name, last, (steps[-1] * 1.22, 10**height), **beside)
    axes.set_xlabel("steps of RK4")
    axes.set_ylabel("peak memory, KB")
    axes.set_title("Memory of a gradient: spiral field, batch 128", loc="left")
    axes.set_xticks(steps, [f"{n:,}" for n in steps])
    axes.minorticks_off()
    axes.set_xlim(steps[0] * 0.9, steps[-1] * 12)
    save(figure, path)


TITLES = {"fixed": "RK4, 100 steps", "adaptive": "dopri5, tolerance 1e-5, steps by row"}


def price(results: dict[str, Any], path: pathlib.Path) -> None:
    """Time against memory: down and to the left is better."""
    parts = [part for part in TITLES if part in results]
    figure, all_axes = panels(len(parts), width=5.6, height=4.6, squeeze=False)
    for axes, part in zip(all_axes[0], parts, strict=True):
        for name, row in results[part].items():
            colour, marker = _look(name)
            axes.loglog(row["kilobytes"], row["milliseconds"], color=colour, marker=marker, ms=7, ls="none", label=name)
        axes.set_xlabel("peak memory, KB")
        axes.set_ylabel("forward and backward, ms")
        axes.set_title(TITLES[part], loc="left")
        axes.legend(fontsize=7.5, loc="upper left", bbox_to_anchor=(0.0, -0.16), ncols=2, handletextpad=0.2)
    save(figure, path)


def draw(results: dict[str, Any], folder: pathlib.Path) -> None:
    """Whatever was measured, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if "memory" in results:
        memory(results, folder / "gradients-memory.png")
    if TITLES.keys() & results.keys():
        price(results, folder / "gradients-price.png")


__all__ = ["draw"]
