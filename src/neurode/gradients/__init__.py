"""How derivatives come back: one strategy a file, each wrapping the same integration."""

from __future__ import annotations

from typing import Any

from neurode._errors import InputError, UnknownOptionError, did_you_mean
from neurode.gradients.autograd import Autograd
from neurode.gradients.continuous import Continuous
from neurode.gradients.discrete import Discrete

STRATEGIES: dict[str, Any] = {"autograd": Autograd(), "discrete": Discrete(), "continuous": Continuous()}


def choose(gradient: Any, problem: Any) -> tuple[Any, str]:
    """The strategy for a problem, and what to say of it in the statistics.

    Args:
        gradient: a name, a strategy, or `"auto"`.
        problem: the problem to be differentiated.
    """
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
