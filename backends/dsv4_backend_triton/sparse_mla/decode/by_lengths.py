"""Sparse MLA decode by the lengths of a batch: how many splits a row takes.

Where all programs run at once, those of the longest row take as long as all. So each row takes ``even`` splits at most,
and fewer if its share of the batch's tiles is smaller, but a row of more than 1.5 times the mean length takes more. If
all rows are equally long, each takes ``even``. A row takes at most ``splits``, of which each has a program; those that
it does not take return at once. A row of one split needs no combining.

Tiles go round robin over the splits of a row. With an ``even`` of 1, the second split begins only when some other row
is done; it has the last two fifths of the tiles.

Every program counts the tiles of the batch for itself, on the GPU. ``lane`` is ``tl.arange(0, MOST_ROWS)``: in Gluon it
has a layout in which every warp holds all lanes, so that the sum stays within a warp. ``lengths`` is
``(len1, len2, has_len1, has_len2, topk1, topk2)``, and ``counts`` is ``(batch, even, splits)``.
"""

from __future__ import annotations

import triton
import triton.language as tl

MOST_ROWS = tl.constexpr(128)
"""Rows of a batch that are counted."""
OVER = 2
"""Splits that a row can take, in units of ``even``. The kernel that combines them is written for 2."""


@triton.jit
def lengths_of(b, ok, lengths):
    """The lengths of rows in both scopes."""
    len1, len2, has_len1, has_len2, topk1, topk2 = lengths
    length1 = tl.load(len1 + b, mask=(has_len1 != 0) & ok, other=topk1)
    return length1, tl.load(len2 + b, mask=(has_len2 != 0) & ok, other=topk2)


@triton.jit
def tiles_of(length1, length2, lengths, KEYS: tl.constexpr):
    """The tiles of rows. The second scope's begin after those of the first scope's width. If the second scope has no
    keys, the first one ends at its length."""
    _, _, _, _, topk1, topk2 = lengths
    tiles1 = (tl.minimum(tl.maximum(length1, 0), topk1) + KEYS - 1) // KEYS
    tiles2 = (tl.minimum(tl.maximum(length2, 0), topk2) + KEYS - 1) // KEYS
    return tl.where(tiles2 > 0, (topk1 + KEYS - 1) // KEYS + tiles2, tiles1)


@triton.jit
def splits_of(tiles, lane, length1, length2, lengths, counts, KEYS: tl.constexpr):
    """The splits of a row of ``tiles`` tiles, from the lengths of all rows."""
    batch, even, splits = counts
    total = tl.sum(tl.where(lane < batch, tiles_of(length1, length2, lengths, KEYS), 0), 0)
    total = tl.maximum(total, 1)
    share = tiles * (even * batch)
    taken = tl.minimum((share + total - 1) // total, even)
    return tl.minimum(tl.maximum(tl.maximum(taken, (2 * share + 3 * total - 1) // (3 * total)), 1), splits)


@triton.jit
def part_of(split, even, splits, tiles):
    """A split's first tile, the step to the next one, and the number of its tiles. A split that the row does not take
    has none."""
    start, step, here = split, splits, (tl.maximum(tiles - split, 0) + splits - 1) // splits
    if even == 1:
        first = tl.where(splits > 1, (3 * tiles + 4) // 5, tiles)
        start, step, here = split * first, 1, tl.where(split == 0, first, tiles - first)
    return start, step, tl.where(split < splits, here, 0)
