"""Integer arithmetic of launch sizes."""

from __future__ import annotations


def pow2(value: int, least: int = 1) -> int:
    """The least power of two that is at least ``value`` and ``least``."""
    return max(least, 1 << max(value - 1, 0).bit_length())


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
