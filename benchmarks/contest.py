"""Timing side by side: candidates in turn, medians, what the machine was doing meanwhile."""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Candidate:
    """One library's way to the same numbers.

    Attributes:
        run: what is timed; returns whatever the library returns, finished.
        read: the numbers in it as tensors, the state first, gradients behind it.
        note: what a reader must know to judge the time.
    """

    run: Callable[[], Any]
    read: Callable[[Any], list[Tensor]]
    note: str = ""


@dataclass(frozen=True)
class Result:
    """What one candidate needed, and how far off its numbers are.

    Attributes:
        milliseconds: the median.
        spread: the middle half of the rounds, as a share of the median.
        errors: relative, of the state and of the gradients.
        peak: multiply-adds that the processor had to give in the same rounds, in GFLOP/s: on a shared machine it changes.
        note: what a reader must know to judge the time.
    """

    milliseconds: float
    spread: float
    errors: list[float]
    peak: float
    note: str = ""


def contest(
    candidates: dict[str, Candidate], truth: Sequence[Tensor], rounds: int, seconds: float, double: bool = False
) -> dict[str, Result]:
    """Medians of interleaved rounds, and the errors against `truth`.

    Every round begins with another candidate: what comes first finds the caches full of what the garbage collector walked over.

    Args:
        candidates: by name.
        truth: what `read` should give, in float64.
        rounds: the most rounds.
        seconds: no further round starts after this long; three rounds at least.
        double: the peak's dtype.
    """
    errors = {}
    for name, candidate in candidates.items():
        candidate.run()
        errors[name] = [relative(x, y) for x, y in zip(candidate.read(candidate.run()), truth, strict=True)]
    repeats = {name: _repeats(candidate.run) for name, candidate in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    peaks: list[float] = []
    order = list(candidates.items())
    started = time.perf_counter()
    for round_ in range(rounds):
        if round_ >= 3 and time.perf_counter() - started > seconds:
            break
        gc.collect()
        for name, candidate in order:
            times[name].append(_time(candidate.run, repeats[name]))
        order = order[1:] + order[:1]
        peaks.append(peak(double))
    top = statistics.median(peaks)
    return {
        name: Result(1e3 * statistics.median(t), _spread(t), errors[name], top, candidates[name].note)
        for name, t in times.items()
    }


def _repeats(run: Callable[[], Any]) -> int:
    """Runs in a round: some five milliseconds of them, so that neither the clock's own cost shows nor that of cold caches."""
    shortest = min(_time(run, 1) for _ in range(3))
    return max(1, min(100, int(5e-3 / shortest)))


def _time(run: Callable[[], Any], repeats: int) -> float:
    for _ in range(repeats):
        run()  # back in the caches after the others
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def _spread(times: list[float]) -> float:
    if len(times) < 4:
        return float("nan")
    first, median, third = statistics.quantiles(times, n=4)
    return (third - first) / median


def relative(x: Tensor, y: Tensor) -> float:
    """The error of x as a share of y's norm."""
    return ((x.double() - y).norm() / y.norm()).item()


def one_core() -> None:
    """Keep this process on one core, so that no library has a second thread to run on, whatever it starts."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def peak(double: bool = False) -> float:
    """GFLOP/s of independent multiply-adds in registers, by the native library's own loop, some milliseconds long."""
    from neurode.fused.native import library

    start = time.perf_counter()
    done = library().nd_peak(ctypes.c_int64(double), ctypes.c_int64(1_000_000))
    return done / (time.perf_counter() - start) / 1e9


def load() -> float:
    """Processes that wanted a core in the last minute, or NaN."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")


__all__ = ["Candidate", "Result", "contest", "load", "one_core", "peak", "relative"]
