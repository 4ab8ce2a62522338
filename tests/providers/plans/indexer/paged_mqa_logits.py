"""``paged_mqa_logits``: programs share the work by the lengths. The tests of the schedule are in triton_suite.py."""

from __future__ import annotations

from collections.abc import Iterator

from dsv4_backend_triton.launch import Launch
from plans import variant_of
from traffic import Arguments, paged

from dsv4_backends.contract.models import FLASH


def covered(call: Arguments, launches: list[Launch]) -> Iterator[bool]:
    (one,) = launches
    grid, taken = one.grid, one.arguments
    yield from (len(grid) == 1, grid[0] >= 1, taken["max_len"] == call["max_context_len"])
    yield (taken["B"], taken["next_n"]) == tuple(call["q"].shape[:2])
    if variant_of(one) == "wgmma":  # whose last tile may end behind the columns
        yield taken["max_len"] + 64 * 4 < 2**31
        # Keys are read once for up to four rows, and as few rows as possible are empty.
        groups = -(-taken["next_n"] // 4)
        yield taken["ROWS"] == -(-taken["next_n"] // groups)


def more_calls() -> Iterator[Arguments]:
    yield from (paged(FLASH.rank(1), 3, next_n, 2000) for next_n in (2, 3, 5, 7))
    yield paged(FLASH.rank(1), 3, 2, 2**31 - 1)
