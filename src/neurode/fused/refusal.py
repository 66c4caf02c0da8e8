"""What the fused engine says where it cannot serve."""

from __future__ import annotations


class CannotLower(Exception):
    """The vector field cannot become a tile program, or the native loops cannot solve the problem; the message says why."""


def in_brief(error: BaseException) -> str:
    """An error on one line: what it says first, and its class."""
    return f"{str(error).strip().split(chr(10))[0]} [{type(error).__name__}]"


class FieldRaises(CannotLower):
    """f itself raised while it was recorded; it may do so on any engine."""
