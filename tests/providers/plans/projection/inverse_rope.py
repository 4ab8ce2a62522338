"""``inverse_rope``: a program computes one head of some tokens."""

from __future__ import annotations

from collections.abc import Iterator

from dsv4_backend_triton.launch import Launch
from plans import once
from traffic import Arguments


def covered(call: Arguments, launches: list[Launch]) -> Iterator[bool]:
    (one,) = launches
    (t, h, _), grid, taken = call["x"].shape, one.grid, one.arguments
    yield from (grid[0] % h == 0, once(grid[0] // h, taken["ROWS"], t), taken["heads"] * call["groups"] == h)
