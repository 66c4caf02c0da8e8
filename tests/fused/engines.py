"""The two engines, for tests."""

from __future__ import annotations

from typing import Any

import neurode


def fused(*args: Any, **kwargs: Any) -> Any:
    """`neurode.solve` on the fused engine."""
    return neurode.solve(*args, engine="fused", **kwargs)


def eager(*args: Any, **kwargs: Any) -> Any:
    """`neurode.solve` on the eager engine."""
    return neurode.solve(*args, gradient="autograd", engine="eager", **kwargs)
