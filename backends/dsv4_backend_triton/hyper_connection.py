"""``hc_prenorm_gemm``: x @ fn.T and the row sums of squares in one pass over x, split along k."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from ._arch import Arch, arch_of
from ._launch import launch
from ._sizes import cdiv, pow2
from ._variants import variant

_SIZES = [
    "M",
    "N",
    "K",
    "x_stride",
    "fn_stride",
    "o_stride_s",
    "o_stride_m",
    "s_stride_s",
    "s_stride_m",
    "per",
]


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=["out_ptr", "sqr_ptr"])
def _hc_kernel(
    x_src,
    fn_src,
    out_ptr,
    sqr_ptr,
    M,
    N,
    K,
    x_stride,
    fn_stride,
    o_stride_s,
    o_stride_m,
    s_stride_s,
    s_stride_m,
    per,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
    MODE: tl.constexpr,
    EVEN: tl.constexpr,
    ALIGNED: tl.constexpr,
    TMA: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One block: BLOCK_M rows, one n tile, ``per`` columns of k.

    MODE "bf16": x is bf16 already, and fn = high + low with both bf16 keeps 16 bits of fn, so two bf16
    products are more exact than one TF32 product and no slower. "tf32": x widened, fn rounded. "fp32": the
    interpreter.
    """
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
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
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
            if SWAP:
                acc = tl.dot(high, tl.trans(x), acc)
                acc = tl.dot(low, tl.trans(x), acc)
            else:
                acc = tl.dot(x, tl.trans(high), acc)
                acc = tl.dot(x, tl.trans(low), acc)
        elif MODE == "tf32":
            if SWAP:
                acc = tl.dot(fn, tl.trans(x32), acc, input_precision="tf32")
            else:
                acc = tl.dot(x32, tl.trans(fn), acc, input_precision="tf32")
        else:
            if SWAP:
                acc = tl.dot(fn, tl.trans(x32), acc, input_precision="ieee")
            else:
                acc = tl.dot(x32, tl.trans(fn), acc, input_precision="ieee")
    if SWAP:
        acc = tl.trans(acc)
    s64 = split.to(tl.int64)
    ok = rows < M
    rows64 = rows.to(tl.int64)
    ptr = out_ptr + s64 * o_stride_s + rows64[:, None] * o_stride_m + cols[None, :]
    tl.store(ptr, acc, mask=ok[:, None] & (cols < N)[None, :])
    first = rows < tl.where(n0 == 0, M, 0)  # the blocks of the first n tile write the sums of squares
    tl.store(sqr_ptr + s64 * s_stride_s + rows64 * s_stride_m, tl.sum(sqr, axis=1), mask=first)


