"""``fp8_einsum`` in plain Triton: a block is a tile of tokens and outputs of one head."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ...configurations import configured
from ...launch import launch as launch_kernel
from ...lib.bits import e8m0_to_fp32, fp8_operand, round_to
from ...lib.sizes import cdiv
from .plan import Call, Shape

_INVARIANT_TOKENS = 128  # that the batch-invariant mode is laid out for


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
    x_src, w_src = x, w
    if tma:
        x_b, x_h, w_h, w_d = (max(stride, 16) for t in (x, w) for stride in t.stride()[:2])
        x_src = TensorDescriptor(x, [h, b, r], [x_h, x_b, 1], [1, config.block_b, 128])
        w_src = TensorDescriptor(w, [h, d, r], [w_h, w_d, 1], [1, config.block_d, 128])
    tiles = cdiv(d, config.block_d) * cdiv(b, config.block_b) * h
    launch_kernel(
        _einsum_kernel,
        (tiles, 1),
        *(x_src, w_src, call.xs, call.ws, out),
        *(b, d, r, *x.stride()[:2], *w.stride()[:2], *call.xs.stride(), *call.ws.stride(), 0, *out.stride()[:2], 1),
        X_KIND=call.x_kind,
        W_KIND=call.w_kind,
        W_ROWS=call.shape.w_rows,
        BLOCK_B=config.block_b,
        BLOCK_D=config.block_d,
        PARTS=1,
        SWAP=config.swap,
        TMA=tma,
        ALIGNED=call.aligned,
        EVEN_K=r % 128 == 0,
        OPERAND=arch.fp8,
        STAGES=config.stages,
        UNROLL=config.unroll if cdiv(r, 128) % config.unroll == 0 else 1,
        num_warps=config.warps,
    )


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
    src,
    h,
    row0,
    kb,
    rows,
    dim,
    stride_h,
    stride_row,
    R,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK: tl.constexpr,
    OPERAND: tl.constexpr,
    N_ROWS,
    CLAMP: tl.constexpr,
):
    """A [BLOCK, 128] tile of e4m3: rows row0.., K block kb of head h. Rows past N_ROWS are zero and not
    fetched, or with CLAMP repeat the last one (no mask: cheaper where such rows are rare). Either is dropped
    at the store."""
    if TMA:
        return tl.reshape(src.load([h, row0, kb * 128]), (BLOCK, 128))
    else:
        k = kb * 128 + dim
        row = rows
        if CLAMP:
            row = tl.minimum(rows, N_ROWS - 1)
        ptr = src + h.to(tl.int64) * stride_h + row.to(tl.int64)[:, None] * stride_row + k[None, :]
        if CLAMP and EVEN_K:
            raw = tl.load(ptr)
        else:
            mask = (k < R)[None, :] if CLAMP else (rows < N_ROWS)[:, None]
            if not CLAMP and not EVEN_K:
                mask = mask & (k < R)[None, :]
            if OPERAND == tl.float8e4nv:
                raw = tl.load(ptr, mask=mask, other=0.0)
            else:
                raw = tl.load(ptr, mask=mask, other=0)
        return fp8_operand(raw, OPERAND)


_SIZES = [
    "B",
    "N",
    "R",
    "x_stride_b",
    "x_stride_h",
    "w_stride_h",
    "w_stride_d",
    "xs_stride_b",
    "xs_stride_h",
    "xs_stride_k",
    "ws_stride_h",
    "ws_stride_d",
    "ws_stride_k",
    "o_stride_s",
    "o_stride_b",
    "o_stride_h",
    "splits",
]


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=["xs_ptr", "ws_ptr"])
def _einsum_kernel(
    x_src,
    w_src,
    xs_ptr,
    ws_ptr,
    out_ptr,
    B,
    N,
    R,
    x_stride_b,
    x_stride_h,
    w_stride_h,
    w_stride_d,
    xs_stride_b,
    xs_stride_h,
    xs_stride_k,
    ws_stride_h,
    ws_stride_d,
    ws_stride_k,
    o_stride_s,
    o_stride_b,
    o_stride_h,
    splits,
    X_KIND: tl.constexpr,
    W_KIND: tl.constexpr,
    W_ROWS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN_K: tl.constexpr,
    OPERAND: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One block: BLOCK_B tokens x PARTS * BLOCK_D outputs of one head, over one split of K.

    The product of each 128-wide K block is scaled in fp32 and added to the accumulator. SWAP makes outputs
    the M side of the product, so that few tokens waste nothing. PARTS accumulators share the token tile:
    twice the outputs per loaded byte without a scaled copy of the whole accumulator in registers.
    """
    n_tiles = tl.cdiv(N, PARTS * BLOCK_D)
    b_tiles = tl.cdiv(B, BLOCK_B)
    pid = tl.program_id(0)
    d0 = (pid % n_tiles) * (PARTS * BLOCK_D)
    pid = pid // n_tiles
    b0 = (pid % b_tiles) * BLOCK_B
    h = pid // b_tiles
    split = tl.program_id(1)
    if ALIGNED:
        x_stride_b = tl.multiple_of(x_stride_b.to(tl.int64), 16)
        x_stride_h = tl.multiple_of(x_stride_h.to(tl.int64), 16)
        w_stride_h = tl.multiple_of(w_stride_h.to(tl.int64), 16)
        w_stride_d = tl.multiple_of(w_stride_d.to(tl.int64), 16)
        o_stride_s = tl.multiple_of(o_stride_s.to(tl.int64), 8)
        o_stride_b = tl.multiple_of(o_stride_b.to(tl.int64), 8)
        o_stride_h = tl.multiple_of(o_stride_h.to(tl.int64), 8)
        n_out = tl.multiple_of(N.to(tl.int64), 8)
    else:
        n_out = N.to(tl.int64)

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

    if SWAP:
        acc0 = tl.zeros((BLOCK_D, BLOCK_B), tl.float32)
    else:
        acc0 = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    acc1 = acc0
    for k_step in tl.range(k_lo, k_hi, UNROLL, num_stages=STAGES):
        for u in tl.static_range(UNROLL):
            kb = k_step + u
            xs = _scale(xs_ptr, xs_off, kb, xs_stride_k, X_KIND, xs_ok)
            x = _load_tile(
                x_src,
                h,
                b0,
                kb,
                tokens,
                dim,
                x_stride_h,
                x_stride_b,
                R,
                TMA,
                EVEN_K,
                BLOCK_B,
                OPERAND,
                B,
                False,
            )
            for part in tl.static_range(PARTS):
                base = d0 + part * BLOCK_D
                w = _load_tile(
                    w_src,
                    h,
                    base,
                    kb,
                    base + dd,
                    dim,
                    w_stride_h,
                    w_stride_d,
                    R,
                    TMA,
                    EVEN_K,
                    BLOCK_D,
                    OPERAND,
                    N,
                    True,
                )
                if SWAP:
                    p = tl.dot(w, tl.trans(x), out_dtype=tl.float32)
                else:
                    p = tl.dot(x, tl.trans(w), out_dtype=tl.float32)
                if W_ROWS:
                    out_d = base + dd
                    ws = _scale(
                        ws_ptr,
                        h64 * ws_stride_h + out_d.to(tl.int64) * ws_stride_d,
                        kb,
                        ws_stride_k,
                        W_KIND,
                        out_d < N,
                    )
                    if SWAP:
                        p *= ws[:, None]
                    else:
                        p *= ws[None, :]
                    s = xs
                else:
                    # BLOCK_D divides 128: one scale for the tile
                    ws = _scale(
                        ws_ptr,
                        h64 * ws_stride_h + (base // 128).to(tl.int64) * ws_stride_d,
                        kb,
                        ws_stride_k,
                        W_KIND,
                        base < N,
                    )
                    s = xs * ws
                if SWAP:
                    p *= s[None, :]
                else:
                    p *= s[:, None]
                if part == 0:
                    acc0 += p
                else:
                    acc1 += p

    for part in tl.static_range(PARTS):
        out_d = d0 + part * BLOCK_D + dd
        ptr = out_ptr + split.to(tl.int64) * o_stride_s + h64 * o_stride_h
        if part == 0:
            acc = acc0
        else:
            acc = acc1
        if SWAP:
            acc = tl.trans(acc)
        ptr += tokens.to(tl.int64)[:, None] * o_stride_b + out_d[None, :]
        tl.store(
            ptr, round_to(acc, out_ptr.dtype.element_ty, OPERAND), mask=(tokens < B)[:, None] & (out_d < n_out)[None, :]
        )
