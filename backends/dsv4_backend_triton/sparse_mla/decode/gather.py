"""What the Gluon kernels of sparse MLA decode share: which keys a split has, how they are fetched and decoded."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ...lib.bits import BF16_TIMES_2_60TH, scaled_e4m3

UNBIAS = gl.constexpr(2.0**60)  # keys are kept times 2^-60, see cache_rows.py
_ASM, _CONSTRAINTS = map(gl.constexpr, scaled_e4m3(4, shared=True))


@gluon.jit
def place(index, block_heads, head_blocks, s_q):
    """The query row of a block, as a number and as (b, s), and its first head."""
    row = index // head_blocks
    b = row // s_q
    return row, b, row - b * s_q, (index - row * head_blocks) * block_heads


@gluon.jit
def columns(KEYS: gl.constexpr, WARPS: gl.constexpr):
    """The keys of a tile, and the words of a nope group and of the rope part, laid out over the threads.

    A thread has 16 bytes of each 64-byte group of one row. 4 lanes share a row, so that the stores of the decoded keys
    (32 bytes a thread) have no bank conflicts.
    """
    lay: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [WARPS, 1], [1, 0])
    lay_r: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [WARPS, 1], [1, 0])
    keys, cols = gl.arange(0, KEYS, gl.SliceLayout(1, lay)), gl.arange(0, 16, gl.SliceLayout(0, lay))
    return keys, cols, gl.arange(0, 32, gl.SliceLayout(0, lay_r))


@gluon.jit
def _tile_of(i, share):
    """The i-th tile of a split: whether it is in the first scope, and its number there."""
    here1, split, first2, splits, _, _ = share
    one = i < here1
    return one, gl.where(one, split + i * splits, first2 + (i - here1) * splits)


@gluon.jit
def schedule(at, lengths, KEYS: gl.constexpr, SINGLE: gl.constexpr):
    """This split's tiles, and their number: tiles go round robin, those of the second scope after those of the first.

    A split's begin depends on the widths only, so that its first indices do not wait for the lengths. Its end depends
    on the second scope's length too.
    """
    b, split, splits = at
    len1, len2, has_len1, has_len2, topk1, topk2 = lengths
    length1 = gl.minimum(gl.maximum(gl.load(len1 + b, mask=has_len1 != 0, other=topk1), 0), topk1)
    length2 = gl.minimum(gl.maximum(gl.load(len2 + b, mask=has_len2 != 0, other=topk2), 0), topk2)
    tiles1 = (topk1 + KEYS - 1) // KEYS
    first2 = (split - tiles1 % splits + splits) % splits
    here1 = (gl.maximum(tiles1 - split, 0) + splits - 1) // splits
    if SINGLE:  # a split for every tile of the widths
        tiles2 = (topk2 + KEYS - 1) // KEYS
    else:
        tiles2 = (length2 + KEYS - 1) // KEYS
    here = here1 + (gl.maximum(tiles2 - first2, 0) + splits - 1) // splits
    return (here1, split, first2, splits, length1, length2), here


@gluon.jit
def index_of(i, keys, share, indices, lengths, KEYS: gl.constexpr):
    """The indices of some keys of a tile of ``KEYS``, -1 beyond the width."""
    idx1, idx2 = indices
    _, _, _, _, topk1, topk2 = lengths
    one, tile = _tile_of(i, share)
    k = tile * KEYS + keys
    return gl.load(gl.where(one, idx1, idx2) + k, mask=k < gl.where(one, topk1, topk2), other=-1)


@gluon.jit
def find(i, index, keys, share, scopes, KEYS: gl.constexpr):
    """The address of each row of some keys of a tile (its first word), whether the row is valid, and its scale
    word."""
    _, _, _, _, length1, length2 = share
    cache1, cache2, slots1, slots2, stride1, stride2, page1, page2, shift1, shift2 = scopes
    one, tile = _tile_of(i, share)
    page_size = gl.where(one, page1, page2)
    ok = (index >= 0) & (index < gl.where(one, slots1, slots2))
    ok = ok & (tile * KEYS + keys < gl.where(one, length1, length2))
    safe = gl.where(ok, index, 0)
    page = safe >> gl.where(one, shift1, shift2)
    slot = safe & (page_size - 1)
    block = gl.where(one, cache1, cache2) + page.to(gl.int64) * (gl.where(one, stride1, stride2) * 4)
    start = block + slot * 144
    scale = (block + page_size * 144 + slot * 2).to(gl.pointer_type(gl.int64))
    word = gl.load(scale, mask=ok, other=0)
    return start, ok, word


@gluon.jit
def load_rope(start, ok, cols_r):
    """Issue the loads of the rope part of each row."""
    offset = (cols_r + 112)[None, :]
    rows_r: gl.constexpr = gl.SliceLayout(1, offset.type.layout)
    start_r, ok_r = gl.convert_layout(start, rows_r), gl.convert_layout(ok, rows_r)
    return gl.load(start_r[:, None] + offset, mask=ok_r[:, None], other=0)


@gluon.jit
def load_groups(start, ok, cols, FIRST: gl.constexpr, END: gl.constexpr):
    """Issue the loads of some nope groups of each row."""
    row = start[:, None] + cols[None, :]
    groups = ()
    for group in gl.static_range(FIRST, END):
        groups += (gl.load(row + 16 * group, mask=ok[:, None], other=0),)  # type: ignore[assignment]
    return groups


@gluon.jit
def load_front(start, ok, cols):
    """Issue the loads of the first four nope groups of each row."""
    return load_groups(start, ok, cols, 0, 4)


@gluon.jit
def load_back(start, ok, cols, cols_r):
    """Issue the loads of the other three, and of the rope part."""
    return load_groups(start, ok, cols, 4, 7), load_rope(start, ok, cols_r)


@gluon.jit
def _decode_group(raw, word, g: gl.constexpr):
    """A nope group of each row, decoded: words of two bf16."""
    code = ((word >> (8 * g)) & 0xFF).to(gl.int32)
    bits = gl.where(code == 255, 0x7FC0, gl.minimum(code + 60, 254) << 7)
    factor, _ = gl.broadcast((bits * 0x10001)[:, None], raw)
    low, high = gl.inline_asm_elementwise(
        _ASM, _CONSTRAINTS, [raw, factor], dtype=(gl.int32, gl.int32), is_pure=True, pack=4
    )
    return gl.reshape(gl.join(low, high), [raw.shape[0], 2 * raw.shape[1]])


@gluon.jit
def beside(left, right):
    """[N, D] and [N, D] to [N, 2 D]; no data moves between threads."""
    return gl.reshape(gl.permute(gl.join(left, right), (0, 2, 1)), [left.shape[0], 2 * left.shape[1]])


@gluon.jit
def decode_tail(group, rope, word):
    """The last nope group and the rope part of each row, beside each other."""
    tail = gl.inline_asm_elementwise(BF16_TIMES_2_60TH, "=r,r", [rope], dtype=gl.int32, is_pure=True, pack=1)
    return beside(gl.convert_layout(_decode_group(group, word, 6), rope.type.layout), tail)


@gluon.jit
def decode_pair(raw, word, g: gl.constexpr):
    """Two nope groups of each row, beside each other."""
    return beside(_decode_group(raw[g], word, g), _decode_group(raw[g + 1], word, g + 1))


@gluon.jit
def deposit(keys32, bias, front, back, word, ok):
    """Decode a tile into a key buffer (seen as 32-bit words), and its mask beside it."""
    back, rope = back
    groups = front + back
    bias.store(gl.where(ok, 0.0, float("-inf")))
    for i in gl.static_range(3):
        keys32.slice(64 * i, 64, 1).store(decode_pair(groups, word, 2 * i))
    keys32.slice(192, 64, 1).store(decode_tail(groups[6], rope, word))
