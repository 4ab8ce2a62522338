"""``fp8_einsum`` for few tokens on wgmma: these are the N of the products, and 64 outputs the M.

role       warps   registers   does
consumer   4       128         64 outputs x BLOCK_B tokens: product, scale, add; store at the end
producer   1       40          streams rows of w past the tokens, as far ahead as the ring goes

             BLOCK_B tokens
64 outputs [     S^T     ]        K: 128 at a time, R in all; two blocks share a multiprocessor

shared memory                               bytes, with BLOCK_B = 64 and STAGES = 4
x_smem [STAGES, BLOCK_B, 128] e4m3          32768
w_smem [STAGES, 64, 128] e4m3               32768
xs_smem [STAGES, 1, max(BLOCK_B, 32)] fp32  1024, with SCALE_BOX

barrier         arrives                  waits      count
full [STAGES]   the tensor maps' bytes   consumer   1
empty [STAGES]  the consumer             producer   1

strides: in elements, as in wgmma.py
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

OUTPUTS = gl.constexpr(64)  # of a block, where these are the M and the tokens are the N
LINE = gl.constexpr(32)  # the least scales of a box: its place is a multiple of 128 bytes
FEWEST_TOKENS, MOST_TOKENS = 17, 64  # of a call; more where blocks are few
_BLOCKS = {16: 1.0, 32: 1.5, 64: 1.0}
"""By the tokens of a tile: the blocks for each multiprocessor up to which it is faster than the next larger tile."""


class Config(NamedTuple):
    """Tiles of ``block_b`` tokens x 64 outputs. ``stages_alone``: where every block has a multiprocessor of its own."""

    block_b: int
    stages: int
    stages_alone: int


def plan(shape: Shape) -> Config | None:
    """A block takes the time of streaming its rows of w, which is shorter if more multiprocessors read. So few groups
    get narrower tiles than their tokens need."""
    if shape.w_rows or shape.batch_invariant or shape.b < FEWEST_TOKENS:
        return None

    def blocks(tokens: int) -> int:
        return cdiv(shape.d, OUTPUTS.value) * shape.h * cdiv(shape.b, tokens)

    config = Config(**configured("fp8_einsum", "wgmma_few", shape.arch, size=min(shape.b, MOST_TOKENS)))
    narrow = [tokens for tokens, most in _BLOCKS.items() if blocks(tokens) <= most * shape.arch.sms]
    if narrow:
        config = config._replace(block_b=min(narrow))
    elif shape.b > MOST_TOKENS:
        return None
    alone = blocks(config.block_b) <= shape.arch.sms
    return config._replace(stages=config.stages_alone) if alone else config


def launch(call: Call, config: Config) -> None:
    grid = cdiv(call.shape.d, OUTPUTS.value) * call.shape.h * cdiv(call.shape.b, config.block_b)
    constants = dict(BLOCK_B=config.block_b, STAGES=config.stages)
    # 128 registers a thread: two blocks share a multiprocessor
    options = dict(num_warps=4, maxnreg=128)
    scales = max(config.block_b, LINE.value)
    launch_boxes(_einsum_wgmma_few_kernel, grid, call, config.block_b, 64, scales, **constants, **options)


@gluon.jit
def _producer(descs, smem, bars, n_k, at, BLOCK_B: gl.constexpr, STAGES: gl.constexpr, SCALE_BOX: gl.constexpr):
    x_desc, w_desc, xs_desc = descs
    x_smem, w_smem, xs_smem = smem
    full, empty = bars
    x_row, x_col, w_row, xs_row, b0 = at
    for kb in range(n_k):
        stage = ring.empty_slot(empty, kb, STAGES)
        bar = full.index(stage)
        mbarrier.expect(bar, (BLOCK_B + OUTPUTS) * 128 + (max(BLOCK_B, LINE) * 4 if SCALE_BOX else 0))
        if SCALE_BOX:
            load_box(xs_desc, [xs_row + kb, b0], bar, xs_smem.index(stage))
        load_box(w_desc, [w_row, kb * 128], bar, w_smem.index(stage))
        load_box(x_desc, [x_row + b0, x_col + kb * 128], bar, x_smem.index(stage))


@gluon.jit
def _consumer(
    tensors, smem, bars, sizes, strides, n_k, BLOCK_B: gl.constexpr, STAGES: gl.constexpr, SCALE_BOX: gl.constexpr
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_B, 32])
    tokens: gl.constexpr = gl.SliceLayout(0, mma)
    store: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    xs, ws, out_ptr = tensors
    x_smem, w_smem, xs_smem = smem
    full, empty = bars
    d0, b0, B, N = sizes
    xs_stride_b, xs_stride_k, ws_stride_k, o_stride_b = strides
    zeros = gl.zeros([OUTPUTS, BLOCK_B], gl.float32, mma)
    acc = zeros
    w_scale = gl.load(ws)
    if not SCALE_BOX:
        xs += gl.minimum(b0 + gl.arange(0, BLOCK_B, tokens), B - 1).to(gl.int64) * xs_stride_b
        x_scale = gl.load(xs)
    for kb in range(n_k):
        stage = kb % STAGES
        ahead = gl.minimum(kb + 1, n_k - 1).to(gl.int64)
        w_next = gl.load(ws + ahead * ws_stride_k)
        if not SCALE_BOX:
            x_next = gl.load(xs + ahead * xs_stride_k)
        mbarrier.wait(full.index(stage), kb // STAGES & 1)
        w, x = w_smem.index(stage), x_smem.index(stage).permute((1, 0))
        part = warpgroup_mma(w, x, zeros, use_acc=False, is_async=True)
        if SCALE_BOX:
            x_scale = xs_smem.index(stage).reshape([max(BLOCK_B, LINE)]).slice(0, BLOCK_B).load(tokens)
        part = warpgroup_mma_wait(0, deps=[part])
        mbarrier.arrive(empty.index(stage))
        acc += part * (x_scale * w_scale)[None, :]
        w_scale = w_next
        if not SCALE_BOX:
            x_scale = x_next
    tile = gl.convert_layout(acc.to(gl.bfloat16), store)
    col = d0 + gl.arange(0, OUTPUTS, gl.SliceLayout(1, store))
    token = b0 + gl.arange(0, BLOCK_B, gl.SliceLayout(0, store))
    ptr = out_ptr + token.to(gl.int64)[None, :] * o_stride_b + col[:, None]
    gl.store(ptr, tile, mask=(token < B)[None, :] & (col < N)[:, None])


@entry(gluon.jit, "B", any_alignment=["xs_ptr", "ws_ptr"])
def _einsum_wgmma_few_kernel(
    x_desc, w_desc, xs_desc,
    xs_ptr, ws_ptr, out_ptr,
    B, N, n_k, H,
    x_row_h, x_col_h, w_row_h, xs_row_h,  # where head h begins in a tensor map: h times these
    xs_stride_b, xs_stride_h, xs_stride_k, ws_stride_h, ws_stride_d, ws_stride_k, o_stride_b, o_stride_h,
    BLOCK_B: gl.constexpr, STAGES: gl.constexpr, SCALE_BOX: gl.constexpr,
):  # fmt: skip
    """Boxes: [BLOCK_B, 128] of x, [64, 128] of w, [1, BLOCK_B] of the scales of x, or of 32."""
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_B, 128], x_desc.layout)
    w_smem = gl.allocate_shared_memory(w_desc.dtype, [STAGES, OUTPUTS, 128], w_desc.layout)
    if SCALE_BOX:
        xs_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, max(BLOCK_B, LINE)], xs_desc.layout)
    else:
        xs_smem = x_smem
    bars = ring.barriers(STAGES, (1, 1))
    n_tiles = gl.cdiv(N, OUTPUTS)
    index = gl.program_id(0)
    b_tiles = gl.cdiv(B, BLOCK_B)
    h = index // (n_tiles * b_tiles)
    d0 = (index % n_tiles) * OUTPUTS
    b0 = (index // n_tiles) % b_tiles * BLOCK_B
    h64 = h.to(gl.int64)
    o_stride_b = gl.multiple_of(o_stride_b.to(gl.int64), 8)
    o_stride_h = gl.multiple_of(o_stride_h.to(gl.int64), 8)
    smem = (x_smem, w_smem, xs_smem)
    tensors = (
        xs_ptr + h64 * xs_stride_h,
        ws_ptr + h64 * ws_stride_h + (d0 // 128).to(gl.int64) * ws_stride_d,
        out_ptr + h64 * o_stride_h,
    )
    sizes = (d0, b0, B, gl.multiple_of(N.to(gl.int64), 8))
    strides = (xs_stride_b, xs_stride_k, ws_stride_k, o_stride_b)
    at = (h * x_row_h, h * x_col_h, d0 + h * w_row_h, h * xs_row_h, b0)
    gl.warp_specialize(
        [
            (_consumer, (tensors, smem, bars, sizes, strides, n_k, BLOCK_B, STAGES, SCALE_BOX)),
            (_producer, ((x_desc, w_desc, xs_desc), smem, bars, n_k, at, BLOCK_B, STAGES, SCALE_BOX)),
        ],
        [1],
        [40],
    )
