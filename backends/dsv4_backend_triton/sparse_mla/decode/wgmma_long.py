"""The split kernel of sparse MLA decode on wgmma for splits of many tiles, in Gluon, with three roles.

One program serves one query row, 64 heads and one split. Splits, order of tiles and partial results are those of the
portable kernel; where the second scope is wide and has lengths, and all programs run at once, those of
``by_lengths.py``. The softmax of a tile runs beside P V of the one before. On the H200 the loader takes most of the
time: it waits for rows, and it has those of 32 keys in flight all the time.

    role         warps   registers   does
    accumulate   8       160         loads Q; holds the 64 x 512 output, 256 columns a warpgroup, and only rescales,
                                     multiplies P V, and stores
    score        4       88          S = Q K^T of 64 keys and the softmax; stores P (bf16) and the rescale factors, and
                                     after the last tile the maximum and the sum
    loader       4       104         gathers FP8 rows into registers, 32 keys at a time, while it decodes the 32 keys
                                     before to bf16 and stores them. It does not fence what it stores, since the fence
                                     would wait for its loads: score does

               64 keys                 512 columns
    64 heads [   S    ]  K: 512      [ wg 0, wg 1 | wg 0, wg 1 ]  K: 64 keys
                                        128   128    128   128

    shared memory                bytes
    q_smem [1, 64, 512] bf16     65536
    k_smem [2, 64, 512] bf16     131072, to the loader [2, 64, 256] words
    p_smem [2, 64, 64] bf16      16384
    b_smem [2, 64] fp32          512: 0, or -inf where there is no key
    a_smem [2, 64] fp32          512: rescale factors
    m_smem [2, 64] fp32          512: maximum and sum of the split

    barrier       arrives      waits        count
    k_full [2]    loader       score        1
    k_empty [2]   accumulate   loader       1
    p_full [2]    score        accumulate   1
    q_full        accumulate   score        1
    done          score        accumulate   1

    A slot of P and of the rescale factors is free when that of K has been filled again, since accumulate has then read
    all three.

    strides: as the signature says
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
from ...launch import entry
from ...lib import ring
from ...lib.gluon import async_load, launch_dependents, reinterpret
from ...lib.sizes import cdiv
from ...lib.softmax import NEGATIVE
from .by_lengths import MOST_ROWS, OVER, lengths_of, part_of, splits_of, tiles_of
from .combine import launch_splits
from .finish import WGMMA_STORE, finish
from .gather import beside, columns, decode_pair, decode_tail, find, index_of, load_groups, load_rope, place, schedule
from .plan import ANY_ALIGNMENT, MOST_SPLITS, Call, Plan, Shape, Tile, splits_for

_HEADS = gl.constexpr(64)
_KEYS = gl.constexpr(64)
_PART = gl.constexpr(32)  # keys that the loader gathers at a time
_RING = gl.constexpr(2)
_FEWEST_TILES = 5
"""Tiles a split. ``wgmma`` takes 7 to 11 % longer with 9 and more (NVIDIA H200, Triton 3.6.0, 2026-11-29). An earlier
form of this kernel gained 2 % over it with 5 and nothing with 4.5."""

_WIDE = 1024
"""Indices of the second scope. Up to so many may be what a model selects, and often all rows have all of them:
splitting by the lengths then took 6 to 9 % longer. Of more, most rows have few: with 8192, and contexts of which few
are long, it took 6 to 12 % less for 16 rows (NVIDIA H200, Triton 3.6.0, 2026-11-29). Other numbers of rows were not
measured."""
_SMALL_PAGE = 2
"""Keys of a page of the second scope in layers that compress 128 keys to one. There rows of ``_WIDE`` indices have all
keys of their contexts, too. Where no row was split, splitting the long ones took 13 % less (Pro, 64 rows, contexts of
39200 in the mean, up to 131072), but 7 % longer if all are as long as the longest. Where each had two splits, it took
9 % longer (Flash, 64 rows; NVIDIA H200, Triton 3.6.0, 2026-11-29)."""
_MOST_EVEN = 8
"""Splits of a row if all are equally long. 4 and 8 were measured; of more than 20 the combining kernel spills."""


def plan(shape: Shape) -> Plan | None:
    if not shape.vectors:
        return None
    tile = Tile(_HEADS.value, _KEYS.value, 8)
    tiles = shape.tiles(tile.keys)
    programs = shape.planned_rows * cdiv(shape.heads, tile.heads)
    splits = splits_for(programs, tiles, shape.arch.sms)
    if tiles < _FEWEST_TILES * splits:
        return None
    wide = shape.topk2 > _WIDE or (shape.topk2 == _WIDE and shape.page2 <= _SMALL_PAGE and splits == 1)
    by_lengths = wide and shape.lengths2 and not shape.batch_invariant
    by_lengths = by_lengths and 1 < shape.rows <= MOST_ROWS.value and splits <= _MOST_EVEN
    most = min(OVER * splits, tiles, MOST_SPLITS)
    if by_lengths and programs * splits <= shape.arch.sms and most > splits:
        return Plan(tile, most, even=splits)
    return Plan(tile, splits)


def launch(call: Call, plan: Plan) -> None:
    config = configured("sparse_mla_decode", "wgmma_long", call.shape.arch)
    launch_splits(
        _decode_wgmma_long_kernel, call, plan, words=True, block_heads=plan.block_heads,
        batch=call.q.shape[0], even=plan.even, BY_LENGTHS=plan.even > 0,
        SCORE_REGISTERS=config["score"], LOADER_REGISTERS=config["loader"], num_warps=plan.tile.warps,
    )  # fmt: skip


@gluon.jit
def _batch(counts, lengths):
    """The lengths of the batch, requested; each warp has all."""
    lay: gl.constexpr = gl.BlockedLayout([MOST_ROWS // 32], [32], [gl.num_warps()], [0])
    lane = gl.arange(0, MOST_ROWS, lay)
    length1, length2 = lengths_of(lane, lane < counts[0], lengths)
    return lane, length1, length2


@gluon.jit
def _own(b, lengths):
    """A row's lengths, and its tiles."""
    _, _, _, _, topk1, topk2 = lengths
    length1, length2 = lengths_of(b, True, lengths)
    tiles = tiles_of(length1, length2, lengths, _KEYS)
    return gl.minimum(gl.maximum(length1, 0), topk1), gl.minimum(gl.maximum(length2, 0), topk2), tiles


