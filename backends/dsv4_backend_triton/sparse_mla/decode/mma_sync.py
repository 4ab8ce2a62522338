"""The split kernel of sparse MLA decode on mma.sync, in Gluon: for SM8x and SM12x, and for few queries on Hopper too.

One program serves one query row, up to 64 heads and one split. It gathers and decodes each key once for all its heads,
while the portable kernel does so for every 16 heads.

    role   warps    does
    all    4 or 8   one step after the other: a tile of keys to shared memory, S = Q K^T, the softmax, O += P V

                 KEYS keys                 512 columns
    HEADS heads [ S ]  K: 512 by 64s      [ O, a quarter a warp ]  K: KEYS by 16s

    shared memory                 bytes, few (16 x 32)   small (32 x 32)   large (64 x 64)
    q_smem [HEADS, 512] bf16      16384                  32768             65536
    k_smem [KEYS, 512] bf16       32768                  32768             65536
    p_smem [KEYS / 32, HEADS, 32] 1024, in the loop      2048              8192
    b_smem [KEYS] fp32            128, in the loop       128               256

    barriers: of the whole block, placed by Triton
    strides: as the signature says
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from ...arch import Arch
from ...configurations import configured
from ...launch import entry
from ...lib.gluon import launch_dependents, reinterpret
from ...lib.mma_sync import ROWS_LAYOUT, add_to_sums, halves, mma_layout, sums_layout
from ...lib.sizes import cdiv
from ...lib.softmax import NEGATIVE
from .combine import launch_splits
from .finish import finish
from .gather import columns, deposit, find, index_of, load_back, load_front, place, schedule
from .plan import ANY_ALIGNMENT, MOST_SPLITS, Call, Plan, Shape, Tile, splits_for

_STEP = gl.constexpr(64)  # columns of Q and K at a time


def plan(shape: Shape) -> Plan | None:
    """The large tile takes 138 KiB; the small one takes 67, for architectures with 99. Both were timed on an H200 with
    the code of SM80 and SM89, limited to their shared memory."""
    if not shape.vectors:
        return None
    rows, heads, arch = shape.planned_rows, shape.heads, shape.arch
    few, small, large = (_tile(arch, role) for role in ("few", "small", "large"))
    tiles = shape.tiles(few.keys)
    if (each := cdiv(rows * cdiv(heads, 16) * tiles, arch.sms)) <= 3:
        # few rows are bound by latency: up to three small tiles a program, and all programs run at once
        return Plan(few, cdiv(tiles, max(each, cdiv(tiles, MOST_SPLITS))))
    if heads <= 16:
        tile = few
    elif arch.wgmma:
        return None
    else:
        below = rows * cdiv(heads, 32) * tiles <= 6 * arch.sms
        tile = small if below or heads <= 32 or arch.smem < large.kib * 1024 else large
    # limited by a multiprocessor's registers and shared memory, of which the system takes 1 KiB for each program
    resident = max(1, min(tile.resident, (arch.smem // 1024 + 1) // (tile.kib + 1)))
    programs = rows * cdiv(heads, tile.heads)
    return Plan(tile, splits_for(programs, shape.tiles(tile.keys), arch.sms, resident))


def _tile(arch: Arch, role: str) -> Tile:
    return Tile(**configured("sparse_mla_decode", "mma_sync", arch, role=role))


def launch(call: Call, plan: Plan) -> None:
    tile = plan.tile
    shape = dict(block_heads=tile.heads, HEADS=tile.heads, KEYS=tile.keys, num_warps=tile.warps)
    launch_splits(_decode_mma_sync_kernel, call, plan, words=True, **shape)


@gluon.jit
def _store_p(p_smem, p):
    """P of a tile, 32 keys a buffer. This is 1 to 2 % faster on the H200 than one buffer for all."""
    if p.shape[1] == 64:
        low, high = halves(p)
        p_smem.index(0).store(low)
        p_smem.index(1).store(high)
    else:
        p_smem.index(0).store(p)


@entry(gluon.jit, "has_sink", any_alignment=ANY_ALIGNMENT)
def _decode_mma_sync_kernel(
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
    SPLIT: gl.constexpr, HEADS: gl.constexpr, KEYS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    if PDL:
        launch_dependents()
    warps: gl.constexpr = gl.num_warps()
    mma: gl.constexpr = mma_layout(warps)
    lhs: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    rhs: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    q_lay: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [warps, 1], [1, 0])
    sums_lay: gl.constexpr = sums_layout(HEADS, warps)
    words: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    narrow: gl.constexpr = gl.SwizzledSharedLayout(8, 2, 4, [1, 0])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_smem = gl.allocate_shared_memory(gl.bfloat16, [HEADS, 512], ROWS_LAYOUT)
    k_smem = gl.allocate_shared_memory(gl.bfloat16, [KEYS, 512], ROWS_LAYOUT)
    k32 = reinterpret(k_smem, gl.int32, [KEYS, 256], words)
    if HEADS > 16:
        p_smem = gl.allocate_shared_memory(gl.bfloat16, [KEYS // 32, HEADS, 32], narrow)
        b_smem = gl.allocate_shared_memory(gl.float32, [KEYS], flat)

    split = gl.program_id(1)
    _, b, s, head0 = place(gl.program_id(0), block_heads, head_blocks, s_q)
    b64, s64 = b.to(gl.int64), s.to(gl.int64)
    idx1 += b64 * i1_sb + s64 * i1_ss
    idx2 += b64 * i2_sb + s64 * i2_ss
    keys, cols, cols_r = columns(KEYS, warps)
    lengths, indices = (len1, len2, has_len1, has_len2, topk1, topk2), (idx1, idx2)
    share, here = schedule((b, split, splits), lengths, KEYS, False)
    scopes = cache1, cache2, slots1, slots2, stride1, stride2, page1, page2, shift1, shift2
    index = index_of(0, keys, share, indices, lengths, KEYS)
    start, ok, word = find(0, index, keys, share, scopes, KEYS)
    front = load_front(start, ok, cols)
    back = load_back(start, ok, cols, cols_r)
    index = index_of(1, keys, share, indices, lengths, KEYS)

    h = head0 + gl.arange(0, HEADS, gl.SliceLayout(1, q_lay))
    q_cols = gl.arange(0, 512, gl.SliceLayout(0, q_lay))
    q_row = q + (b64 * q_sb + s64 * q_ss) * 8 + h.to(gl.int64) * (q_sh * 8)
    h_ok = h < gl.minimum(heads, head0 + block_heads)
    q_smem.store(gl.load(q_row[:, None] + q_cols[None, :], mask=h_ok[:, None], other=0.0))

    m_i = gl.full([HEADS], NEGATIVE, gl.float32, rows)
    l_parts = gl.zeros([HEADS, 16], gl.float32, sums_lay)
    acc = gl.zeros([HEADS, 512], gl.float32, mma)
    for i in range(here):
        if HEADS == 16:  # allocated only while it is needed, so that two programs of 32 keys fit the 100 KiB of SM86
            b_smem = gl.allocate_shared_memory(gl.float32, [KEYS], flat)
        deposit(k32, b_smem, front, back, word, ok)
        # The next tile is loaded in two parts: all of it at once does not fit the L1 cache that is left, and its loads
        # would delay the reads of shared memory.
        start, ok, word = find(i + 1, index, keys, share, scopes, KEYS)
        front = load_front(start, ok, cols)
        logits = gl.zeros([HEADS, KEYS], gl.float32, mma)
        for c in gl.static_range(512 // _STEP):
            queries = q_smem.slice(_STEP * c, _STEP, 1).load(lhs)
            logits = mma_v2(queries, k_smem.slice(_STEP * c, _STEP, 1).permute((1, 0)).load(rhs), logits)
        back = load_back(start, ok, cols, cols_r)
        index = index_of(i + 2, keys, share, indices, lengths, KEYS)
        logits = logits * scale_log2 + b_smem.load(gl.SliceLayout(0, mma))[None, :]
        m_new = gl.maximum(m_i, gl.max(logits, 1))
        p = gl.exp2(logits - m_new[:, None])
        alpha = gl.exp2(m_i - m_new)
        acc = acc * alpha[:, None]
        l_parts = add_to_sums(l_parts, alpha, p)
        if HEADS == 16:
            p_smem = gl.allocate_shared_memory(gl.bfloat16, [KEYS // 32, HEADS, 32], narrow)
        _store_p(p_smem, p.to(gl.bfloat16))
        for c in gl.static_range(KEYS // 16):  # 16 keys at a time: all of P would take too many registers
            operand = p_smem.index(c // 2).slice(16 * (c % 2), 16, 1).load(lhs)
            acc = mma_v2(operand, k_smem.slice(16 * c, 16, 0).load(rhs), acc)
        m_i = m_new

    l_i = gl.convert_layout(gl.sum(l_parts, 1), rows)
    results, sizes = (out, o_sb, o_ss, o_sh, lse, part, part_lse, sink), (heads, block_heads, head_blocks, s_q, splits)
    finish(acc, m_i, l_i, here, results, sizes, has_sink, SPLIT, mma, False)
