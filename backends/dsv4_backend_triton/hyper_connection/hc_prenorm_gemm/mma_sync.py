"""``hc_prenorm_gemm`` for many rows on mma.sync, in Gluon.

Reads of shared memory limit the plain Triton kernel: it reads x a second time for the squares, a quarter of all reads,
and several of its warps read each row. Here a warp has rows of its own, takes the squares from its operands, and reads
all of ``fn``, whose halves go to shared memory once a step.

    role   warps   does
    all    WARPS   cp.async of the next x; fn of the next step to registers; fn to [high; low] bf16; squares, products

                 32 mixes
    ROWS rows [ acc       ]     K: STEP columns at a time, ``per`` in all; high and low add to the same sums

    shared memory                    bytes, with ROWS = 128, STAGES = 3
    x_smem [STAGES, ROWS, 64] bf16   49152
    fn_smem [2, 64, 64] bf16         16384

    barriers: of the whole block, placed by Triton; cp.async groups, one a step
    strides: in elements. N <= 32; K and per are multiples of STEP.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from ...configurations import configured
from ...launch import entry
from ...lib.gluon import async_load, launch_dependents
from ...lib.mma_sync import ROWS_LAYOUT
from .op import Call, Shape
from .reduce import launch_splits

STEP = gl.constexpr(64)
MIXES = gl.constexpr(32)
FEWEST_ROWS = 257


class Config(NamedTuple):
    """``blocks``: for each multiprocessor, from which the pieces of k follow."""

    block_m: int
    block_k: int
    stages: int
    warps: int
    blocks: int


def plan(shape: Shape) -> Config | None:
    if not shape.aligned or shape.batch_invariant or shape.m < FEWEST_ROWS or shape.n > MIXES.value:
        return None
    config = Config(**configured("hc_prenorm_gemm", "mma_sync", shape.arch))
    return None if shape.k % config.block_k else config


def launch(call: Call, config: Config) -> None:
    strides = (call.x.stride(0) // 8, call.fn.stride(0) // 4)
    constants = dict(ROWS=config.block_m, STAGES=config.stages)
    sources = (call.x, call.fn)
    launch_splits(_hc_mma_sync_kernel, call, config, sources, strides, 1, **constants, num_warps=config.warps)


@entry(gluon.jit, "M", any_alignment=["out_ptr", "sqr_ptr"])
def _hc_mma_sync_kernel(
    x_ptr, fn_ptr, out_ptr, sqr_ptr,
    M, N, K,
    x_stride, fn_stride,  # in 8 and in 4 elements
    o_stride_s, o_stride_m, s_stride_s, s_stride_m,
    per,
    ROWS: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    if PDL:
        launch_dependents()
    warps: gl.constexpr = gl.num_warps()
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1], instr_shape=[16, 8])
    lhs: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    rhs: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    x_lay: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [warps, 1], [1, 0])
    fn_lay: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [warps, 1], [1, 0])
    x_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, ROWS, STEP], ROWS_LAYOUT)
    fn_smem = gl.allocate_shared_memory(gl.bfloat16, [2, 2 * MIXES, STEP], ROWS_LAYOUT)
    m0 = gl.program_id(0) * ROWS
    split = gl.program_id(1)
    k_lo = gl.multiple_of(split * per, 64)
    steps = gl.maximum(gl.minimum(per, K - k_lo), 0) // STEP

    rows = gl.minimum(m0 + gl.arange(0, ROWS, gl.SliceLayout(1, x_lay)), M - 1)  # not stored beyond
    columns = gl.arange(0, STEP, gl.SliceLayout(0, x_lay))
    x = x_ptr + rows.to(gl.int64)[:, None] * (x_stride.to(gl.int64) * 8) + (k_lo + columns)[None, :]
    mixes = gl.arange(0, MIXES, gl.SliceLayout(1, fn_lay))
    fn_columns = gl.arange(0, STEP, gl.SliceLayout(0, fn_lay))
    fn = fn_ptr + mixes.to(gl.int64)[:, None] * (fn_stride.to(gl.int64) * 4) + (k_lo + fn_columns)[None, :]
    mix_ok = (mixes < gl.where(steps > 0, N, 0))[:, None]  # a split beyond K reads nothing

    for i in gl.static_range(STAGES - 1):
        if i < steps:
            async_load(x_smem.index(i), x + i * STEP)
        async_copy.commit_group()
    acc = gl.zeros([ROWS, MIXES], gl.float32, mma)
    squares = gl.zeros([ROWS, 16], gl.float32, lhs)
    fn_next = gl.load(fn, mask=mix_ok, other=0.0)
    for step in range(steps):
        # high by truncation: integer instructions, where a rounding conversion costs four times as much
        bits = fn_next.to(gl.int32, bitcast=True)
        high = (bits >> 16).to(gl.int16).to(gl.bfloat16, bitcast=True)
        low = (fn_next - (bits & -65536).to(gl.float32, bitcast=True)).to(gl.bfloat16)
        halves = fn_smem.index(step % 2)
        halves.slice(0, MIXES, 0).store(high)
        halves.slice(MIXES, MIXES, 0).store(low)
        ahead = gl.minimum(step + 1, steps - 1)
        fn_next = gl.load(fn + ahead * STEP, mask=mix_ok, other=0.0)
        async_copy.wait_group(STAGES - 2)
        here = x_smem.index(step % STAGES)
        for c in gl.static_range(STEP // 16):
            a = here.slice(c * 16, 16, 1).load(lhs)
            wide = a.to(gl.float32)
            squares += wide * wide
            part = halves.slice(c * 16, 16, 1).permute((1, 0))
            acc = mma_v2(a, part.slice(0, MIXES, 1).load(rhs), acc)
            acc = mma_v2(a, part.slice(MIXES, MIXES, 1).load(rhs), acc)
        if step + STAGES - 1 < steps:
            async_load(x_smem.index((step + STAGES - 1) % STAGES), x + (step + STAGES - 1) * STEP)
        async_copy.commit_group()
    async_copy.wait_group(0)

    split64 = split.to(gl.int64)
    store: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [warps, 1], [1, 0])
    row = m0 + gl.arange(0, ROWS, gl.SliceLayout(1, store))
    mix = gl.arange(0, MIXES, gl.SliceLayout(0, store))
    at = out_ptr + split64 * o_stride_s + row.to(gl.int64)[:, None] * o_stride_m + mix[None, :]
    gl.store(at, gl.convert_layout(acc, store), mask=(row < M)[:, None] & (mix < N)[None, :])
    sums = gl.convert_layout(gl.sum(squares, 1), gl.SliceLayout(1, store))
    gl.store(sqr_ptr + split64 * s_stride_s + row.to(gl.int64) * s_stride_m, sums, mask=row < M)
