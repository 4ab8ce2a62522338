"""The split kernel of sparse MLA decode for Hopper (sm_90a), written in Gluon.

The same work split, tile order and partial results as the portable kernel in decode.py, which launches this
one in its place and combines after it. One CTA serves one query row, 64 heads and one split, in two roles:

* a *loader* warpgroup (two where a split is a single tile) gathers the FP8 rows of the next tile into registers while
  the last one is being consumed, decodes them to bf16 and writes them into a ring of two 64 x 512 key buffers;
* two *consumer* warpgroups share S = Q K^T (32 keys each), the softmax, and O += P V (256 columns each).

Decoding and tensor work run side by side, and get in each other's way: on the H200 (128 queries of 128 heads) either
role alone would take about 0.7 of what both take. Asking for the rows ahead of their gather (prefetch to L2) made
it slower.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ._gluon import async_load, barrier, block_index, launch_dependents

# Triton 3.9 renamed it.
_PRIVATE_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "_reinterpret"))

# Loader warps and their registers, by whether a split is a single tile, which is latency alone: of 4 x 128, 8 x 72,
# 8 x 80, 8 x 88 and 8 x 96 the fastest on the H200, and without spills with Triton 3.6 and 3.9 (2026-11-27).
LOADERS = {True: (8, 80), False: (4, 128)}

_NEGATIVE = gl.constexpr(-1.0e30)  # a running maximum before the first key: finite, so that -inf - -inf cannot arise
_LN2 = gl.constexpr(0.6931471805599453)
_LOG2E = gl.constexpr(1.4426950408889634)
_UNBIAS = gl.constexpr(2.0**60)  # keys are kept times 2^-60, see decode.py
_HEADS = gl.constexpr(64)
_KEYS = gl.constexpr(64)
_RING = gl.constexpr(2)


def _decode_asm() -> str:
    """Four words of e4m3 bytes, and their factors, to eight words of bf16 pairs; decode.py explains the
    steps.
    """
    lines = ["{", ".reg .b32 n, t, z;", ".reg .pred p;"]
    for i in range(4):
        lines += [f"and.b32 t, ${8 + i}, 0x7f7f7f7f;", "add.u32 t, t, 0x01010101;"]
        lines.append("mov.b32 n, t;" if i == 0 else "or.b32 n, n, t;")
    lines += ["and.b32 n, n, 0x80808080;", "setp.ne.u32 p, n, 0;", "selp.b32 z, 0x7fc07fc0, 0x80008000, p;"]
    for i in range(4):
        for half, selector in ((0, "0x9180"), (1, "0xb3a2")):
            lines += [
                f"prmt.b32 t, ${8 + i}, 0, {selector};",
                "shl.b32 t, t, 4;",
                "and.b32 t, t, 0x87f087f0;",
            ]
            lines.append(f"fma.rn.bf16x2 ${4 * half + i}, t, ${12 + i}, z;")
    return "\n".join([*lines, "}"])


_ASM = gl.constexpr(_decode_asm())
_CONSTRAINTS = gl.constexpr(",".join(["=&r"] * 8 + ["r"] * 8))
_ASM_ROPE = gl.constexpr(
    "{ .reg .b32 f, z; mov.b32 f, 0x21802180; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, f, z; }"
)


@gluon.jit
def _place(index, block_heads, head_blocks, s_q):
    """The query row of a block, as a number and as (b, s), and its first head."""
    row = index // head_blocks
    b = row // s_q
    return row, b, row - b * s_q, (index - row * head_blocks) * block_heads


@gluon.jit
def _tile(i, here1, split, first2, splits):
    """The i-th tile of a split: whether it is of the first scope, and its number there."""
    one = i < here1
    return one, gl.where(one, split + i * splits, first2 + (i - here1) * splits)


@gluon.jit
def _schedule(b, split, splits, len1, len2, has_len1, has_len2, topk1, topk2, SINGLE: gl.constexpr):
    """Lengths, the widths that the tiles are dealt out by, and this split's share of the tiles."""
    length1 = gl.minimum(gl.maximum(gl.load(len1 + b, mask=has_len1 != 0, other=topk1), 0), topk1)
    length2 = gl.minimum(gl.maximum(gl.load(len2 + b, mask=has_len2 != 0, other=topk2), 0), topk2)
    if SINGLE:
        # a split for every tile of the widths: which tile is whose does not wait for the lengths
        width1, width2 = topk1, topk2
    else:
        width1, width2 = length1, length2
    tiles1, tiles2 = (width1 + _KEYS - 1) // _KEYS, (width2 + _KEYS - 1) // _KEYS
    first2 = (split - tiles1 % splits + splits) % splits
    here1 = (gl.maximum(tiles1 - split, 0) + splits - 1) // splits
    here = here1 + (gl.maximum(tiles2 - first2, 0) + splits - 1) // splits
    return length1, length2, width1, width2, first2, here1, here


