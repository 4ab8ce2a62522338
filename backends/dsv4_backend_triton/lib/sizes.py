"""Integer arithmetic of launch sizes.

``triton.cdiv`` and ``triton.next_power_of_2`` take 2.5 us a call from Python, and launchers need some at every call.
"""

from __future__ import annotations


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def pow2(value: int, least: int = 1) -> int:
    """The least power of two that is at least ``value`` and ``least``."""
    return max(least, 1 << max(value - 1, 0).bit_length())


def common_unit(*sizes: int) -> int:
    """The largest of 16, 8 and 1 that divides all of them."""
    together = 0
    for size in sizes:
        together |= size
    return 16 if together % 16 == 0 else 8 if together % 8 == 0 else 1
