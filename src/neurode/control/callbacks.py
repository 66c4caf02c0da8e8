"""Functions of the user's that are told of every step; they watch and change nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neurode._state import number
from neurode.stepping import Interval, Step


@dataclass(frozen=True)
class Callbacks:
    """What to call at the steps of a joint solve, each as `callback(t0, y0, dt)`.

    `t0` is the time at the start of the step, a float64 0-d tensor; `y0` the state there, in the user's structure; `dt`
    the positive length of the step, a float64 0-d tensor. What they return is ignored; what they raise ends the solve.

    Args:
        step: called before every attempt.
        accept: called after an attempt that was accepted; on a fixed grid after every step.
        reject: called after an attempt that was rejected.

    Example:
        >>> import neurode
        >>> lengths = []
        >>> watch = neurode.Callbacks(step=lambda t0, y0, dt: lengths.append(float(dt)))
        >>> solution = neurode.solve(lambda t, y: -y, 1.0, (0, 1), method="rk4", steps=2, callbacks=watch)
        >>> lengths
        [0.5, 0.5]
    """

    step: Callable[..., Any] | None = None
    accept: Callable[..., Any] | None = None
    reject: Callable[..., Any] | None = None


class Watch:
    """Calls the callbacks of one problem with times and states as users know them."""

    def __init__(self, problem: Any) -> None:
        self.callbacks, self.layout = problem.callbacks, problem.layout

    def before(self, interval: Interval, y: Tensor) -> None:
        """An attempt is about to be made."""
        self._call(self.callbacks.step, interval, y)

    def after(self, step: Step, accepted: bool) -> None:
        """An attempt was judged."""
        self._call(self.callbacks.accept if accepted else self.callbacks.reject, step.interval, step.y0)

    def _call(self, callback: Callable[..., Any] | None, interval: Interval, y: Tensor) -> None:
        if callback is None:
            return
        t0, t1 = number(interval.t0), number(interval.t1)
        dtype = torch.float32 if y.device.type == "mps" else torch.float64
        times = torch.tensor([t0, abs(t1 - t0)], dtype=dtype, device=y.device)
        callback(times[0], self.layout.unpack(y), times[1])


def watch(problem: Any) -> Watch | None:
    """What calls the problem's callbacks, or None where it has none."""
    return None if problem.callbacks is None else Watch(problem)