@gluon.jit
def _index(i, keys, here1, split, first2, splits, idx1, idx2, width1, width2):
    """The indices of a tile, -1 beyond the width."""
    one, tile = _tile(i, here1, split, first2, splits)
    k = tile * _KEYS + keys
    return gl.load(gl.where(one, idx1, idx2) + k, mask=k < gl.where(one, width1, width2), other=-1)


@gluon.jit
def _fetch(
    i,
    index,
    keys,
    cols,
    cols_r,
    rows_r: gl.constexpr,
    share,
    scopes,
):
    """Issue the loads of a tile: the seven nope groups, the rope part and the scale word of each row."""
    here1, split, first2, splits, length1, length2 = share
    cache1, cache2, slots1, slots2, stride1, stride2, page1, page2, shift1, shift2 = scopes
    one, tile = _tile(i, here1, split, first2, splits)
    page_size = gl.where(one, page1, page2)
    ok = (index >= 0) & (index < gl.where(one, slots1, slots2))
    ok = ok & (tile * _KEYS + keys < gl.where(one, length1, length2))
    safe = gl.where(ok, index, 0)
    page = safe >> gl.where(one, shift1, shift2)
    slot = safe & (page_size - 1)
    block = gl.where(one, cache1, cache2) + page.to(gl.int64) * (gl.where(one, stride1, stride2) * 4)
    start = block + slot * 144
    row = start[:, None] + cols[None, :]
    okc = ok[:, None]
    scale = (block + page_size * 144 + slot * 2).to(gl.pointer_type(gl.int64))
    word = gl.load(scale, mask=ok, other=0)
    r0 = gl.load(row, mask=okc, other=0)
    r1 = gl.load(row + 16, mask=okc, other=0)
    r2 = gl.load(row + 32, mask=okc, other=0)
    r3 = gl.load(row + 48, mask=okc, other=0)
    r4 = gl.load(row + 64, mask=okc, other=0)
    r5 = gl.load(row + 80, mask=okc, other=0)
    r6 = gl.load(row + 96, mask=okc, other=0)
    start_r = gl.convert_layout(start, rows_r)
    ok_r = gl.convert_layout(ok, rows_r)
    rope = gl.load(start_r[:, None] + (cols_r + 112)[None, :], mask=ok_r[:, None], other=0)
    return r0, r1, r2, r3, r4, r5, r6, rope, word, ok


@gluon.jit
def _decode_group(raw, word, g: gl.constexpr):
    code = ((word >> (8 * g)) & 0xFF).to(gl.int32)
    bits = gl.where(code == 255, 0x7FC0, gl.minimum(code + 60, 254) << 7)
    factor, _ = gl.broadcast((bits * 0x10001)[:, None], raw)
    low, high = gl.inline_asm_elementwise(
        _ASM, _CONSTRAINTS, [raw, factor], dtype=(gl.int32, gl.int32), is_pure=True, pack=4
    )
    return gl.reshape(gl.join(low, high), [raw.shape[0], 2 * raw.shape[1]])


@gluon.jit
def _beside(left, right):
    """[N, D] and [N, D] to [N, 2 D]; moves nothing between threads."""
    return gl.reshape(gl.permute(gl.join(left, right), (0, 2, 1)), [left.shape[0], 2 * left.shape[1]])


