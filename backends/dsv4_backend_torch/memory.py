"""The memory of a reference beyond its inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterator

CHUNK_BYTES = 64 * 2**20
"""Target size of the largest temporary of a chunk. A chunk has at most five of that size, and six more while products
are in fp64, so less than 1 GiB in all."""


def row_chunks(rows: int, bytes_per_row: int) -> Iterator[slice]:
    """Cut ``rows`` into chunks whose largest temporary has at most ``CHUNK_BYTES``; a chunk has at least one row."""
    step = max(1, CHUNK_BYTES // max(1, bytes_per_row))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
