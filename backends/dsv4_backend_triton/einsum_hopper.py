"""``fp8_einsum`` for many tokens on Hopper: warp-specialised Gluon, persistent.

One warp fetches tiles through tensor maps; two warpgroups each multiply 64 tokens by BLOCK_D outputs and add
the scaled product of every 128-wide K block to their accumulators. While one warpgroup scales and adds, the
other keeps the tensor cores busy, which plain Triton cannot express: there the product of a block is waited
for at once.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from ._boxes import boxes  # noqa: F401  (for those who launch)
from ._gluon import load_box

TOKENS = gl.constexpr(64)  # per warpgroup: the M of one wgmma
OUTPUTS = gl.constexpr(64)  # of a block, where these are the M and the tokens are the N
LINE = gl.constexpr(32)  # scales that are fetched at least: a box lands at a multiple of 128 bytes


@gluon.jit
def _tile(index, n_tiles, b_tiles, BLOCK_D: gl.constexpr):
    """Output tile of a linear index: outputs fastest, then tokens, then heads, so that a wave shares both
    operands."""
    d0 = (index % n_tiles) * BLOCK_D
    index = index // n_tiles
    b0 = (index % b_tiles) * (2 * TOKENS)
    return index // b_tiles, b0, d0


@gluon.jit
def _producer(
    x_desc,
    w_desc,
    xs_desc,
    x_smem,
    w_smem,
    xs_smem,
    full,
    empty,
    tiles,
    n_tiles,
    b_tiles,
    n_k,
    x_row_h,
    x_col_h,
    w_row_h,
    xs_row_h,
    BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
    SCALE_BOX: gl.constexpr,
):
    step = 0
    for index in range(gl.program_id(0), tiles, gl.num_programs(0)):
        h, b0, d0 = _tile(index, n_tiles, b_tiles, BLOCK_D)
        x_row = b0 + h * x_row_h
        x_col = h * x_col_h
        w_row = d0 + h * w_row_h
        for kb in range(n_k):
            stage = step % STAGES
            phase = (step // STAGES) & 1
            mbarrier.wait(empty.index(stage), phase ^ 1)
            bar = full.index(stage)
            if SCALE_BOX:
                mbarrier.expect(bar, (2 * TOKENS + BLOCK_D) * 128 + 2 * TOKENS * 4)
                load_box(xs_desc, [h * xs_row_h + kb, b0], bar, xs_smem.index(stage))
            else:
                mbarrier.expect(bar, (2 * TOKENS + BLOCK_D) * 128)
            load_box(x_desc, [x_row, x_col + kb * 128], bar, x_smem.index(2 * stage))
            load_box(x_desc, [x_row + TOKENS, x_col + kb * 128], bar, x_smem.index(2 * stage + 1))
            load_box(w_desc, [w_row, kb * 128], bar, w_smem.index(stage))
            step += 1


@gluon.jit
def _consumer(
    WHO: gl.constexpr,
    x_smem,
    w_smem,
    xs_smem,
    full,
    empty,
    xs_ptr,
    ws_ptr,
    out_ptr,
    tiles,
    n_tiles,
    b_tiles,
    n_k,
    B,
    N,
    xs_stride_b,
    xs_stride_h,
    xs_stride_k,
    ws_stride_h,
    ws_stride_d,
    ws_stride_k,
    o_stride_b,
    o_stride_h,
    BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
    SCALE_BOX: gl.constexpr,
):
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 32])
    row_layout: gl.constexpr = gl.SliceLayout(1, mma)
    store: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    rows = gl.arange(0, TOKENS, layout=row_layout)
    zeros = gl.zeros([TOKENS, BLOCK_D], gl.float32, layout=mma)
    step = 0
    for index in range(gl.program_id(0), tiles, gl.num_programs(0)):
        h, b0, d0 = _tile(index, n_tiles, b_tiles, BLOCK_D)
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
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            part = warpgroup_mma(
                x_smem.index(2 * stage + WHO),
                w_smem.index(stage).permute((1, 0)),
                zeros,
                use_acc=False,
                is_async=True,
            )
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


SIZES = [
    "B",
    "N",
    "n_k",
    "H",
    "x_row_h",
    "x_col_h",
    "w_row_h",
    "xs_row_h",
    "xs_stride_b",
    "xs_stride_h",
    "xs_stride_k",
    "ws_stride_h",
    "ws_stride_d",
    "ws_stride_k",
    "o_stride_b",
    "o_stride_h",
]


@gluon.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["xs_ptr", "ws_ptr"])
def einsum_hopper_kernel(
    x_desc,
    w_desc,
    xs_desc,
    xs_ptr,
    ws_ptr,
    out_ptr,
    B,
    N,
    n_k,
    H,
    x_row_h,
    x_col_h,
    w_row_h,
    xs_row_h,
    xs_stride_b,
    xs_stride_h,
    xs_stride_k,
    ws_stride_h,
    ws_stride_d,
    ws_stride_k,
    o_stride_b,
    o_stride_h,
    BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMER_REGS: gl.constexpr,
    SCALE_BOX: gl.constexpr,
):
    """x_desc: boxes of [64, 128], head h starting at row h * x_row_h, column h * x_col_h; w_desc: boxes of
    [BLOCK_D, 128], head h at row h * w_row_h. Rows of the next head that a box reaches are not stored. N % 8
    == 0, out strides % 8 == 0, r % 128 == 0, fp32 scales, w scales per 128. SCALE_BOX: x scales lie
    token-minor (a new cache line every K block) and come through xs_desc, boxes of [1, 128], head h at row h
    * xs_row_h."""
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [2 * STAGES, TOKENS, 128], x_desc.layout)
    w_smem = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BLOCK_D, 128], w_desc.layout)
    if SCALE_BOX:
        xs_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 2 * TOKENS], xs_desc.layout)
    else:
        xs_smem = x_smem
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    o_stride_b = gl.multiple_of(o_stride_b.to(gl.int64), 8)
    o_stride_h = gl.multiple_of(o_stride_h.to(gl.int64), 8)
    n_tiles = gl.cdiv(N, BLOCK_D)
    b_tiles = gl.cdiv(B, 2 * TOKENS)
    tiles = n_tiles * b_tiles * H
    n_out = gl.multiple_of(N.to(gl.int64), 8)
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    0,
                    x_smem,
                    w_smem,
                    xs_smem,
                    full,
                    empty,
                    xs_ptr,
                    ws_ptr,
                    out_ptr,
                    tiles,
                    n_tiles,
                    b_tiles,
                    n_k,
                    B,
                    n_out,
                    xs_stride_b,
                    xs_stride_h,
                    xs_stride_k,
                    ws_stride_h,
                    ws_stride_d,
                    ws_stride_k,
                    o_stride_b,
                    o_stride_h,
                    BLOCK_D,
                    STAGES,
                    SCALE_BOX,
                ),
            ),
            (
                _consumer,
                (
                    1,
                    x_smem,
                    w_smem,
                    xs_smem,
                    full,
                    empty,
                    xs_ptr,
                    ws_ptr,
                    out_ptr,
                    tiles,
                    n_tiles,
                    b_tiles,
                    n_k,
                    B,
                    n_out,
                    xs_stride_b,
                    xs_stride_h,
                    xs_stride_k,
                    ws_stride_h,
                    ws_stride_d,
                    ws_stride_k,
                    o_stride_b,
                    o_stride_h,
                    BLOCK_D,
                    STAGES,
                    SCALE_BOX,
                ),
            ),
            (
                _producer,
                (
                    x_desc,
                    w_desc,
                    xs_desc,
                    x_smem,
                    w_smem,
                    xs_smem,
                    full,
                    empty,
                    tiles,
                    n_tiles,
                    b_tiles,
                    n_k,
                    x_row_h,
                    x_col_h,
                    w_row_h,
                    xs_row_h,
                    BLOCK_D,
                    STAGES,
                    SCALE_BOX,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGS, 40],
    )


@gluon.jit
def _few_producer(
    x_desc,
    w_desc,
    xs_desc,
    x_smem,
    w_smem,
    xs_smem,
    full,
    empty,
    n_k,
    x_row,
    x_col,
    w_row,
    xs_row,
    BLOCK_B: gl.constexpr,
    STAGES: gl.constexpr,
    SCALE_BOX: gl.constexpr,
):
    for kb in range(n_k):
        stage = kb % STAGES
        mbarrier.wait(empty.index(stage), ((kb // STAGES) & 1) ^ 1)
        bar = full.index(stage)
        if SCALE_BOX:
            mbarrier.expect(bar, (BLOCK_B + OUTPUTS) * 128 + max(BLOCK_B, LINE) * 4)
            load_box(xs_desc, [xs_row + kb, 0], bar, xs_smem.index(stage))
        else:
            mbarrier.expect(bar, (BLOCK_B + OUTPUTS) * 128)
        load_box(w_desc, [w_row, kb * 128], bar, w_smem.index(stage))
        load_box(x_desc, [x_row, x_col + kb * 128], bar, x_smem.index(stage))


@gluon.jit
def _few_consumer(
    x_smem,
    w_smem,
    xs_smem,
    full,
    empty,
    xs,
    ws,
    out_ptr,
    n_k,
    d0,
    B,
    N,
    xs_stride_b,
    xs_stride_k,
    ws_stride_k,
    o_stride_b,
    BLOCK_B: gl.constexpr,
    STAGES: gl.constexpr,
    SCALE_BOX: gl.constexpr,
):
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_B, 32])
    tokens: gl.constexpr = gl.SliceLayout(0, mma)
    store: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    zeros = gl.zeros([OUTPUTS, BLOCK_B], gl.float32, mma)
    acc = zeros
    w_scale = gl.load(ws)
    if not SCALE_BOX:
        xs += gl.minimum(gl.arange(0, BLOCK_B, tokens), B - 1).to(gl.int64) * xs_stride_b
        x_scale = gl.load(xs)
    for kb in range(n_k):
        stage = kb % STAGES
        ahead = gl.minimum(kb + 1, n_k - 1).to(gl.int64)
        w_next = gl.load(ws + ahead * ws_stride_k)
        if not SCALE_BOX:
            x_next = gl.load(xs + ahead * xs_stride_k)
        mbarrier.wait(full.index(stage), (kb // STAGES) & 1)
        part = warpgroup_mma(
            w_smem.index(stage), x_smem.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True
        )
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
    token = gl.arange(0, BLOCK_B, gl.SliceLayout(0, store))
    ptr = out_ptr + token.to(gl.int64)[None, :] * o_stride_b + col[:, None]
    gl.store(ptr, tile, mask=(token < B)[None, :] & (col < N)[:, None])


@gluon.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["xs_ptr", "ws_ptr"])
def einsum_few_kernel(
    x_desc,
    w_desc,
    xs_desc,
    xs_ptr,
    ws_ptr,
    out_ptr,
    B,
    N,
    n_k,
    H,
    x_row_h,
    x_col_h,
    w_row_h,
    xs_row_h,
    xs_stride_b,
    xs_stride_h,
    xs_stride_k,
    ws_stride_h,
    ws_stride_d,
    ws_stride_k,
    o_stride_b,
    o_stride_h,
    BLOCK_B: gl.constexpr,
    STAGES: gl.constexpr,
    SCALE_BOX: gl.constexpr,
):
    """The same for at most BLOCK_B tokens, which are the N of the products: a block streams 64 rows of w past them, as
    far ahead as its shared memory goes. x_desc: boxes of [BLOCK_B, 128]; w_desc: of [64, 128]; xs_desc: of
    [1, BLOCK_B], or of 32."""
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_B, 128], x_desc.layout)
    w_smem = gl.allocate_shared_memory(w_desc.dtype, [STAGES, OUTPUTS, 128], w_desc.layout)
    if SCALE_BOX:
        xs_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, max(BLOCK_B, LINE)], xs_desc.layout)
    else:
        xs_smem = x_smem
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    n_tiles = gl.cdiv(N, OUTPUTS)
    index = gl.program_id(0)
    h = index // n_tiles
    d0 = (index % n_tiles) * OUTPUTS
    h64 = h.to(gl.int64)
    o_stride_b = gl.multiple_of(o_stride_b.to(gl.int64), 8)
    o_stride_h = gl.multiple_of(o_stride_h.to(gl.int64), 8)
    gl.warp_specialize(
        [
            (
                _few_consumer,
                (
                    x_smem,
                    w_smem,
                    xs_smem,
                    full,
                    empty,
                    xs_ptr + h64 * xs_stride_h,
                    ws_ptr + h64 * ws_stride_h + (d0 // 128).to(gl.int64) * ws_stride_d,
                    out_ptr + h64 * o_stride_h,
                    n_k,
                    d0,
                    B,
                    gl.multiple_of(N.to(gl.int64), 8),
                    xs_stride_b,
                    xs_stride_k,
                    ws_stride_k,
                    o_stride_b,
                    BLOCK_B,
                    STAGES,
                    SCALE_BOX,
                ),
            ),
            (
                _few_producer,
                (
                    x_desc,
                    w_desc,
                    xs_desc,
                    x_smem,
                    w_smem,
                    xs_smem,
                    full,
                    empty,
                    n_k,
                    h * x_row_h,
                    h * x_col_h,
                    d0 + h * w_row_h,
                    h * xs_row_h,
                    BLOCK_B,
                    STAGES,
                    SCALE_BOX,
                ),
            ),
        ],
        [1],
        [40],
    )
