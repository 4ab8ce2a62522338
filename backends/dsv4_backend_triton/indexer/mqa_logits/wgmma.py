"""``mqa_logits`` (full form, 64 heads of 128) on wgmma: warp-specialised, persistent.

A key tile is fetched once for both consumers, no barrier spans the block, and one consumer's head sum overlaps the
other's product.

    role            warps   registers   does
    producer        1       40          fetches queries and keys through tensor maps
    consumer 0, 1   4 each  232         keys x its two queries, relu, head sum in registers, store

              query 2 WHO  query 2 WHO + 1
              64 heads     64 heads
    KEYS keys [          S          ] -> [KEYS, 2] logits        K: the 128 dimensions

    shared memory                  bytes, with KEYS = 128 and STAGES = 6
    q_smem [4, 128, 128] e4m3      65536     slot 2 * (turn % 2) + WHO
    k_smem [STAGES, KEYS, 128]     98304

    barrier          arrives                     waits       count
    q_full [2]       the tensor map's bytes      consumers   1
    q_empty [2]      each consumer               producer    2
    k_full [STAGES]  the tensor map's bytes      consumers   1
    k_empty [STAGES] each consumer               producer    2

    strides: w_stride, out_stride in elements
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from ...configurations import configured
from ...launch import entry, launch_kernel
from ...lib import ring
from ...lib.boxes import boxes
from ...lib.gluon import load_box
from ...lib.sizes import cdiv
from .op import Call, Shape

COLUMNS = gl.constexpr(128)  # two queries of 64 heads: the N of one wgmma
DIM = gl.constexpr(128)
ROWS = gl.constexpr(4)  # queries of a block
FEWEST_ROWS = 4


class Config(NamedTuple):
    keys: int
    stages: int
    registers: int


def plan(shape: Shape) -> Config | None:
    if shape.compressed or shape.rows < FEWEST_ROWS or (shape.h, shape.d) != (64, 128):
        return None
    return Config(**configured("mqa_logits", "wgmma", shape.arch))


def takes(call: Call) -> bool:
    """Contiguous queries, and keys on 16-byte boundaries."""
    q, k = call.q, call.k
    contiguous = q.stride(2) == 1 and q.stride(1) == 128 and q.stride(0) == 8192
    pointers = (q.data_ptr() | k.data_ptr()) % 16 == 0
    return contiguous and pointers and k.stride(0) % 16 == 0 and k.stride(0) >= 128


def launch(call: Call, config: Config) -> None:
    (m, _, _), n, sms = call.q.shape, call.k.shape[0], call.shape.arch.sms
    row_blocks = cdiv(m, 4)
    chunk = _balanced_chunk(n, row_blocks, config.keys, sms)
    launch_kernel(
        _mqa_logits_wgmma_kernel, (min(sms, row_blocks * cdiv(n, chunk)),),
        boxes(call.q, [m * 64, 128], [128, 1], [128, 128], 8),
        boxes(call.k, [n, 128], [call.k.stride(0), 1], [config.keys, 128], 8),
        *(call.k_scale, call.weights, call.starts, call.ends, call.out),
        *(m, n, call.weights.stride(0), call.out.stride(0), chunk), KEYS=config.keys, STAGES=config.stages,
        CONSUMER_REGS=config.registers, num_warps=4,
    )  # fmt: skip


def _balanced_chunk(columns: int, row_blocks: int, block_n: int, sms: int) -> int:
    """The number of columns of an item. A row block is cut into the number of pieces whose last round is fullest; each
    piece costs about 2 % of a block's time, since the queries are read again."""
    pieces = range(1, max(8, cdiv(sms, row_blocks)) + 1)
    best = min(pieces, key=lambda c: cdiv(row_blocks * c, sms) / c * (1 + 0.02 * c))
    return cdiv(cdiv(columns, best), block_n) * block_n


