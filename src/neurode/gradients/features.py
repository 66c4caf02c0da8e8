"""What a solve may ask of a gradient strategy, and how a strategy says which of it it can differentiate.

A strategy carries `handles`, the names of the features that it goes through, and `choose` refuses a problem that has others
before anything is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from neurode._errors import GradientError
from neurode._problem import Problem
from neurode._state import unreadable


@dataclass(frozen=True)
class Feature:
    """One thing that not every strategy differentiates.

    Args:
        name: as it stands in `handles`.
        present: whether a problem has it.
        shown: how the message calls it, of the problem.
    """

    name: str
    present: Callable[[Problem], bool]
    shown: Callable[[Problem], str]


def _transformed(problem: Problem) -> bool:
    if unreadable(problem.y0):
        return True
    forward_ad = torch.autograd.forward_ad
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(problem.y0).tangent is not None


FEATURES = (
    Feature("transforms", _transformed, lambda p: "torch.func transforms, torch.compile or forward mode"),
    Feature("events", lambda p: bool(p.events), lambda p: "events"),
    Feature("dense", lambda p: p.dense, lambda p: "dense=True"),
    Feature("steps", lambda p: isinstance(p.t_eval, str), lambda p: "t_eval='steps'"),
    Feature("rows", lambda p: p.per_row, lambda p: "rows with steps of their own (batch_dim=0)"),
    Feature(
        "estimates",
        lambda p: bool(p.estimates),
        lambda p: "estimates= over all steps (neurode.regularizers.random_step estimates at one, under every strategy)",
    ),
    Feature("adams", lambda p: p.method.kind == "adams", lambda p: f"the multistep method {p.method.name!r}"),
    Feature("coupled", lambda p: p.method.kind == "reversible", lambda p: f"the coupling {p.method.name!r}"),
    Feature("symplectic", lambda p: p.method.kind == "symplectic", lambda p: f"the splitting method {p.method.name!r}"),
)
EVERYTHING = frozenset(feature.name for feature in FEATURES)


def asked_of(problem: Problem) -> list[Feature]:
    """The features that a problem has."""
    return [feature for feature in FEATURES if feature.present(problem)]


def refuse(strategy: Any, problem: Problem, others: Iterable[Any]) -> None:
    """Raise where a strategy does not differentiate all of a problem, naming those of `others` that do.

    Raises:
        GradientError: the problem has a feature that is not among `strategy.handles`.
    """
    asked = asked_of(problem)
    missing = [feature for feature in asked if feature.name not in strategy.handles]
    if not missing:
        return
    names = {feature.name for feature in asked}
    able = [f"gradient={other.name!r}" for other in others if names <= other.handles]
    what = " and ".join(feature.shown(problem) for feature in missing)
    raise GradientError(f"gradient={strategy.name!r} does not go through {what}. Type {' or '.join(able)}.")
