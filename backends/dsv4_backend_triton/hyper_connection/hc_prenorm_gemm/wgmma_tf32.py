"""``hc_prenorm_gemm`` for 65 to 4096 rows on wgmma, in TF32.

``fn`` goes from shared memory straight to the tensor cores, which drop the last 13 of its bits, as DeepGEMM's do. x is
read once: a thread widens its operand in registers, where bf16 is exact, and takes the squares from it. So little code
runs before the first fetch and after the last, which counts where a block has few steps.

    role   warps   does
    all    4       fetches tiles of x and fn through tensor maps; x to registers, squares, products

              32 mixes
    64 rows [   acc   ]     K: STEP columns at a time, ``per`` in all; in two parts, of which the second is read from
                            shared memory while the first multiplies

    shared memory                       bytes, with STEP = 128, STAGES = 7
    x_smem [STAGES, 64, STEP] bf16      114688
    fn_smem [STAGES, 32, STEP] fp32     114688

    barrier         arrives                  waits   count
    full [STAGES]   the tensor maps' bytes   all     1

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
from ...lib.gluon import barrier, block_index, launch_dependents, load_box
from .op import Call, Shape
from .reduce import launch_splits

ROWS = gl.constexpr(64)
MIXES = gl.constexpr(32)  # rows of fn in a tile; those beyond n are zeros that the tensor map fills in
FEWEST_ROWS, MOST_ROWS = 65, 4096


class Config(NamedTuple):
    """``blocks`` for each multiprocessor."""

    block_m: int
    block_k: int
    stages: int
    blocks: int


def plan(shape: Shape) -> Config | None:
    if not shape.aligned or shape.batch_invariant or shape.n > MIXES.value:
        return None
    if not FEWEST_ROWS <= shape.m <= MOST_ROWS:
        return None
    config = Config(**configured("hc_prenorm_gemm", "wgmma_tf32", shape.arch), block_m=ROWS.value)
    return None if shape.k % config.block_k else config


def launch(call: Call, config: Config) -> None:
    x, fn, k = call.x, call.fn, call.shape.k
    sources = (
        boxes(x, x.shape, [max(x.stride(0), k), 1], [ROWS.value, config.block_k], 16),
        boxes(fn, fn.shape, [max(fn.stride(0), k), 1], [MIXES.value, config.block_k], 32),
    )
    constants = dict(STEP=config.block_k, STAGES=config.stages)
    launch_splits(_hc_wgmma_tf32_kernel, call, config, sources, (), 1, **constants, num_warps=4)


@gluon.jit
def _fetch(descs, smem, full, at, step, STEP: gl.constexpr, STAGES: gl.constexpr):
    x_desc, fn_desc = descs
    x_smem, fn_smem = smem
    m0, k_lo = at
    slot = step % STAGES
    bar = full.index(slot)
    mbarrier.expect(bar, ROWS * STEP * 2 + MIXES * STEP * 4)
    load_box(fn_desc, [0, k_lo + step * STEP], bar, fn_smem.index(slot))
    load_box(x_desc, [m0, k_lo + step * STEP], bar, x_smem.index(slot))


@entry(gluon.jit, "M", any_alignment=["out_ptr", "sqr_ptr"])
def _hc_wgmma_tf32_kernel(
    x_desc, fn_desc,  # in boxes of [64, STEP] bf16 and [32, STEP] fp32
    out_ptr, sqr_ptr,
    M, N, K,
    o_stride_s, o_stride_m, s_stride_s, s_stride_m,
    per,
    STEP: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    if PDL:
        launch_dependents()
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, MIXES, 8])
    lhs: gl.constexpr = gl.DotOperandLayout(0, mma, 1)
    PART: gl.constexpr = STEP // 2
    k_lo = gl.program_id(1) * per
    steps = gl.maximum(gl.minimum(per, K - k_lo), 0) // STEP
    x_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, ROWS, STEP], x_desc.layout)
    fn_smem = gl.allocate_shared_memory(gl.float32, [STAGES, MIXES, STEP], fn_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    descs, smem, at = (x_desc, fn_desc), (x_smem, fn_smem), (gl.program_id(0) * ROWS, k_lo)
    for step in range(gl.minimum(steps, STAGES)):
        mbarrier.init(full.index(step), count=1)
        ring.sync()
        _fetch(descs, smem, full, at, step, STEP, STAGES)

    acc = gl.zeros([ROWS, MIXES], gl.float32, mma)
    squares = gl.zeros([ROWS, PART], gl.float32, lhs)
    for step in range(steps):
        slot = ring.full_slot(full, step, STAGES)
        for i in gl.static_range(2):
            x = x_smem.index(slot).slice(i * PART, PART, 1).load(lhs).to(gl.float32)
            fn = fn_smem.index(slot).slice(i * PART, PART, 1).permute((1, 0))
            acc = warpgroup_mma(x, fn, acc, is_async=True)
            squares += x * x
        acc = warpgroup_mma_wait(0, deps=(acc,))
        if step + STAGES < steps:
            barrier()
            _fetch(descs, smem, full, at, step + STAGES, STEP, STAGES)

    # opaque to the compiler, which would compute all addresses before the first fetch
    m0 = block_index("x") * ROWS
    split64 = block_index("y").to(gl.int64)
    rows = m0 + gl.arange(0, ROWS, gl.SliceLayout(1, mma))
    mixes = gl.arange(0, MIXES, gl.SliceLayout(0, mma))
    at_out = out_ptr + split64 * o_stride_s + rows.to(gl.int64)[:, None] * o_stride_m + mixes[None, :]
    gl.store(at_out, acc, mask=(rows < M)[:, None] & (mixes < N)[None, :])
    rows = m0 + gl.arange(0, ROWS, gl.SliceLayout(1, lhs))
    gl.store(sqr_ptr + split64 * s_stride_s + rows.to(gl.int64) * s_stride_m, gl.sum(squares, 1), mask=rows < M)
