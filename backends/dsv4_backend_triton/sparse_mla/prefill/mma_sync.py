"""Sparse MLA prefill on mma.sync, in Gluon: one program serves one query row and up to 64 heads.

A tile of keys lies in shared memory as four buffers of 128 columns. Q K^T reads them one after the other, and so does
P V. Once P V has read a buffer, the same columns of the next tile are copied into it, and Q K^T waits for the copy when
it needs them. So the keys take the memory of one tile, and their loads have three quarters of a tile's time.

    role   warps    does
    all    4 or 8   cp.async of the next keys, S = Q K^T, the softmax, O += P V

                 KEYS keys                  512 columns
    HEADS heads [ S ]  K: 4 x 128 by 64s   [ 128 | 128 | 128 | 128 ]  K: KEYS by 16s

    shared memory                   bytes, 16 x 64       32 x 32   64 x 64
    q_smem [HEADS, 512] bf16        16384                32768     65536
    k_smem 4 x [KEYS, 128] bf16     65536                32768     65536
    p_smem [HEADS, KEYS] bf16       1024, in the loop    2048      8192

    barriers: of the whole block, placed by Triton; cp.async groups, one a buffer
    strides: as the signature says
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from ...configurations import configured
from ...launch import entry, launch_kernel
from ...lib.gluon import async_load, block_index
from ...lib.mma_sync import ROWS_LAYOUT, add_to_sums, halves, mma_layout, sums_layout
from ...lib.softmax import LN2, LOG2E, NEGATIVE
from .op import ANY_ALIGNMENT, Call, Shape, Tile

_PART = gl.constexpr(128)  # columns of a buffer
_STEP = gl.constexpr(64)  # columns of Q and K at a time


def plan(shape: Shape) -> Tile | None:
    """The large tile takes 137 KiB, the others 81 and 67: two fit a multiprocessor of SM80, one fits 99 KiB."""
    if not shape.vectors:
        return None
    return Tile(**configured("sparse_mla_prefill", "mma_sync", shape.arch, size=shape.heads))


def launch(call: Call, tile: Tile) -> None:
    grid, arguments = call.arguments(tile.heads, 8)
    kernel = _prefill_mma_sync_kernel
    launch_kernel(kernel, grid, *arguments, HEADS=tile.heads, KEYS=tile.keys, num_warps=tile.warps)


@gluon.jit
def _indices(idx, tile, keys, length):
    """The indices of a tile, -1 beyond the length."""
    k = tile * keys.shape[0] + keys
    return gl.load(idx + k, mask=k < length, other=-1)


@gluon.jit
def _copy(buffer, kv, index, s_kv, kv_ss, cols, part: gl.constexpr):
    """Start the copy of one part of a tile's rows: zeros for invalid indices."""
    ok = (index >= 0) & (index < s_kv)
    row = kv + gl.where(ok, index, 0).to(gl.int64) * (kv_ss * 8)
    async_load(buffer, row[:, None] + (cols + part * _PART)[None, :], mask=ok[:, None])
    async_copy.commit_group()


