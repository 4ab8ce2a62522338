"""``mqa_logits`` on wgmma: warp-specialised, persistent.

A key tile is fetched once for both consumers, and no barrier spans the block. Each consumer has one half of a tile on
the tensor cores while it adds up the heads of the other. With one product each, the two fall in step, and the tensor
cores idle during both head sums.

    role            warps   registers   does
    producer        1       40          fetches queries and keys through tensor maps
    consumer 0, 1   4 each  232         keys x its two queries, relu, head sum in registers, store; -inf elsewhere

              query 2 WHO  query 2 WHO + 1
              64 heads     64 heads
    64 keys [            S          ] -> [64, 2] logits        K: the 128 dimensions

    shared memory                  bytes, with KEYS = 128 and STAGES = 8
    q_smem [4, 128, 128] e4m3      65536     slot 2 * (turn % 2) + WHO
    k_smem [STAGES, KEYS, 128]     131072

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
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from ...configurations import configured
from ...launch import entry, launch_kernel
from ...lib import ring
from ...lib.boxes import boxes
from ...lib.gluon import load_box
from ...lib.sizes import cdiv
from ..head_sum import COLUMNS, HALF, logits, product, products, relu_head_sum
from .op import Call, Shape

KEYS = gl.constexpr(128)  # two products
DIM = gl.constexpr(128)
ROWS = gl.constexpr(4)  # queries of a block
FEWEST_ROWS = 4
MOST_KEYS = 2**31 - 2**16  # and columns: a program's last tiles lie behind both, and places are int32


class Config(NamedTuple):
    stages: int
    registers: int


def plan(shape: Shape) -> Config | None:
    if shape.rows < FEWEST_ROWS or (shape.h, shape.d) != (64, 128):
        return None
    return Config(**configured("mqa_logits", "wgmma", shape.arch))


def takes(call: Call) -> bool:
    """Contiguous queries, and keys on 16-byte boundaries, not too many."""
    q, k = call.q, call.k
    contiguous = q.stride(2) == 1 and q.stride(1) == 128 and q.stride(0) == 8192
    pointers = (q.data_ptr() | k.data_ptr()) % 16 == 0
    plain = contiguous and pointers and k.stride(0) % 16 == 0 and k.stride(0) >= 128
    return plain and 0 < k.shape[0] < MOST_KEYS - call.out.shape[1]


def launch(call: Call, config: Config) -> None:
    (m, _, _), n, columns, sms = call.q.shape, call.k.shape[0], call.out.shape[1], call.shape.arch.sms
    tiles, each, all_tiles = _shares(cdiv(m, 4), cdiv(columns, 128), sms)
    launch_kernel(
        _mqa_logits_wgmma_kernel, (cdiv(all_tiles, each),),
        boxes(call.q, [m * 64, 128], [128, 1], [128, 128], 8),
        boxes(call.k, [n, 128], [call.k.stride(0), 1], [128, 128], 8),
        *(call.k_scale, call.weights, call.starts, call.ends, call.out),
        *(m, n, columns, call.weights.stride(0), call.out.stride(0), tiles, each, all_tiles),
        COMPRESSED=call.shape.compressed, STAGES=config.stages, CONSUMER_REGS=config.registers, num_warps=4,
    )  # fmt: skip


def _shares(row_blocks: int, tiles: int, sms: int) -> tuple[int, int, int]:
    """The tiles of a row block, those of a program, and all. They are dealt in the order of row blocks, to each program
    the same number. With few rows a program has tiles of one row block only, which is padded with empty tiles."""
    each = cdiv(row_blocks * tiles, sms)
    pieces = cdiv(tiles, each)
    if row_blocks * pieces <= sms:
        each = cdiv(tiles, pieces)
        tiles = pieces * each
    return tiles, each, row_blocks * tiles


@gluon.jit
def _item(index, work, COMPRESSED: gl.constexpr):
    """First row and columns of this program's share of a row block, the keys that a row of it reaches in them, and the
    first key and the end of each row."""
    starts_ptr, ends_ptr, m, n, columns, tiles, first, last = work
    row0 = index * ROWS
    ends = last - index * tiles
    c0 = gl.minimum(gl.maximum(first - index * tiles, 0) * KEYS, columns)
    c1 = gl.minimum(gl.minimum(ends, tiles) * KEYS, columns)
    lo = n
    hi = 0
    begin = ()
    end = ()
    for i in gl.static_range(ROWS):
        row = gl.minimum(row0 + i, m - 1)
        start = gl.minimum(gl.maximum(gl.load(starts_ptr + row), 0), n)
        count = gl.minimum(gl.maximum(gl.load(ends_ptr + row), 0), n) - start
        if COMPRESSED:
            count = gl.minimum(count, columns)
        count = gl.where(row0 + i < m, gl.maximum(count, 0), 0)
        lo = gl.minimum(lo, gl.where(count > 0, start, n))
        hi = gl.maximum(hi, gl.where(count > 0, start + count, 0))
        begin += (start,)  # type: ignore[assignment]
        end += (start + count,)  # type: ignore[assignment]
    if COMPRESSED:
        # rows that start at different keys: the last share has what goes beyond the columns of the first
        hi = gl.where(ends < tiles, gl.minimum(hi, lo + c1), hi)
        lo += c0
    else:
        lo = gl.minimum(gl.maximum(c0, lo // KEYS * KEYS), c1)
        hi = gl.minimum(c1, hi)
    return row0, c0, c1, lo, hi, begin, end


@gluon.jit
def _producer(descs, smem, bars, work, STAGES: gl.constexpr, COMPRESSED: gl.constexpr):
    q_desc, k_desc = descs
    q_smem, k_smem = smem
    q_full, q_empty, k_full, k_empty = bars
    _, _, _, _, _, tiles, first, last = work
    step = 0
    turn = 0
    for index in range(first // tiles, (last + tiles - 1) // tiles):
        row0, _c0, _c1, lo, hi, _begin, _end = _item(index, work, COMPRESSED)
        if lo < hi:
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
def _fill(row_ptr, begin, end):
    """-inf to columns [begin, end) of a row."""
    lane = gl.arange(0, 512, layout=gl.BlockedLayout([1], [32], [4], [0]))
    value = gl.full([512], float("-inf"), gl.float32, layout=gl.BlockedLayout([1], [32], [4], [0]))
    for j in range(begin, end, 512):
        gl.store(row_ptr + j + lane, value, mask=j + lane < end, cache_modifier=".cs")


@gluon.jit
def _store(s, w, key, scale, begin, end, row_ptr):
    """The logits of the keys of each row."""
    total = relu_head_sum(s, w) * scale[:, None]
    inside = (key[:, None] >= begin[None, :]) & (key[:, None] < end[None, :])
    gl.store(row_ptr[None, :] + key[:, None], total, mask=inside, cache_modifier=".cs")


@gluon.jit
def _consumer(
    WHO: gl.constexpr, tensors, smem, bars, work, STAGES: gl.constexpr, COMPRESSED: gl.constexpr
):  # fmt: skip
    head = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, products(2)))
    lane = gl.arange(0, HALF, layout=gl.SliceLayout(1, logits(2)))
    pair = gl.arange(0, 2, layout=gl.SliceLayout(0, logits(2)))
    k_scale_ptr, w_ptr, out_ptr, w_stride, out_stride = tensors
    _, _, m, n, _, tiles, first, last = work
    q_smem, k_smem = smem
    q_full, q_empty, k_full, k_empty = bars
    step = 0
    turn = 0
    for index in range(first // tiles, (last + tiles - 1) // tiles):
        row0, c0, c1, lo, hi, begin, end = _item(index, work, COMPRESSED)
        row = row0 + WHO * 2
        if lo < hi:
            w_row = row + head // 64
            # half of the weights: the relu is doubled
            w = 0.5 * gl.load(w_ptr + w_row.to(gl.int64) * w_stride + head % 64, mask=w_row < m, other=0.0)
            begins = gl.where(pair == 0, begin[2 * WHO], begin[2 * WHO + 1])
            ends = gl.where(pair == 0, end[2 * WHO], end[2 * WHO + 1])
            row_ptr = out_ptr + (row + pair).to(gl.int64) * out_stride
            if COMPRESSED:
                row_ptr -= begins
            scale_a = gl.load(k_scale_ptr + lo + lane, mask=lo + lane < n, other=0.0)
            scale_b = gl.load(k_scale_ptr + lo + HALF + lane, mask=lo + HALF + lane < n, other=0.0)
            slot = ring.full_slot(q_full, turn, 2)
            q_t = q_smem.index(2 * slot + WHO).permute((1, 0))
            stage = ring.full_slot(k_full, step, STAGES)
            a = product(k_smem.index(stage).slice(0, HALF), q_t)
            for j in range(lo, hi, KEYS):
                more = j + KEYS < hi
                step += 1
                key = j + lane
                ahead = key + KEYS
                next_a = gl.load(k_scale_ptr + ahead, mask=ahead < n, other=0.0)
                next_b = gl.load(k_scale_ptr + ahead + HALF, mask=ahead + HALF < n, other=0.0)
                s = warpgroup_mma_wait(0, deps=[a])
                b = product(k_smem.index(stage).slice(HALF, HALF), q_t)
                mbarrier.arrive(k_empty.index((step + STAGES - 2) % STAGES), pred=j > lo)
                after = step % STAGES
                mbarrier.wait(k_full.index(after), (step // STAGES) & 1, pred=more)
                # The branch keeps the head sum behind the product's start: the assembler would mix them.
                if row < m:
                    _store(s, w, key, scale_a, begins, ends, row_ptr)
                s = warpgroup_mma_wait(0, deps=[b])
                # beyond the last tile: the product of any bytes, which is not used
                a = product(k_smem.index(after).slice(0, HALF), q_t)
                if row < m:
                    _store(s, w, key + HALF, scale_b, begins, ends, row_ptr)
                stage = after
                scale_a = next_a
                scale_b = next_b
            warpgroup_mma_wait(0, deps=[a])
            mbarrier.arrive(k_empty.index((step + STAGES - 1) % STAGES))
            mbarrier.arrive(q_empty.index(slot))
            turn += 1
        for i in gl.static_range(2):
            if row + i < m:
                fill_ptr = out_ptr + (row + i).to(gl.int64) * out_stride
                filled = end[2 * WHO + i]
                if COMPRESSED:
                    filled -= begin[2 * WHO + i]
                else:
                    _fill(fill_ptr, c0, gl.minimum(begin[2 * WHO + i], c1))
                _fill(fill_ptr, gl.maximum(filled, c0), c1)


@entry(gluon.jit, "m", any_alignment=["k_scale_ptr", "w_ptr", "starts_ptr", "ends_ptr", "out_ptr"])
def _mqa_logits_wgmma_kernel(
    q_desc, k_desc,  # [m * 64, 128] in boxes of [128, 128], [n, 128] in boxes of [KEYS, 128]
    k_scale_ptr, w_ptr, starts_ptr, ends_ptr, out_ptr,
    m, n, columns, w_stride, out_stride, tiles, each, all_tiles,
    COMPRESSED: gl.constexpr, STAGES: gl.constexpr, CONSUMER_REGS: gl.constexpr,
):  # fmt: skip
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [4, COLUMNS, DIM], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, KEYS, DIM], k_desc.layout)
    q_full, q_empty = ring.barriers(2, (1, 2))
    k_full, k_empty = ring.barriers(STAGES, (1, 2))
    first = gl.program_id(0) * each
    work = (starts_ptr, ends_ptr, m, n, columns, tiles, first, gl.minimum(first + each, all_tiles))
    tensors, smem = (k_scale_ptr, w_ptr, out_ptr, w_stride, out_stride), (q_smem, k_smem)
    bars = (q_full, q_empty, k_full, k_empty)
    gl.warp_specialize(
        [
            (_consumer, (0, tensors, smem, bars, work, STAGES, COMPRESSED)),
            (_consumer, (1, tensors, smem, bars, work, STAGES, COMPRESSED)),
            (_producer, ((q_desc, k_desc), smem, bars, work, STAGES, COMPRESSED)),
        ],
        [4, 1],
        [CONSUMER_REGS, 40],
    )
