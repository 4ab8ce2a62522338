"""How long calls are cut, and what is large enough to be cut."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

FEW_TOKENS = 8
"""Up to this many new tokens a call is bound by what the host does for each layer. It reads a packed cache's pages
themselves, and what its layers share is kept for them."""
FLAT_ROWS = 4096
"""Up to this many rows, the sequences of a batch share one call; beyond, each has its own and no query is copied."""
CHUNK_BYTES = 256 * 2**20
"""Size aimed at for the largest temporary that a step makes."""


def row_chunks(rows: int, bytes_per_row: int) -> Iterator[slice]:
    """Cut ``rows`` so that a chunk's temporary stays at ``CHUNK_BYTES``, or at one row if that is larger."""
    step = max(1, CHUNK_BYTES // max(1, bytes_per_row))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def cut(x: Tensor, *slices: slice) -> Tensor:
    """``x[slices]``, which costs nothing where it is all of x."""
    whole = all(part == slice(0, size) for part, size in zip(slices, x.shape, strict=False))
    return x if whole else x[slices]


def sequences_of(batch: int, length: int) -> list[slice]:
    """The sequences that share a call: all of them, or each its own."""
    if batch == 1 or length == 1 or batch * length <= FLAT_ROWS:
        return [slice(0, batch)]
    return [slice(b, b + 1) for b in range(batch)]
