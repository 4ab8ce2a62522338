"""``fp8_einsum`` for many tokens on mma.sync where e4m3 is not in hardware, in Gluon.

What limits plain Triton here is the number of instructions that decode: with a second accumulator, for the scales, a
warp has registers for 64 x 32 outputs, and decodes 3 words for 4 products. Here the only accumulator is in units of the
scale of the current K block, so one of 4 warps has 64 x 64 outputs, and decodes 2.

    role   warps   does
    all    WARPS   cp.async of the next operands; the accumulator to the unit of this K block; decodes; products

                128 outputs
    128 tokens [   acc     ]     K: STEP at a time, a new unit every 128

That is exact enough where no scale is 2^80 times another. All scales of a tile are read first: a tile with others, or
with 0, infinite or NaN ones, is multiplied in four parts with two accumulators.

Operands are fp16: an e4m3 value times 144, which is exact, and a NaN is infinite. A sum of finite ones is finite.

    shared memory                    bytes, with STAGES = 3
    x_smem [STAGES, 128, STEP] e4m3  24576
    w_smem [STAGES, 128, STEP] e4m3  24576

    barriers: of the whole block, placed by Triton; cp.async groups, one a step
    strides: x and w in 16 bytes, others in elements
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from ...configurations import configured
from ...launch import entry, launch_kernel
from ...lib.gluon import async_load, times_144
from ...lib.sizes import cdiv
from .op import FP32, Call, Shape

TILE = gl.constexpr(128)  # tokens and outputs
STEP = gl.constexpr(64)
HALVES = gl.constexpr(2)  # of a K block
_PART = gl.constexpr(32)
_INVERSE = gl.constexpr(1.0 / (144 * 144))
_LEAST, _MOST = gl.constexpr(2.0**-64), gl.constexpr(2.0**16)
FEWEST_TOKENS = 257


class Config(NamedTuple):
    stages: int
    warps: int


def plan(shape: Shape) -> Config | None:
    tiles = cdiv(shape.b, TILE.value) * cdiv(shape.d, TILE.value) * shape.h
    if shape.w_rows or shape.batch_invariant or shape.b < FEWEST_TOKENS or tiles < shape.arch.sms:
        return None
    return Config(**configured("fp8_einsum", "mma_sync", shape.arch))


def takes(call: Call) -> bool:
    """fp32 scales, whole K blocks, 16-byte boundaries, tokens within 2^31 scales."""
    pointers = (call.x.data_ptr() | call.w.data_ptr() | call.out.data_ptr()) % 16 == 0
    plain = call.x_kind == FP32 and call.w_kind == FP32 and call.x.shape[2] % 128 == 0
    return plain and pointers and call.aligned and call.x.shape[0] * call.xs.stride(0) < 2**31


def launch(call: Call, config: Config) -> None:
    x, w, out = call.x, call.w, call.out
    (b, h, r), d = x.shape, w.shape[1]
    launch_kernel(
        _einsum_mma_sync_kernel, (cdiv(d, TILE.value) * cdiv(b, TILE.value) * h,),
        *(x, w, call.xs, call.ws, out), *(b, d, r // 128),
        *(s // 16 for t in (x, w) for s in t.stride()[:2]),
        *(*call.xs.stride(), *call.ws.stride(), out.stride(0), out.stride(1)), STAGES=config.stages,
        WARPS=config.warps, num_warps=config.warps,
    )  # fmt: skip


@gluon.jit
def _copy(smem, x, w, step, STAGES: gl.constexpr):
    """Start the copy of a step's operands."""
    x_smem, w_smem = smem
    async_load(x_smem.index(step % STAGES), x + step * STEP)
    async_load(w_smem.index(step % STAGES), w + step * STEP)


@gluon.jit
def _store(tile, out, d0, N, b0, B, o_stride_b, WARPS: gl.constexpr):
    """[TILE, 32] outputs from column d0 on."""
    store: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [WARPS, 1], [1, 0])
    tile = gl.convert_layout(tile.to(gl.bfloat16), store)
    token = b0 + gl.arange(0, TILE, gl.SliceLayout(1, store))
    col = d0 + gl.arange(0, _PART, gl.SliceLayout(0, store))
    ptr = out + token.to(gl.int64)[:, None] * o_stride_b + col[None, :]
    gl.store(ptr, tile, mask=(token < B)[:, None] & (col < N)[None, :])