@gluon.jit
def _deposit(keys32, bias, lay_r: gl.constexpr, r0, r1, r2, r3, r4, r5, r6, rope, word, ok):
    """Decode a tile into a key buffer (seen as 32-bit words), and its mask beside it."""
    bias.store(gl.where(ok, 0.0, float("-inf")))
    keys32.slice(0, 64, 1).store(_beside(_decode_group(r0, word, 0), _decode_group(r1, word, 1)))
    keys32.slice(64, 64, 1).store(_beside(_decode_group(r2, word, 2), _decode_group(r3, word, 3)))
    keys32.slice(128, 64, 1).store(_beside(_decode_group(r4, word, 4), _decode_group(r5, word, 5)))
    tail = gl.inline_asm_elementwise(_ASM_ROPE, "=r,r", [rope], dtype=gl.int32, is_pure=True, pack=1)
    keys32.slice(192, 64, 1).store(_beside(gl.convert_layout(_decode_group(r6, word, 6), lay_r), tail))


@gluon.jit
def _loader(
    k32,
    b_smem,
    k_full,
    k_empty,
    b,
    split,
    splits,
    idx1,
    idx2,
    len1,
    len2,
    has_len1,
    has_len2,
    topk1,
    topk2,
    cache1,
    cache2,
    slots1,
    slots2,
    stride1,
    stride2,
    page1,
    page2,
    shift1,
    shift2,
    SINGLE: gl.constexpr,
    WARPS: gl.constexpr,
):
    # A thread has 16 bytes of each 64-byte group of one row: 4 lanes a row, so that the stores of the decoded
    # keys (32 bytes a thread) meet no bank twice.
    lay: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [WARPS, 1], [1, 0])
    lay_r: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [WARPS, 1], [1, 0])
    rows_r: gl.constexpr = gl.SliceLayout(1, lay_r)
    keys = gl.arange(0, _KEYS, gl.SliceLayout(1, lay))
    cols = gl.arange(0, 16, gl.SliceLayout(0, lay))
    cols_r = gl.arange(0, 32, gl.SliceLayout(0, lay_r))
    length1, length2, width1, width2, first2, here1, here = _schedule(
        b, split, splits, len1, len2, has_len1, has_len2, topk1, topk2, SINGLE
    )
    share = here1, split, first2, splits, length1, length2
    scopes = cache1, cache2, slots1, slots2, stride1, stride2, page1, page2, shift1, shift2
    index = _index(0, keys, here1, split, first2, splits, idx1, idx2, width1, width2)
    r0, r1, r2, r3, r4, r5, r6, rope, word, ok = _fetch(0, index, keys, cols, cols_r, rows_r, share, scopes)
    if SINGLE:
        _deposit(k32.index(0), b_smem.index(0), lay_r, r0, r1, r2, r3, r4, r5, r6, rope, word, ok)
        fence_async_shared()
        barrier()
        mbarrier.arrive(k_full.index(0), count=1)
    else:
        slot = 0
        phase = 0
        index = _index(1, keys, here1, split, first2, splits, idx1, idx2, width1, width2)
        for i in range(here):
            mbarrier.wait(k_empty.index(slot), phase ^ 1)
            _deposit(k32.index(slot), b_smem.index(slot), lay_r, r0, r1, r2, r3, r4, r5, r6, rope, word, ok)
            # Before the next loads are issued: the fence would wait for them.
            fence_async_shared()
            barrier()
            mbarrier.arrive(k_full.index(slot), count=1)
            r0, r1, r2, r3, r4, r5, r6, rope, word, ok = _fetch(i + 1, index, keys, cols, cols_r, rows_r, share, scopes)
            index = _index(i + 2, keys, here1, split, first2, splits, idx1, idx2, width1, width2)
            slot ^= 1
            phase = gl.where(slot == 0, phase ^ 1, phase)


@gluon.jit
def _partial_sums(weight, like):
    """Of each head 16 sums, each of what one thread has."""
    return gl.convert_layout(
        gl.reshape(gl.sum(gl.reshape(weight, [_HEADS, 2, 4, 8]), 2), [_HEADS, 16]), like.type.layout
    )


