"""How ``paged_mqa_logits`` divides its work: every program finds its share from the lengths, on the GPU.

An item is one request's rows, or ROWS of them; its index is ``group * B + request``. The row of an item is ``tiles``
tiles of columns, of which the first hold keys and the others are to be filled: two kinds of work. For either, the items
lie in a row of places, of which each program takes an equal number. An item has VISIT more places than it has tiles of
the kind, since fetching its queries takes about as long as VISIT tiles. So no program visits many items without tiles.

``lane`` is ``tl.arange(0, SCAN)``, and ``row`` is ``tl.arange(0, ROWS)``: in Gluon they have the caller's layouts.
``lengths`` is ``(lens_ptr, B, next_n, limit, len_stride_b, len_stride_n)``. Lengths are clamped to ``limit``.
"""

from __future__ import annotations

import triton
import triton.language as tl

FEW, MANY = 32, 256
"""SCAN: the number of requests whose lengths are read at a time. A scan of FEW stays within a warp."""
_NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def tiles_of(longest, BLOCK_N: tl.constexpr):
    """The number of tiles with keys of an item, by its longest row."""
    longest = tl.maximum(longest, 0)
    return longest // BLOCK_N + (longest % BLOCK_N > 0)


@triton.jit
def item_of(row, item, lengths, ROWS: tl.constexpr):
    """The request of an item, its first row, and the length of each of its rows."""
    lens_ptr, B, next_n, limit, len_stride_b, len_stride_n = lengths
    row0 = 0
    if next_n > ROWS:
        row0 = item // B * ROWS
        item = item % B
    b = item.to(tl.int64)
    row = tl.minimum(row0 + row, next_n - 1)
    return b, row0, tl.minimum(tl.load(lens_ptr + b * len_stride_b + row * len_stride_n), limit)


@triton.jit
def _ends(
    lane, block, seen, lengths, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, SCAN: tl.constexpr, VISIT: tl.constexpr
):  # fmt: skip
    """The ends of the places with keys of SCAN requests, after ``seen`` places of earlier items."""
    lens_ptr, B, next_n, limit, len_stride_b, len_stride_n = lengths
    a_group = (B + SCAN - 1) // SCAN
    row0 = block // a_group * ROWS
    b = block % a_group * SCAN + lane
    longest = lane * 0
    for i in tl.static_range(ROWS):
        row = tl.minimum(row0 + i, next_n - 1)
        ptr = lens_ptr + b.to(tl.int64) * len_stride_b + row * len_stride_n
        longest = tl.maximum(longest, tl.load(ptr, mask=b < B, other=0))
    tiles = tiles_of(tl.minimum(longest, limit), BLOCK_N)
    return seen + tl.cumsum(tl.where(b < B, tiles + VISIT, 0), axis=0)


@triton.jit
def count_places(lane, lengths, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, SCAN: tl.constexpr, VISIT: tl.constexpr):
    """The ends of the places with keys, of the first SCAN items and of all items."""
    _, B, next_n, _, _, _ = lengths
    blocks = (next_n + ROWS - 1) // ROWS * ((B + SCAN - 1) // SCAN)
    ends = _ends(lane, 0, 0, lengths, ROWS, BLOCK_N, SCAN, VISIT)
    total = tl.max(ends, axis=0)
    for block in range(1, blocks):
        total = tl.max(_ends(lane, block, total, lengths, ROWS, BLOCK_N, SCAN, VISIT), axis=0)
    return ends, total


@triton.jit
def _first(lane, ends, start, block, tiles, B, SCAN: tl.constexpr, VISIT: tl.constexpr, FILL: tl.constexpr):
    """Among a block of items, the index of the first one whose places go beyond ``start``, _NOWHERE if none does; and
    the end of the items before it."""
    a_group = (B + SCAN - 1) // SCAN
    b = block % a_group * SCAN + lane
    item = block // a_group * B + b
    if FILL:
        ends = (item + 1) * (tiles + 2 * VISIT) - ends
    first = tl.min(tl.where((b < B) & (ends > start), item, _NOWHERE), axis=0)
    return first, tl.max(tl.where((b < B) & (ends <= start), ends, 0), axis=0)


@triton.jit
def share(
    lane, ends, total, tiles, lengths,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, SCAN: tl.constexpr, VISIT: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """This program's share of the tiles with keys, or of those to FILL: its first item, the first place in it, and the
    number of places. ``ends`` and ``total`` are from ``count_places``. If no item has such a tile, there is no share.
    """
    _, B, next_n, _, _, _ = lengths
    groups = (next_n + ROWS - 1) // ROWS
    items = groups * B
    places = total
    if FILL:
        places = items * (tiles + 2 * VISIT) - total
    places = tl.where(places > items * VISIT, places, 0)
    # The last program's end is exact; in between, fp32 rounds for all programs alike.
    each = places.to(tl.float32) / tl.num_programs(0)
    program = tl.program_id(0)
    start = tl.minimum((program * each).to(tl.int32), places)
    stop = tl.minimum(((program + 1) * each).to(tl.int32), places)
    stop = tl.where(program + 1 == tl.num_programs(0), places, stop)
    item, before = _first(lane, ends, start, 0, tiles, B, SCAN, VISIT, FILL)
    blocks = groups * ((B + SCAN - 1) // SCAN)
    if blocks > 1:
        seen = tl.max(ends, axis=0)
        for block in range(1, blocks):
            ends = _ends(lane, block, seen, lengths, ROWS, BLOCK_N, SCAN, VISIT)
            item_here, before_here = _first(lane, ends, start, block, tiles, B, SCAN, VISIT, FILL)
            item = tl.minimum(item, item_here)
            before = tl.maximum(before, before_here)
            seen = tl.max(ends, axis=0)
    # The place is known before the item's length is read again: Triton 3.8 and 3.9 fetch no keys ahead in a loop whose
    # first tile follows from it.
    return item, start - before, stop - start


@triton.jit
def part(place, count, tiles, VISIT: tl.constexpr):
    """An item's part of the next ``count`` places: its first tile, one past its last tile, and the number of places
    that remain for the next items."""
    return tl.maximum(place - VISIT, 0), tl.minimum(place + count - VISIT, tiles), count - (tiles + VISIT - place)
