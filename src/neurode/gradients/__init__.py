"""How derivatives come back: one strategy a file, each wrapping the same integration."""

from __future__ import annotations

from typing import Any

import torch

from neurode._errors import InputError, UnknownOptionError, did_you_mean
from neurode.gradients.autograd import Autograd
from neurode.gradients.continuous import Continuous
from neurode.gradients.discrete import Discrete
from neurode.gradients.features import refuse

STRATEGIES: dict[str, Any] = {"autograd": Autograd(), "discrete": Discrete(), "continuous": Continuous()}


def choose(gradient: Any, problem: Any) -> tuple[Any, str]:
    """The strategy for a problem, and what to say of it in the statistics.

    Args:
        gradient: a name, a strategy, or `"auto"`.
        problem: the problem to be differentiated.

    Raises:
        UnknownOptionError: no strategy has that name.
        InputError: it is neither a name nor a strategy.
        GradientError: gradients are on and the strategy does not go through something that the problem has.
    """
    strategy, note = _named(gradient)
    if torch.is_grad_enabled():
        refuse(strategy, problem, STRATEGIES.values())
    return strategy, note


def _named(gradient: Any) -> tuple[Any, str]:
    if gradient == "auto":
        return STRATEGIES["autograd"], "autograd (auto: exact, on PyTorch's tape)"
    if isinstance(gradient, str):
        if gradient not in STRATEGIES:
            raise UnknownOptionError(
                f"gradient={gradient!r} is not a strategy.{did_you_mean(gradient, STRATEGIES)} It is one of: auto,"
                f" {', '.join(STRATEGIES)}."
            )
        return STRATEGIES[gradient], gradient
    if not hasattr(gradient, "solve"):
        raise InputError(f"gradient is of type {type(gradient).__name__}; give a name such as 'autograd'.")
    return gradient, gradient.name


__all__ = ["STRATEGIES", "Autograd", "Continuous", "Discrete", "choose"]
