"""The split kernel of sparse MLA decode on wgmma, in Gluon: one program serves one query row, 64 heads and one split.

Splits, order of tiles and partial results are those of the portable kernel. Decoding and products run at the same time
and slow each other down: on the H200 (128 queries of 128 heads) either role alone takes about 0.7 of the time of both.
Prefetching the rows to L2 before their gather was slower. Splits of many tiles are left to ``wgmma_long``.

    role       warps                      registers   does
    consumer   8                          the rest    S = Q K^T (32 keys a warpgroup), the softmax, O += P V (256
                                                      columns a warpgroup)
    loader     4, or 8 where a split is   128, or 80  gathers the FP8 rows of the next tile into registers while the
               a single tile                          last one is consumed, decodes them to bf16, and stores them

               64 keys                       512 columns
    64 heads [ wg 0 | wg 1 ]  K: 512       [    wg 0    |    wg 1    ]  K: 64 keys
               32     32                        256          256

    shared memory                bytes
    q_smem [1, 64, 512] bf16     65536
    k_smem [2, 64, 512] bf16     131072, to the loader [2, 64, 256] words
    p_smem [64, 64] bf16         8192
    b_smem [2, 64] fp32          512: 0, or -inf where there is no key

    barrier       arrives    waits      count
    k_full [2]    loader     consumer   1
    k_empty [2]   consumer   loader     1

    strides: as the signature says
"""

from __future__ import annotations

from functools import cache

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, warpgroup_mma, warpgroup_mma_wait

from ...arch import Arch
from ...configurations import configured
from ...launch import entry
from ...lib import ring
from ...lib.gluon import FROM_3_9, async_load, launch_dependents, reinterpret
from ...lib.sizes import cdiv
from ...lib.softmax import NEGATIVE
from .combine import launch_splits
from .finish import WGMMA_STORE, finish
from .gather import columns, deposit, find, index_of, load_back, load_front, place, schedule
from .plan import ANY_ALIGNMENT, MOST_SPLITS, Call, Plan, Shape, Tile, splits_for

_HEADS = gl.constexpr(64)
_KEYS = gl.constexpr(64)
_RING = gl.constexpr(2)


def plan(shape: Shape) -> Plan | None:
    """With few rows each tile has a program, and its heads are spread over as many programs as run at once."""
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


@cache
def _loaders(arch: Arch, single: bool) -> tuple[int, int]:
    """Loader warps and their registers. If a split is a single tile, its latency is what counts."""
    config = configured("sparse_mla_decode", "wgmma", arch, role="single" if single else "ring")
    return config["loaders"], config["registers"]


def launch(call: Call, plan: Plan) -> None:
    loaders, registers = _loaders(call.shape.arch, plan.single)
    launch_splits(
        _decode_wgmma_kernel, call, plan, words=True, block_heads=min(plan.block_heads, plan.tile.heads),
        SINGLE=plan.single, LOADERS=loaders, LOADER_REGISTERS=registers, num_warps=plan.tile.warps,
    )  # fmt: skip


@gluon.jit
def _loader(smem, bars, at, indices, lengths, scopes, SINGLE: gl.constexpr, WARPS: gl.constexpr):
    k32, b_smem = smem
    k_full, k_empty = bars
    keys, cols, cols_r = columns(_KEYS, WARPS)
    share, here = schedule(at, lengths, _KEYS, SINGLE)
    index = index_of(0, keys, share, indices, lengths, _KEYS)
    start, ok, word = find(0, index, keys, share, scopes, _KEYS)
    front = load_front(start, ok, cols)
    back = load_back(start, ok, cols, cols_r)
    if SINGLE:
        deposit(k32.index(0), b_smem.index(0), front, back, word, ok)
        ring.publish(k_full.index(0))
    else:
        slot = 0
        phase = 0
        index = index_of(1, keys, share, indices, lengths, _KEYS)
        for i in range(here):
            mbarrier.wait(k_empty.index(slot), phase ^ 1)
            deposit(k32.index(slot), b_smem.index(slot), front, back, word, ok)
            # The fence comes before the next loads are issued, since it would wait for them.
            ring.publish(k_full.index(slot))
            start, ok, word = find(i + 1, index, keys, share, scopes, _KEYS)
            front = load_front(start, ok, cols)
            back = load_back(start, ok, cols, cols_r)
            index = index_of(i + 2, keys, share, indices, lengths, _KEYS)
            slot ^= 1
            phase = gl.where(slot == 0, phase ^ 1, phase)


@gluon.jit
def _partial_sums(p, like):
    """[64, 16]: 8 threads hold logits of a head, and two of the 16 sums each."""
    sums = gl.sum(gl.reshape(p, [_HEADS, 2, 4, 8]), 2)
    return gl.convert_layout(gl.reshape(sums, [_HEADS, 16]), like.type.layout)


@gluon.jit
def _attend(queries, keys, bias, p_smem, acc, m_i, l_parts, scale_log2, s_mma: gl.constexpr, FIRST: gl.constexpr):
    """One tile of keys into the running (accumulator, maximum, partial sums) of an online softmax in base 2."""
    zero = gl.zeros([_HEADS, _KEYS], gl.float32, s_mma)
    token = warpgroup_mma(queries, keys.permute((1, 0)), zero, use_acc=False, is_async=True)
    bias = bias.load(gl.SliceLayout(0, s_mma))
    logits = warpgroup_mma_wait(0, deps=(token,))
    logits = logits * scale_log2 + bias[None, :]
    m_new = gl.maximum(m_i, gl.max(logits, 1))
    p = gl.exp2(logits - m_new[:, None])
    p_smem.store(p.to(gl.bfloat16))
    ring.sync()
    if FIRST:
        token = warpgroup_mma(p_smem, keys, acc, use_acc=False, is_async=True)
        l_parts = _partial_sums(p, l_parts)
    else:
        alpha = gl.exp2(m_i - m_new)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
        token = warpgroup_mma(p_smem, keys, acc, is_async=True)
        alpha = gl.convert_layout(alpha, gl.SliceLayout(1, l_parts.type.layout))
        l_parts = l_parts * alpha[:, None] + _partial_sums(p, l_parts)
    return warpgroup_mma_wait(0, deps=(token,)), m_new, l_parts