@gluon.jit
def _attend(queries, keys, bias, p_smem, acc, peak, sums, scale_log2, s_mma: gl.constexpr, FIRST: gl.constexpr):
    """One tile of keys into the running (accumulator, maximum, partial sums) of an online softmax in base 2."""
    zero = gl.zeros([_HEADS, _KEYS], gl.float32, s_mma)
    token = warpgroup_mma(queries, keys.permute((1, 0)), zero, use_acc=False, is_async=True)
    bias = bias.load(gl.SliceLayout(0, s_mma))
    logits = warpgroup_mma_wait(0, deps=(token,))
    logits = logits * scale_log2 + bias[None, :]
    new_peak = gl.maximum(peak, gl.max(logits, 1))
    weight = gl.exp2(logits - new_peak[:, None])
    p_smem.store(weight.to(gl.bfloat16))
    fence_async_shared()
    barrier()
    if FIRST:
        token = warpgroup_mma(p_smem, keys, acc, use_acc=False, is_async=True)
        sums = _partial_sums(weight, sums)
    else:
        alpha = gl.exp2(peak - new_peak)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
        token = warpgroup_mma(p_smem, keys, acc, is_async=True)
        alpha = gl.convert_layout(alpha, gl.SliceLayout(1, sums.type.layout))
        sums = sums * alpha[:, None] + _partial_sums(weight, sums)
    return warpgroup_mma_wait(0, deps=(token,)), new_peak, sums


