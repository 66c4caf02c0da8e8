"""Step size controllers: numbers only. What an error ratio means for the next step, for floats and for rows alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PID:
    """Proportional-integral-derivative control of the step size (Soderlind 2003).

    With error ratios r_n (accepted where r <= 1) and k the order of the error estimate plus one, an accepted step is
    followed by one larger by `safety r_n^(-b1/k) r_{n-1}^(b2/k) r_{n-2}^(-b3/k)`, where `b1 = p + i + d`,
    `b2 = p + 2 d`, `b3 = d`; a rejected one is repeated smaller by `safety r_n^(-1/k)`.

    Args:
        proportional, integral, derivative: the coefficients p, i, d.
        safety: factor below one; Hairer, Norsett & Wanner 1993, II.4, use 0.9.
        min_factor, max_factor: bounds of the change of the step; 0.2 and 10 as in DOPRI5 (same book, appendix).
        hold: do not let the step grow directly after a rejection (same book, II.4).
        shrink_accepted: whether an accepted step may be followed by a smaller one.
        retain: after a step that was cut short to hit a time, go on with the size from before the cut.
        stretch: a step that reaches this many times its length to a time to be hit takes it all; DOPRI5 leaves no rest
            of less than 1 % (`x + 1.01 h > xend`).

    References:
        G. Soderlind (2003), Digital filters in adaptive time-stepping, ACM TOMS 29(1), doi:10.1145/641876.641877.

    Example:
        >>> import neurode
        >>> neurode.solve(lambda t, y: -y, 1.0, (0, 1), controller=neurode.PID.i()).stats.num_rejected
        0
    """

    proportional: float = 0.0
    integral: float = 1.0
    derivative: float = 0.0
    safety: float = 0.9
    min_factor: float = 0.2
    max_factor: float = 10.0
    hold: bool = True
    shrink_accepted: bool = True
    retain: bool = True
    stretch: float = 1.01

    @classmethod
    def i(cls) -> PID:
        """The elementary controller (Hairer, Norsett & Wanner 1993, II.4, eq. 4.13)."""
        return cls(hold=False)

    @classmethod
    def pi(cls) -> PID:
        """The PI controller of DOPRI5, beta = 0.04 at k = 5, so p = 0.2, p + i = 0.85 (Hairer & Wanner 1996, IV.2)."""
        return cls(proportional=0.2, integral=0.65)

    @classmethod
    def pi34(cls) -> PID:
        """Gustafsson's PI.3.4, smoother steps where stability limits them (ACM TOMS 17(4), 1991)."""
        return cls(proportional=0.4, integral=0.3)

    @classmethod
    def h312(cls) -> PID:
        """H312PID, a low-pass filter of the error for noisy problems (Soderlind 2003, table 2)."""
        return cls(proportional=1 / 9, integral=1 / 18, derivative=1 / 18)

    @property
    def memory(self) -> int:
        """How many earlier error ratios enter."""
        return 2 if self.derivative else 1 if self.proportional else 0

    def grow(self, ratio: Any, history: tuple[Any, ...], k: float, held: Any) -> Any:
        """The factor after an accepted step.

        Args:
            ratio: its error ratio, a float or `(rows,)`.
            history: the ratios of the accepted steps before, the latest first, `memory` of them.
            k: order of the error estimate plus one.
            held: whether the attempt before was rejected.
        """
        p, i, d = self.proportional, self.integral, self.derivative
        factor = self.safety * power(_floor(ratio), -(p + i + d) / k)
        if history:
            factor = factor * power(history[0], (p + 2 * d) / k)
        if len(history) > 1:
            factor = factor * power(history[1], -d / k)
        low = self.min_factor if self.shrink_accepted else 1.0
        factor = _clip(factor, low, self.max_factor)
        return _hold(factor, held) if self.hold else factor

    def shrink(self, ratio: Any, k: float) -> Any:
        """The factor after a rejected step, whose ratio may be infinite."""
        return _clip(self.safety * power(_floor(ratio), -1.0 / k), self.min_factor, 1.0)

    def remember(self, ratio: Any, history: tuple[Any, ...]) -> tuple[Any, ...]:
        """The history with one more accepted ratio; at least 1e-4 each (Hairer's `facold`)."""
        floor = max(ratio, 1e-4) if isinstance(ratio, float) else ratio.clamp_min(1e-4)
        return (floor, *history)[: self.memory]


def power(x: Any, exponent: float) -> Any:
    """`x ** exponent` for a positive float or tensor, each element the same whatever lies beside it.

    `torch.pow` rounds the elements that fill a vector register otherwise than those left over, so that a row's steps
    would depend on its place in the batch; `exp` and `log` do not.
    """
    return torch.exp(exponent * torch.log(x)) if isinstance(x, Tensor) else x**exponent


def _floor(ratio: Any) -> Any:
    """A ratio that can be raised to a negative power."""
    return max(ratio, 1e-30) if isinstance(ratio, float) else ratio.clamp_min(1e-30)


def _clip(factor: Any, low: float, high: float) -> Any:
    return min(max(factor, low), high) if isinstance(factor, float) else factor.clamp(low, high)


def _hold(factor: Any, held: Any) -> Any:
    if isinstance(factor, Tensor):
        return torch.where(held, factor.clamp_max(1.0), factor)
    return min(factor, 1.0) if held else factor
