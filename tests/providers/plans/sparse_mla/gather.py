"""``gather_dequant_kv``: programs take one tile after another, as many as the lengths make."""

from __future__ import annotations

from collections.abc import Iterator

from dsv4_backend_triton.launch import Launch
from traffic import Arguments


def covered(call: Arguments, launches: list[Launch]) -> Iterator[bool]:
    (one,) = launches
    taken = one.arguments
    yield from (taken["requests"] == len(call["seq_lens"]), taken["rows"] <= call["out"].shape[1])
    yield 1 <= one.grid[0] <= taken["requests"] * -(-taken["rows"] // taken["ROWS"])