@gluon.jit
def _consumer(
    query, results, smem, bars, at, sizes, lengths, has_sink, scale_log2, SPLIT: gl.constexpr, SINGLE: gl.constexpr
):  # fmt: skip
    q, q_sh, head0 = query
    q_smem, k_smem, b_smem, p_smem = smem
    k_full, k_empty = bars
    heads, block_heads, _, _, _ = sizes
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
    _, here = schedule(at, lengths, _KEYS, SINGLE)
    async_copy.wait_group(0)
    ring.sync()

    m_i = gl.full([_HEADS], NEGATIVE, gl.float32, s_rows)
    # the running sum of exp as 16 partial sums a head, so that in the loop a thread adds only its own registers
    sum_lay: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [8, 0]],
        lane_bases=[[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0], [0, 8]],
        block_bases=[],
        shape=[64, 16],
    )
    l_parts = gl.zeros([_HEADS, 16], gl.float32, sum_lay)
    acc = gl.zeros([_HEADS, 512], gl.float32, o_mma)
    if SINGLE:
        mbarrier.wait(k_full.index(0), 0)
        acc, m_i, l_parts = _attend(
            q_smem.index(0), k_smem.index(0), b_smem.index(0), p_smem, acc, m_i, l_parts, scale_log2, s_mma, True
        )
    else:
        slot = 0
        phase = 0
        for _ in range(here):
            mbarrier.wait(k_full.index(slot), phase)
            if FROM_3_9:
                # A 0 that is opaque to the compiler. With a plain 0, Triton 3.9 computes the 32 descriptors of the
                # queries before the loop and spills them.
                zero = gl.inline_asm_elementwise(
                    "and.b32 $0, $1, 0;", "=r,r", [slot], dtype=gl.int32, is_pure=False, pack=1
                )
                queries = q_smem.index(zero)
            else:
                queries = q_smem.index(0)
            acc, m_i, l_parts = _attend(
                queries, k_smem.index(slot), b_smem.index(slot), p_smem, acc, m_i, l_parts, scale_log2, s_mma, False
            )
            ring.arrive(k_empty.index(slot))
            slot ^= 1
            phase = gl.where(slot == 0, phase ^ 1, phase)

    l_i = gl.convert_layout(gl.sum(l_parts, 1), o_rows)
    m_i = gl.convert_layout(m_i, o_rows)
    finish(acc, m_i, l_i, here, results, sizes, has_sink, SPLIT, WGMMA_STORE, True)


@entry(gluon.jit, "has_sink", any_alignment=ANY_ALIGNMENT)
def _decode_wgmma_kernel(
    q, out, lse, part, part_lse, sink,
    cache1, idx1, len1, cache2, idx2, len2,
    has_sink: gl.int32, has_len1: gl.int32, has_len2: gl.int32,
    scale_log2: gl.float32,
    heads: gl.int32, block_heads: gl.int32, head_blocks: gl.int32, s_q: gl.int32, splits: gl.int32,
    q_sb: gl.int64, q_ss: gl.int64, q_sh: gl.int64, o_sb: gl.int64, o_ss: gl.int64, o_sh: gl.int64,  # in 8 elements
    i1_sb: gl.int64, i1_ss: gl.int64, i2_sb: gl.int64, i2_ss: gl.int64,  # in indices
    topk1: gl.int32, topk2: gl.int32, slots1: gl.int32, slots2: gl.int32,
    stride1: gl.int64, stride2: gl.int64,  # of a page, in 16 bytes
    page1: gl.int32, page2: gl.int32, shift1: gl.int32, shift2: gl.int32,
    SPLIT: gl.constexpr, SINGLE: gl.constexpr, LOADERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
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
    k32 = reinterpret(k_smem, gl.int32, [_RING, _KEYS, 256], w_lay)
    p_smem = gl.allocate_shared_memory(gl.bfloat16, [_HEADS, _KEYS], k_lay)
    b_smem = gl.allocate_shared_memory(gl.float32, [_RING, _KEYS], flat)
    bars, at = ring.barriers(_RING, (1, 1)), (b, split, splits)
    ring.sync()
    lengths = (len1, len2, has_len1, has_len2, topk1, topk2)
    scopes = (cache1, cache2, slots1, slots2, stride1, stride2, page1, page2, shift1, shift2)
    query, results = (q, q_sh, head0), (out, o_sb, o_ss, o_sh, lse, part, part_lse, sink)
    smem, sizes = (q_smem, k_smem, b_smem, p_smem), (heads, block_heads, head_blocks, s_q, splits)
    gl.warp_specialize(
        [
            (_consumer, (query, results, smem, bars, at, sizes, lengths, has_sink, scale_log2, SPLIT, SINGLE)),
            (_loader, ((k32, b_smem), bars, at, (idx1, idx2), lengths, scopes, SINGLE, LOADERS)),
        ],
        [LOADERS],
        [LOADER_REGISTERS],
    )
