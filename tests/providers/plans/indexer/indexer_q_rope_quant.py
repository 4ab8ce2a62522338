"""``indexer_q_rope_quant``: a program computes some heads of a token."""

from __future__ import annotations

from collections.abc import Iterator

from dsv4_backend_triton.launch import Launch
from plans import once
from traffic import Arguments


def covered(call: Arguments, launches: list[Launch]) -> Iterator[bool]:
    (one,) = launches
    grid, taken = one.grid, one.arguments
    yield from (grid == (len(call["q"]) * taken["tiles"],), once(taken["tiles"], taken["ROWS"], call["q"].shape[1]))