@gluon.jit
def _splits(tiles, batch, counts, lengths):
    lane, length1, length2 = batch
    return splits_of(tiles, lane, length1, length2, lengths, counts, _KEYS)


@gluon.jit
def _share(start, step, own, lengths):
    """Every ``step``-th tile of a row from ``start`` on, in the form of ``schedule``."""
    length1, length2, _ = own
    _, _, _, _, topk1, _ = lengths
    tiles1 = (topk1 + _KEYS - 1) // _KEYS
    here1 = (gl.maximum(tiles1 - start, 0) + step - 1) // step
    return (here1, start, start + here1 * step - tiles1, step, length1, length2)


@gluon.jit
def _begin(at, counts, lengths):
    """What of ``_schedule`` the other rows do not change: a share of the first tile only."""
    b, split, _ = at
    own = _own(b, lengths)
    start, _, _ = part_of(split, counts[1], 2, own[2])
    return _share(start, 1, own, lengths)


@gluon.jit
def _schedule(at, batch, counts, lengths):
    """This split's tiles, their number, and the number of splits that the row takes."""
    b, split, _ = at
    own = _own(b, lengths)
    splits = _splits(own[2], batch, counts, lengths)
    start, step, here = part_of(split, counts[1], splits, own[2])
    return _share(start, step, own, lengths), here, splits


