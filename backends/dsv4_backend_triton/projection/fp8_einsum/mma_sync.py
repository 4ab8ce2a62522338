"""``fp8_einsum`` for many tokens on mma.sync where e4m3 is not in hardware, in Gluon.

What limits a kernel here is the number of instructions beside the products, most of which decode. So every operand is
decoded once a block, to fp16 in shared memory, while those decoded before are multiplied, and a block is as large as
registers allow: each warp has 64 x 64 outputs.

    role   warps       does
    all    TOKENS / 32 cp.async of the bytes of step i + 2; decodes those of i + 1; products of i

                128 outputs
    TOKENS     [   acc     ]     K: STEP at a time
    tokens

Scales that are powers of two, within ``_RANGE`` of each other for a token, go into the decoded x: the unit of a token's
accumulator is the largest of its scales (those of x times those of w). With other scales the accumulator is multiplied
to the unit of each K block, which is exact enough where no scale is 2^80 times another. All scales of a tile are read
first: a tile with others, or with 0, infinite or NaN ones, is multiplied in four parts with two accumulators.

Operands are fp16: an e4m3 value times 144, which is exact, and a NaN is infinite. A sum of finite ones is finite.

    shared memory                    bytes, with TOKENS = 256, STEP = 64
    x_raw [2][TOKENS, STEP] e4m3     32768
    w_raw [2][128, STEP] e4m3        16384
    x_op  [2][TOKENS, STEP] fp16     65536
    w_op  [2][128, STEP] fp16        32768
    units [TOKENS] fp32               1024

    barriers: of the whole block, placed by Triton; one a step, since no buffer is read and written between two of them
    strides: x and w in 16 bytes, others in elements
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from ...configurations import configured
from ...launch import entry, launch_kernel
from ...lib.gluon import async_load, times_144, times_144_and
from ...lib.sizes import cdiv
from .op import FP32, Call, Shape

OUTPUTS = gl.constexpr(128)
K_BLOCK = gl.constexpr(128)
_PART = gl.constexpr(32)
_INVERSE = gl.constexpr(1.0 / (144 * 144))
_LEAST, _MOST = gl.constexpr(2.0**-64), gl.constexpr(2.0**16)
_RANGE = gl.constexpr(2.0**16)
FEWEST_TOKENS = 257


class Config(NamedTuple):
    """``tokens`` of a block, and the K of a ``step``."""

    tokens: int
    step: int


def plan(shape: Shape) -> Config | None:
    if shape.w_rows or shape.batch_invariant or shape.b < FEWEST_TOKENS:
        return None
    config = Config(**configured("fp8_einsum", "mma_sync", shape.arch))
    tiles = cdiv(shape.b, config.tokens) * cdiv(shape.d, OUTPUTS.value) * shape.h
    return config if tiles >= shape.arch.sms * 3 // 4 else None


def takes(call: Call) -> bool:
    """fp32 scales, whole K blocks, 16-byte boundaries, tokens within 2^31 scales."""
    pointers = (call.x.data_ptr() | call.w.data_ptr() | call.out.data_ptr()) % 16 == 0
    plain = call.x_kind == FP32 and call.w_kind == FP32 and call.x.shape[2] % K_BLOCK.value == 0
    return plain and pointers and call.aligned and call.x.shape[0] * call.xs.stride(0) < 2**31


def launch(call: Call, config: Config) -> None:
    x, w, out = call.x, call.w, call.out
    (b, h, r), d = x.shape, w.shape[1]
    launch_kernel(
        _einsum_mma_sync_kernel, (cdiv(d, OUTPUTS.value) * cdiv(b, config.tokens) * h,),
        *(x, w, call.xs, call.ws, out), *(b, d, r // K_BLOCK.value),
        *(s // 16 for t in (x, w) for s in t.stride()[:2]),
        *(*call.xs.stride(), *call.ws.stride(), out.stride(0), out.stride(1)),
        TOKENS=config.tokens, STEP=config.step, num_warps=config.tokens // 32,
    )  # fmt: skip


@gluon.jit
def _store(tile, out, d0, N, b0, B, o_stride_b, WARPS: gl.constexpr):
    """A tile of outputs from token b0 and column d0 on."""
    COLUMNS: gl.constexpr = tile.shape[1] // 8  # threads
    store: gl.constexpr = gl.BlockedLayout([1, 8], [32 // COLUMNS, COLUMNS], [WARPS, 1], [1, 0])
    tile = gl.convert_layout(tile.to(gl.bfloat16), store)
    token = b0 + gl.arange(0, tile.shape[0], gl.SliceLayout(1, store))
    col = d0 + gl.arange(0, tile.shape[1], gl.SliceLayout(0, store))
    ptr = out + token.to(gl.int64)[:, None] * o_stride_b + col[None, :]
    gl.store(ptr, tile, mask=(token < B)[:, None] & (col < N)[None, :])


@gluon.jit
def _buffers(COUNT: gl.constexpr, dtype: gl.constexpr, rows: gl.constexpr, step: gl.constexpr, layout: gl.constexpr):
    found = ()
    for _ in gl.static_range(COUNT):
        found += (gl.allocate_shared_memory(dtype, [rows, step], layout),)  # type: ignore[assignment]
    return found


@gluon.jit
def _zeros(PARTS: gl.constexpr, rows: gl.constexpr, columns: gl.constexpr, mma: gl.constexpr):
    found = ()
    for _ in gl.static_range(PARTS):
        found += (gl.zeros([rows, columns], gl.float32, mma),)  # type: ignore[assignment]
    return found


@gluon.jit
def _multiply(acc, x_op, first: gl.constexpr, w_op, c: gl.constexpr, mma: gl.constexpr):
    """``acc`` of every part plus its product over 16 of a step."""
    b = w_op.slice(c * 16, 16, 1).permute((1, 0)).load(gl.DotOperandLayout(1, mma, 2))
    found = ()
    for i in gl.static_range(len(acc)):
        a = x_op[first + i].slice(c * 16, 16, 1).load(gl.DotOperandLayout(0, mma, 2))
        found += (mma_v2(a, b, acc[i]),)  # type: ignore[assignment]
    return found


@gluon.jit
def _decode(raw, op, factor, layout: gl.constexpr, SCALED: gl.constexpr):
    """Bytes to fp16, with SCALED each row also times its factor."""
    values = raw.load(layout)
    if SCALED:
        op.store(times_144_and(values, factor[:, None]))
    else:
        op.store(times_144(values))


@gluon.jit
def _offsets(b0, B, stride, PARTS: gl.constexpr, ROWS: gl.constexpr, layout: gl.constexpr):
    """Of the scales of each part's tokens. Rows past the last repeat it and are not stored."""
    found = ()
    for i in gl.static_range(PARTS):
        found += (gl.minimum(b0 + i * ROWS + gl.arange(0, ROWS, layout), B - 1) * stride,)  # type: ignore[assignment]
    return found


