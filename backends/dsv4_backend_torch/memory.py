"""How much a reference may use beyond its inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterator

CHUNK_BYTES = 64 * 2**20
"""Size aimed at for the largest temporary of a step. A step holds at most five of that size, and
while products are in fp64 six more, so 1 GiB is never met."""


def row_chunks(rows: int, bytes_per_row: int) -> Iterator[slice]:
    """Cut ``rows`` so that a chunk's largest temporary stays at ``CHUNK_BYTES``, or at one row if that is larger."""
    step = max(1, CHUNK_BYTES // max(1, bytes_per_row))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
