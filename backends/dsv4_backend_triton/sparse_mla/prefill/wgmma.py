"""Sparse MLA prefill on wgmma, in Gluon: a program serves one query row and 64 heads at a time, in a persistent grid.

role         warps  registers  does
score        4      160        S = Q K^T of 64 keys and the softmax; stores P (bf16) and the rescale factors.
                               Three quarters of Q stay in its registers (96 of them): without them in shared memory
                               there is room for a third key buffer
accumulate   8      160        holds the 64 x 512 output, 256 columns a warpgroup (128 registers a thread), and only
                               rescales, multiplies P V, and stores
loader       4      32         gathers key rows by 16-byte cp.async, and their mask, the initial value of the score
                               accumulator. A row whose index is invalid is zero-filled by the copy itself, so that
                               no value of unreferenced memory is read

The four warpgroups share 512 registers for each thread index: 160 + 2 * 160 + 32. If an accumulating warpgroup has
fewer than 160, ptxas serialises every wgmma of the kernel.

           64 keys                512 columns
64 heads [   S    ]  K: 512     [ wg 0, wg 1 | wg 0, wg 1 ]  K: 64 keys
                                  128   128    128   128

shared memory                bytes (231088 of 232448 with the barriers)
k_smem [3, 64, 512] bf16     196608    K and V are the same bytes: P V reads a buffer as it lies, Q K^T through a
                                       transposed view; three quarters of Q pass through a slot of it
q_smem [64, 128] bf16        16384     the last quarter of Q
p_smem [2, 64, 64] bf16      16384
a_smem [2, 64] fp32          512       rescale factors; after the last block of a row, 1 / (sum + sink)
b_smem [3, 64] fp32          768       0, or -inf where there is no key

barrier       arrives                               waits               count
k_full [3]    each loader thread's copies, and one  score               129
              more for the mask
k_empty [3]   accumulate (score, for Q)             loader              1
q_full        each loader thread's copies           score               128
q_empty       score                                 loader              1
p_full [2]    score                                 accumulate          1
p_empty [2]   accumulate                            score               1
s_done [2]    score, when Q K^T of the block after  accumulate          1
              is done

P V of block i is held back until Q K^T of block i + 1 is done: the two products never share the tensor cores, and
P V runs under the softmax of block i + 1. The copies are generic-proxy writes that wgmma reads through the async
proxy, ordered by the mbarrier alone and without fence.proxy.async, as usual for cp.async operands of wgmma; P is
stored by ordinary stores and does get the fence.

strides: as the signature says
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, warpgroup_mma, warpgroup_mma_wait

from ...launch import entry, launch_kernel
from ...lib import ring
from ...lib.gluon import async_load, barrier
from ...lib.sizes import cdiv
from ...lib.softmax import LN2, LOG2E, NEGATIVE
from .op import Call, Shape, Tile

HEADS = gl.constexpr(64)  # heads of one item: the M of wgmma
DIM = gl.constexpr(512)
BN = gl.constexpr(64)  # keys in a block
NBUF = gl.constexpr(3)  # key buffers of 64 KiB
NP = gl.constexpr(2)  # P buffers of 8 KiB
QC = gl.constexpr(128)  # columns in a chunk of Q
Q_REG = gl.constexpr(3)  # chunks of Q that live in registers; the fourth lives in shared memory
REG_SCORE = gl.constexpr(160)
REG_LOAD = gl.constexpr(32)  # leaves 160 for the accumulators: 512 = 160 + 2 * 160 + 32


def plan(shape: Shape) -> Tile | None:
    """There is nothing to choose: it takes any number of heads, and at 8 heads its tile of 64 is still as fast as the
    portable kernel (NVIDIA H200, Triton 3.6.0, 2026-11-22)."""
    return Tile(HEADS.value, BN.value, 8) if shape.vectors else None


def launch(call: Call, tile: Tile) -> None:
    """One program on each multiprocessor, since it takes all shared memory and all registers."""
    s_q, h_q, _ = call.q.shape
    groups = cdiv(h_q, tile.heads)
    n_items = s_q * groups
    launch_kernel(
        _prefill_wgmma_kernel, (min(call.shape.arch.sms, n_items),), *(call.q, call.kv, call.indices),
        call.indices if call.lengths is None else call.lengths,  # not read
        call.max_logits if call.sink is None else call.sink,  # not read
        *(call.out, call.max_logits, call.lse), *(n_items, call.kv.shape[0], h_q, call.indices.shape[1]),
        *(stride // 8 for stride in call.strides[:3]), call.indices.stride(0),
        *(stride // 8 for stride in call.strides[3:]), float(call.sm_scale) * LOG2E.value,
        HAS_LEN=call.lengths is not None, HAS_SINK=call.sink is not None, FLIP=not call.sm_scale > 0, GROUPS=groups,
        num_warps=tile.warps,
    )  # fmt: skip


@gluon.jit
def _row_blocks(len_ptr, row, topk, HAS_LEN: gl.constexpr):
    """The number of keys of one row, and of the blocks that hold them."""
    n = topk
    if HAS_LEN:
        n = gl.maximum(gl.minimum(gl.load(len_ptr + row), topk), 0)
    return n, (n + BN - 1) // BN


@gluon.jit
def _opaque(x):
    """x, hidden from the optimiser, so that addresses built from it are computed where they are used.

    Whatever depends on the thread index alone is otherwise hoisted out of the loop over items, and spilled.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], gl.int32, False, 1)


