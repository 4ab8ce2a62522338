"""Sparse MLA decode: a call as its kernels take it, and the number of splits of a row's keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from ...arch import Arch
from ...lib.sizes import cdiv

MOST_SPLITS = 40  # limited by the registers of the kernel that combines them
_INVARIANT_ROWS = 16  # the number of rows that the batch-invariant mode is planned for

# For the split kernels, which have the same parameters. The staging kernel has some of them.
ANY_ALIGNMENT = ["sink", "idx1", "len1", "idx2", "len2", "lse"]


class Shape(NamedTuple):
    """All that a plan depends on.

    Attributes:
        rows: b * s_q.
        topk1, topk2: Widths of the two scopes' indices.
        vectors: Whether cache pages, queries and output can be read 16 bytes at a time and page sizes are powers of 2.
        unaligned: Whether cache pages are not all on 8-byte boundaries.
        lengths2: Whether lengths of the second scope are given. Without them all rows have as many tiles.
        page2: Keys of a page of the second scope; the first one's if there is no second.
    """

    arch: Arch
    rows: int
    heads: int
    topk1: int
    topk2: int
    vectors: bool
    unaligned: bool
    batch_invariant: bool
    lengths2: bool
    page2: int

    @property
    def planned_rows(self) -> int:
        """The number of rows to plan for: ``rows``, or a fixed number in the batch-invariant mode."""
        return _INVARIANT_ROWS if self.batch_invariant else self.rows

    def tiles(self, keys: int) -> int:
        """The number of tiles of so many keys in a row."""
        return max(cdiv(self.topk1, keys) + cdiv(self.topk2, keys), 1)


class Tile(NamedTuple):
    """The tile of one program.

    ``keys`` must be 32 or more. With 16 keys the portable kernel gave wrong results on the H200 (Triton 3.6): the
    logits were right, the product with the values was not. Its operands get kWidth 8, as for the byte loads that they
    come from, while the K dimension is 16.

    Attributes:
        resident: How many programs a multiprocessor's registers hold at once.
        kib: The shared memory of one program.
    """

    heads: int
    keys: int
    warps: int
    resident: int = 1
    kib: int = 0


class Plan(NamedTuple):
    """A launch of a split kernel: its tile, and the number of splits of a row's keys.

    Attributes:
        even: If rows have different numbers of splits, that of every row if all are equally long; ``splits`` is then
            the most.
    """

    tile: Tile
    splits: int
    single: bool = False  # every split is exactly one tile
    block_heads: int = 64  # heads of one program, if fewer than the tile is high: more programs
    even: int = 0


class Scopes(NamedTuple):
    """Both scopes of a call as the kernels take them. If the call has one scope, the second one has no indices."""

    cache1: Tensor
    cache2: Tensor
    idx1: Tensor
    idx2: Tensor
    len1: Tensor
    len2: Tensor
    has_len1: int
    has_len2: int
    strides: tuple[int, int, int, int]  # of the indices
    topk1: int
    topk2: int
    unit: int  # bytes that divide every page's address: 16, 8 or 1
    pow2: bool  # both page sizes are powers of two

    @property
    def pages(self) -> Iterator[int]:
        """slots, page strides (in units), page sizes and their logarithms, each of both scopes."""
        caches = (self.cache1, self.cache2)
        pages = [cache.shape[1] for cache in caches]
        yield from (min(cache.shape[0] * cache.shape[1], 2**31 - 1) for cache in caches)
        yield from (cache.stride(0) // self.unit for cache in caches)
        yield from pages
        yield from (page.bit_length() - 1 for page in pages)


class Call(NamedTuple):
    """A call with its results allocated. ``q_unit``: strides of ``q`` and ``out`` are passed in this unit, 8 or 1."""

    shape: Shape
    q: Tensor
    scopes: Scopes
    sm_scale: float
    sink: Tensor | None
    out: Tensor
    lse: Tensor
    q_unit: int


def splits_for(programs: int, tiles: int, sms: int, resident: int = 1) -> int:
    """The split count with the least expected time.

    The unit is the time of one tile. A wave takes the tiles of its longest program, half as many again for each other
    program on the same multiprocessor (at most ``resident`` share one), and 2 to start and finish a program. Writing
    and reading a program's partial result takes 0.0102. The numbers are fitted to sweeps on the H200 (2026-11-27),
    where the choice is within 3 % of the best.
    """
    best, least = 1, float("inf")
    for splits in range(1, min(tiles, MOST_SPLITS) + 1):
        sharing = min(cdiv(programs * splits, sms), resident)
        waves = cdiv(programs * splits, sms * sharing)
        cost = waves * ((1 + 0.5 * (sharing - 1)) * (tiles / splits + cdiv(tiles, splits)) / 2 + 2)
        cost += 0.0102 * programs * splits if splits > 1 else 0.0
        if cost < least - 1e-9:
            best, least = splits, cost
    return best
