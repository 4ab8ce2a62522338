"""``fp8_einsum`` for many tokens on mma.sync where e4m3 is not in hardware, in Gluon.

What limits a kernel here is the number of instructions beside the products, most of which decode, and the time after
each barrier. A warp has 32 tokens and all columns of its block: no other warp needs its x, so that stays e4m3 in shared
memory and is decoded in registers, just before it is multiplied. w is decoded once a block, to fp16 in shared memory, a
step ahead. The barrier of a step stands before its last products, whose operands are in registers by then: they keep
the tensor cores busy while the next step begins.

    role   warps       does
    all    TOKENS / 32 step i: decodes x, 16 of K at a time, and multiplies; decodes w of i + 1; after the barrier
                       cp.async of the bytes of x of i + 2 and of w of i + 3

                OUTPUTS columns
    TOKENS     [     acc      ]     K: STEP at a time
    tokens

Scales that are powers of two, within ``_RANGE`` of each other for a token, go into the decoded x: the unit of a token's
accumulator is the largest of its scales (those of x times those of w). With other scales the accumulator is multiplied
to the unit of each K block, which is exact enough where no scale is 2^80 times another; with K up to 2^16 it stays
finite. All scales of a tile are read first: a tile with others, or with 0, infinite or NaN ones, is multiplied in parts
with two accumulators.

Operands are fp16: an e4m3 value times 144, which is exact, and a NaN is infinite. A sum of finite ones is finite. Both
have K in the order of ``lib.gluon.reordered``.

    shared memory                        bytes, with TOKENS = 256, STEP = 128
    x_raw [2][TOKENS, STEP] e4m3         65536
    w_raw [2][OUTPUTS, STEP] e4m3        32768
    w_op  [2][PARTS][ROWS, STEP] fp16    65536    PARTS * ROWS = OUTPUTS; each part a buffer, since Triton 3.6 places
                                                  barriers between stores to parts of one
    units [TOKENS] fp32                   1024

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
from ...lib.gluon import async_load, reordered, times_144, times_144_and
from ...lib.sizes import cdiv
from .op import FP32, Call, Shape

OUTPUTS = gl.constexpr(128)
K_BLOCK = gl.constexpr(128)
_PART = gl.constexpr(32)
_INVERSE = gl.constexpr(1.0 / (144 * 144))
_LEAST, _MOST = gl.constexpr(2.0**-64), gl.constexpr(2.0**16)
_RANGE = gl.constexpr(2.0**16)
_PAIR, _ALONE = 1.08, 0.7
"""How long two small tiles take that share a multiprocessor, and one that has it alone, if a large one takes 1."""
FEWEST_TOKENS = 65
MOST_K = 2**16
"""Sums of this many products, 2^80 times as large, are finite in fp32."""


class Config(NamedTuple):
    """``tokens`` of a block, and the K of a ``step``."""

    tokens: int
    step: int

    def tiles(self, shape: Shape) -> int:
        return cdiv(shape.b, self.tokens) * cdiv(shape.d, OUTPUTS.value) * shape.h

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return 2 * self.step * (self.tokens + 3 * OUTPUTS.value) + 4 * self.tokens


def plan(shape: Shape) -> Config | None:
    """The tile whose waves over the multiprocessors take less time, unless half of them or more are idle."""
    if shape.w_rows or shape.batch_invariant or shape.b < FEWEST_TOKENS:
        return None
    arch = shape.arch
    large, small = (Config(**configured("fp8_einsum", "mma_sync", arch, role=role)) for role in ("large", "small"))
    pair = _PAIR if 2 * small.shared <= arch.smem else 2 * _ALONE
    pairs, alone = divmod(cdiv(small.tiles(shape), arch.sms), 2)
    config = small if pairs * pair + alone * _ALONE < cdiv(large.tiles(shape), arch.sms) else large
    return config if 2 * config.tiles(shape) > arch.sms else None


def takes(call: Call) -> bool:
    """fp32 scales, whole K blocks of at most 2^16 in all, 16-byte boundaries, tokens within 2^31 scales."""
    pointers = (call.x.data_ptr() | call.w.data_ptr() | call.out.data_ptr()) % 16 == 0
    plain = call.x_kind == FP32 and call.w_kind == FP32
    plain = plain and call.x.shape[2] % K_BLOCK.value == 0 and call.x.shape[2] <= MOST_K
    return plain and pointers and call.aligned and call.x.shape[0] * call.xs.stride(0) < 2**31


def launch(call: Call, config: Config) -> None:
    x, w, out = call.x, call.w, call.out
    (b, h, r), d = x.shape, w.shape[1]
    step = config.step if r % (2 * config.step) == 0 else min(config.step, K_BLOCK.value // 2)
    launch_kernel(
        _einsum_mma_sync_kernel, (cdiv(d, OUTPUTS.value) * cdiv(b, config.tokens) * h,),
        *(x, w, call.xs, call.ws, out), *(b, d, r // K_BLOCK.value),
        *(s // 16 for t in (x, w) for s in t.stride()[:2]),
        *(*call.xs.stride(), *call.ws.stride(), out.stride(0), out.stride(1)),
        TOKENS=config.tokens, STEP=step, num_warps=config.tokens // 32,
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
def _raw(x_raw, c: gl.constexpr, mma: gl.constexpr):
    """The bytes of 32 of a step's x, as two of 16."""
    raw = x_raw.slice(c * 32, 32, 1).load(gl.DotOperandLayout(0, mma, 4))
    return gl.split(gl.permute(gl.reshape(raw, [raw.shape[0], 2, 16]), (0, 2, 1)))


