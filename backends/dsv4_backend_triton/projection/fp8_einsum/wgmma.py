"""``fp8_einsum`` for many tokens on wgmma: warp-specialised, persistent.

While one consumer scales and adds the product of a 128-wide K block, the other keeps the tensor cores busy, which plain
Triton cannot express: there the product of a block is waited for at once.

    role            warps   registers          does
    producer        1       40                 fetches tiles of x and w, and scales of x, through tensor maps
    consumer 0, 1   4 each  CONSUMER_REGS      64 tokens x OUTPUTS: product, scale, add; store at the end

                 OUTPUTS = HALVES * BLOCK_D
    64 tokens  [ consumer 0 ]         K: 128 at a time, R in all
    64 tokens  [ consumer 1 ]

A consumer waits for a stage and releases it about as long as it multiplies half a K block. So a stage has GROUP K
blocks, whose products are issued together, or the outputs have two HALVES, multiplied one after the other, since the
registers do not hold both products. The scales of w of a whole tile come to shared memory before its loop, which does
not wait for a load of them; those of the next tile are on their way meanwhile.

Both consumers begin with the same stage, so they would also scale and add at the same time. With TURNS they issue
products in turns. That makes wide tiles faster where the scales of x come in boxes, and the others slower.

    shared memory                                narrow   wide     broad
    BLOCK_D, HALVES, GROUP, STAGES               64 1 2 4 128 1 2 3 128 2 1 4
    x_smem [2 STAGES GROUP, 64, 128] e4m3        131072   98304    65536
    w_smem [STAGES GROUP HALVES, BLOCK_D, 128]   65536    98304    131072
    xs_smem [STAGES, GROUP, 128] fp32            4096     3072     2048      with SCALE_BOX
    ws_smem [2 HALVES SCALES] fp32               1024     1024     2048

    barrier           arrives                                    waits       count
    full [STAGES]     the tensor maps' bytes, without second's   consumers   1
    second [STAGES]   those of the second half of w              consumers   1
    empty [STAGES]    each consumer                              producer    2
    turn [2]          the other consumer, its products issued    a consumer  1       with TURNS

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
from ...lib.gluon import barrier, load_box, reinterpret
from ...lib.sizes import cdiv
from .boxes import SCALES, launch_boxes, takes  # noqa: F401
from .op import Call, Shape

TOKENS = gl.constexpr(64)  # per warpgroup: the M of one wgmma
FEWEST_TOKENS = 65
_BROAD = 1.9  # the time of a broad tile over that of a wide one


class Config(NamedTuple):
    """Tiles of 128 tokens x ``halves`` times ``block_d``. ``group``: K blocks of a stage. ``turns``: the consumers
    issue products in turns."""

    block_d: int
    halves: int
    group: int
    stages: int
    registers: int
    turns: bool


def plan(shape: Shape) -> Config | None:
    """The narrow tile where every block has a multiprocessor of its own, else the one whose waves over the
    multiprocessors take less time. Fewer than ``FEWEST_TOKENS`` are the N of wgmma in ``wgmma_few.py``."""
    if shape.w_rows or shape.batch_invariant or shape.b < FEWEST_TOKENS:
        return None

    def waves(outputs: int) -> int:
        return cdiv(cdiv(shape.d, outputs) * cdiv(shape.b, 128) * shape.h, shape.arch.sms)

    if waves(64) == 1:
        role = "narrow"
    else:  # each half of a broad tile has its scale of w, so there must be two
        role = "broad" if shape.d % 256 == 0 and waves(256) * _BROAD < waves(128) else "wide"
    return Config(**configured("fp8_einsum", "wgmma", shape.arch, role=role))


def launch(call: Call, config: Config) -> None:
    b, h, _ = call.x.shape
    tiles = cdiv(call.shape.d, config.block_d * config.halves) * h * cdiv(b, 128)
    constants = dict(BLOCK_D=config.block_d, HALVES=config.halves, STAGES=config.stages, CONSUMER_REGS=config.registers)
    constants |= dict(TURNS=config.turns)
    grid = (min(tiles, call.shape.arch.sms),)
    launch_boxes(_einsum_wgmma_kernel, grid, call, 64, config.block_d, 128, config.group, num_warps=4, **constants)


@gluon.jit
def _tile(index, tiles, OUTPUTS: gl.constexpr):
    """Output tile of a linear index: outputs fastest, then tokens, then heads, so that a wave shares both
    operands."""
    _, n_tiles, b_tiles, _ = tiles
    d0 = (index % n_tiles) * OUTPUTS
    index = index // n_tiles
    b0 = (index % b_tiles) * (2 * TOKENS)
    return index // b_tiles, b0, d0


@gluon.jit
def _last_tile(B):
    """Where the last tile of tokens begins: it is as full as the others, so that its blocks keep pace and read w when
    they do. A place in a box of scales is a multiple of 16 bytes."""
    return gl.maximum(B - 2 * TOKENS + 3, 0) // 4 * 4


@gluon.jit
def _producer(
    descs, smem, bars, tiles, heads, B,
    BLOCK_D: gl.constexpr, HALVES: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, SCALE_BOX: gl.constexpr,
):  # fmt: skip
    x_desc, w_desc, xs_desc = descs
    x_smem, w_smem, xs_smem, _ = smem
    full, second, empty, _ = bars
    x_row_h, x_col_h, w_row_h, xs_row_h = heads
    count, _, _, n_k = tiles
    slot = 0
    phase = 1
    for index in range(gl.program_id(0), count, gl.num_programs(0)):
        h, b0, d0 = _tile(index, tiles, HALVES * BLOCK_D)
        b0 = gl.minimum(b0, _last_tile(B))
        x_row = b0 + h * x_row_h
        x_col = h * x_col_h
        w_row = d0 + h * w_row_h
        xs_row = h * xs_row_h
        for kb in range(0, n_k, GROUP):
            mbarrier.wait(empty.index(slot), phase)
            bar = full.index(slot)
            mbarrier.expect(bar, GROUP * ((2 * TOKENS + BLOCK_D) * 128 + (2 * TOKENS * 4 if SCALE_BOX else 0)))
            if SCALE_BOX:
                load_box(xs_desc, [xs_row + kb, b0], bar, xs_smem.index(slot))
            for g in gl.static_range(GROUP):
                block = slot * GROUP + g
                col = (kb + g) * 128
                load_box(x_desc, [x_row, x_col + col], bar, x_smem.index(2 * block))
                load_box(w_desc, [w_row, col], bar, w_smem.index(block * HALVES))
                load_box(x_desc, [x_row + TOKENS, x_col + col], bar, x_smem.index(2 * block + 1))
            if HALVES == 2:
                mbarrier.expect(second.index(slot), BLOCK_D * 128)
                load_box(w_desc, [w_row + BLOCK_D, kb * 128], second.index(slot), w_smem.index(2 * slot + 1))
            slot, phase = ring.advance(slot, phase, STAGES)


@gluon.jit
def _scales_of_w(index, tiles, ws_ptr, strides, BLOCK_D: gl.constexpr, HALVES: gl.constexpr):
    """Those of a tile, or of the last."""
    spread: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    count, _, _, n_k = tiles
    stride_h, stride_d, stride_k = strides
    h, _, d0 = _tile(gl.minimum(index, count - 1), tiles, HALVES * BLOCK_D)
    i = gl.arange(0, HALVES * SCALES, spread)
    kb = i % SCALES
    ws = ws_ptr + h.to(gl.int64) * stride_h + (d0 // 128 + i // SCALES).to(gl.int64) * stride_d
    return gl.load(ws + kb * stride_k, mask=kb < n_k, other=0.0)


@gluon.jit
def _add(acc, part, scale):
    """``acc + part * scale``, which LLVM keeps in its place. It would move it behind the next product, which then needs
    registers of its own, and they would spill. The wait for ``second`` keeps ptxas from the same."""
    return gl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [part, scale, acc], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def _consumer(
    WHO: gl.constexpr, smem, bars, tensors, tiles, sizes, strides,
    BLOCK_D: gl.constexpr, HALVES: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, SCALE_BOX: gl.constexpr,
    TURNS: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 32])
    row_layout: gl.constexpr = gl.SliceLayout(1, mma)
    store: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    xs_ptr, ws_ptr, out_ptr = tensors
    x_smem, w_smem, xs_smem, ws_smem = smem
    full, second, empty, turn = bars
    B, N = sizes
    xs_stride_b, xs_stride_h, xs_stride_k, ws_stride_h, ws_stride_d, ws_stride_k, o_stride_b, o_stride_h = strides
    count, _, _, n_k = tiles
    rows = gl.arange(0, TOKENS, layout=row_layout)
    if SCALE_BOX:
        lines = reinterpret(xs_smem, gl.float32, [STAGES * GROUP, 1, 2 * TOKENS], xs_smem.layout)
    zeros = gl.zeros([TOKENS, BLOCK_D], gl.float32, layout=mma)
    FIRST: gl.constexpr = WHO * HALVES * SCALES
    w_line = reinterpret(ws_smem, gl.float32, [2 * HALVES * SCALES, 1], ws_smem.layout)
    ws_strides = (ws_stride_h, ws_stride_d, ws_stride_k)
    upcoming = _scales_of_w(gl.program_id(0), tiles, ws_ptr, ws_strides, BLOCK_D, HALVES)
    slot = 0
    phase = 0
    mine = 1 - WHO  # the first turn is that of consumer 0
    for index in range(gl.program_id(0), count, gl.num_programs(0)):
        h, first, d0 = _tile(index, tiles, HALVES * BLOCK_D)
        b0 = gl.minimum(first, _last_tile(B)) + WHO * TOKENS
        ws_smem.slice(FIRST, HALVES * SCALES).store(upcoming)
        barrier()  # here, or the compiler puts one into the loop
        upcoming = _scales_of_w(index + gl.num_programs(0), tiles, ws_ptr, ws_strides, BLOCK_D, HALVES)
        if not SCALE_BOX:
            token = gl.minimum(b0 + rows, B - 1).to(gl.int64)
            xs = xs_ptr + h.to(gl.int64) * xs_stride_h + token * xs_stride_b
        acc = gl.zeros([TOKENS, BLOCK_D], gl.float32, layout=mma)
        acc_1 = gl.zeros([TOKENS, BLOCK_D], gl.float32, layout=mma)  # with HALVES == 2
        for kb in range(0, n_k, GROUP):
            w_scales = ()
            x_scales = ()
            for g in gl.static_range(GROUP):
                for half in gl.static_range(HALVES):
                    w_scale = w_line.index(FIRST + half * SCALES + kb + g).load(row_layout)
                    w_scales += (w_scale,)  # type: ignore[assignment]
                if not SCALE_BOX:
                    x_scales += (gl.load(xs),)  # type: ignore[assignment]
                    xs += xs_stride_k
            mbarrier.wait(full.index(slot), phase)
            if TURNS:
                mbarrier.wait(turn.index(WHO), mine)
                mine ^= 1
            parts = ()
            for g in gl.static_range(GROUP):
                block = slot * GROUP + g
                x, w = x_smem.index(2 * block + WHO), w_smem.index(block * HALVES).permute((1, 0))
                parts += (warpgroup_mma(x, w, zeros, use_acc=False, is_async=True),)  # type: ignore[assignment]
            if TURNS:
                mbarrier.arrive(turn.index(1 - WHO))
            if SCALE_BOX:
                for g in gl.static_range(GROUP):
                    line = lines.index(slot * GROUP + g).reshape([2 * TOKENS])
                    x_scales += (line.slice(WHO * TOKENS, TOKENS).load(row_layout),)  # type: ignore[assignment]
            for g in gl.static_range(GROUP):
                part = warpgroup_mma_wait(GROUP - 1 - g, deps=[parts[g]])
                if g == GROUP - 1 and HALVES == 1:
                    mbarrier.arrive(empty.index(slot))
                scale = (x_scales[g] * w_scales[g * HALVES])[:, None]  # type: ignore[var-annotated]
                acc = _add(acc, part, scale) if HALVES == 2 else acc + part * scale
            if HALVES == 2:
                mbarrier.wait(second.index(slot), phase)
                if TURNS:
                    mbarrier.wait(turn.index(WHO), mine)
                    mine ^= 1
                x, w = x_smem.index(2 * slot + WHO), w_smem.index(2 * slot + 1).permute((1, 0))
                part = warpgroup_mma(x, w, zeros, use_acc=False, is_async=True)
                if TURNS:
                    mbarrier.arrive(turn.index(1 - WHO))
                part = warpgroup_mma_wait(0, deps=[part])
                mbarrier.arrive(empty.index(slot))
                acc_1 += part * (x_scales[0] * w_scales[1])[:, None]  # type: ignore[misc]
            slot, phase = ring.advance(slot, phase, STAGES)
        token = b0 + gl.arange(0, TOKENS, layout=gl.SliceLayout(1, store))
        for half in gl.static_range(HALVES):
            tile = gl.convert_layout((acc_1 if half else acc).to(gl.bfloat16), store)
            col = d0 + half * BLOCK_D + gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, store))
            ptr = out_ptr + h.to(gl.int64) * o_stride_h + token.to(gl.int64)[:, None] * o_stride_b + col[None, :]
            gl.store(ptr, tile, mask=((token >= first) & (token < B))[:, None] & (col < N)[None, :])


@entry(gluon.jit, "B", any_alignment=["xs_ptr", "ws_ptr"])
def _einsum_wgmma_kernel(
    x_desc, w_desc, xs_desc,
    xs_ptr, ws_ptr, out_ptr,
    B, N, n_k, H,
    x_row_h, x_col_h, w_row_h, xs_row_h,  # where head h begins in a tensor map: h times these
    xs_stride_b, xs_stride_h, xs_stride_k, ws_stride_h, ws_stride_d, ws_stride_k, o_stride_b, o_stride_h,
    BLOCK_D: gl.constexpr, HALVES: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    CONSUMER_REGS: gl.constexpr, SCALE_BOX: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """Boxes: [64, 128] of x, [BLOCK_D, 128] of w, [GROUP, 128] of the scales of x. Rows of the next head that a box
    reaches are not stored."""
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [2 * STAGES * GROUP, TOKENS, 128], x_desc.layout)
    w_smem = gl.allocate_shared_memory(w_desc.dtype, [STAGES * GROUP * HALVES, BLOCK_D, 128], w_desc.layout)
    if SCALE_BOX:
        xs_smem = gl.allocate_shared_memory(gl.float32, [STAGES, GROUP, 2 * TOKENS], xs_desc.layout)
    else:
        xs_smem = x_smem
    ws_smem = gl.allocate_shared_memory(gl.float32, [2 * HALVES * SCALES], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full, second, empty = ring.barriers(STAGES, (1, 1, 2))
    if TURNS:
        (turn,) = ring.barriers(2, (1,))
    else:
        turn = empty
    bars = (full, second, empty, turn)
    o_stride_b = gl.multiple_of(o_stride_b.to(gl.int64), 8)
    o_stride_h = gl.multiple_of(o_stride_h.to(gl.int64), 8)
    n_tiles = gl.cdiv(N, BLOCK_D * HALVES)
    b_tiles = gl.cdiv(B, 2 * TOKENS)
    tiles = (n_tiles * b_tiles * H, n_tiles, b_tiles, n_k)
    sizes = (B, gl.multiple_of(N.to(gl.int64), 8))
    tensors, smem = (xs_ptr, ws_ptr, out_ptr), (x_smem, w_smem, xs_smem, ws_smem)
    strides = (xs_stride_b, xs_stride_h, xs_stride_k, ws_stride_h, ws_stride_d, ws_stride_k, o_stride_b, o_stride_h)
    descs, heads = (x_desc, w_desc, xs_desc), (x_row_h, x_col_h, w_row_h, xs_row_h)
    gl.warp_specialize(
        [
            (
                _consumer,
                (0, smem, bars, tensors, tiles, sizes, strides, BLOCK_D, HALVES, GROUP, STAGES, SCALE_BOX, TURNS),
            ),
            (
                _consumer,
                (1, smem, bars, tensors, tiles, sizes, strides, BLOCK_D, HALVES, GROUP, STAGES, SCALE_BOX, TURNS),
            ),
            (_producer, (descs, smem, bars, tiles, heads, B, BLOCK_D, HALVES, GROUP, STAGES, SCALE_BOX)),
        ],
        [4, 1],
        [CONSUMER_REGS, 40],
    )
