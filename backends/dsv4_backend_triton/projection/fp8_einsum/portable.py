"""``fp8_einsum`` in plain Triton: a block is a tile of tokens and outputs of one head.

role   does
all    a 128-wide K block of x and of w, their product, its scaling in fp32, and the sum, all along R

               BLOCK_D outputs, all of one 128 (or of W_ROWS, each with its scale)
BLOCK_B tokens [     acc     ]    K: 128 at a time.  With SWAP the outputs are the M side of the product, so that few
                                  tokens waste nothing

shared memory: STAGES * (BLOCK_B + BLOCK_D) * 128 bytes of operands, twice that where they are decoded to bf16
barriers: of the whole block, placed by Triton
strides: in elements
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ...configurations import configured
from ...launch import entry, launch_kernel
from ...lib.bits import e8m0_to_fp32, fp8_operand, round_to
from ...lib.sizes import cdiv
from .op import Call, Shape

_INVARIANT_TOKENS = 128  # the batch-invariant mode is planned for so many


class Config(NamedTuple):
    """``stages_alone``: where every block has a multiprocessor of its own."""

    block_b: int
    block_d: int
    swap: bool
    warps: int
    stages: int
    stages_alone: int
    unroll: int
    tma: bool


def plan(shape: Shape) -> Config:
    tokens = _INVARIANT_TOKENS if shape.batch_invariant else shape.b
    config = Config(**configured("fp8_einsum", "portable", shape.arch, size=tokens))
    if shape.w_rows and config.block_b * config.block_d > 8192:  # scales per row of w cost registers: half the tile
        config = config._replace(block_d=config.block_d // 2)
    return config._replace(stages=config.stages_alone) if shape.alone else config


def launch(call: Call, config: Config) -> None:
    x, w, out, arch = call.x, call.w, call.out, call.shape.arch
    (b, h, r), d = x.shape, w.shape[1]
    tma = config.tma and call.operands_aligned and x.data_ptr() % 16 == 0 and w.data_ptr() % 16 == 0
    # A tensor map needs vectors that do not overlap.
    tma = tma and (b == 1 or x.stride(0) >= r) and (d == 1 or w.stride(1) >= r)
    tma = tma and (h == 1 or min(x.stride(1), w.stride(0)) >= r)
    x_src, w_src = x, w
    if tma:
        x_b, x_h, w_h, w_d = (max(stride, 16) for t in (x, w) for stride in t.stride()[:2])
        x_src = TensorDescriptor(x, [h, b, r], [x_h, x_b, 1], [1, config.block_b, 128])
        w_src = TensorDescriptor(w, [h, d, r], [w_h, w_d, 1], [1, config.block_d, 128])
    tiles = cdiv(d, config.block_d) * cdiv(b, config.block_b) * h
    launch_kernel(
        _einsum_kernel, (tiles, 1), *(x_src, w_src, call.xs, call.ws, out),
        *(b, d, r, *x.stride()[:2], *w.stride()[:2], *call.xs.stride(), *call.ws.stride(), 0, *out.stride()[:2], 1),
        X_KIND=call.x_kind, W_KIND=call.w_kind, W_ROWS=call.shape.w_rows, BLOCK_B=config.block_b,
        BLOCK_D=config.block_d, SWAP=config.swap, TMA=tma, ALIGNED=call.aligned, EVEN_K=r % 128 == 0,
        OPERAND=tl.float16 if arch.fp8 == tl.bfloat16 else arch.fp8, STAGES=config.stages,
        UNROLL=config.unroll if cdiv(r, 128) % config.unroll == 0 else 1, num_warps=config.warps,
    )  # fmt: skip


@triton.jit
def _scale(ptr, offset, kb, stride_k, KIND: tl.constexpr, mask):
    """Scales of K block ``kb`` at ``ptr + offset``: fp32, an E8M0 byte, or one of four E8M0 bytes of an
    int32."""
    if KIND == 0:
        return tl.load(ptr + offset + kb * stride_k.to(tl.int64), mask=mask, other=0.0)
    elif KIND == 1:
        return e8m0_to_fp32(tl.load(ptr + offset + kb * stride_k.to(tl.int64), mask=mask, other=0))
    else:
        word = tl.load(ptr + offset + (kb // 4) * stride_k.to(tl.int64), mask=mask, other=0)
        return e8m0_to_fp32(word >> ((kb % 4) * 8))


@triton.jit
def _load_tile(
    src, at, rows, dim, strides, ROWS, R,
    TMA: tl.constexpr, EVEN_K: tl.constexpr, CLAMP: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """A [BLOCK, 128] tile of e4m3, ``at`` head h, row row0, K block kb. Rows past ROWS are zero and not fetched, or
    with CLAMP repeat the last one (no mask: cheaper where such rows are rare). Either is dropped at the store."""
    h, row0, kb = at
    stride_h, stride_row = strides
    if TMA:
        return tl.reshape(src.load([h, row0, kb * 128]), (rows.shape[0], 128))
    else:
        k = kb * 128 + dim
        row = tl.minimum(rows, ROWS - 1) if CLAMP else rows
        ptr = src + h.to(tl.int64) * stride_h + row.to(tl.int64)[:, None] * stride_row + k[None, :]
        if CLAMP and EVEN_K:
            raw = tl.load(ptr)
        else:
            mask = (k < R)[None, :] if CLAMP else (rows < ROWS)[:, None]
            if not CLAMP and not EVEN_K:
                mask = mask & (k < R)[None, :]
            raw = tl.load(ptr, mask=mask, other=0.0)
        return fp8_operand(raw, OPERAND)


@entry(triton.jit, "B", any_alignment=["xs_ptr", "ws_ptr"])
def _einsum_kernel(
    x_src, w_src,  # pointers, or with TMA tensor maps
    xs_ptr, ws_ptr, out_ptr,
    B, N, R,
    x_stride_b, x_stride_h, w_stride_h, w_stride_d,  # all in elements
    xs_stride_b, xs_stride_h, xs_stride_k, ws_stride_h, ws_stride_d, ws_stride_k,
    o_stride_s, o_stride_b, o_stride_h,
    splits,  # always 1, o_stride_s 0; without the two, the kernels for 17 to 32 tokens spill 8 to 16 bytes
    X_KIND: tl.constexpr, W_KIND: tl.constexpr, W_ROWS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, SWAP: tl.constexpr, TMA: tl.constexpr, ALIGNED: tl.constexpr,
    EVEN_K: tl.constexpr, OPERAND: tl.constexpr, STAGES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(N, BLOCK_D)
    b_tiles = tl.cdiv(B, BLOCK_B)
    pid = tl.program_id(0)
    d0 = (pid % n_tiles) * BLOCK_D
    pid = pid // n_tiles
    b0 = (pid % b_tiles) * BLOCK_B
    h = pid // b_tiles
    split = tl.program_id(1)
    n_out = N.to(tl.int64)
    if ALIGNED:
        x_stride_b = tl.multiple_of(x_stride_b.to(tl.int64), 16)
        x_stride_h = tl.multiple_of(x_stride_h.to(tl.int64), 16)
        w_stride_h = tl.multiple_of(w_stride_h.to(tl.int64), 16)
        w_stride_d = tl.multiple_of(w_stride_d.to(tl.int64), 16)
        o_stride_s = tl.multiple_of(o_stride_s.to(tl.int64), 8)
        o_stride_b = tl.multiple_of(o_stride_b.to(tl.int64), 8)
        o_stride_h = tl.multiple_of(o_stride_h.to(tl.int64), 8)
        n_out = tl.multiple_of(n_out, 8)
    h64 = h.to(tl.int64)
    tokens = b0 + tl.arange(0, BLOCK_B)
    dim = tl.arange(0, 128)
    dd = tl.arange(0, BLOCK_D)
    xs_off = h64 * xs_stride_h + tokens.to(tl.int64) * xs_stride_b
    xs_ok = tokens < B
    n_k = tl.cdiv(R, 128)
    per = tl.cdiv(n_k, splits)
    k_lo = split * per
    k_hi = tl.minimum(k_lo + per, n_k)
    acc = tl.zeros((BLOCK_D, BLOCK_B) if SWAP else (BLOCK_B, BLOCK_D), tl.float32)
    x_strides, w_strides = (x_stride_h, x_stride_b), (w_stride_h, w_stride_d)
    for k_step in tl.range(k_lo, k_hi, UNROLL, num_stages=STAGES):
        for u in tl.static_range(UNROLL):
            kb = k_step + u
            s = _scale(xs_ptr, xs_off, kb, xs_stride_k, X_KIND, xs_ok)
            x = _load_tile(x_src, (h, b0, kb), tokens, dim, x_strides, B, R, TMA, EVEN_K, False, OPERAND)
            w = _load_tile(w_src, (h, d0, kb), d0 + dd, dim, w_strides, N, R, TMA, EVEN_K, True, OPERAND)
            if SWAP:
                p = tl.dot(w, tl.trans(x), out_dtype=tl.float32)
            else:
                p = tl.dot(x, tl.trans(w), out_dtype=tl.float32)
            if OPERAND == tl.float16:
                p += p * 0.0  # infinite, of a NaN, to NaN
                s *= 1.0 / (144 * 144)
            if W_ROWS:
                out_d = d0 + dd
                ws_off = h64 * ws_stride_h + out_d.to(tl.int64) * ws_stride_d
                ws = _scale(ws_ptr, ws_off, kb, ws_stride_k, W_KIND, out_d < N)
                p *= ws[:, None] if SWAP else ws[None, :]
            else:  # BLOCK_D divides 128: one scale for the tile
                ws_off = h64 * ws_stride_h + (d0 // 128).to(tl.int64) * ws_stride_d
                s = s * _scale(ws_ptr, ws_off, kb, ws_stride_k, W_KIND, d0 < N)
            p *= s[None, :] if SWAP else s[:, None]
            acc += p

    out_d = d0 + dd
    ptr = out_ptr + split.to(tl.int64) * o_stride_s + h64 * o_stride_h
    if SWAP:
        acc = tl.trans(acc)
    ptr += tokens.to(tl.int64)[:, None] * o_stride_b + out_d[None, :]
    result = round_to(acc, out_ptr.dtype.element_ty, OPERAND)
    tl.store(ptr, result, mask=(tokens < B)[:, None] & (out_d < n_out)[None, :])