@gluon.jit
def _loader(smem, bars, at, indices, counts, lengths, scopes, BY_LENGTHS: gl.constexpr):
    k32, b_smem = smem
    k_full, k_empty = bars
    keys, cols, cols_r = columns(_PART, 4)
    if BY_LENGTHS:
        share = _begin(at, counts, lengths)
        batch = _batch(counts, lengths)
    else:
        share, here = schedule(at, lengths, _KEYS, False)
    index = index_of(0, keys, share, indices, lengths, _KEYS)
    start, ok, word = find(0, index, keys, share, scopes, _KEYS)
    raw = load_groups(start, ok, cols, 0, 7)
    raw += (load_rope(start, ok, cols_r),)
    if BY_LENGTHS:
        share, here, _ = _schedule(at, batch, counts, lengths)
    index = index_of(0, keys + _PART, share, indices, lengths, _KEYS)
    slot = 0
    phase = 0
    for i in range(here):
        mbarrier.wait(k_empty.index(slot), phase ^ 1)
        for part in gl.static_range(2):
            # The next part is the other half of this tile, or the first half of the next tile.
            next_keys = keys + (1 - part) * _PART
            start, next_ok, next_word = find(i + part, index, next_keys, share, scopes, _KEYS)
            index = index_of(i + 1, keys + part * _PART, share, indices, lengths, _KEYS)
            b_smem.index(slot).slice(part * _PART, _PART).store(gl.where(ok, 0.0, float("-inf")))
            # Rows are requested as registers become free.
            first = decode_pair(raw, word, 0)
            requested = load_groups(start, next_ok, cols, 0, 2)
            second = decode_pair(raw, word, 2)
            requested += load_groups(start, next_ok, cols, 2, 4)
            third = decode_pair(raw, word, 4)
            requested += load_groups(start, next_ok, cols, 4, 6)
            tail = gl.convert_layout(decode_tail(raw[6], raw[7], word), third.type.layout)
            requested += load_groups(start, next_ok, cols, 6, 7)
            requested += (load_rope(start, next_ok, cols_r),)
            # one store, since Triton puts a barrier between two
            row = beside(beside(first, second), beside(third, tail))
            k32.index(slot).slice(part * _PART, _PART, 0).store(row)
            raw = requested
            ok = next_ok
            word = next_word
        ring.arrive(k_full.index(slot))
        slot ^= 1
        phase = gl.where(slot == 0, phase ^ 1, phase)


@gluon.jit
def _score(smem, bars, at, counts, lengths, scale_log2, BY_LENGTHS: gl.constexpr):
    q_smem, k_smem, b_smem, p_smem, a_smem, m_smem = smem
    k_full, p_full, q_full, done = bars
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    # 4 partial sums per head, one in each thread that holds the head.
    sum_lay: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[8, 0]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 4],
    )
    if BY_LENGTHS:
        _, here, _ = _schedule(at, _batch(counts, lengths), counts, lengths)
    else:
        _, here = schedule(at, lengths, _KEYS, False)
    m_i = gl.full([_HEADS], NEGATIVE, gl.float32, rows)
    l_parts = gl.zeros([_HEADS, 4], gl.float32, sum_lay)
    zero = gl.zeros([_HEADS, _KEYS], gl.float32, mma)
    mbarrier.wait(q_full, 0)
    slot = 0
    phase = 0
    for _ in range(here):
        mbarrier.wait(k_full.index(slot), phase)
        fence_async_shared()
        # A 0 that is opaque to the compiler. With a plain 0, Triton 3.9 computes the 32 descriptors of the queries
        # before the loop and spills them.
        none = gl.inline_asm_elementwise("and.b32 $0, $1, 0;", "=r,r", [slot], dtype=gl.int32, is_pure=False, pack=1)
        keys = k_smem.index(slot)
        token = warpgroup_mma(q_smem.index(none), keys.permute((1, 0)), zero, use_acc=False, is_async=True)
        bias = b_smem.index(slot).load(gl.SliceLayout(0, mma))
        logits = warpgroup_mma_wait(0, deps=(token,))
        logits = logits * scale_log2 + bias[None, :]
        # In two steps: more independent chains of comparisons.
        top = gl.convert_layout(gl.max(gl.max(gl.reshape(logits, [_HEADS, 8, 8]), 1), 1), rows)
        m_new = gl.maximum(m_i, top)
        alpha = gl.exp2(m_i - m_new)
        p = gl.exp2(logits - m_new[:, None])
        p_smem.index(slot).store(p.to(gl.bfloat16))
        a_smem.index(slot).store(alpha)
        ring.publish(p_full.index(slot))
        sums = gl.convert_layout(gl.sum(gl.sum(gl.reshape(p, [_HEADS, 8, 4, 2]), 1), 2), sum_lay)
        l_parts = l_parts * gl.convert_layout(alpha, gl.SliceLayout(1, sum_lay))[:, None] + sums
        m_i = m_new
        slot ^= 1
        phase = gl.where(slot == 0, phase ^ 1, phase)
    m_smem.index(0).store(m_i)
    m_smem.index(1).store(gl.convert_layout(gl.sum(l_parts, 1), rows))
    ring.arrive(done)


