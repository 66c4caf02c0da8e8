"""What the fused engine says where it cannot serve."""

from __future__ import annotations


class CannotLower(Exception):
    """The vector field cannot become a tile program, or the native loops cannot solve the problem; the message says why."""


class FieldRaises(CannotLower):
    """f itself raised while it was recorded; it may do so on any engine."""
