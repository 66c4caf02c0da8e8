"""One look for all figures: matplotlib with a palette that colour-blind readers can tell apart."""

from __future__ import annotations

import base64
import pathlib
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

# Okabe & Ito (2008), Color universal design: distinguishable with every common colour vision deficiency.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#333333",
)  # fmt: skip
CYCLE = [BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BLACK]
MARKERS = "osD^vPX<"

STYLE = {
    "figure.dpi": 110, "savefig.dpi": 160, "figure.facecolor": "white", "font.size": 10, "axes.titlesize": 11,
    "axes.titleweight": "bold", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.25, "grid.linewidth": 0.6, "lines.linewidth": 1.6, "lines.markersize": 5, "legend.frameon": False,
    "legend.fontsize": 9, "axes.prop_cycle": plt.cycler(color=CYCLE), "figure.constrained_layout.use": True,
}  # fmt: skip


def panels(columns: int = 1, rows: int = 1, *, width: float = 4.6, height: float = 3.6, **options: Any) -> Any:
    """A figure and its axes in the house's look; `options` go to `plt.subplots`."""
    mpl.rcParams.update(STYLE)
    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), **options)


def save(figure: Any, path: pathlib.Path) -> pathlib.Path:
    """Write a PNG and close the figure."""
    figure.savefig(path)
    plt.close(figure)
    return path


def data_uri(path: pathlib.Path) -> str:
    """A picture as text that a page can hold."""
    kind = {".png": "image/png", ".gif": "image/gif"}[path.suffix]
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