@gluon.jit
def _accumulate(
    query, results, smem, bars, at, sizes, counts, lengths, has_sink, SPLIT: gl.constexpr, BY_LENGTHS: gl.constexpr
):  # fmt: skip
    q, q_sh, head0 = query
    q_smem, k_smem, p_smem, a_smem, m_smem = smem
    k_empty, p_full, q_full, done = bars
    heads, block_heads, _, _, _ = sizes
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, 128, 16])
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    q_lay: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    h = head0 + gl.arange(0, _HEADS, gl.SliceLayout(1, q_lay))
    cols = gl.arange(0, 512, gl.SliceLayout(0, q_lay))
    q_row = q + h.to(gl.int64) * (q_sh * 8)
    heads_end = gl.minimum(heads, head0 + block_heads)
    async_load(q_smem.index(0), q_row[:, None] + cols[None, :], mask=(h < heads_end)[:, None])
    async_copy.commit_group()
    if BY_LENGTHS:
        _, here, splits = _schedule(at, _batch(counts, lengths), counts, lengths)
    else:
        _, here = schedule(at, lengths, _KEYS, False)
    async_copy.wait_group(0)
    ring.publish(q_full)

    acc = gl.zeros([_HEADS, 512], gl.float32, mma)
    slot = 0
    phase = 0
    for _ in range(here):
        mbarrier.wait(p_full.index(slot), phase)
        alpha = a_smem.index(slot).load(rows)
        acc = acc * alpha[:, None]
        token = warpgroup_mma(p_smem.index(slot), k_smem.index(slot), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(token,))
        ring.arrive(k_empty.index(slot))
        slot ^= 1
        phase = gl.where(slot == 0, phase ^ 1, phase)
    mbarrier.wait(done, 0)
    m_i, l_i = m_smem.index(0).load(rows), m_smem.index(1).load(rows)
    if BY_LENGTHS:
        if splits == 1:
            if at[1] == 0:
                finish(acc, m_i, l_i, here, results, sizes, has_sink, False, WGMMA_STORE, True)
        elif at[1] < splits:
            finish(acc, m_i, l_i, here, results, sizes, has_sink, True, WGMMA_STORE, True)
    else:
        finish(acc, m_i, l_i, here, results, sizes, has_sink, SPLIT, WGMMA_STORE, True)


