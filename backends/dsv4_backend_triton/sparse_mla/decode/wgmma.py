"""The split kernel of sparse MLA decode for Hopper (sm_90a), written in Gluon.

The same work split, tile order and partial results as the portable kernel. One CTA serves one query row, 64 heads and
one split, in two roles:

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

from ...configurations import configured
from ...lib.gluon import PRIVATE_REINTERPRET, async_load, barrier, block_index, launch_dependents
from ...lib.sizes import cdiv
from ...lib.softmax import LN2, LOG2E, NEGATIVE
from .combine import launch_splits
from .gather import (
    UNBIAS,
    deposit,
    find,
    index_of,
    load_back,
    load_front,
    place,
    schedule,
)
from .plan import MOST_SPLITS, NO_ALIGN, NO_SPECIALIZE, Call, Plan, Shape, Tile, splits_for

_HEADS = gl.constexpr(64)
_KEYS = gl.constexpr(64)
_RING = gl.constexpr(2)


def plan(shape: Shape) -> Plan | None:
    """Few rows: a program for each tile, and each tile's heads over as many programs as there is room for."""
    if not shape.vectors:
        return None
    rows, heads, sms = shape.planned_rows, shape.heads, shape.arch.sms
    tile = Tile(_HEADS.value, _KEYS.value, 8)
    tiles = shape.tiles(tile.keys)
    blocks = min(sms // (rows * tiles), cdiv(heads, 16)) if tiles <= MOST_SPLITS else 1
    if heads > 32 and blocks > 1 and blocks * tile.heads >= heads:
        return Plan(tile, tiles, single=True, block_heads=cdiv(heads, blocks))
    splits = splits_for(rows * cdiv(heads, tile.heads), tiles, sms)
    return Plan(tile, splits, single=splits == tiles)


def launch(call: Call, plan: Plan) -> None:
    """Loader warps and their registers by whether a split is a single tile, which is latency alone."""
    loader = configured("sparse_mla_decode", "wgmma", call.shape.arch, role="single" if plan.single else "ring")
    launch_splits(
        _decode_wgmma_kernel,
        call,
        plan,
        words=True,
        block_heads=min(plan.block_heads, plan.tile.heads),
        SINGLE=plan.single,
        LOADERS=loader["loaders"],
        LOADER_REGISTERS=loader["registers"],
        num_warps=plan.tile.warps,
    )


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
    length1, length2, first2, here1, here = schedule(
        b, split, splits, len1, len2, has_len1, has_len2, topk1, topk2, _KEYS, SINGLE
    )
    share = here1, split, first2, splits, length1, length2
    scopes = cache1, cache2, slots1, slots2, stride1, stride2, page1, page2, shift1, shift2
    index = index_of(0, keys, here1, split, first2, splits, idx1, idx2, topk1, topk2)
    start, ok, word = find(0, index, keys, share, scopes)
    r0, r1, r2, r3 = load_front(start, ok, cols)
    r4, r5, r6, rope = load_back(start, ok, cols, cols_r, rows_r)
    if SINGLE:
        deposit(k32.index(0), b_smem.index(0), lay_r, r0, r1, r2, r3, r4, r5, r6, rope, word, ok)
        fence_async_shared()
        barrier()
        mbarrier.arrive(k_full.index(0), count=1)
    else:
        slot = 0
        phase = 0
        index = index_of(1, keys, here1, split, first2, splits, idx1, idx2, topk1, topk2)
        for i in range(here):
            mbarrier.wait(k_empty.index(slot), phase ^ 1)
            deposit(k32.index(slot), b_smem.index(slot), lay_r, r0, r1, r2, r3, r4, r5, r6, rope, word, ok)
            # Before the next loads are issued: the fence would wait for them.
            fence_async_shared()
            barrier()
            mbarrier.arrive(k_full.index(slot), count=1)
            start, ok, word = find(i + 1, index, keys, share, scopes)
            r0, r1, r2, r3 = load_front(start, ok, cols)
            r4, r5, r6, rope = load_back(start, ok, cols, cols_r, rows_r)
            index = index_of(i + 2, keys, here1, split, first2, splits, idx1, idx2, topk1, topk2)
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
    _, _, _, _, here = schedule(b, split, splits, len1, len2, has_len1, has_len2, topk1, topk2, _KEYS, SINGLE)
    async_copy.wait_group(0)
    fence_async_shared()
    barrier()

    peak = gl.full([_HEADS], NEGATIVE, gl.float32, s_rows)
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
            if PRIVATE_REINTERPRET:
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
    inverse = gl.where(some, UNBIAS / total, 0.0)
    # Found again: kept from before the loop, all this would cost its registers.
    row, b, s, head0 = place(block_index("x"), block_heads, head_blocks, s_q)
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
        row_lse = gl.where(some, (peak + gl.log2(total)) * LN2, float("inf"))
        gl.store(lse + head, row_lse, mask=head_ok)
        sink_value = gl.load(sink + head, mask=head_ok & (has_sink != 0), other=float("-inf"))
        inverse = gl.where(some, inverse / (1.0 + gl.exp2((sink_value - row_lse) * LOG2E)), 0.0)
        result = gl.convert_layout((acc * inverse[:, None]).to(gl.bfloat16), store)
        hs = head0 + gl.arange(0, _HEADS, gl.SliceLayout(1, store))
        d = gl.arange(0, 512, gl.SliceLayout(0, store))
        o_row = out + hs.to(gl.int64) * (o_sh * 8)
        gl.store(o_row[:, None] + d[None, :], result, mask=(hs < heads_end)[:, None])


@gluon.jit(
    do_not_specialize=NO_SPECIALIZE,
    do_not_specialize_on_alignment=NO_ALIGN,
)
def _decode_wgmma_kernel(
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
    _, b, s, head0 = place(gl.program_id(0), block_heads, head_blocks, s_q)
    b64, s64 = b.to(gl.int64), s.to(gl.int64)
    q += (b64 * q_sb + s64 * q_ss) * 8
    idx1 += b64 * i1_sb + s64 * i1_ss
    idx2 += b64 * i2_sb + s64 * i2_ss
    k_lay: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    w_lay: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_smem = gl.allocate_shared_memory(gl.bfloat16, [1, _HEADS, 512], k_lay)
    k_smem = gl.allocate_shared_memory(gl.bfloat16, [_RING, _KEYS, 512], k_lay)
    if PRIVATE_REINTERPRET:
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
