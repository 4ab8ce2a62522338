"""``hc_prenorm_gemm`` for the most rows on wgmma: warp-specialised.

The portable kernel has one group of warps that waits for a tile, splits ``fn`` into two bf16, writes that to shared
memory for the tensor cores, and multiplies: one after the other, which reaches three quarters of the H200's bandwidth.
Here three roles overlap.

    role       warps                registers   does
    consumer   ROWS / 16, a group   80          x times both halves at once, straight from shared memory, and squares
               for 64 rows
    splitter   4                    80          turns each fn tile into [high; low], bf16
    producer   1                    40          fetches tiles of x and fn through tensor maps

                32 mixes high, 32 low
    ROWS rows [ acc                  ]     K: STEP columns at a time, ``per`` in all

    shared memory                          bytes, with ROWS = 128, STEP = 64, STAGES = 6, RING = 4
    x_smem [STAGES, ROWS, STEP] bf16       98304
    fn_smem [STAGES, 32, STEP] fp32        49152
    split_smem [RING, 64, STEP] bf16       32768

    barrier           arrives                  waits                count
    x_full [STAGES]   the tensor maps' bytes   splitter, consumer   1
    x_empty [STAGES]  splitter, consumer       producer             2
    s_full [RING]     splitter                 consumer             1
    s_empty [RING]    consumer                 splitter             1

    strides: in elements. N <= 32; K and per are multiples of STEP.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from ...configurations import configured
from ...launch import entry
from ...lib import ring
from ...lib.boxes import boxes
from ...lib.gluon import launch_dependents, load_box
from .op import Call, Shape
from .reduce import launch_splits

MIXES = gl.constexpr(32)  # rows of fn in a tile; those beyond n are zeros that the tensor map fills in
FEWEST_ROWS = 4097


class Config(NamedTuple):
    """``stages`` of tiles of x and fn, ``ring`` of tiles of split fn; ``blocks`` for each multiprocessor."""

    block_m: int
    block_k: int
    stages: int
    ring: int
    blocks: int


def plan(shape: Shape) -> Config | None:
    """Two warpgroups share what the splitter splits."""
    if not shape.aligned or shape.batch_invariant or shape.m < FEWEST_ROWS or shape.n > MIXES.value:
        return None
    config = Config(**configured("hc_prenorm_gemm", "wgmma", shape.arch, size=shape.m))
    return None if shape.k % config.block_k else config


def launch(call: Call, config: Config) -> None:
    x, fn, k = call.x, call.fn, call.shape.k
    sources = (
        boxes(x, x.shape, [max(x.stride(0), k), 1], [config.block_m, config.block_k], 16),
        boxes(fn, fn.shape, [max(fn.stride(0), k), 1], [MIXES.value, config.block_k], 32),
    )
    constants = dict(ROWS=config.block_m, STEP=config.block_k, STAGES=config.stages, RING=config.ring)
    launch_splits(_hc_wgmma_kernel, call, config, sources, (), 1, **constants, num_warps=config.block_m // 16)


@gluon.jit
def _producer(descs, smem, bars, at, ROWS: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr):
    x_desc, fn_desc = descs
    x_smem, fn_smem = smem
    x_full, x_empty = bars
    m0, k_lo, steps = at
    for step in range(steps):
        stage = ring.empty_slot(x_empty, step, STAGES)
        bar = x_full.index(stage)
        mbarrier.expect(bar, ROWS * STEP * 2 + MIXES * STEP * 4)
        k0 = k_lo + step * STEP
        load_box(fn_desc, [0, k0], bar, fn_smem.index(stage))
        load_box(x_desc, [m0, k0], bar, x_smem.index(stage))


@gluon.jit
def _splitter(smem, bars, steps, STAGES: gl.constexpr, RING: gl.constexpr):
    fn_smem, split_smem = smem
    x_full, x_empty, s_full, s_empty = bars
    lay: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    for step in range(steps):
        stage = ring.full_slot(x_full, step, STAGES)
        fn = fn_smem.index(stage).load(lay)
        # high by truncation: integer instructions, where a rounding conversion costs four times as much
        bits = fn.to(gl.int32, bitcast=True)
        high = (bits >> 16).to(gl.int16).to(gl.bfloat16, bitcast=True)
        low = (fn - (bits & -65536).to(gl.float32, bitcast=True)).to(gl.bfloat16)
        slot = ring.empty_slot(s_empty, step, RING)
        both = split_smem.index(slot)
        both.slice(0, MIXES, 0).store(high)
        both.slice(MIXES, MIXES, 0).store(low)
        ring.publish(s_full.index(slot))
        mbarrier.arrive(x_empty.index(stage), count=1)


@gluon.jit
def _consumer(
    smem, bars, target, steps,
    ROWS: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    x_smem, split_smem = smem
    x_full, x_empty, s_full, s_empty = bars
    out_ptr, sqr_ptr, m0, M, N, o_stride_m, s_stride_m = target
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [ROWS // 16, 1], [16, 2 * MIXES, 16])
    lay: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [ROWS // 16, 1], [1, 0])
    acc = gl.zeros([ROWS, 2 * MIXES], gl.float32, mma)
    squares = gl.zeros([ROWS, STEP], gl.float32, lay)
    for step in range(steps):
        slot = ring.full_slot(s_full, step, RING)
        # The splitter has waited for this tile, but only a thread that waits on the barrier itself sees what arrived.
        stage = ring.full_slot(x_full, step, STAGES)
        x = x_smem.index(stage)
        acc = warpgroup_mma(x, split_smem.index(slot).permute((1, 0)), acc, is_async=True)
        wide = x.load(lay).to(gl.float32)
        squares += wide * wide
        acc = warpgroup_mma_wait(0, deps=(acc,))
        ring.arrive(x_empty.index(stage))
        mbarrier.arrive(s_empty.index(slot), count=1)
    mixes = gl.sum(gl.reshape(acc, [ROWS, 2, MIXES]), 1)
    store: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [ROWS // 16, 1], [1, 0])
    mixes = gl.convert_layout(mixes, store)
    rows = m0 + gl.arange(0, ROWS, gl.SliceLayout(1, store))
    cols = gl.arange(0, MIXES, gl.SliceLayout(0, store))
    ptr = out_ptr + rows.to(gl.int64)[:, None] * o_stride_m + cols[None, :]
    gl.store(ptr, mixes, mask=(rows < M)[:, None] & (cols < N)[None, :])
    rows = m0 + gl.arange(0, ROWS, gl.SliceLayout(1, lay))
    gl.store(sqr_ptr + rows.to(gl.int64) * s_stride_m, gl.sum(squares, 1), mask=rows < M)


@entry(gluon.jit, "M", any_alignment=["out_ptr", "sqr_ptr"])
def _hc_wgmma_kernel(
    x_desc, fn_desc,  # in boxes of [ROWS, STEP] bf16 and [32, STEP] fp32
    out_ptr, sqr_ptr,
    M, N, K,
    o_stride_s, o_stride_m, s_stride_s, s_stride_m,
    per,
    ROWS: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    if PDL:
        launch_dependents()
    m0 = gl.program_id(0) * ROWS
    split = gl.program_id(1)
    k_lo = split * per
    steps = gl.maximum(gl.minimum(per, K - k_lo), 0) // STEP
    split64 = split.to(gl.int64)
    out_ptr += split64 * o_stride_s
    sqr_ptr += split64 * s_stride_s
    b_lay: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    x_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, ROWS, STEP], x_desc.layout)
    fn_smem = gl.allocate_shared_memory(gl.float32, [STAGES, MIXES, STEP], fn_desc.layout)
    split_smem = gl.allocate_shared_memory(gl.bfloat16, [RING, 2 * MIXES, STEP], b_lay)
    x_full, x_empty = ring.barriers(STAGES, (1, 2))
    s_full, s_empty = ring.barriers(RING, (1, 1))
    ring.sync()
    descs, bars = (x_desc, fn_desc), (x_full, x_empty, s_full, s_empty)
    target = (out_ptr, sqr_ptr, m0, M, N, o_stride_m, s_stride_m)
    gl.warp_specialize(
        [
            (_consumer, ((x_smem, split_smem), bars, target, steps, ROWS, STEP, STAGES, RING)),
            (_splitter, ((fn_smem, split_smem), bars, steps, STAGES, RING)),
            (_producer, (descs, (x_smem, fn_smem), (x_full, x_empty), (m0, k_lo, steps), ROWS, STEP, STAGES)),
        ],
        [4, 1],
        [80, 40],
    )
