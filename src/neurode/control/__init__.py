"""Which step next: fixed grids, adaptive control of one step for all, adaptive control of each row's own step."""

from __future__ import annotations

from typing import Any

from neurode.control.adaptive import JointPace
from neurode.control.callbacks import Callbacks, watch
from neurode.control.fixed import FixedPace, RowGridPace
from neurode.control.pid import PID
from neurode.control.rows import RowPace


def pace(problem: Any, stepper: Any) -> Any:
    """The pace of one solve: it proposes intervals, judges steps and knows when all is done."""
    if problem.grid is not None:
        return RowGridPace(problem) if problem.per_row else FixedPace(problem)
    return RowPace(problem, stepper) if problem.per_row else JointPace(problem, stepper)


__all__ = ["PID", "Callbacks", "FixedPace", "JointPace", "RowGridPace", "RowPace", "pace", "watch"]
