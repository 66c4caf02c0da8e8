"""PyTorch's own tape through the integration loop: exact, any order of derivative, memory in proportion to the steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from neurode._loop import Outcome, integrate
from neurode._problem import Problem
from neurode.gradients.features import EVERYTHING


@dataclass(frozen=True)
class Autograd:
    """Backpropagation through the operations of the solver.

    Exact for the numbers that were computed: accepted interior times are constants, the ends and output times move.
    Supports double backward, forward mode and `torch.func` transforms. Memory: the activations of every evaluation of
    `f` in accepted steps.
    """

    name = "autograd"
    handles = EVERYTHING
    fused = False  # whether the fused engine gives this gradient

    def solve(self, problem: Problem, stats: Any) -> Outcome:
        """Integrate under whatever gradient mode is on."""
        return integrate(problem)