@gluon.jit
def _consumer(
    q,
    q_sh,
    out,
    o_sb,
    o_ss,
    o_sh,
    lse,
    part,
    part_lse,
    sink,
    q_smem,
    k_smem,
    b_smem,
    p_smem,
    k_full,
    k_empty,
    b,
    heads,
    block_heads,
    head_blocks,
    s_q,
    head0,
    split,
    splits,
    len1,
    len2,
    has_len1,
    has_len2,
    topk1,
    topk2,
    has_sink,
    scale_log2,
    SPLIT: gl.constexpr,
    SINGLE: gl.constexpr,
):
    s_mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, 32, 16])
    o_mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, 128, 16])
    s_rows: gl.constexpr = gl.SliceLayout(1, s_mma)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_mma)
    q_lay: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])

    h = head0 + gl.arange(0, _HEADS, gl.SliceLayout(1, q_lay))
    cols = gl.arange(0, 512, gl.SliceLayout(0, q_lay))
    q_row = q + h.to(gl.int64) * (q_sh * 8)
    heads_end = gl.minimum(heads, head0 + block_heads)
    async_load(q_smem.index(0), q_row[:, None] + cols[None, :], mask=(h < heads_end)[:, None])
    async_copy.commit_group()
    _, _, _, _, _, _, here = _schedule(b, split, splits, len1, len2, has_len1, has_len2, topk1, topk2, SINGLE)
    async_copy.wait_group(0)
    fence_async_shared()
    barrier()

    peak = gl.full([_HEADS], _NEGATIVE, gl.float32, s_rows)
    # the running sum of the weights as 16 partial sums a head, so that in the loop a thread adds only its own
    # registers
    sum_lay: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [8, 0]],
        lane_bases=[[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0], [0, 8]],
        block_bases=[],
        shape=[64, 16],
    )
    sums = gl.zeros([_HEADS, 16], gl.float32, sum_lay)
    acc = gl.zeros([_HEADS, 512], gl.float32, o_mma)
    if SINGLE:
        mbarrier.wait(k_full.index(0), 0)
        acc, peak, sums = _attend(
            q_smem.index(0), k_smem.index(0), b_smem.index(0), p_smem, acc, peak, sums, scale_log2, s_mma, True
        )
    else:
        slot = 0
        phase = 0
        for _ in range(here):
            mbarrier.wait(k_full.index(slot), phase)
            if _PRIVATE_REINTERPRET:
                queries = q_smem.index(0)
            else:
                # Triton 3.9 would compute the 32 descriptors of the queries before the loop and spill them: hide the
                # index
                none = gl.inline_asm_elementwise(
                    "and.b32 $0, $1, 0;", "=r,r", [slot], dtype=gl.int32, is_pure=False, pack=1
                )
                queries = q_smem.index(none)
            acc, peak, sums = _attend(
                queries, k_smem.index(slot), b_smem.index(slot), p_smem, acc, peak, sums, scale_log2, s_mma, False
            )
            barrier()
            mbarrier.arrive(k_empty.index(slot), count=1)
            slot ^= 1
            phase = gl.where(slot == 0, phase ^ 1, phase)

    total = gl.convert_layout(gl.sum(sums, 1), o_rows)
    peak = gl.convert_layout(peak, o_rows)
    some = total != 0.0  # true for NaN too: a NaN key must show
    total = gl.where(some, total, 1.0)
    inverse = gl.where(some, _UNBIAS / total, 0.0)
    # Found again: kept from before the loop, all this would cost its registers.
    row, b, s, head0 = _place(block_index("x"), block_heads, head_blocks, s_q)
    split = block_index("y")
    heads_end = gl.minimum(heads, head0 + block_heads)
    row64, split_row = row.to(gl.int64), (row.to(gl.int64) * splits + split) * heads
    out += (b.to(gl.int64) * o_sb + s.to(gl.int64) * o_ss) * 8
    lse += row64 * heads
    part_lse += split_row
    part += split_row * 512
    if SPLIT:
        head = head0 + gl.arange(0, _HEADS, o_rows)
        head_ok = head < heads_end
        gl.store(part_lse + head, gl.where(some, peak + gl.log2(total), float("-inf")), mask=head_ok)
        if here > 0:
            d = gl.arange(0, 512, gl.SliceLayout(0, o_mma))
            gl.store((part + head * 512)[:, None] + d[None, :], acc * inverse[:, None], mask=head_ok[:, None])
    else:
        # The accumulator's layout with the column bits inside a quad exchanged, so that a thread holds 8
        # neighbouring columns: a few shuffles make 16-byte stores of 4-byte ones.
        store: gl.constexpr = gl.DistributedLinearLayout(
            reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64], [0, 256]],
            lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
            warp_bases=[[16, 0], [32, 0], [0, 128]],
            block_bases=[],
            shape=[64, 512],
        )
        head = head0 + gl.arange(0, _HEADS, o_rows)
        head_ok = head < heads_end
        row_lse = gl.where(some, (peak + gl.log2(total)) * _LN2, float("inf"))
        gl.store(lse + head, row_lse, mask=head_ok)
        sink_value = gl.load(sink + head, mask=head_ok & (has_sink != 0), other=float("-inf"))
        inverse = gl.where(some, inverse / (1.0 + gl.exp2((sink_value - row_lse) * _LOG2E)), 0.0)
        result = gl.convert_layout((acc * inverse[:, None]).to(gl.bfloat16), store)
        hs = head0 + gl.arange(0, _HEADS, gl.SliceLayout(1, store))
        d = gl.arange(0, 512, gl.SliceLayout(0, store))
        o_row = out + hs.to(gl.int64) * (o_sh * 8)
        gl.store(o_row[:, None] + d[None, :], result, mask=(hs < heads_end)[:, None])


_NO_SPECIALIZE = [
    "has_sink",
    "has_len1",
    "has_len2",
    "scale_log2",
    "heads",
    "block_heads",
    "head_blocks",
    "s_q",
    "splits",
    "q_sb",
    "q_ss",
    "q_sh",
    "o_sb",
    "o_ss",
    "o_sh",
    "i1_sb",
    "i1_ss",
    "i2_sb",
    "i2_ss",
    "topk1",
    "topk2",
    "slots1",
    "slots2",
    "stride1",
    "stride2",
    "page1",
    "page2",
    "shift1",
    "shift2",
]