@gluon.jit
def _score(logits, q_smem, buffer, part: gl.constexpr, lhs: gl.constexpr, rhs: gl.constexpr):
    for c in gl.static_range(_PART // _STEP):
        queries = q_smem.slice(part * _PART + c * _STEP, _STEP, 1).load(lhs)
        logits = mma_v2(queries, buffer.slice(c * _STEP, _STEP, 1).permute((1, 0)).load(rhs), logits)
    return logits


@gluon.jit
def _p_operands(p_smem, lhs: gl.constexpr):
    """P as operands of 16 keys each, which all four products read."""
    first, second = p_smem.slice(0, 16, 1).load(lhs), p_smem.slice(16, 16, 1).load(lhs)
    if p_smem.shape[1] == 32:
        return first, second
    else:
        return first, second, p_smem.slice(32, 16, 1).load(lhs), p_smem.slice(48, 16, 1).load(lhs)


@gluon.jit
def _few_p_operands(p, lhs: gl.constexpr):
    """The same for 16 heads and 64 keys, through 1 KiB that is allocated in the loop, so that two programs fit the 164
    KiB of SM80."""
    p_smem = gl.allocate_shared_memory(gl.bfloat16, [16, 32], gl.SwizzledSharedLayout(8, 2, 4, [1, 0]))
    low, high = halves(p)
    p_smem.store(low)
    first, second = p_smem.slice(0, 16, 1).load(lhs), p_smem.slice(16, 16, 1).load(lhs)
    p_smem.store(high)
    return first, second, p_smem.slice(0, 16, 1).load(lhs), p_smem.slice(16, 16, 1).load(lhs)


@gluon.jit
def _accumulate(acc, operands, buffer, rhs: gl.constexpr):
    for c in gl.static_range(buffer.shape[0] // 16):
        acc = mma_v2(operands[c], buffer.slice(16 * c, 16, 0).load(rhs), acc)
    return acc


@gluon.jit
def _emit(acc, inverse, buffer, o_row, cols, ok, part: gl.constexpr, lay: gl.constexpr):
    """128 columns of the output, through shared memory: 16 bytes at a time."""
    buffer = buffer.slice(0, acc.shape[0], 0)
    buffer.store((acc * inverse[:, None]).to(gl.bfloat16))
    gl.store(o_row[:, None] + (cols + part * _PART)[None, :], buffer.load(lay), mask=ok[:, None])


@entry(gluon.jit, "has_sink", any_alignment=ANY_ALIGNMENT)
def _prefill_mma_sync_kernel(
    q, kv, idx, lengths, sink, out, max_logits, lse,
    has_sink: gl.int32, has_length: gl.int32, scale_log2: gl.float32,
    heads: gl.int32, head_blocks: gl.int32, topk: gl.int32, s_kv: gl.int32,
    q_ss: gl.int64, q_sh: gl.int64, kv_ss: gl.int64, o_ss: gl.int64, o_sh: gl.int64,  # in 8 elements
    i_ss: gl.int64,  # in indices
    HEADS: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    warps: gl.constexpr = gl.num_warps()
    mma: gl.constexpr = mma_layout(warps)
    lhs: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    rhs: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    lay: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [warps, 1], [1, 0])
    lay_rows: gl.constexpr = gl.SliceLayout(1, lay)
    sums_lay: gl.constexpr = sums_layout(HEADS, warps)
    narrow: gl.constexpr = gl.SwizzledSharedLayout(8, 64 // KEYS, KEYS // 8, [1, 0])
    q_smem = gl.allocate_shared_memory(gl.bfloat16, [HEADS, 512], ROWS_LAYOUT)
    k_smem = ()
    for _ in gl.static_range(4):
        k_smem += (gl.allocate_shared_memory(gl.bfloat16, [KEYS, _PART], ROWS_LAYOUT),)  # type: ignore[assignment]
    if HEADS > 16:
        p_smem = gl.allocate_shared_memory(gl.bfloat16, [HEADS, KEYS], narrow)

    pid = gl.program_id(0)
    row = pid // head_blocks
    row64 = row.to(gl.int64)
    head0 = (pid - row * head_blocks) * HEADS
    idx += row64 * i_ss
    length = gl.minimum(gl.maximum(gl.load(lengths + row, mask=has_length != 0, other=topk), 0), topk)
    keys = gl.arange(0, KEYS, lay_rows)
    columns = gl.arange(0, KEYS, gl.SliceLayout(0, mma))
    cols = gl.arange(0, _PART, gl.SliceLayout(0, lay))

    h = head0 + gl.arange(0, HEADS, lay_rows)
    q_row = q + row64 * (q_ss * 8) + h.to(gl.int64) * (q_sh * 8)
    for part in gl.static_range(4):
        queries = q_row[:, None] + (cols + part * _PART)[None, :]
        async_load(q_smem.slice(part * _PART, _PART, 1), queries, mask=(h < heads)[:, None])
    index = _indices(idx, 0, keys, length)
    for part in gl.static_range(4):
        _copy(k_smem[part], kv, index, s_kv, kv_ss, cols, part)

    m_i = gl.full([HEADS], NEGATIVE, gl.float32, rows)
    l_parts = gl.zeros([HEADS, 16], gl.float32, sums_lay)
    acc = ()
    for _ in gl.static_range(4):
        acc += (gl.zeros([HEADS, _PART], gl.float32, mma),)  # type: ignore[assignment]
    for tile in range((length + KEYS - 1) // KEYS):
        index_here = _indices(idx, tile, columns, length)
        index = _indices(idx, tile + 1, keys, length)
        logits = gl.zeros([HEADS, KEYS], gl.float32, mma)
        for part in gl.static_range(4):
            async_copy.wait_group(3 - part)
            logits = _score(logits, q_smem, k_smem[part], part, lhs, rhs)
        valid = (index_here >= 0) & (index_here < s_kv)
        logits = gl.where(valid[None, :], logits * scale_log2, float("-inf"))
        m_new = gl.maximum(m_i, gl.max(logits, 1))
        p = gl.exp2(logits - m_new[:, None])
        if HEADS > 16:
            p_smem.store(p.to(gl.bfloat16))
        alpha = gl.exp2(m_i - m_new)
        l_parts = add_to_sums(l_parts, alpha, p)
        if HEADS > 16:
            operands = _p_operands(p_smem, lhs)
        else:
            operands = _few_p_operands(p.to(gl.bfloat16), lhs)
        summed = ()
        for part in gl.static_range(4):
            summed += (_accumulate(acc[part] * alpha[:, None], operands, k_smem[part], rhs),)  # type: ignore[assignment]
            _copy(k_smem[part], kv, index, s_kv, kv_ss, cols, part)
        acc, m_i = summed, m_new
    async_copy.wait_group(0)

    l_i = gl.convert_layout(gl.sum(l_parts, 1), rows)
    pid = block_index("x")
    row = pid // head_blocks
    row64 = row.to(gl.int64)
    head0 = (pid - row * head_blocks) * HEADS
    has_keys = l_i != 0.0  # true for NaN too: a NaN key must show
    l_i = gl.where(has_keys, l_i, 1.0)
    row_lse = gl.where(has_keys, (m_i + gl.log2(l_i)) * LN2, float("inf"))
    head = head0 + gl.arange(0, HEADS, rows)
    at = row64 * heads + head
    gl.store(lse + at, row_lse, mask=head < heads)
    gl.store(max_logits + at, gl.where(has_keys, m_i * LN2, float("-inf")), mask=head < heads)
    sink_value = gl.load(sink + head, mask=head < gl.where(has_sink != 0, heads, 0), other=float("-inf"))
    inverse = gl.where(has_keys, 1.0 / (l_i * (1.0 + gl.exp2((sink_value - row_lse) * LOG2E))), 0.0)
    h = head0 + gl.arange(0, HEADS, lay_rows)
    o_row = out + row64 * (o_ss * 8) + h.to(gl.int64) * (o_sh * 8)
    for part in gl.static_range(4):
        _emit(acc[part], inverse, k_smem[part], o_row, cols, h < heads, part, lay)
