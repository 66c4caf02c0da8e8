"""Runs a solve on the fused engine, for tests."""

from __future__ import annotations

from typing import Any

import neurode
from neurode.fused import run


class Native:
    """A strategy that hands the whole problem to the fused engine."""

    name = "discrete"

    def solve(self, problem: Any, stats: Any) -> Any:
        return run.solve(problem, stats)


def fused(*args: Any, **kwargs: Any) -> Any:
    """`neurode.solve` on the fused engine."""
    return neurode.solve(*args, gradient=Native(), **kwargs)


def eager(*args: Any, **kwargs: Any) -> Any:
    """`neurode.solve` on the eager engine."""
    return neurode.solve(*args, gradient="autograd", **kwargs)