@gluon.jit
def _loader(tensors, smem, bars, sizes, strides, HAS_LEN: gl.constexpr, GROUPS: gl.constexpr):
    q_ptr, kv_ptr, idx_ptr, len_ptr = tensors
    k_smem, q_smem, b_smem = smem
    k_full, k_empty, q_full, q_empty = bars
    n_items, s_kv, h_q, topk = sizes
    q_stride_s8, q_stride_h8, kv_stride8, idx_stride = strides
    # 8 lanes cover one 128-byte line of a row; a warp instruction moves 4 lines.
    lay: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    lay_r: gl.constexpr = gl.SliceLayout(1, lay)
    lay_c: gl.constexpr = gl.SliceLayout(0, lay)
    slot = 0
    phase = 0
    q_phase = 0
    for item in range(gl.program_id(0), n_items, gl.num_programs(0)):
        row = item // GROUPS
        keys = _opaque(gl.arange(0, BN, lay_r))
        n, n_blocks = _row_blocks(len_ptr, row, topk, HAS_LEN)
        idx_row = idx_ptr + row.to(gl.int64) * idx_stride
        idx = gl.load(idx_row + keys, mask=keys < n, other=-1)

        h = _opaque((item % GROUPS) * HEADS) + gl.arange(0, HEADS, lay_r)
        qcols = gl.arange(0, QC, lay_c)
        q_rows = q_ptr + (row.to(gl.int64) * q_stride_s8 + h.to(gl.int64) * q_stride_h8) * 8
        h_ok = h < h_q
        # The part of Q that score keeps in registers passes through one slot of the key ring.
        mbarrier.wait(k_empty.index(slot), phase ^ 1)
        for c in gl.static_range(Q_REG):
            chunk = k_smem.index(slot).slice(c * QC, QC, 1)
            async_load(chunk, q_rows[:, None] + (qcols + c * QC)[None, :], mask=h_ok[:, None])
        async_copy.mbarrier_arrive(k_full.index(slot), increment_count=False)
        mbarrier.arrive(k_full.index(slot), count=1)
        slot, phase = ring.advance(slot, phase, NBUF)
        mbarrier.wait(q_empty, q_phase ^ 1)
        async_load(q_smem, q_rows[:, None] + (qcols + Q_REG * QC)[None, :], mask=h_ok[:, None])
        async_copy.mbarrier_arrive(q_full, increment_count=False)
        q_phase ^= 1

        cols = gl.arange(0, DIM, lay_c)
        for i in range(n_blocks):
            ok = idx.to(gl.uint32, bitcast=True) < s_kv.to(gl.uint32)  # both bounds at once
            src = kv_ptr + gl.where(ok, idx, 0).to(gl.int64) * kv_stride8 * 8
            nxt = keys + (i + 1) * BN
            idx = gl.load(idx_row + nxt, mask=nxt < n, other=-1)
            mbarrier.wait(k_empty.index(slot), phase ^ 1)
            b_smem.index(slot).store(gl.where(ok, 0.0, float("-inf")))
            async_load(k_smem.index(slot), src[:, None] + cols[None, :], mask=ok[:, None])
            async_copy.mbarrier_arrive(k_full.index(slot), increment_count=False)
            # One ordinary arrival more: it releases the stores of the mask, as the copies' arrivals do not.
            ring.arrive(k_full.index(slot))
            slot, phase = ring.advance(slot, phase, NBUF)