@gluon.jit(
    do_not_specialize=_NO_SPECIALIZE,
    do_not_specialize_on_alignment=["sink", "idx1", "len1", "idx2", "len2", "lse"],
)
def _decode_hopper_kernel(
    q,
    out,
    lse,
    part,
    part_lse,
    sink,
    cache1,
    idx1,
    len1,
    cache2,
    idx2,
    len2,
    has_sink: gl.int32,
    has_len1: gl.int32,
    has_len2: gl.int32,
    scale_log2: gl.float32,
    heads: gl.int32,
    block_heads: gl.int32,
    head_blocks: gl.int32,
    s_q: gl.int32,
    splits: gl.int32,
    q_sb: gl.int64,
    q_ss: gl.int64,
    q_sh: gl.int64,
    o_sb: gl.int64,
    o_ss: gl.int64,
    o_sh: gl.int64,
    i1_sb: gl.int64,
    i1_ss: gl.int64,
    i2_sb: gl.int64,
    i2_ss: gl.int64,
    topk1: gl.int32,
    topk2: gl.int32,
    slots1: gl.int32,
    slots2: gl.int32,
    stride1: gl.int64,
    stride2: gl.int64,
    page1: gl.int32,
    page2: gl.int32,
    shift1: gl.int32,
    shift2: gl.int32,
    SPLIT: gl.constexpr,
    SINGLE: gl.constexpr,
    LOADERS: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
    PDL: gl.constexpr,
):
    if PDL:
        launch_dependents()
    split = gl.program_id(1)
    _, b, s, head0 = _place(gl.program_id(0), block_heads, head_blocks, s_q)
    b64, s64 = b.to(gl.int64), s.to(gl.int64)
    q += (b64 * q_sb + s64 * q_ss) * 8
    idx1 += b64 * i1_sb + s64 * i1_ss
    idx2 += b64 * i2_sb + s64 * i2_ss
    k_lay: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    w_lay: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_smem = gl.allocate_shared_memory(gl.bfloat16, [1, _HEADS, 512], k_lay)
    k_smem = gl.allocate_shared_memory(gl.bfloat16, [_RING, _KEYS, 512], k_lay)
    if _PRIVATE_REINTERPRET:
        k32 = k_smem._reinterpret(gl.int32, [_RING, _KEYS, 256], w_lay)
    else:
        k32 = k_smem.reinterpret(gl.int32, [_RING, _KEYS, 256], w_lay)
    p_smem = gl.allocate_shared_memory(gl.bfloat16, [_HEADS, _KEYS], k_lay)
    b_smem = gl.allocate_shared_memory(gl.float32, [_RING, _KEYS], flat)
    k_full = gl.allocate_shared_memory(gl.int64, [_RING, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [_RING, 1], mbarrier.MBarrierLayout())
    for j in gl.static_range(_RING):
        mbarrier.init(k_full.index(j), count=1)
        mbarrier.init(k_empty.index(j), count=1)
    fence_async_shared()
    barrier()
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    q,
                    q_sh,
                    out,
                    o_sb,
                    o_ss,
                    o_sh,
                    lse,
                    part,
                    part_lse,
                    sink,
                    q_smem,
                    k_smem,
                    b_smem,
                    p_smem,
                    k_full,
                    k_empty,
                    b,
                    heads,
                    block_heads,
                    head_blocks,
                    s_q,
                    head0,
                    split,
                    splits,
                    len1,
                    len2,
                    has_len1,
                    has_len2,
                    topk1,
                    topk2,
                    has_sink,
                    scale_log2,
                    SPLIT,
                    SINGLE,
                ),
            ),
            (
                _loader,
                (
                    k32,
                    b_smem,
                    k_full,
                    k_empty,
                    b,
                    split,
                    splits,
                    idx1,
                    idx2,
                    len1,
                    len2,
                    has_len1,
                    has_len2,
                    topk1,
                    topk2,
                    cache1,
                    cache2,
                    slots1,
                    slots2,
                    stride1,
                    stride2,
                    page1,
                    page2,
                    shift1,
                    shift2,
                    SINGLE,
                    LOADERS,
                ),
            ),
        ],
        [LOADERS],
        [LOADER_REGISTERS],
    )
