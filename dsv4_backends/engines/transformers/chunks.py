"""Cuts long calls into chunks."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

FEW_TOKENS = 8
"""Up to this many new tokens a call is bound by the host's work for each layer. It reads a packed cache's pages
directly, and computes what its layers share once."""
FLAT_ROWS = 4096
"""Up to this many rows the sequences of a batch share one call. Beyond, each has a call, and no query is copied."""
CHUNK_BYTES = 256 * 2**20
"""Target size of the largest temporary of a chunk."""


def row_chunks(rows: int, bytes_per_row: int) -> Iterator[slice]:
    """Cut ``rows`` into chunks whose temporary has at most ``CHUNK_BYTES``; a chunk has at least one row."""
    step = max(1, CHUNK_BYTES // max(1, bytes_per_row))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def cut(x: Tensor, *slices: slice) -> Tensor:
    """``x[slices]``; x itself if the slices cover all of it, which launches nothing."""
    whole = all(part == slice(0, size) for part, size in zip(slices, x.shape, strict=False))
    return x if whole else x[slices]


def sequences_of(batch: int, length: int) -> list[slice]:
    """The sequences of each call: all in one call, or one sequence a call."""
    if batch == 1 or length == 1 or batch * length <= FLAT_ROWS:
        return [slice(0, batch)]
    return [slice(b, b + 1) for b in range(batch)]
