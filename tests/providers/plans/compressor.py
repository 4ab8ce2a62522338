"""The compressors: a program computes some of the tokens of a window, and some columns."""

from __future__ import annotations

from collections.abc import Iterator

from dsv4_backend_triton.arch import Arch
from dsv4_backend_triton.launch import Launch
from traffic import Arguments

from plans import once


def covered(call: Arguments, launches: list[Launch]) -> Iterator[bool]:
    for one in launches:
        yield once(one.grid[0], one.arguments["group"], len(call["positions"]))
        yield one.grid[1] * one.arguments["DIM"] == len(call["norm_weight"])
    yield launches[0].arguments["group"] <= call["ratio"]


def workspace(call: Arguments, arch: Arch) -> int:
    """The sums of a window that a token completes; none for short windows, nor for the indexer's."""
    return 4 * len(call["norm_weight"]) * len(call["positions"]) if call["ratio"] == 128 else 0
