"""``fp8_einsum`` for few tokens on wgmma: these are the N of the products, and 64 outputs the M.

role       warps   registers   does
consumer   4       the rest    64 outputs x BLOCK_B tokens: product, scale, add; store at the end
producer   1       40          streams rows of w past the tokens, as far ahead as the ring goes

             BLOCK_B tokens
64 outputs [     S^T     ]        K: 128 at a time, R in all

A consumer waits for a stage and releases it about as long as it multiplies a K block. So a stage has GROUP K blocks,
whose products are issued together. The scales of w come to shared memory before the loop, which does not wait for a
load of them.

shared memory                                    bytes, with BLOCK_B = 64, GROUP = 4 and STAGES = 3
x_smem [STAGES GROUP, BLOCK_B, 128] e4m3         98304
w_smem [STAGES GROUP, 64, 128] e4m3              98304
xs_smem [STAGES, GROUP, max(BLOCK_B, 32)] fp32   3072, with SCALE_BOX
ws_smem [SCALES] fp32                            512

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
from ...lib.gluon import barrier, load_box, reinterpret
from ...lib.sizes import cdiv
from .boxes import SCALES, launch_boxes, takes  # noqa: F401
from .op import Call, Shape

OUTPUTS = gl.constexpr(64)  # of a block, where these are the M and the tokens are the N
LINE = gl.constexpr(32)  # the least scales of a box: its place is a multiple of 128 bytes
FEWEST_TOKENS = 17
_TILES = {16: 0.5, 32: 1.0, 64: 1.0}
"""By the tokens of a tile: the blocks for each multiprocessor up to which it is faster than the next larger."""
_MOST_HEADS = 65535  # of a grid


class Config(NamedTuple):
    """Tiles of ``block_b`` tokens x 64 outputs. ``group``: K blocks of a stage."""

    block_b: int
    group: int
    stages: int
    registers: int


def plan(shape: Shape) -> Config | None:
    """A block takes the time of streaming its rows of w, which is shorter if more multiprocessors read. So the tile is
    the narrowest of which every block has a multiprocessor of its own; narrow ones on all of them read the same rows
    of w too often. Roles: ``few`` if the rows of w occupy at most half of the multiprocessors, else ``alone``. Where no
    tile is so wide, two blocks share a multiprocessor."""
    if shape.w_rows or shape.batch_invariant or shape.h > _MOST_HEADS:
        return None
    columns = cdiv(shape.d, OUTPUTS.value) * shape.h
    few = 2 * columns <= shape.arch.sms
    if shape.b < FEWEST_TOKENS and not few:
        return None
    for tokens, most in _TILES.items():
        if columns * cdiv(shape.b, tokens) <= most * shape.arch.sms:
            role = "few" if few else "alone"
            return Config(**configured("fp8_einsum", "wgmma_few", shape.arch, size=tokens, role=role))
    if shape.b > max(_TILES):
        return None
    return Config(**configured("fp8_einsum", "wgmma_few", shape.arch, size=shape.b))


def launch(call: Call, config: Config) -> None:
    grid = (cdiv(call.shape.d, OUTPUTS.value), cdiv(call.shape.b, config.block_b), call.shape.h)
    constants = dict(BLOCK_B=config.block_b, STAGES=config.stages)
    options = dict(num_warps=4, maxnreg=config.registers)
    scales = max(config.block_b, LINE.value)
    launch_boxes(_einsum_wgmma_few_kernel, grid, call, config.block_b, 64, scales, config.group, **constants, **options)


@gluon.jit
def _producer(
    descs, smem, bars, n_k, at,
    BLOCK_B: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, SCALE_BOX: gl.constexpr,
):  # fmt: skip
    x_desc, w_desc, xs_desc = descs
    x_smem, w_smem, xs_smem, _ = smem
    full, empty = bars
    x_row, x_col, w_row, xs_row, b0 = at
    slot = 0
    phase = 1
    for kb in range(0, n_k, GROUP):
        mbarrier.wait(empty.index(slot), phase)
        bar = full.index(slot)
        mbarrier.expect(bar, GROUP * ((BLOCK_B + OUTPUTS) * 128 + (max(BLOCK_B, LINE) * 4 if SCALE_BOX else 0)))
        if SCALE_BOX:
            load_box(xs_desc, [xs_row + kb, b0], bar, xs_smem.index(slot))
        for g in gl.static_range(GROUP):
            load_box(w_desc, [w_row, (kb + g) * 128], bar, w_smem.index(slot * GROUP + g))
            load_box(x_desc, [x_row + b0, x_col + (kb + g) * 128], bar, x_smem.index(slot * GROUP + g))
        slot, phase = ring.advance(slot, phase, STAGES)


@gluon.jit
def _consumer(
    tensors, smem, bars, sizes, strides, n_k,
    BLOCK_B: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, SCALE_BOX: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_B, 32])
    tokens: gl.constexpr = gl.SliceLayout(0, mma)
    store: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    spread: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    xs, ws, out_ptr = tensors
    x_smem, w_smem, xs_smem, ws_smem = smem
    full, empty = bars
    d0, b0, first, B, N = sizes
    xs_stride_b, xs_stride_k, ws_stride_k, o_stride_b = strides
    if SCALE_BOX:
        lines = reinterpret(xs_smem, gl.float32, [STAGES * GROUP, 1, max(BLOCK_B, LINE)], xs_smem.layout)
    zeros = gl.zeros([OUTPUTS, BLOCK_B], gl.float32, mma)
    acc = gl.zeros([OUTPUTS, BLOCK_B], gl.float32, mma)
    if not SCALE_BOX:
        xs += gl.minimum(b0 + gl.arange(0, BLOCK_B, tokens), B - 1).to(gl.int64) * xs_stride_b
    column = gl.arange(0, SCALES, spread)
    ws_smem.store(gl.load(ws + column * ws_stride_k, mask=column < n_k, other=0.0))
    barrier()  # here, or the compiler puts one into the loop
    w_line = reinterpret(ws_smem, gl.float32, [SCALES, 1], ws_smem.layout)
    slot = 0
    phase = 0
    for kb in range(0, n_k, GROUP):
        w_scales = ()
        x_scales = ()
        for g in gl.static_range(GROUP):
            w_scales += (w_line.index(kb + g).load(tokens),)  # type: ignore[assignment]
            if not SCALE_BOX:
                x_scales += (gl.load(xs),)  # type: ignore[assignment]
                xs += xs_stride_k
        mbarrier.wait(full.index(slot), phase)
        parts = ()
        for g in gl.static_range(GROUP):
            w, x = w_smem.index(slot * GROUP + g), x_smem.index(slot * GROUP + g).permute((1, 0))
            parts += (warpgroup_mma(w, x, zeros, use_acc=False, is_async=True),)  # type: ignore[assignment]
        if SCALE_BOX:
            for g in gl.static_range(GROUP):
                line = lines.index(slot * GROUP + g).reshape([max(BLOCK_B, LINE)])
                x_scales += (line.slice(0, BLOCK_B).load(tokens),)  # type: ignore[assignment]
        for g in gl.static_range(GROUP):
            part = warpgroup_mma_wait(GROUP - 1 - g, deps=[parts[g]])
            if g == GROUP - 1:
                mbarrier.arrive(empty.index(slot))
            acc += part * (x_scales[g] * w_scales[g])[None, :]
        slot, phase = ring.advance(slot, phase, STAGES)
    tile = gl.convert_layout(acc.to(gl.bfloat16), store)
    col = d0 + gl.arange(0, OUTPUTS, gl.SliceLayout(1, store))
    token = b0 + gl.arange(0, BLOCK_B, gl.SliceLayout(0, store))
    ptr = out_ptr + token.to(gl.int64)[None, :] * o_stride_b + col[:, None]
    gl.store(ptr, tile, mask=((token >= first) & (token < B))[None, :] & (col < N)[:, None])


@entry(gluon.jit, "B", any_alignment=["xs_ptr", "ws_ptr"])
def _einsum_wgmma_few_kernel(
    x_desc, w_desc, xs_desc,
    xs_ptr, ws_ptr, out_ptr,
    B, N, n_k, H,
    x_row_h, x_col_h, w_row_h, xs_row_h,  # where head h begins in a tensor map: h times these
    xs_stride_b, xs_stride_h, xs_stride_k, ws_stride_h, ws_stride_d, ws_stride_k, o_stride_b, o_stride_h,
    BLOCK_B: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, SCALE_BOX: gl.constexpr,
):  # fmt: skip
    """Boxes: [BLOCK_B, 128] of x, [64, 128] of w, [GROUP, BLOCK_B] of the scales of x, or of 32."""
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [STAGES * GROUP, BLOCK_B, 128], x_desc.layout)
    w_smem = gl.allocate_shared_memory(w_desc.dtype, [STAGES * GROUP, OUTPUTS, 128], w_desc.layout)
    if SCALE_BOX:
        xs_smem = gl.allocate_shared_memory(gl.float32, [STAGES, GROUP, max(BLOCK_B, LINE)], xs_desc.layout)
    else:
        xs_smem = x_smem
    ws_smem = gl.allocate_shared_memory(gl.float32, [SCALES], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bars = ring.barriers(STAGES, (1, 1))
    d0 = gl.program_id(0) * OUTPUTS
    first = gl.program_id(1) * BLOCK_B
    b0 = gl.minimum(first, gl.maximum(B - BLOCK_B + 3, 0) // 4 * 4)  # as in wgmma.py
    h = gl.program_id(2)
    h64 = h.to(gl.int64)
    o_stride_b = gl.multiple_of(o_stride_b.to(gl.int64), 8)
    o_stride_h = gl.multiple_of(o_stride_h.to(gl.int64), 8)
    smem = (x_smem, w_smem, xs_smem, ws_smem)
    tensors = (
        xs_ptr + h64 * xs_stride_h,
        ws_ptr + h64 * ws_stride_h + (d0 // 128).to(gl.int64) * ws_stride_d,
        out_ptr + h64 * o_stride_h,
    )
    sizes = (d0, b0, first, B, gl.multiple_of(N.to(gl.int64), 8))
    strides = (xs_stride_b, xs_stride_k, ws_stride_k, o_stride_b)
    at = (h * x_row_h, h * x_col_h, d0 + h * w_row_h, h * xs_row_h, b0)
    gl.warp_specialize(
        [
            (_consumer, (tensors, smem, bars, sizes, strides, n_k, BLOCK_B, GROUP, STAGES, SCALE_BOX)),
            (_producer, ((x_desc, w_desc, xs_desc), smem, bars, n_k, at, BLOCK_B, GROUP, STAGES, SCALE_BOX)),
        ],
        [1],
        [40],
    )
