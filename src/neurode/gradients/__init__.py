"""How derivatives come back: one strategy a file, each wrapping the same integration."""

from __future__ import annotations

from neurode.gradients.again import of_native
from neurode.gradients.autograd import Autograd
from neurode.gradients.budget import read_memory
from neurode.gradients.choice import STRATEGIES, choose
from neurode.gradients.continuous import Continuous
from neurode.gradients.discrete import Discrete
from neurode.gradients.reversible import Retrace

__all__ = ["STRATEGIES", "Autograd", "Continuous", "Discrete", "Retrace", "choose", "of_native", "read_memory"]