@gluon.jit
def _scales(xs, ws, kb, xs_stride_k, ws_stride_k, offsets):
    """Of x times those of w, for each part's tokens."""
    w_scale = gl.load(ws + kb * ws_stride_k)
    found = ()
    for i in gl.static_range(len(offsets)):
        found += (gl.load(xs + kb * xs_stride_k + offsets[i]) * w_scale,)  # type: ignore[assignment]
    return found


@gluon.jit
def _times(scales, by):
    """As fp16."""
    found = ()
    for i in gl.static_range(len(scales)):
        found += ((scales[i] * by[i]).to(gl.float16),)  # type: ignore[assignment]
    return found


@gluon.jit
def _product(
    x_raw, w_raw, x_op, w_op, units, x, w, xs, ws, xs_stride_b, xs_stride_k, ws_stride_k, b0, B, n_k,
    PARTS: gl.constexpr, ROWS: gl.constexpr, STEP: gl.constexpr, mma: gl.constexpr, lay: gl.constexpr,
    POWERS: gl.constexpr,
):  # fmt: skip
    """The sum over all K blocks, of each part. The bytes of step 0 are on their way."""
    HALVES: gl.constexpr = K_BLOCK // STEP
    rows_lay: gl.constexpr = gl.SliceLayout(1, lay)
    tokens_lay: gl.constexpr = gl.SliceLayout(1, mma)
    steps = n_k * HALVES

    tokens = _offsets(b0, B, xs_stride_b, PARTS, ROWS, rows_lay)
    inverse = ()
    for i in gl.static_range(PARTS):
        inverse += (1.0 / units.slice(i * ROWS, ROWS, 0).load(rows_lay),)  # type: ignore[assignment]
    factor = _times(_scales(xs, ws, 0, xs_stride_k, ws_stride_k, tokens), inverse)
    summed_tokens = _offsets(b0, B, xs_stride_b, PARTS, ROWS, tokens_lay)
    unit = _scales(xs, ws, 0, xs_stride_k, ws_stride_k, summed_tokens)
    # Read again: as ``unit`` itself, Triton would not carry ``unit`` from one turn to the next.
    unit_next = _scales(xs, ws, 0, xs_stride_k, ws_stride_k, summed_tokens)

    async_copy.wait_group(0)
    ahead = gl.minimum(1, steps - 1)
    async_load(x_raw[1], x + ahead * STEP)
    async_load(w_raw[1], w + ahead * STEP)
    async_copy.commit_group()
    for i in gl.static_range(PARTS):
        _decode(x_raw[0].slice(i * ROWS, ROWS, 0), x_op[i], factor[i], lay, POWERS)
    _decode(w_raw[0], w_op[0], 0, lay, False)

    acc = _zeros(PARTS, ROWS, OUTPUTS, mma)
    for kb in range(n_k):
        block = gl.minimum(kb + 1, n_k - 1).to(gl.int64)
        if not POWERS:
            scaled = ()
            for i in gl.static_range(PARTS):
                scaled += (acc[i] * (unit[i] / unit_next[i])[:, None],)  # type: ignore[assignment]
            acc = scaled
            unit = unit_next
        for half in gl.static_range(HALVES):
            async_copy.wait_group(0)
            ahead = gl.minimum(kb * HALVES + half + 2, steps - 1)
            async_load(x_raw[half % 2], x + ahead * STEP)
            async_load(w_raw[half % 2], w + ahead * STEP)
            async_copy.commit_group()
            if half == HALVES - 1:
                if POWERS:
                    factor = _times(_scales(xs, ws, block, xs_stride_k, ws_stride_k, tokens), inverse)
                else:
                    unit_next = _scales(xs, ws, block, xs_stride_k, ws_stride_k, summed_tokens)
            for c in gl.static_range(STEP // 16):
                acc = _multiply(acc, x_op, half % 2 * PARTS, w_op[half % 2], c, mma)
                for i in gl.static_range(c, PARTS, STEP // 16):
                    raw = x_raw[1 - half % 2].slice(i * ROWS, ROWS, 0)
                    _decode(raw, x_op[(1 - half % 2) * PARTS + i], factor[i], lay, POWERS)
                if c == 0:
                    _decode(w_raw[1 - half % 2], w_op[1 - half % 2], 0, lay, False)
    async_copy.wait_group(0)
    summed = ()
    for i in gl.static_range(PARTS):
        if POWERS:
            summed += (acc[i] * (units.slice(i * ROWS, ROWS, 0).load(tokens_lay) * _INVERSE)[:, None],)  # type: ignore[assignment]
        else:
            summed += (acc[i] * (unit[i] * _INVERSE)[:, None],)  # type: ignore[assignment]
    return summed


@entry(gluon.jit, "B", any_alignment=["xs_ptr", "ws_ptr"])
def _einsum_mma_sync_kernel(
    x_ptr, w_ptr, xs_ptr, ws_ptr, out_ptr,
    B, N, n_k,
    x_stride_b, x_stride_h, w_stride_h, w_stride_d,  # in 16 bytes
    xs_stride_b, xs_stride_h, xs_stride_k, ws_stride_h, ws_stride_d, ws_stride_k, o_stride_b, o_stride_h,
    TOKENS: gl.constexpr, STEP: gl.constexpr,
):  # fmt: skip
    WARPS: gl.constexpr = TOKENS // 32
    HALVES: gl.constexpr = K_BLOCK // STEP
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS // 2, 2], instr_shape=[16, 8])
    lay: gl.constexpr = gl.BlockedLayout([1, 16], [512 // STEP, STEP // 16], [WARPS, 1], [1, 0])
    rows_lay: gl.constexpr = gl.SliceLayout(1, lay)
    as_read: gl.constexpr = gl.SwizzledSharedLayout(16, 1, 1, [1, 0])
    for_ldmatrix: gl.constexpr = gl.SwizzledSharedLayout(8, 64 // STEP, STEP // 8, [1, 0])
    ROWS: gl.constexpr = WARPS * 512 // STEP  # that all threads decode at once: 16 bytes each
    PARTS: gl.constexpr = TOKENS // ROWS
    x_raw = _buffers(2, gl.uint8, TOKENS, STEP, as_read)
    w_raw = _buffers(2, gl.uint8, OUTPUTS, STEP, as_read)
    x_op = _buffers(2 * PARTS, gl.float16, ROWS, STEP, for_ldmatrix)
    w_op = _buffers(2, gl.float16, OUTPUTS, STEP, for_ldmatrix)
    units = gl.allocate_shared_memory(gl.float32, [TOKENS], gl.SwizzledSharedLayout(1, 1, 1, [0]))

    n_tiles = gl.cdiv(N, OUTPUTS)
    b_tiles = gl.cdiv(B, TOKENS)
    pid = gl.program_id(0)
    d0 = (pid % n_tiles) * OUTPUTS
    pid = pid // n_tiles
    b0 = (pid % b_tiles) * TOKENS
    h = (pid // b_tiles).to(gl.int64)
    o_stride_b = gl.multiple_of(o_stride_b.to(gl.int64), 8)
    out = out_ptr + h * gl.multiple_of(o_stride_h.to(gl.int64), 8)
    n_out = gl.multiple_of(N.to(gl.int64), 8)

    # rows past the last repeat it and are not stored
    column = gl.arange(0, STEP, gl.SliceLayout(0, lay))
    w_of = gl.arange(0, OUTPUTS, rows_lay)
    x_row = h * x_stride_h + gl.minimum(b0 + gl.arange(0, TOKENS, rows_lay), B - 1).to(gl.int64) * x_stride_b
    w_row = h * w_stride_h + gl.minimum(d0 + w_of, N - 1).to(gl.int64) * w_stride_d
    x = x_ptr + (x_row * 16)[:, None] + column[None, :]
    w = w_ptr + (w_row * 16)[:, None] + column[None, :]
    xs = xs_ptr + h * xs_stride_h
    ws = ws_ptr + h * ws_stride_h + (d0 // 128).to(gl.int64) * ws_stride_d
    async_load(x_raw[0], x)
    async_load(w_raw[0], w)
    async_copy.commit_group()

    one_row: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    of_row = gl.minimum(b0 + gl.arange(0, TOKENS, one_row), B - 1) * xs_stride_b
    least = gl.full([TOKENS], float("inf"), gl.float32, one_row)
    most = gl.zeros([TOKENS], gl.float32, one_row)
    odd = gl.zeros([TOKENS], gl.int32, one_row)  # 1: not a power of two; 2: irregular
    for first in range(0, n_k, 8):
        for i in gl.static_range(8):
            at = gl.minimum(first + i, n_k - 1).to(gl.int64)
            scale = gl.load(xs + at * xs_stride_k + of_row) * gl.load(ws + at * ws_stride_k)
            size = gl.abs(scale)
            odd |= gl.where((size >= _LEAST) & (size <= _MOST), 0, 2)
            odd |= gl.where((size.to(gl.int32, bitcast=True) & 0x7FFFFF) == 0, 0, 1)
            least = gl.minimum(least, size)
            most = gl.maximum(most, size)
    odd |= gl.where(most <= least * _RANGE, 0, 1)
    units.store(most)
    kind = gl.max(odd, 0)
    if kind < 2:
        if kind == 0:
            acc = _product(
                x_raw, w_raw, x_op, w_op, units, x, w, xs, ws, xs_stride_b, xs_stride_k, ws_stride_k, b0, B, n_k,
                PARTS, ROWS, STEP, mma, lay, True,
            )  # fmt: skip
        else:
            acc = _product(
                x_raw, w_raw, x_op, w_op, units, x, w, xs, ws, xs_stride_b, xs_stride_k, ws_stride_k, b0, B, n_k,
                PARTS, ROWS, STEP, mma, lay, False,
            )  # fmt: skip
        for i in gl.static_range(PARTS):
            tile = acc[i] + acc[i] * 0.0  # infinite, of a NaN, to NaN: these scales cannot overflow
            _store(tile, out, d0, n_out, b0 + i * ROWS, B, o_stride_b, WARPS)
    else:
        tokens = _offsets(b0, B, xs_stride_b, PARTS, ROWS, gl.SliceLayout(1, mma))
        async_copy.wait_group(0)
        for part in range(4):
            w_row = h * w_stride_h + gl.minimum(d0 + part * _PART + w_of, N - 1).to(gl.int64) * w_stride_d
            w_part = w_ptr + (w_row * 16)[:, None] + column[None, :]
            total = _zeros(PARTS, ROWS, _PART, mma)
            for kb in range(n_k):
                p = _zeros(PARTS, ROWS, _PART, mma)
                for half in range(HALVES):
                    async_load(x_raw[0], x + (kb * HALVES + half) * STEP)
                    async_load(w_raw[0], w_part + (kb * HALVES + half) * STEP)
                    async_copy.commit_group()
                    async_copy.wait_group(0)
                    for i in gl.static_range(PARTS):
                        _decode(x_raw[0].slice(i * ROWS, ROWS, 0), x_op[i], 0, lay, False)
                    _decode(w_raw[0], w_op[0], 0, lay, False)
                    for c in gl.static_range(STEP // 16):
                        p = _multiply(p, x_op, 0, w_op[0].slice(0, _PART, 0), c, mma)
                scales = _scales(xs, ws, gl.to_tensor(kb).to(gl.int64), xs_stride_k, ws_stride_k, tokens)
                summed = ()
                for i in gl.static_range(PARTS):
                    q = p[i] * _INVERSE
                    summed += (total[i] + (q + q * 0.0) * scales[i][:, None],)  # type: ignore[assignment]
                total = summed
            for i in gl.static_range(PARTS):
                _store(total[i], out, d0 + part * _PART, n_out, b0 + i * ROWS, B, o_stride_b, WARPS)
