"""``fp8_einsum`` for many tokens on wgmma: warp-specialised, persistent.

While one consumer scales and adds the product of a 128-wide K block, the other keeps the tensor cores busy, which plain
Triton cannot express: there the product of a block is waited for at once.

    role            warps   registers          does
    producer        1       40                 fetches tiles of x and w, and scales of x, through tensor maps
    consumer 0, 1   4 each  CONSUMER_REGS      64 tokens x BLOCK_D outputs: product, scale, add; store at the end

                 BLOCK_D outputs
    64 tokens  [ consumer 0 ]         K: 128 at a time, R in all
    64 tokens  [ consumer 1 ]

    shared memory                         bytes, narrow (BLOCK_D = 64, STAGES = 8)   wide (128, 6)
    x_smem [2 STAGES, 64, 128] e4m3       131072                                     98304
    w_smem [STAGES, BLOCK_D, 128] e4m3    65536                                      98304
    xs_smem [STAGES, 1, 128] fp32         4096, with SCALE_BOX                       3072

    barrier         arrives                  waits       count
    full [STAGES]   the tensor maps' bytes   consumers   1
    empty [STAGES]  each consumer            producer    2

    strides: in elements. N and the output's are multiples of 8, R of 128; scales are fp32, of w one for 128 outputs.
    SCALE_BOX: scales of x lie token-minor (a new cache line every K block) and come through xs_desc.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from ...configurations import configured
from ...launch import entry
from ...lib import ring
from ...lib.gluon import load_box
from ...lib.sizes import cdiv
from .boxes import launch_boxes, takes  # noqa: F401
from .op import Call, Shape

TOKENS = gl.constexpr(64)  # per warpgroup: the M of one wgmma
FEWEST_TOKENS, NARROW_TOKENS = 65, 128


class Config(NamedTuple):
    """Tiles of 128 tokens x ``block_d``."""

    block_d: int
    stages: int
    registers: int


def plan(shape: Shape) -> Config | None:
    """The narrow tile where every block has a multiprocessor of its own, else the 128-wide one where it fills 70 % of
    them; the narrow one for up to ``NARROW_TOKENS`` in any case. Fewer than ``FEWEST_TOKENS`` are the N of wgmma in
    ``wgmma_few.py``."""
    if shape.w_rows or shape.batch_invariant or shape.b < FEWEST_TOKENS:
        return None
    narrow, wide = (cdiv(shape.d, width) * cdiv(shape.b, 128) * shape.h for width in (64, 128))
    role = "narrow" if narrow <= shape.arch.sms else "wide" if wide > 0.7 * shape.arch.sms else ""
    if not role and shape.b > NARROW_TOKENS:
        return None
    return Config(**configured("fp8_einsum", "wgmma", shape.arch, role=role or "narrow"))


def launch(call: Call, config: Config) -> None:
    b, h, _ = call.x.shape
    grid = min(cdiv(call.shape.d, config.block_d) * h * cdiv(b, 128), call.shape.arch.sms)
    constants = dict(BLOCK_D=config.block_d, STAGES=config.stages, CONSUMER_REGS=config.registers)
    launch_boxes(_einsum_wgmma_kernel, grid, call, 64, config.block_d, 128, num_warps=4, **constants)


@gluon.jit
def _tile(index, tiles, BLOCK_D: gl.constexpr):
    """Output tile of a linear index: outputs fastest, then tokens, then heads, so that a wave shares both
    operands."""
    _, n_tiles, b_tiles, _ = tiles
    d0 = (index % n_tiles) * BLOCK_D
    index = index // n_tiles
    b0 = (index % b_tiles) * (2 * TOKENS)
    return index // b_tiles, b0, d0


@gluon.jit
def _producer(
    descs, smem, bars, tiles, heads, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, SCALE_BOX: gl.constexpr
):  # fmt: skip
    x_desc, w_desc, xs_desc = descs
    x_smem, w_smem, xs_smem = smem
    full, empty = bars
    x_row_h, x_col_h, w_row_h, xs_row_h = heads
    count, _, _, n_k = tiles
    step = 0
    for index in range(gl.program_id(0), count, gl.num_programs(0)):
        h, b0, d0 = _tile(index, tiles, BLOCK_D)
        x_row = b0 + h * x_row_h
        x_col = h * x_col_h
        w_row = d0 + h * w_row_h
        for kb in range(n_k):
            stage = ring.empty_slot(empty, step, STAGES)
            bar = full.index(stage)
            mbarrier.expect(bar, (2 * TOKENS + BLOCK_D) * 128 + (2 * TOKENS * 4 if SCALE_BOX else 0))
            if SCALE_BOX:
                load_box(xs_desc, [h * xs_row_h + kb, b0], bar, xs_smem.index(stage))
            load_box(x_desc, [x_row, x_col + kb * 128], bar, x_smem.index(2 * stage))
            load_box(x_desc, [x_row + TOKENS, x_col + kb * 128], bar, x_smem.index(2 * stage + 1))
            load_box(w_desc, [w_row, kb * 128], bar, w_smem.index(stage))
            step += 1


@gluon.jit
def _consumer(
    WHO: gl.constexpr, smem, bars, tensors, tiles, sizes, strides,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr, SCALE_BOX: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 32])
    row_layout: gl.constexpr = gl.SliceLayout(1, mma)
    store: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    xs_ptr, ws_ptr, out_ptr = tensors
    x_smem, w_smem, xs_smem = smem
    full, empty = bars
    B, N = sizes
    xs_stride_b, xs_stride_h, xs_stride_k, ws_stride_h, ws_stride_d, ws_stride_k, o_stride_b, o_stride_h = strides
    count, _, _, n_k = tiles
    rows = gl.arange(0, TOKENS, layout=row_layout)
    zeros = gl.zeros([TOKENS, BLOCK_D], gl.float32, layout=mma)
    step = 0
    for index in range(gl.program_id(0), count, gl.num_programs(0)):
        h, b0, d0 = _tile(index, tiles, BLOCK_D)
        b0 += WHO * TOKENS
        ws = ws_ptr + h.to(gl.int64) * ws_stride_h + (d0 // 128).to(gl.int64) * ws_stride_d
        w_scale = gl.load(ws)
        if not SCALE_BOX:
            token = gl.minimum(b0 + rows, B - 1).to(gl.int64)
            xs = xs_ptr + h.to(gl.int64) * xs_stride_h + token * xs_stride_b
            x_scale = gl.load(xs)
        acc = zeros
        for kb in range(n_k):
            stage = step % STAGES
            # the next block's scales, fetched while this block is multiplied; farther ahead is no gain,
            # since a load is waited for together with every later one that shares its scoreboard
            ahead = gl.minimum(kb + 1, n_k - 1).to(gl.int64)
            w_next = gl.load(ws + ahead * ws_stride_k)
            if not SCALE_BOX:
                x_next = gl.load(xs + ahead * xs_stride_k)
            mbarrier.wait(full.index(stage), step // STAGES & 1)
            x, w = x_smem.index(2 * stage + WHO), w_smem.index(stage).permute((1, 0))
            part = warpgroup_mma(x, w, zeros, use_acc=False, is_async=True)
            if SCALE_BOX:
                line = xs_smem.index(stage).reshape([2 * TOKENS])
                x_scale = line.slice(WHO * TOKENS, TOKENS).load(row_layout)
            part = warpgroup_mma_wait(0, deps=[part])
            mbarrier.arrive(empty.index(stage))
            acc += part * (x_scale * w_scale)[:, None]
            w_scale = w_next
            if not SCALE_BOX:
                x_scale = x_next
            step += 1
        tile = gl.convert_layout(acc.to(gl.bfloat16), store)
        token = b0 + gl.arange(0, TOKENS, layout=gl.SliceLayout(1, store))
        col = d0 + gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, store))
        ptr = out_ptr + h.to(gl.int64) * o_stride_h + token.to(gl.int64)[:, None] * o_stride_b + col[None, :]
        gl.store(ptr, tile, mask=(token < B)[:, None] & (col < N)[None, :])


@entry(gluon.jit, "B", any_alignment=["xs_ptr", "ws_ptr"])
def _einsum_wgmma_kernel(
    x_desc, w_desc, xs_desc,
    xs_ptr, ws_ptr, out_ptr,
    B, N, n_k, H,
    x_row_h, x_col_h, w_row_h, xs_row_h,  # where head h begins in a tensor map: h times these
    xs_stride_b, xs_stride_h, xs_stride_k, ws_stride_h, ws_stride_d, ws_stride_k, o_stride_b, o_stride_h,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr, CONSUMER_REGS: gl.constexpr, SCALE_BOX: gl.constexpr,
):  # fmt: skip
    """Boxes: [64, 128] of x, [BLOCK_D, 128] of w, [1, 128] of the scales of x. Rows of the next head that a box reaches
    are not stored."""
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [2 * STAGES, TOKENS, 128], x_desc.layout)
    w_smem = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BLOCK_D, 128], w_desc.layout)
    if SCALE_BOX:
        xs_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 2 * TOKENS], xs_desc.layout)
    else:
        xs_smem = x_smem
    bars = ring.barriers(STAGES, (1, 2))
    o_stride_b = gl.multiple_of(o_stride_b.to(gl.int64), 8)
    o_stride_h = gl.multiple_of(o_stride_h.to(gl.int64), 8)
    n_tiles = gl.cdiv(N, BLOCK_D)
    b_tiles = gl.cdiv(B, 2 * TOKENS)
    tiles = (n_tiles * b_tiles * H, n_tiles, b_tiles, n_k)
    sizes = (B, gl.multiple_of(N.to(gl.int64), 8))
    tensors, smem = (xs_ptr, ws_ptr, out_ptr), (x_smem, w_smem, xs_smem)
    strides = (xs_stride_b, xs_stride_h, xs_stride_k, ws_stride_h, ws_stride_d, ws_stride_k, o_stride_b, o_stride_h)
    descs, heads = (x_desc, w_desc, xs_desc), (x_row_h, x_col_h, w_row_h, xs_row_h)
    gl.warp_specialize(
        [
            (_consumer, (0, smem, bars, tensors, tiles, sizes, strides, BLOCK_D, STAGES, SCALE_BOX)),
            (_consumer, (1, smem, bars, tensors, tiles, sizes, strides, BLOCK_D, STAGES, SCALE_BOX)),
            (_producer, (descs, smem, bars, tiles, heads, BLOCK_D, STAGES, SCALE_BOX)),
        ],
        [4, 1],
        [CONSUMER_REGS, 40],
    )