@gluon.jit
def _decoded(raw, factor, mma: gl.constexpr, SCALED: gl.constexpr):
    """Bytes of x as an operand, with SCALED each row also times its factor."""
    if SCALED:
        a = times_144_and(raw, gl.convert_layout(factor, gl.SliceLayout(1, raw.type.layout))[:, None])
    else:
        a = times_144(raw)
    return gl.convert_layout(reordered(a), gl.DotOperandLayout(0, mma, 2))


@gluon.jit
def _right(w_op, k: gl.constexpr, mma: gl.constexpr):
    """16 of a step's w, of one part of the columns."""
    return w_op.slice(k * 16, 16, 1).permute((1, 0)).load(gl.DotOperandLayout(1, mma, 2))


@gluon.jit
def _decode(raw, op, layout: gl.constexpr):
    """Bytes of w to fp16."""
    op.store(reordered(times_144(raw.load(layout))))


@gluon.jit
def _scales(xs, ws, kb, xs_stride_k, ws_stride_k, tokens):
    """Of x times those of w, for each token."""
    return gl.load(xs + kb * xs_stride_k + tokens) * gl.load(ws + kb * ws_stride_k)


@gluon.jit
def _product(
    x_raw, w_raw, w_op, units, x, w, xs, ws, xs_stride_b, xs_stride_k, ws_stride_k, b0, B, n_k,
    STEP: gl.constexpr, mma: gl.constexpr, lay: gl.constexpr, POWERS: gl.constexpr,
):  # fmt: skip
    """The sum over all K blocks, of each part of the columns. The bytes of step 0 are on their way."""
    HALVES: gl.constexpr = K_BLOCK // STEP
    PARTS: gl.constexpr = len(w_op) // 2
    ROWS: gl.constexpr = w_op[0].shape[0]
    TOKENS: gl.constexpr = units.shape[0]
    x_lay: gl.constexpr = gl.SliceLayout(1, gl.DotOperandLayout(0, mma, 4))
    tokens_lay: gl.constexpr = gl.SliceLayout(1, mma)
    TURN: gl.constexpr = max(HALVES, 2)
    steps = n_k * HALVES

    tokens = gl.minimum(b0 + gl.arange(0, TOKENS, x_lay), B - 1) * xs_stride_b
    inverse = 1.0 / units.load(x_lay)
    factor_next = (_scales(xs, ws, 0, xs_stride_k, ws_stride_k, tokens) * inverse).to(gl.float16)
    summed_tokens = gl.minimum(b0 + gl.arange(0, TOKENS, tokens_lay), B - 1) * xs_stride_b
    unit = _scales(xs, ws, 0, xs_stride_k, ws_stride_k, summed_tokens)
    # Read again: as ``unit`` itself, Triton would not carry ``unit`` from one turn to the next.
    unit_next = _scales(xs, ws, 0, xs_stride_k, ws_stride_k, summed_tokens)

    async_load(w_raw[1], w + gl.minimum(1, steps - 1) * STEP)
    async_copy.commit_group()
    async_copy.wait_group(0)
    for i in gl.static_range(PARTS):
        _decode(w_raw[0].slice(i * ROWS, ROWS, 0), w_op[i], lay)
    async_load(x_raw[1], x + gl.minimum(1, steps - 1) * STEP)
    async_load(w_raw[0], w + gl.minimum(2, steps - 1) * STEP)
    async_copy.commit_group()
    low, high = _raw(x_raw[0], 0, mma)
    a = _decoded(low, factor_next, mma, POWERS)

    acc = _zeros(PARTS, TOKENS, ROWS, mma)
    for turn in range(steps // TURN):
        for half in gl.static_range(TURN):
            step = turn * TURN + half
            if half % HALVES == 0:  # a K block begins
                factor = factor_next
                if not POWERS:
                    scaled = ()
                    for i in gl.static_range(PARTS):
                        scaled += (acc[i] * (unit / unit_next)[:, None],)  # type: ignore[assignment]
                    acc = scaled
                    unit = unit_next
            if half % HALVES == HALVES - 1:
                block = gl.minimum(step // HALVES + 1, n_k - 1).to(gl.int64)
                if POWERS:
                    factor_next = (_scales(xs, ws, block, xs_stride_k, ws_stride_k, tokens) * inverse).to(gl.float16)
                else:
                    unit_next = _scales(xs, ws, block, xs_stride_k, ws_stride_k, summed_tokens)
            low, high = _raw(x_raw[half % 2], 0, mma)
            for k in gl.static_range(STEP // 16):
                b = ()
                for i in gl.static_range(PARTS):
                    b += (_right(w_op[half % 2 * PARTS + i], k, mma),)  # type: ignore[assignment]
                if k + 1 == STEP // 16:
                    async_copy.wait_group(0)
                    async_load(x_raw[half % 2], x + gl.minimum(step + 2, steps - 1) * STEP)
                    async_load(w_raw[1 - half % 2], w + gl.minimum(step + 3, steps - 1) * STEP)
                    async_copy.commit_group()
                    low, high = _raw(x_raw[1 - half % 2], 0, mma)
                    coming = low
                elif k % 2 == 1:
                    low, high = _raw(x_raw[half % 2], (k + 1) // 2, mma)
                    coming = low
                else:
                    coming = high
                found = ()
                for i in gl.static_range(PARTS):
                    found += (mma_v2(a, b[i], acc[i]),)  # type: ignore[assignment]
                    if i == 0:
                        if k + 1 == STEP // 16 and half % HALVES == HALVES - 1:
                            a_next = _decoded(coming, factor_next, mma, POWERS)
                        else:
                            a_next = _decoded(coming, factor, mma, POWERS)
                    if i == PARTS // 2 and k + 1 < STEP // 16:
                        for j in gl.static_range(k, PARTS, STEP // 16 - 1):
                            raw = w_raw[1 - half % 2].slice(j * ROWS, ROWS, 0)
                            _decode(raw, w_op[(1 - half % 2) * PARTS + j], lay)
                acc = found
                a = a_next
    async_copy.wait_group(0)
    summed = ()
    for i in gl.static_range(PARTS):
        if POWERS:
            summed += (acc[i] * (units.load(tokens_lay) * _INVERSE)[:, None],)  # type: ignore[assignment]
        else:
            summed += (acc[i] * (unit * _INVERSE)[:, None],)  # type: ignore[assignment]
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
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, 8])
    lay: gl.constexpr = gl.BlockedLayout([1, 16], [512 // STEP, STEP // 16], [WARPS, 1], [1, 0])
    rows_lay: gl.constexpr = gl.SliceLayout(1, lay)
    of_bytes: gl.constexpr = gl.SwizzledSharedLayout(16, 128 // STEP, STEP // 16, [1, 0])
    of_operands: gl.constexpr = gl.SwizzledSharedLayout(8, max(64 // STEP, 1), min(STEP // 8, 8), [1, 0])
    ROWS: gl.constexpr = min(WARPS * 512 // STEP, OUTPUTS)  # that all threads decode at once: 16 bytes each
    PARTS: gl.constexpr = OUTPUTS // ROWS
    x_raw = _buffers(2, gl.uint8, TOKENS, STEP, of_bytes)
    w_raw = _buffers(2, gl.uint8, OUTPUTS, STEP, of_bytes)
    w_op = _buffers(2 * PARTS, gl.float16, ROWS, STEP, of_operands)
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
    for first in range(0, n_k, 16):
        for i in gl.static_range(16):
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
                x_raw, w_raw, w_op, units, x, w, xs, ws, xs_stride_b, xs_stride_k, ws_stride_k, b0, B, n_k,
                STEP, mma, lay, True,
            )  # fmt: skip
        else:
            acc = _product(
                x_raw, w_raw, w_op, units, x, w, xs, ws, xs_stride_b, xs_stride_k, ws_stride_k, b0, B, n_k,
                STEP, mma, lay, False,
            )  # fmt: skip
        for i in gl.static_range(PARTS):
            tile = acc[i] + acc[i] * 0.0  # infinite, of a NaN, to NaN: these scales cannot overflow
            _store(tile, out, d0 + i * ROWS, n_out, b0, B, o_stride_b, WARPS)
    else:
        tokens = gl.minimum(b0 + gl.arange(0, TOKENS, gl.SliceLayout(1, mma)), B - 1) * xs_stride_b
        w_part_op = w_op[0].slice(0, _PART, 0)
        async_copy.wait_group(0)
        for part in range(OUTPUTS // _PART):
            w_row = h * w_stride_h + gl.minimum(d0 + part * _PART + w_of, N - 1).to(gl.int64) * w_stride_d
            w_part = w_ptr + (w_row * 16)[:, None] + column[None, :]
            total = gl.zeros([TOKENS, _PART], gl.float32, mma)
            for kb in range(n_k):
                p = gl.zeros([TOKENS, _PART], gl.float32, mma)
                for half in range(HALVES):
                    async_load(x_raw[0], x + (kb * HALVES + half) * STEP)
                    async_load(w_raw[0], w_part + (kb * HALVES + half) * STEP)
                    async_copy.commit_group()
                    async_copy.wait_group(0)
                    _decode(w_raw[0].slice(0, ROWS, 0), w_op[0], lay)
                    for c in gl.static_range(STEP // 32):
                        low, high = _raw(x_raw[0], c, mma)
                        p = mma_v2(_decoded(low, 0, mma, False), _right(w_part_op, 2 * c, mma), p)
                        p = mma_v2(_decoded(high, 0, mma, False), _right(w_part_op, 2 * c + 1, mma), p)
                scales = _scales(xs, ws, gl.to_tensor(kb).to(gl.int64), xs_stride_k, ws_stride_k, tokens)
                q = p * _INVERSE
                total += (q + q * 0.0) * scales[:, None]
            _store(total, out, d0 + part * _PART, n_out, b0, B, o_stride_b, WARPS)
