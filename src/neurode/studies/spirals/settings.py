"""Everything that a run of the study depends on."""

from __future__ import annotations

import json
import pathlib
import shlex
from dataclasses import asdict, dataclass, fields
from typing import Literal

from neurode._errors import InputError

MODELS = ("ode-euler", "ode-rk4", "resnet")
LABELS = {"ode-euler": "Neural ODE, Euler", "ode-rk4": "Neural ODE, RK4", "resnet": "ResNet"}


@dataclass(frozen=True)
class Settings:
    """Train the spiral classifiers and write the report.

    Three models on 1,000 points of two noisy, interleaved spirals: a neural ODE solved with Euler's method, one solved
    with RK4, and a residual network of as many blocks. A run can be stopped with Ctrl-C and goes on where it was when
    the same command is given again.
    """

    out: pathlib.Path = pathlib.Path("runs/spirals")
    """Folder for the report, the figures, the weights and the numbers."""
    seeds: tuple[int, ...] = (0,)
    """One training of all three models for each seed; the table shows mean and spread."""
    epochs: int = 500
    """Passes over the training points."""
    batch_size: int = 128
    """Points in an update."""
    learning_rate: float = 0.01
    """Initial rate of Adam; annealed to zero along a cosine."""
    num_points: int = 1000
    """Training points."""
    num_test: int = 20_000
    """Fresh points for the test accuracy."""
    steps: int = 20
    """Solver steps of the neural ODEs, and blocks of the residual network."""
    hidden: int = 128
    """Width of the vector field and of the blocks."""
    engine: Literal["auto", "eager", "fused"] = "auto"
    """Engine that solves the neural ODEs while they train: eager is PyTorch, operation by operation; fused is one native
    call a solve; auto takes fused where it can be used."""
    threads: int = 1
    """Threads of PyTorch: the matrices are small, more than one rarely helps."""
    toy_updates: int = 300
    """Updates of the small flows in the section on crossing and augmentation."""
    max_memory_steps: int = 640
    """Longest solve in the section on memory (5, 10, 20, ... up to this)."""

    def __post_init__(self) -> None:
        least = dict.fromkeys(("epochs", "batch_size", "steps", "hidden", "threads", "toy_updates"), 1)
        least |= {"num_points": 2, "num_test": 2, "max_memory_steps": 5}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise InputError(f"{name}={getattr(self, name)}; it must be at least {bound}.")
        if self.engine not in ("auto", "eager", "fused"):
            raise InputError(f"engine={self.engine!r}; it must be 'auto', 'eager' or 'fused'.")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise InputError(f"seeds={self.seeds}; give one or more different numbers.")
        if not self.learning_rate > 0:
            raise InputError(f"learning_rate={self.learning_rate}; it must be positive.")

    def as_json(self) -> str:
        """The settings that reproduce a run; the folder is not one of them."""
        values = {name: value for name, value in asdict(self).items() if name != "out"}
        return json.dumps(values, indent=2) + "\n"

    def command(self) -> str:
        """What to type for this run; settings at their default are left out."""
        words = ["neurode", "spirals"]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "out" and value != field.default:
                values = value if isinstance(value, tuple) else (value,)
                words += [f"--{field.name.replace('_', '-')}", *map(str, values)]
        return shlex.join(words)

    def training_key(self) -> dict[str, object]:
        """What a checkpoint depends on: one made under other values must not be continued."""
        names = {field.name for field in fields(self)} - {"out", "seeds", "num_test", "toy_updates", "max_memory_steps"}
        return {name: getattr(self, name) for name in sorted(names)}