@entry(gluon.jit, "B", any_alignment=["xs_ptr", "ws_ptr"])
def _einsum_mma_sync_kernel(
    x_ptr, w_ptr, xs_ptr, ws_ptr, out_ptr,
    B, N, n_k,
    x_stride_b, x_stride_h, w_stride_h, w_stride_d,  # in 16 bytes
    xs_stride_b, xs_stride_h, xs_stride_k, ws_stride_h, ws_stride_d, ws_stride_k, o_stride_b, o_stride_h,
    STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS // 2, 2], instr_shape=[16, 8])
    lhs: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    rhs: gl.constexpr = gl.DotOperandLayout(1, mma, 4)
    lay: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [WARPS, 1], [1, 0])
    rows_lay: gl.constexpr = gl.SliceLayout(1, lay)
    banks: gl.constexpr = gl.SwizzledSharedLayout(16, 2, 4, [1, 0])
    x_smem = gl.allocate_shared_memory(gl.uint8, [STAGES, TILE, STEP], banks)
    w_smem = gl.allocate_shared_memory(gl.uint8, [STAGES, TILE, STEP], banks)
    smem = (x_smem, w_smem)

    n_tiles = gl.cdiv(N, TILE)
    b_tiles = gl.cdiv(B, TILE)
    pid = gl.program_id(0)
    d0 = (pid % n_tiles) * TILE
    pid = pid // n_tiles
    b0 = (pid % b_tiles) * TILE
    h = (pid // b_tiles).to(gl.int64)
    o_stride_b = gl.multiple_of(o_stride_b.to(gl.int64), 8)
    out = out_ptr + h * gl.multiple_of(o_stride_h.to(gl.int64), 8)
    n_out = gl.multiple_of(N.to(gl.int64), 8)

    # rows past the last repeat it and are not stored
    row = gl.arange(0, TILE, rows_lay)
    column = gl.arange(0, STEP, gl.SliceLayout(0, lay))
    x_row = h * x_stride_h + gl.minimum(b0 + row, B - 1).to(gl.int64) * x_stride_b
    w_row = h * w_stride_h + gl.minimum(d0 + row, N - 1).to(gl.int64) * w_stride_d
    x = x_ptr + (x_row * 16)[:, None] + column[None, :]
    w = w_ptr + (w_row * 16)[:, None] + column[None, :]
    xs = xs_ptr + h * xs_stride_h
    token = gl.minimum(b0 + gl.arange(0, TILE, gl.SliceLayout(1, mma)), B - 1) * xs_stride_b
    ws = ws_ptr + h * ws_stride_h + (d0 // 128).to(gl.int64) * ws_stride_d

    steps = n_k * HALVES
    for i in gl.static_range(STAGES - 1):
        if i < steps:
            _copy(smem, x, w, i, STAGES)
        async_copy.commit_group()
    one_row: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    of_row = gl.minimum(b0 + gl.arange(0, TILE, one_row), B - 1) * xs_stride_b
    bad = gl.zeros([TILE], gl.int32, one_row)
    for kb in range(n_k):
        at = gl.to_tensor(kb).to(gl.int64)
        size = gl.abs(gl.load(xs + at * xs_stride_k + of_row) * gl.load(ws + at * ws_stride_k))
        bad |= ((size >= _LEAST) & (size <= _MOST)).to(gl.int32) ^ 1
    if gl.max(bad, 0) == 0:
        acc = ()
        for _ in gl.static_range(4):
            acc += (gl.zeros([TILE, _PART], gl.float32, mma),)  # type: ignore[assignment]
        unit = gl.load(xs + token) * gl.load(ws)
        unit_next = unit * 1.0  # as ``unit`` itself, Triton would not carry ``unit`` from one turn to the next
        for kb in range(n_k):
            factor = unit / unit_next
            unit = unit_next
            scaled = ()
            for part in gl.static_range(4):
                scaled += (acc[part] * factor[:, None],)  # type: ignore[assignment]
            acc = scaled
            for half in gl.static_range(HALVES):
                step = kb * HALVES + half
                async_copy.wait_group(STAGES - 2)
                if half == HALVES - 1:
                    ahead = gl.minimum(kb + 1, n_k - 1).to(gl.int64)
                    unit_next = gl.load(xs + ahead * xs_stride_k + token) * gl.load(ws + ahead * ws_stride_k)
                x_here, w_here = x_smem.index(step % STAGES), w_smem.index(step % STAGES)
                for c in gl.static_range(STEP // 32):
                    a = times_144(x_here.slice(c * 32, 32, 1).load(lhs))
                    summed = ()
                    for part in gl.static_range(4):
                        b = w_here.slice(part * _PART, _PART, 0).slice(c * 32, 32, 1).permute((1, 0)).load(rhs)
                        summed += (mma_v2(a, times_144(b), acc[part]),)  # type: ignore[assignment]
                    acc = summed
                if step + STAGES - 1 < steps:
                    _copy(smem, x, w, step + STAGES - 1, STAGES)
                async_copy.commit_group()
        async_copy.wait_group(0)
        for part in gl.static_range(4):
            tile = acc[part] * (unit * _INVERSE)[:, None]
            tile += tile * 0.0  # infinite, of a NaN, to NaN
            _store(tile, out, d0 + part * _PART, n_out, b0, B, o_stride_b, WARPS)
    else:
        async_copy.wait_group(0)
        for part in range(4):
            w_row = h * w_stride_h + gl.minimum(d0 + part * _PART + row, N - 1).to(gl.int64) * w_stride_d
            w_part = w_ptr + (w_row * 16)[:, None] + column[None, :]
            total = gl.zeros([TILE, _PART], gl.float32, mma)
            for kb in range(n_k):
                p = gl.zeros([TILE, _PART], gl.float32, mma)
                for half in range(HALVES):
                    _copy(smem, x, w_part, kb * HALVES + half, STAGES)
                    async_copy.commit_group()
                    async_copy.wait_group(0)
                    stage = (kb * HALVES + half) % STAGES
                    for c in gl.static_range(STEP // 32):
                        a = times_144(x_smem.index(stage).slice(c * 32, 32, 1).load(lhs))
                        b = w_smem.index(stage).slice(0, _PART, 0).slice(c * 32, 32, 1).permute((1, 0)).load(rhs)
                        p = mma_v2(a, times_144(b), p)
                at = gl.to_tensor(kb).to(gl.int64)
                scale = gl.load(xs + at * xs_stride_k + token) * gl.load(ws + at * ws_stride_k)
                p *= _INVERSE
                total += (p + p * 0.0) * scale[:, None]
            _store(total, out, d0 + part * _PART, n_out, b0, B, o_stride_b, WARPS)
