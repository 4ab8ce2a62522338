"""``hc_prenorm_gemm`` in plain Triton: x @ fn.T and the row sums of squares in one pass over x, split along k.

role   does
all    a BLOCK_K-wide step of x and fn: the squares of x, and the product

             BLOCK_N mixes
BLOCK_M rows [   acc    ]    K: ``per`` columns of k in all, BLOCK_K at a time; with SWAP transposed

MODE "bf16": x is bf16 already, and fn = high + low with both bf16 keeps 16 bits of fn, so two bf16 products are more
exact than one TF32 product and no slower. "tf32": x widened, fn rounded. "fp32": the interpreter.

shared memory: STAGES * (2 * BLOCK_M + 4 * BLOCK_N) * BLOCK_K bytes of operands, and fn split or x widened
barriers: of the whole block, placed by Triton
strides: in elements
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents
from triton.tools.tensor_descriptor import TensorDescriptor

from ...configurations import configured
from ...launch import entry
from ...lib.sizes import cdiv, pow2
from .op import Call, Shape
from .reduce import launch_splits


class Config(NamedTuple):
    """``blocks``: programs for each multiprocessor, from which the pieces of k follow."""

    block_m: int
    block_k: int
    block_n: int
    swap: bool
    mode: str
    warps: int
    stages: int
    blocks: int
    tma: bool


def plan(shape: Shape) -> Config:
    """Few rows are bound by launch and latency: little code, and TF32, which does not split fn. With many rows x goes
    from shared memory straight to the tensor cores, and fn is split into two bf16."""
    config = Config(**configured("hc_prenorm_gemm", "portable", shape.arch, size=shape.planned_rows))
    config = config._replace(block_n=min(config.block_n, pow2(shape.n, 16)))
    return config._replace(mode="fp32") if shape.arch.interpret else config


def launch(call: Call, config: Config) -> None:
    x, fn, (_, m, n, k, aligned, _) = call.x, call.fn, call.shape
    even = k % config.block_k == 0
    tma = config.tma and even and aligned
    sources = (x, fn)
    if tma:  # a single row may have any stride
        x_strides, fn_strides = [max(x.stride(0), k), 1], [max(fn.stride(0), k), 1]
        x_desc = TensorDescriptor(x, [m, k], x_strides, [config.block_m, config.block_k])
        sources = (x_desc, TensorDescriptor(fn, [n, k], fn_strides, [config.block_n, config.block_k]))
    launch_splits(
        _hc_kernel, call, config, sources, (x.stride(0), fn.stride(0)), max(1, cdiv(n, config.block_n)),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, SWAP=config.swap, MODE=config.mode,
        EVEN=even, ALIGNED=aligned, TMA=tma, STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip


@triton.jit
def _product(x, fn, acc, SWAP: tl.constexpr, PRECISION: tl.constexpr = None):
    """x @ fn.T added to ``acc``, or with SWAP fn @ x.T."""
    if SWAP:
        return tl.dot(fn, tl.trans(x), acc, input_precision=PRECISION)
    else:
        return tl.dot(x, tl.trans(fn), acc, input_precision=PRECISION)


@entry(triton.jit, "M", any_alignment=["out_ptr", "sqr_ptr"])
def _hc_kernel(
    x_src, fn_src,  # pointers, or with TMA tensor maps
    out_ptr, sqr_ptr,
    M, N, K,
    x_stride, fn_stride, o_stride_s, o_stride_m, s_stride_s, s_stride_m,  # all in elements
    per,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr, MODE: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, TMA: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    m0 = tl.program_id(0) * BLOCK_M
    split = tl.program_id(1)
    n0 = tl.program_id(2) * BLOCK_N
    if ALIGNED:
        x_stride = tl.multiple_of(x_stride.to(tl.int64), 8)
        fn_stride = tl.multiple_of(fn_stride.to(tl.int64), 4)
    rows = m0 + tl.arange(0, BLOCK_M)
    cols = n0 + tl.arange(0, BLOCK_N)
    kk = tl.arange(0, BLOCK_K)
    if not TMA:
        # rows past M repeat the last one (not stored); columns past N are not fetched
        x_row = x_src + tl.minimum(rows, M - 1).to(tl.int64)[:, None] * x_stride
        fn_row = fn_src + tl.minimum(cols, N - 1).to(tl.int64)[:, None] * fn_stride
        col_ok = (cols < N)[:, None]
    k_lo = tl.multiple_of(split * per, BLOCK_K)
    k_hi = tl.minimum(k_lo + per, K)
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    sqr = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for k0 in tl.range(k_lo, k_hi, BLOCK_K, num_stages=STAGES):
        k = k0 + kk
        if TMA:
            x = x_src.load([m0, k0])
            fn = fn_src.load([n0, k0])
        elif EVEN:
            x = tl.load(x_row + k[None, :])
            fn = tl.load(fn_row + k[None, :], mask=col_ok, other=0.0)
        else:
            k_ok = (k < k_hi)[None, :]
            x = tl.load(x_row + k[None, :], mask=k_ok, other=0.0)
            fn = tl.load(fn_row + k[None, :], mask=k_ok & col_ok, other=0.0)
        x32 = x.to(tl.float32)
        sqr += x32 * x32
        if MODE == "bf16":
            # high by truncation: integer instructions, where a rounding conversion costs four times as much
            bits = fn.to(tl.int32, bitcast=True)
            high = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
            low = (fn - (bits & -65536).to(tl.float32, bitcast=True)).to(tl.bfloat16)
            acc = _product(x, high, acc, SWAP)
            acc = _product(x, low, acc, SWAP)
        else:
            acc = _product(x32, fn, acc, SWAP, "tf32" if MODE == "tf32" else "ieee")
    if SWAP:
        acc = tl.trans(acc)
    s64 = split.to(tl.int64)
    ok = rows < M
    rows64 = rows.to(tl.int64)
    ptr = out_ptr + s64 * o_stride_s + rows64[:, None] * o_stride_m + cols[None, :]
    tl.store(ptr, acc, mask=ok[:, None] & (cols < N)[None, :])
    first = rows < tl.where(n0 == 0, M, 0)  # the blocks of the first n tile write the sums of squares
    tl.store(sqr_ptr + s64 * s_stride_s + rows64 * s_stride_m, tl.sum(sqr, axis=1), mask=first)