@entry(gluon.jit, "has_sink", any_alignment=ANY_ALIGNMENT)
def _decode_wgmma_long_kernel(
    q, out, lse, part, part_lse, sink,
    cache1, idx1, len1, cache2, idx2, len2,
    has_sink: gl.int32, has_len1: gl.int32, has_len2: gl.int32,
    scale_log2: gl.float32,
    heads: gl.int32, block_heads: gl.int32, head_blocks: gl.int32, s_q: gl.int32, splits: gl.int32,
    q_sb: gl.int64, q_ss: gl.int64, q_sh: gl.int64, o_sb: gl.int64, o_ss: gl.int64, o_sh: gl.int64,  # in 8 elements
    i1_sb: gl.int64, i1_ss: gl.int64, i2_sb: gl.int64, i2_ss: gl.int64,  # in indices
    topk1: gl.int32, topk2: gl.int32, slots1: gl.int32, slots2: gl.int32,
    stride1: gl.int64, stride2: gl.int64,  # of a page, in 16 bytes
    page1: gl.int32, page2: gl.int32, shift1: gl.int32, shift2: gl.int32, batch: gl.int32, even: gl.int32,
    SPLIT: gl.constexpr, BY_LENGTHS: gl.constexpr, SCORE_REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    if PDL:
        launch_dependents()
    split = gl.program_id(1)
    _, b, s, head0 = place(gl.program_id(0), block_heads, head_blocks, s_q)
    lengths, counts = (len1, len2, has_len1, has_len2, topk1, topk2), (batch, even, splits)
    if BY_LENGTHS:
        taken = splits
        if split >= gl.minimum(even, 2):  # the others begin before they know
            _, _, tiles = _own(b, lengths)
            taken = _splits(tiles, _batch(counts, lengths), counts, lengths)
        if split >= taken:
            return
    b64, s64 = b.to(gl.int64), s.to(gl.int64)
    q += (b64 * q_sb + s64 * q_ss) * 8
    idx1 += b64 * i1_sb + s64 * i1_ss
    idx2 += b64 * i2_sb + s64 * i2_ss
    k_lay: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    w_lay: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_smem = gl.allocate_shared_memory(gl.bfloat16, [1, _HEADS, 512], k_lay)
    k_smem = gl.allocate_shared_memory(gl.bfloat16, [_RING, _KEYS, 512], k_lay)
    k32 = reinterpret(k_smem, gl.int32, [_RING, _KEYS, 256], w_lay)
    p_smem = gl.allocate_shared_memory(gl.bfloat16, [_RING, _HEADS, _KEYS], k_lay)
    b_smem = gl.allocate_shared_memory(gl.float32, [_RING, _KEYS], flat)
    a_smem = gl.allocate_shared_memory(gl.float32, [_RING, _HEADS], flat)
    m_smem = gl.allocate_shared_memory(gl.float32, [2, _HEADS], flat)
    k_full, k_empty, p_full = ring.barriers(_RING, (1, 1, 1))
    q_full, done = ring.barriers(1, (1, 1))
    q_full, done, at = q_full.index(0), done.index(0), (b, split, splits)
    ring.sync()
    scopes = (cache1, cache2, slots1, slots2, stride1, stride2, page1, page2, shift1, shift2)
    query, results = (q, q_sh, head0), (out, o_sb, o_ss, o_sh, lse, part, part_lse, sink)
    sizes, sum_bars = (heads, block_heads, head_blocks, s_q, splits), (k_empty, p_full, q_full, done)
    smem, sum_smem = (q_smem, k_smem, b_smem, p_smem, a_smem, m_smem), (q_smem, k_smem, p_smem, a_smem, m_smem)
    gl.warp_specialize(
        [
            (
                _accumulate,
                (query, results, sum_smem, sum_bars, at, sizes, counts, lengths, has_sink, SPLIT, BY_LENGTHS),
            ),
            (_score, (smem, (k_full, p_full, q_full, done), at, counts, lengths, scale_log2, BY_LENGTHS)),
            (_loader, ((k32, b_smem), (k_full, k_empty), at, (idx1, idx2), counts, lengths, scopes, BY_LENGTHS)),
        ],
        [4, 4],
        [SCORE_REGISTERS, LOADER_REGISTERS],
    )