@gluon.jit
def _item(index, work, KEYS: gl.constexpr):
    """First row, column range, and the tile-aligned part of it that a row reaches."""
    starts_ptr, ends_ptr, m, n, chunk, row_blocks, _ = work
    row0 = (index % row_blocks) * ROWS
    c0 = (index // row_blocks) * chunk
    c1 = gl.minimum(c0 + chunk, n)
    lo = n
    hi = 0
    for i in gl.static_range(ROWS):
        row = gl.minimum(row0 + i, m - 1)
        start = gl.minimum(gl.maximum(gl.load(starts_ptr + row), 0), n)
        end = gl.minimum(gl.maximum(gl.load(ends_ptr + row), 0), n)
        filled = end > start
        lo = gl.minimum(lo, gl.where(filled, start, n))
        hi = gl.maximum(hi, gl.where(filled, end, 0))
    lo = gl.minimum(gl.maximum(c0, lo // KEYS * KEYS), c1)
    hi = gl.maximum(gl.minimum(c1, hi), lo)
    return row0, c0, c1, lo, hi


@gluon.jit
def _producer(descs, smem, bars, work, KEYS: gl.constexpr, STAGES: gl.constexpr):
    q_desc, k_desc = descs
    q_smem, k_smem = smem
    q_full, q_empty, k_full, k_empty = bars
    _, _, _, _, _, _, items = work
    step = 0
    turn = 0
    for index in range(gl.program_id(0), items, gl.num_programs(0)):
        row0, _c0, _c1, lo, hi = _item(index, work, KEYS)
        slot = ring.empty_slot(q_empty, turn, 2)
        mbarrier.expect(q_full.index(slot), 2 * COLUMNS * DIM)
        for i in gl.static_range(2):
            load_box(q_desc, [row0 * 64 + i * COLUMNS, 0], q_full.index(slot), q_smem.index(2 * slot + i))
        turn += 1
        for j in range(lo, hi, KEYS):
            stage = ring.empty_slot(k_empty, step, STAGES)
            mbarrier.expect(k_full.index(stage), KEYS * DIM)
            load_box(k_desc, [j, 0], k_full.index(stage), k_smem.index(stage))
            step += 1


@gluon.jit
def _fill(out_ptr, row, m, out_stride, begin, end):
    """-inf to columns [begin, end) of two rows."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    lane = gl.arange(0, 512, layout=layout)
    value = gl.full([512], float("-inf"), gl.float32, layout=layout)
    for j in range(begin, end, 512):
        for i in gl.static_range(2):
            col = j + lane
            ptr = out_ptr + (row + i).to(gl.int64) * out_stride + col
            gl.store(ptr, value, mask=(col < end) & (row + i < m), cache_modifier=".cs")


@gluon.jit
def _consumer(WHO: gl.constexpr, tensors, smem, bars, work, KEYS: gl.constexpr, STAGES: gl.constexpr):
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    zeros = gl.zeros([KEYS, COLUMNS], gl.float32, layout=mma)
    result: gl.constexpr = gl.sum(gl.reshape(zeros, [KEYS, 2, 64]), axis=2).type.layout
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, mma))
    key = gl.arange(0, KEYS, layout=gl.SliceLayout(1, result))
    pair = gl.arange(0, 2, layout=gl.SliceLayout(0, result))
    k_scale_ptr, w_ptr, out_ptr, w_stride, out_stride = tensors
    starts_ptr, ends_ptr, m, n, _, _, items = work
    q_smem, k_smem = smem
    q_full, q_empty, k_full, k_empty = bars
    step = 0
    turn = 0
    for index in range(gl.program_id(0), items, gl.num_programs(0)):
        row0, c0, c1, lo, hi = _item(index, work, KEYS)
        row = row0 + WHO * 2
        w_row = row + column // 64
        # half of the weights: the relu below is doubled
        w = 0.5 * gl.load(w_ptr + w_row.to(gl.int64) * w_stride + column % 64, mask=w_row < m, other=0.0)
        rows = row + pair
        rows_in = gl.minimum(rows, m - 1)
        start = gl.maximum(gl.load(starts_ptr + rows_in), 0)
        end = gl.load(ends_ptr + rows_in)
        row_ptr = out_ptr + rows.to(gl.int64) * out_stride
        row_ok = rows < m
        scale = gl.load(k_scale_ptr + lo + key, mask=lo + key < n, other=0.0)
        slot = ring.full_slot(q_full, turn, 2)
        q_t = q_smem.index(2 * slot + WHO).permute((1, 0))
        for j in range(lo, hi, KEYS):
            ahead = j + KEYS + key
            scale_next = gl.load(k_scale_ptr + ahead, mask=ahead < n, other=0.0)
            stage = ring.full_slot(k_full, step, STAGES)
            s = warpgroup_mma(k_smem.index(stage), q_t, zeros, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(k_empty.index(stage))
            s = (s + gl.abs(s)) * w[None, :]
            total = gl.sum(gl.reshape(s, [KEYS, 2, 64]), axis=2) * scale[:, None]
            col = j + key
            inside = (col[:, None] >= start[None, :]) & (col[:, None] < end[None, :])
            total = gl.where(inside, total, float("-inf"))
            ptr, stored = row_ptr[None, :] + col[:, None], row_ok[None, :] & (col < c1)[:, None]
            gl.store(ptr, total, mask=stored, cache_modifier=".cs")
            scale = scale_next
            step += 1
        mbarrier.arrive(q_empty.index(slot))
        turn += 1
        _fill(out_ptr, row, m, out_stride, c0, lo)
        _fill(out_ptr, row, m, out_stride, gl.minimum((hi + KEYS - 1) // KEYS * KEYS, c1), c1)


@entry(gluon.jit, "m", any_alignment=["k_scale_ptr", "w_ptr", "starts_ptr", "ends_ptr", "out_ptr"])
def _mqa_logits_wgmma_kernel(
    q_desc, k_desc,  # [m * 64, 128] in boxes of [128, 128], [n, 128] in boxes of [KEYS, 128]
    k_scale_ptr, w_ptr, starts_ptr, ends_ptr, out_ptr,
    m, n, w_stride, out_stride, chunk,
    KEYS: gl.constexpr, STAGES: gl.constexpr, CONSUMER_REGS: gl.constexpr,
):  # fmt: skip
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [4, COLUMNS, DIM], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, KEYS, DIM], k_desc.layout)
    q_full, q_empty = ring.barriers(2, (1, 2))
    k_full, k_empty = ring.barriers(STAGES, (1, 2))
    row_blocks = gl.cdiv(m, ROWS)
    work = (starts_ptr, ends_ptr, m, n, chunk, row_blocks, row_blocks * gl.cdiv(n, chunk))
    tensors, smem = (k_scale_ptr, w_ptr, out_ptr, w_stride, out_stride), (q_smem, k_smem)
    bars = (q_full, q_empty, k_full, k_empty)
    gl.warp_specialize(
        [
            (_consumer, (0, tensors, smem, bars, work, KEYS, STAGES)),
            (_consumer, (1, tensors, smem, bars, work, KEYS, STAGES)),
            (_producer, ((q_desc, k_desc), smem, bars, work, KEYS, STAGES)),
        ],
        [4, 1],
        [CONSUMER_REGS, 40],
    )