@gluon.jit
def _row_max(s, rows: gl.constexpr):
    # In two steps: twice as many independent chains of comparisons.
    return gl.convert_layout(gl.max(gl.max(gl.reshape(s, [HEADS, BN // 8, 8]), 1), 1), rows)


@gluon.jit
def _score(
    tensors, smem, bars, sizes, scale,
    HAS_LEN: gl.constexpr, HAS_SINK: gl.constexpr, FLIP: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    len_ptr, sink_ptr, max_ptr, lse_ptr = tensors
    k_smem, q_smem, b_smem, p_smem, a_smem = smem
    k_full, k_empty, q_full, q_empty, p_full, p_empty, s_done = bars
    n_items, h_q, topk = sizes
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    qlay: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    # 4 partial sums per head, one in each thread that holds the head.
    plast: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[8, 0]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[HEADS, 4],
    )
    slot = 0
    phase = 0
    q_phase = 0
    pslot = 0
    pphase = 0
    for item in range(gl.program_id(0), n_items, gl.num_programs(0)):
        row = item // GROUPS
        head0 = (item % GROUPS) * HEADS
        _n, n_blocks = _row_blocks(len_ptr, row, topk, HAS_LEN)
        mbarrier.wait(k_full.index(slot), phase)
        q = ()
        for c in gl.static_range(Q_REG):
            q += (k_smem.index(slot).slice(c * QC, QC, 1).load(qlay),)  # type: ignore[assignment]
        ring.arrive(k_empty.index(slot))
        slot, phase = ring.advance(slot, phase, NBUF)
        mbarrier.wait(q_full, q_phase)
        q_phase ^= 1

        # m_i is the running maximum (of the raw products, unless FLIP), l_parts the running sum of exp, added up
        # across threads only at the end of the row.
        m_i = gl.full([HEADS], NEGATIVE, gl.float32, rows)
        l_parts = gl.zeros([HEADS, 4], gl.float32, plast)
        for i in range(n_blocks):
            mbarrier.wait(k_full.index(slot), phase)
            kb = k_smem.index(slot)
            # The mask (0 or -inf for each key) is the initial value of the accumulator.
            acc, _ = gl.broadcast(b_smem.index(slot).load(gl.SliceLayout(0, mma))[None, :], m_i[:, None])
            for c in gl.static_range(Q_REG):
                acc = warpgroup_mma(q[c], kb.slice(c * QC, QC, 1).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma(q_smem, kb.slice(Q_REG * QC, QC, 1).permute((1, 0)), acc, is_async=True)
            s = warpgroup_mma_wait(0, deps=(acc,))
            # P V of the block before may now have the tensor cores.
            mbarrier.arrive(s_done.index(pslot ^ 1), count=1, pred=i > 0)
            if FLIP:  # a scale that is not positive would turn the maximum into a minimum
                s = gl.where(s == float("-inf"), s, s * scale)
            m_new = gl.maximum(m_i, _row_max(s, rows))
            if FLIP:
                alpha = gl.exp2(m_i - m_new)
                p = gl.exp2(s - m_new[:, None])
            else:
                alpha = gl.exp2((m_i - m_new) * scale)
                p = gl.exp2(s * scale - (m_new * scale)[:, None])
            m_i = m_new
            mbarrier.wait(p_empty.index(pslot), pphase ^ 1)
            p_smem.index(pslot).store(p.to(gl.bfloat16))
            a_smem.index(pslot).store(alpha)
            ring.publish(p_full.index(pslot))
            psum = gl.convert_layout(gl.sum(gl.sum(gl.reshape(p, [HEADS, BN // 8, 4, 2]), 1), 2), plast)
            l_parts = l_parts * gl.convert_layout(alpha, gl.SliceLayout(1, plast))[:, None] + psum
            slot, phase = ring.advance(slot, phase, NBUF)
            pslot, pphase = ring.advance(pslot, pphase, NP)
        mbarrier.arrive(s_done.index(pslot ^ 1), count=1, pred=n_blocks > 0)
        # Without the barrier, a row of no blocks could let the loader run two phases past a late warp.
        ring.arrive(q_empty)
        l_i = gl.convert_layout(gl.sum(l_parts, 1), rows)
        if not FLIP:
            m_i = m_i * scale

        # Final factor of each head: 1 / (sum + sink), or 0 for a row with nothing valid.
        h = _opaque(head0) + gl.arange(0, HEADS, rows)
        h_ok = h < h_q
        den = l_i
        if HAS_SINK:
            sink = gl.load(sink_ptr + h, mask=h_ok, other=float("-inf"))
            den = l_i + gl.exp2(sink * LOG2E - m_i)
        fin = gl.where(l_i > 0.0, 1.0 / gl.where(l_i > 0.0, den, 1.0), 0.0)
        mbarrier.wait(p_empty.index(pslot), pphase ^ 1)
        a_smem.index(pslot).store(fin)
        ring.arrive(p_full.index(pslot))
        mbarrier.arrive(s_done.index(pslot), count=1)
        pslot, pphase = ring.advance(pslot, pphase, NP)
        dst = row.to(gl.int64) * h_q + h
        lse = gl.where(l_i > 0.0, (m_i + gl.log2(gl.where(l_i > 0.0, l_i, 1.0))) * LN2, float("inf"))
        gl.store(max_ptr + dst, gl.where(l_i > 0.0, m_i * LN2, float("-inf")), mask=h_ok)
        gl.store(lse_ptr + dst, lse, mask=h_ok)


@gluon.jit
def _emit(x, buf, dst, column: gl.constexpr, ok, lay: gl.constexpr):
    """Store 64 columns of the output through shared memory, with 16-byte accesses to global memory."""
    barrier()
    buf.store(gl.reshape(x, [HEADS, 64]))
    barrier()
    gl.store(dst + column, buf.load(lay), mask=ok)


@gluon.jit
def _accumulate(tensors, smem, bars, sizes, strides, HAS_LEN: gl.constexpr, GROUPS: gl.constexpr):
    out_ptr, len_ptr = tensors
    k_smem, p_smem, a_smem = smem
    k_empty, p_full, p_empty, s_done = bars
    n_items, h_q, topk = sizes
    o_stride_s8, o_stride_h8 = strides
    # Two warpgroups side by side along the columns: 128 columns of each 256 belong to one. (The instruction
    # with N = 256 needs more registers than ptxas grants a kernel of 512 threads.)
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 2], instr_shape=[16, 128, 16])
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    wlay: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    slot = 0
    pslot = 0
    pphase = 0
    for item in range(gl.program_id(0), n_items, gl.num_programs(0)):
        row = item // GROUPS
        head0 = (item % GROUPS) * HEADS
        _n, n_blocks = _row_blocks(len_ptr, row, topk, HAS_LEN)
        slot, _ = ring.advance(slot, 0, NBUF)  # the slot that Q passed through
        acc = gl.zeros([HEADS, DIM], gl.float32, mma)
        for _ in range(n_blocks):
            mbarrier.wait(p_full.index(pslot), pphase)
            alpha = a_smem.index(pslot).load(rows)
            acc = acc * alpha[:, None]
            mbarrier.wait(s_done.index(pslot), pphase)
            tok = warpgroup_mma(p_smem.index(pslot), k_smem.index(slot), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(tok,))
            ring.arrive(k_empty.index(slot))
            mbarrier.arrive(p_empty.index(pslot), count=1)
            slot, _ = ring.advance(slot, 0, NBUF)
            pslot, pphase = ring.advance(pslot, pphase, NP)

        # The last entry of a row carries the final factors; its P buffer is free for the output.
        mbarrier.wait(p_full.index(pslot), pphase)
        mbarrier.wait(s_done.index(pslot), pphase)
        fin = a_smem.index(pslot).load(rows)
        o = (acc * fin[:, None]).to(gl.bfloat16)
        h = _opaque(head0) + gl.arange(0, HEADS, gl.SliceLayout(1, wlay))
        c = gl.arange(0, 64, gl.SliceLayout(0, wlay))
        dst = out_ptr + (row.to(gl.int64) * o_stride_s8 + h.to(gl.int64) * o_stride_h8) * 8
        dst = dst[:, None] + (c % 32 + c // 32 * 128)[None, :]
        h_ok = (h < h_q)[:, None]
        buf = p_smem.index(pslot)
        # Column bits 256, 128 (the warpgroup), 64 and 32; the pieces are ordered by bits 256, 64, 32.
        o = gl.permute(gl.reshape(o, [HEADS, 2, 2, 2, 2, 32]), [0, 2, 5, 4, 3, 1])
        pieces = (o,)
        for level in gl.static_range(3):
            halves = ()
            for i in gl.static_range(2**level):
                halves += gl.split(pieces[i])
            pieces = halves  # type: ignore[assignment]
        for i in gl.static_range(8):
            _emit(pieces[i], buf, dst, i // 4 * 256 + i % 4 * 32, h_ok, wlay)
        ring.arrive(p_empty.index(pslot))
        pslot, pphase = ring.advance(pslot, pphase, NP)


@entry(gluon.jit, "n_items", any_alignment=["idx_ptr", "len_ptr", "sink_ptr", "max_ptr", "lse_ptr"])
def _prefill_wgmma_kernel(
    q_ptr, kv_ptr, idx_ptr, len_ptr, sink_ptr, out_ptr, max_ptr, lse_ptr,
    n_items, s_kv, h_q, topk,
    q_stride_s8, q_stride_h8, kv_stride8,  # in 8 elements (16 bytes), so that alignment is known
    idx_stride,  # in indices
    o_stride_s8, o_stride_h8,  # in 8 elements
    scale,
    HAS_LEN: gl.constexpr, HAS_SINK: gl.constexpr, FLIP: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    t_lay: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    f_lay: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_smem = gl.allocate_shared_memory(gl.bfloat16, [NBUF, BN, DIM], t_lay)
    q_smem = gl.allocate_shared_memory(gl.bfloat16, [HEADS, QC], t_lay)
    p_smem = gl.allocate_shared_memory(gl.bfloat16, [NP, HEADS, BN], t_lay)
    a_smem = gl.allocate_shared_memory(gl.float32, [NP, HEADS], f_lay)  # rescale factors
    b_smem = gl.allocate_shared_memory(gl.float32, [NBUF, BN], f_lay)  # masks
    # Every loader thread arrives when its copies have landed, and one more for the mask.
    k_full, k_empty = ring.barriers(NBUF, (129, 1))
    p_full, p_empty, s_done = ring.barriers(NP, (1, 1, 1))
    q_full, q_empty = ring.barriers(1, (128, 1))
    q_full, q_empty = q_full.index(0), q_empty.index(0)
    ring.sync()
    sizes = (n_items, h_q, topk)
    q_bars, p_bars = (k_full, k_empty, q_full, q_empty), (k_empty, p_full, p_empty, s_done)
    bars = (k_full, k_empty, q_full, q_empty, p_full, p_empty, s_done)
    smem, tensors = (k_smem, q_smem, b_smem, p_smem, a_smem), (len_ptr, sink_ptr, max_ptr, lse_ptr)
    sources, strides = (q_ptr, kv_ptr, idx_ptr, len_ptr), (q_stride_s8, q_stride_h8, kv_stride8, idx_stride)
    target, o_strides, k_smems = (out_ptr, len_ptr), (o_stride_s8, o_stride_h8), (k_smem, q_smem, b_smem)
    gl.warp_specialize(
        [
            (_accumulate, (target, (k_smem, p_smem, a_smem), p_bars, sizes, o_strides, HAS_LEN, GROUPS)),
            (_score, (tensors, smem, bars, sizes, scale, HAS_LEN, HAS_SINK, FLIP, GROUPS)),
            (_loader, (sources, k_smems, q_bars, (n_items, s_kv, h_q, topk), strides, HAS_LEN, GROUPS)),
        ],
        [4, 4],
        [REG_SCORE, REG_LOAD],
    )