@triton.jit
def _sum_partials(src, size, dst, width, stride, block, group, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """The sum of ``group`` partials of ``size`` elements, one after the other at ``src``, into rows of ``width`` at
    ``dst``. All are loaded before the first is used."""
    start = block.to(tl.int64) * BLOCK
    each = tl.arange(0, BLOCK)
    at = start + each
    ok = at < size
    values = ()
    for i in tl.static_range(GROUP):
        there = ok & (each < tl.where(i < group, BLOCK, 0))  # the interpreter has no and of a mask and a scalar
        values += (tl.load(src + i * size + at, mask=there, other=0.0),)  # type: ignore[assignment]
    total = values[0]  # type: ignore[misc]
    for i in tl.static_range(1, GROUP):
        total += values[i]
    row0 = start // width
    beyond = (start - row0 * width).to(tl.int32) + each
    tl.store(dst + (row0 + beyond // width) * stride + beyond % width, total, mask=ok)


_REDUCE_SIZES = ["M", "N", "group", "o_stride_s", "o_stride_m", "s_stride_s", "s_stride_m"]


@triton.jit(do_not_specialize=_REDUCE_SIZES, do_not_specialize_on_alignment=["out_ptr", "sqr_ptr"])
def _hc_reduce_kernel(
    part_ptr,
    out_ptr,
    sqr_ptr,
    M,
    N,
    group,
    o_stride_s,
    o_stride_m,
    s_stride_s,
    s_stride_m,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sum each ``group`` of partials, in a fixed order, into one of the results.

    Workspace: [results * group, M, N] mixes, then [results * group, M] sums of squares. ALIGNED: N % 4 == 0.
    """
    block = tl.program_id(0)
    result = tl.program_id(1).to(tl.int64)
    mixes = M.to(tl.int64) * N
    if ALIGNED:
        mixes = tl.multiple_of(mixes, 4)
    blocks = tl.cdiv(mixes, BLOCK).to(tl.int32)
    if PDL:
        gdc_wait()
    if block < blocks:
        src, dst = part_ptr + result * group * mixes, out_ptr + result * o_stride_s
        _sum_partials(src, mixes, dst, N, o_stride_m, block, group, BLOCK, GROUP)
    else:
        part_ptr += tl.num_programs(1).to(tl.int64) * group * mixes
        src, dst = part_ptr + result * group * M, sqr_ptr + result * s_stride_s
        _sum_partials(src, M.to(tl.int64), dst, 1, s_stride_m, block - blocks, group, BLOCK, GROUP)


@dataclass(frozen=True)
class HcConfig:
    """Launch configuration for one row-count class."""

    block_m: int
    block_k: int
    block_n: int
    swap: bool
    mode: str
    warps: int
    stages: int
    blocks: int  # for each multiprocessor, which k is cut for
    tma: bool
    provenance: str


@dataclass(frozen=True)
class HopperConfig:
    """Launch configuration of the warp-specialised kernel."""

    block_m: int
    block_k: int
    stages: int  # of tiles of x and fn
    ring: int  # of tiles of split fn
    provenance: str
    blocks: int = 1  # for each multiprocessor


_MEASURED = "H100, Triton 3.6.0, torch 2.11, 2026-11-25: the fastest of a sweep at the split counts that vLLM asks for"
_H200 = "H200, Triton 3.6.0, torch 2.11, 2026-11-27: the fastest of a sweep at the split counts that vLLM asks for"
_DERIVED = "derived: no measurement; as on SM90, fewer stages for 99 KiB of shared memory"

# Keyed by compute capability, then the largest row count of the class. Few rows: launch and latency bound, so little
# code and TF32 (no splitting of fn). Many rows: x from shared memory straight to the tensor cores, fn as two bf16.
_TABLE: dict[Any, list[tuple[int, HcConfig]]] = {
    90: [
        (64, HcConfig(16, 128, 16, True, "tf32", 2, 3, 2, True, _MEASURED)),
        (128, HcConfig(16, 128, 32, True, "tf32", 2, 3, 2, True, _H200)),
        (256, HcConfig(64, 64, 32, False, "bf16", 4, 4, 2, True, _MEASURED)),
        (4096, HcConfig(64, 128, 32, False, "bf16", 4, 5, 1, True, _MEASURED)),
        (1 << 62, HcConfig(64, 128, 32, False, "bf16", 4, 3, 2, True, _MEASURED)),
    ],
    "any": [
        (64, HcConfig(16, 64, 16, True, "tf32", 2, 4, 2, False, _DERIVED)),
        (1 << 62, HcConfig(64, 64, 32, False, "bf16", 4, 3, 1, False, _DERIVED)),
    ],
}


# The warp-specialised kernel, from so many rows on, likewise. A step of 128 columns halves the splitter's waits; for
# the most rows, two warpgroups share what it splits. To redo: tools/sweep.py hc_prenorm_gemm.
_HOPPER_ROWS = 129
_HOPPER = [
    (256, HopperConfig(64, 128, 4, 2, _H200)),
    (4096, HopperConfig(64, 128, 5, 2, _H200)),
    (1 << 62, HopperConfig(128, 64, 6, 4, _H200)),
]


def _plain_config(arch: Arch, m: int) -> HcConfig:
    return next(config for limit, config in _TABLE.get(arch.cc, _TABLE["any"]) if m <= limit)


def _config(arch: Arch, m: int, n: int, k: int, aligned: bool) -> HcConfig | HopperConfig:
    if arch.cc == 90 and not arch.interpret and aligned and m >= _HOPPER_ROWS and n <= 32:
        special = next(config for limit, config in _HOPPER if m <= limit)
        if k % special.block_k == 0 and variant("hyper_connection_hopper") is not None:
            return special
    return _plain_config(arch, m)


_INVARIANT_ROWS, _INVARIANT_SPLITS = 256, 16
"""The rows that the batch-invariant mode is laid out for, and into how many pieces it cuts k. With fewer pieces, few
rows keep fewer multiprocessors busy; with more, many rows write more partials."""


def default_splits(arch: Arch, m: int, k: int, config: HcConfig | HopperConfig) -> int:
    """Pieces of k that keep the machine busy, of at least two k steps each."""
    wanted = config.blocks * arch.sms // cdiv(m, config.block_m)
    return max(1, min(wanted, 32, k // (2 * config.block_k)))


def _constants(config: HcConfig, n: int, k: int, mode: str, aligned: bool, pdl: bool) -> dict[str, Any]:
    even = k % config.block_k == 0
    return dict(
        BLOCK_M=config.block_m,
        BLOCK_N=min(config.block_n, pow2(n, 16)),
        BLOCK_K=config.block_k,
        SWAP=config.swap,
        MODE=mode,
        EVEN=even,
        ALIGNED=aligned,
        TMA=config.tma and even and aligned,
        STAGES=config.stages,
        PDL=pdl,
    )


def hc_prenorm_gemm(
    x: torch.Tensor,
    fn: torch.Tensor,
    *,
    num_splits: int | None = None,
    out: torch.Tensor | None = None,
    sqr_sum: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``mixes = x @ fn.T`` [m, n] fp32 and ``sqr_sum = (x * x).sum(1)`` [m] fp32.

    ``x`` [m, k] bf16, ``fn`` [n, k] fp32. With ``num_splits`` S the results are partials [S, m, n] and [S,
    m] that sum to them. Deterministic. Workspace: where k is cut into more pieces than the caller asks for
    (``default_splits``), pieces * m * (n + 1) fp32.
    """
    return _hc_prenorm_gemm(x, fn, num_splits, out, sqr_sum)


def _hc_prenorm_gemm(x, fn, num_splits=None, out=None, sqr_sum=None, config=None, splits=None, batch_invariant=False):
    m, k = x.shape
    n = fn.shape[0]
    lead = () if num_splits is None else (num_splits,)
    if out is None:
        out = torch.empty((*lead, m, n), dtype=torch.float32, device=x.device)
    if sqr_sum is None:
        sqr_sum = torch.empty((*lead, m), dtype=torch.float32, device=x.device)
    if m == 0:
        return out, sqr_sum
    if k == 0:
        return out.zero_(), sqr_sum.zero_()
    if n == 0:  # the sums of squares are wanted all the same
        _hc_prenorm_gemm(x, fn.new_zeros((1, k)), num_splits, None, sqr_sum, config, splits, batch_invariant)
        return out, sqr_sum
    arch = arch_of(x.device)
    aligned = x.stride(0) % 8 == 0 and fn.stride(0) % 4 == 0
    aligned = aligned and x.data_ptr() % 16 == 0 and fn.data_ptr() % 16 == 0
    if config is None:
        config = _plain_config(arch, _INVARIANT_ROWS) if batch_invariant else _config(arch, m, n, k, aligned)
    results = num_splits or 1
    if splits is None:
        # A caller that asks for few partials gets the sums of more of them: cheaper than an idle machine.
        wanted = default_splits(arch, m, k, config)
        if batch_invariant:
            wanted = min(_INVARIANT_SPLITS, k // (2 * config.block_k))
        group = max(1, wanted // results)
        splits = results * group
    per = cdiv(cdiv(k, config.block_k), splits) * config.block_k
    out_strides = (0, *out.stride())[-3:-1]
    sqr_strides = (0, *sqr_sum.stride())[-2:]
    target, target_sqr, o_strides, s_strides = out, sqr_sum, out_strides, sqr_strides
    reduce = splits > results
    if reduce:
        work = torch.empty(splits * m * (n + 1), dtype=torch.float32, device=x.device)
        target, target_sqr, o_strides, s_strides = work, work[splits * m * n :], (m * n, n), (m, 1)
    pdl = reduce and arch.major >= 9 and not arch.interpret
    tiles = cdiv(m, config.block_m)
    common = (target, target_sqr, m, n, k)
    strides = (*o_strides, *s_strides)
    if isinstance(config, HopperConfig):
        hopper = variant("hyper_connection_hopper")
        launch(
            hopper.hc_hopper_kernel,
            (tiles, splits),
            hopper.boxes(x, x.shape, [max(x.stride(0), k), 1], [config.block_m, config.block_k], 16),
            hopper.boxes(fn, fn.shape, [max(fn.stride(0), k), 1], [32, config.block_k], 32),
            *common,
            *strides,
            per,
            ROWS=config.block_m,
            STEP=config.block_k,
            STAGES=config.stages,
            RING=config.ring,
            PDL=pdl,
            num_warps=config.block_m // 16,
        )
    else:
        mode = "fp32" if arch.interpret else config.mode
        constants = _constants(config, n, k, mode, aligned, pdl)
        block_n: int = constants["BLOCK_N"]
        x_src, fn_src = x, fn
        if constants["TMA"]:
            # a single row may have any stride
            x_src = TensorDescriptor(x, [m, k], [max(x.stride(0), k), 1], [config.block_m, config.block_k])
            fn_src = TensorDescriptor(fn, [n, k], [max(fn.stride(0), k), 1], [block_n, config.block_k])
        launch(
            _hc_kernel,
            (tiles, splits, max(1, cdiv(n, block_n))),
            x_src,
            fn_src,
            *common,
            x.stride(0),
            fn.stride(0),
            *strides,
            per,
            **constants,
            num_warps=config.warps,
        )
    if reduce:
        group, block = splits // results, 128
        launch(
            _hc_reduce_kernel,
            (cdiv(m * n, block) + cdiv(m, block), results),
            work,
            out,
            sqr_sum,
            m,
            n,
            group,
            *out_strides,
            *sqr_strides,
            BLOCK=block,
            GROUP=pow2(group),
            ALIGNED=n % 4 == 0,
            PDL=pdl,
            num_warps=1,
            **({"launch_pdl": True} if pdl else {}),
        )
    return out, sqr_sum
