"""Indexer logits: ``mqa_logits`` over contiguous keys, ``paged_mqa_logits`` over the paged key cache.

``logits[m, n] = k_scale[n] * sum_h relu(q[m, h] . k[n]) * weights[m, h]``; positions outside a row's range
are exactly -inf. Every element of the output is written exactly once by the kernel itself: no fill pass, no
workspace.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ._arch import Arch, arch_of
from ._launch import launch
from ._numeric import fp8_operand
from ._sizes import cdiv, pow2
from ._variants import variant


@triton.jit
def _relu_head_sum(k, q_t, w, ROWS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr):
    """Twice ``sum_h relu(k . q_h) * w_h``, as [BLOCK_N, ROWS].

    Keys are the M side of the product, so that the head sum runs along registers of one thread. ``x + |x|``
    is twice the relu in one full-rate instruction (max is half rate), and keeps NaN.
    """
    s = tl.dot(k, q_t, out_dtype=tl.float32)
    s = (s + tl.abs(s)) * w[None, :]
    return tl.sum(tl.reshape(s, (BLOCK_N, ROWS, BLOCK_H)), axis=2)


@triton.jit
def _load_q(
    q_ptr,
    row,
    row_ok,
    head,
    stride_m,
    stride_h,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
):
    dim = tl.arange(0, BLOCK_D)
    ptr = q_ptr + row.to(tl.int64)[:, None] * stride_m + (head * stride_h)[:, None] + dim[None, :]
    mask = (row_ok & (head < H))[:, None] & (dim < D)[None, :]
    if OPERAND == tl.float8e4nv:
        raw = tl.load(ptr, mask=mask, other=0.0)
    else:
        raw = tl.load(ptr, mask=mask, other=0)
    return fp8_operand(raw, OPERAND)


@triton.jit
def _fill(out_ptr, row, row_ok, out_stride, begin, end, FILL_N: tl.constexpr):
    """-inf to columns [begin, end) of some rows."""
    for j in range(begin, end, FILL_N):
        col = j + tl.arange(0, FILL_N)
        ptr = out_ptr + row.to(tl.int64)[:, None] * out_stride + col[None, :]
        value = tl.full((row.shape[0], FILL_N), float("-inf"), tl.float32)
        tl.store(ptr, value, mask=row_ok[:, None] & (col < end)[None, :], cache_modifier=".cs")


_MQA_SIZES = ["m", "n", "n_cols", "q_stride_m", "q_stride_h", "k_stride", "w_stride", "out_stride", "chunk"]
_MQA_ANY_ALIGNMENT = ["k_scale_ptr", "w_ptr", "starts_ptr", "ends_ptr", "out_ptr"]


@triton.jit(do_not_specialize=_MQA_SIZES, do_not_specialize_on_alignment=_MQA_ANY_ALIGNMENT)
def _mqa_logits_kernel(
    q_ptr,
    k_src,
    k_scale_ptr,
    w_ptr,
    starts_ptr,
    ends_ptr,
    out_ptr,
    m,
    n,
    n_cols,
    q_stride_m,
    q_stride_h,
    k_stride,
    w_stride,
    out_stride,
    chunk,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COMPRESSED: tl.constexpr,
    K_TMA: tl.constexpr,
    ALIGNED: tl.constexpr,
    OPERAND: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One block: ROWS queries against ``chunk`` output columns. Columns are keys (full) or keys - row
    start."""
    row_block = tl.program_id(0)
    c0 = tl.program_id(1) * chunk
    c1 = tl.minimum(c0 + chunk, n_cols)
    if ALIGNED:
        q_stride_m = tl.multiple_of(q_stride_m.to(tl.int64), 16)
        q_stride_h = tl.multiple_of(q_stride_h.to(tl.int64), 16)
        k_stride = tl.multiple_of(k_stride.to(tl.int64), 16)

    # rows past m repeat the last row and are not stored
    rows = row_block * ROWS + tl.arange(0, ROWS)
    row_ok = rows < m
    row_of = tl.minimum(rows, m - 1)
    start = tl.minimum(tl.maximum(tl.load(starts_ptr + row_of), 0), n)
    end = tl.minimum(tl.maximum(tl.load(ends_ptr + row_of), 0), n)

    rh = tl.arange(0, ROWS * BLOCK_H)
    q_row = tl.minimum(row_block * ROWS + rh // BLOCK_H, m - 1)
    head = rh % BLOCK_H
    q = _load_q(q_ptr, q_row, q_row < m, head, q_stride_m, q_stride_h, H, D, BLOCK_D, OPERAND)
    q_t = tl.trans(q)
    w = tl.load(w_ptr + q_row.to(tl.int64) * w_stride + head, mask=head < H, other=0.0)

    # Compressed rows that start at different keys cannot share a tile: then each row gets its own pass.
    first = tl.min(start, axis=0)
    n_groups = 1
    if COMPRESSED:
        shared = first == tl.max(start, axis=0)
        n_groups = tl.where(shared, 1, ROWS)
    for group in range(n_groups):
        selected = row_ok
        origin = 0
        if COMPRESSED:
            # all rows, or the group's; a scalar or-ed into a mask is more than the interpreter can do
            row = tl.arange(0, ROWS)
            selected = row_ok & (row == tl.where(shared, row, group))
            origin = tl.where(shared, first, tl.sum(tl.where(tl.arange(0, ROWS) == group, start, 0), axis=0))
        filled = selected & (end > start)
        lo = tl.min(tl.where(filled, start, 2147483647), axis=0)
        hi = tl.max(tl.where(filled, end, 0), axis=0)
        lo_col = tl.minimum(tl.maximum(c0, (lo - origin) // BLOCK_N * BLOCK_N), c1)
        hi_col = tl.maximum(tl.minimum(c1, hi - origin), lo_col)
        hi_col = tl.minimum((hi_col + BLOCK_N - 1) // BLOCK_N * BLOCK_N, c1)
        _fill(out_ptr, rows, selected, out_stride, c0, lo_col, 4 * BLOCK_N)
        _fill(out_ptr, rows, selected, out_stride, hi_col, c1, 4 * BLOCK_N)
        for j in tl.range(lo_col, hi_col, BLOCK_N, num_stages=STAGES):
            col = j + tl.arange(0, BLOCK_N)
            key = origin + col
            key_ok = key < n
            scale = tl.load(k_scale_ptr + key, mask=key_ok, other=0.0)
            if K_TMA:
                k = fp8_operand(k_src.load([origin + j, 0]), OPERAND)
            else:
                dim = tl.arange(0, BLOCK_D)
                k_ptr = k_src + key.to(tl.int64)[:, None] * k_stride + dim[None, :]
                k_mask = key_ok[:, None] & (dim < D)[None, :]
                if OPERAND == tl.float8e4nv:
                    raw = tl.load(k_ptr, mask=k_mask, other=0.0)
                else:
                    raw = tl.load(k_ptr, mask=k_mask, other=0)
                k = fp8_operand(raw, OPERAND)
            s = _relu_head_sum(k, q_t, w, ROWS, BLOCK_H, BLOCK_N) * (0.5 * scale)[:, None]
            inside = (key[:, None] >= start[None, :]) & (key[:, None] < end[None, :])
            s = tl.where(inside, s, float("-inf"))
            ptr = out_ptr + rows.to(tl.int64)[None, :] * out_stride + col[:, None]
            tl.store(ptr, s, mask=selected[None, :] & (col < c1)[:, None], cache_modifier=".cs")


_PAGED_SIZES = [
    "next_n",
    "max_len",
    "limit",
    "pages",
    "q_stride_b",
    "q_stride_n",
    "q_stride_h",
    "page_stride",
    "w_stride",
    "len_stride_b",
    "len_stride_n",
    "table_stride",
    "out_stride",
    "chunk",
]
_PAGED_ANY_ALIGNMENT = ["w_ptr", "lens_ptr", "table_ptr", "out_ptr"]


@triton.jit(do_not_specialize=_PAGED_SIZES, do_not_specialize_on_alignment=_PAGED_ANY_ALIGNMENT)
def _paged_mqa_logits_kernel(
    q_ptr,
    cache_ptr,
    k_desc,
    w_ptr,
    lens_ptr,
    table_ptr,
    out_ptr,
    next_n,
    max_len,
    limit,
    pages,
    q_stride_b,
    q_stride_n,
    q_stride_h,
    page_stride,
    w_stride,
    len_stride_b,
    len_stride_n,
    table_stride,
    out_stride,
    chunk,
    H: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    K_MODE: tl.constexpr,
    ALIGNED: tl.constexpr,
    OPERAND: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One block: all (or ROWS of the) next_n queries of one request against ``chunk`` positions.

    K_MODE 0 looks every key's page up; 1 and 2 need PAGE % BLOCK_N == 0 and look one page up per tile, one
    tile ahead; 2 fetches keys through the tensor-map descriptor. No length reaches beyond ``limit``, where the table
    ends; a page that the cache does not have is not read (the descriptor reads zeros), and its keys are -inf.
    """
    b = tl.program_id(0).to(tl.int64)
    c0 = tl.program_id(1) * chunk
    c1 = tl.minimum(c0 + chunk, max_len)
    row0 = tl.program_id(2) * ROWS
    if ALIGNED:
        q_stride_b = tl.multiple_of(q_stride_b.to(tl.int64), 16)
        q_stride_n = tl.multiple_of(q_stride_n.to(tl.int64), 16)
        q_stride_h = tl.multiple_of(q_stride_h.to(tl.int64), 16)
        page_stride = tl.multiple_of(page_stride.to(tl.int64), 16)

    rows = row0 + tl.arange(0, ROWS)
    row_ok = rows < next_n
    row_of = tl.minimum(rows, next_n - 1)
    length = tl.minimum(tl.load(lens_ptr + b * len_stride_b + row_of * len_stride_n), limit)
    longest = tl.max(length, axis=0)
    hi = tl.maximum(tl.minimum(c1, longest), c0)
    hi_col = tl.minimum((hi + BLOCK_N - 1) // BLOCK_N * BLOCK_N, c1)
    out_row = b * next_n + rows
    _fill(out_ptr, out_row, row_ok, out_stride, hi_col, c1, 4 * BLOCK_N)
    if hi > c0:
        table_ptr += b * table_stride
        if K_MODE != 0:
            page_next = tl.load(table_ptr + c0 // PAGE)
        rh = tl.arange(0, ROWS * BLOCK_H)
        q_row = tl.minimum(row0 + rh // BLOCK_H, next_n - 1)
        head = rh % BLOCK_H
        q = _load_q(
            q_ptr + b * q_stride_b,
            q_row,
            q_row < next_n,
            head,
            q_stride_n,
            q_stride_h,
            H,
            D,
            BLOCK_D,
            OPERAND,
        )
        q_t = tl.trans(q)
        w = tl.load(w_ptr + (b * next_n + q_row) * w_stride + head, mask=head < H, other=0.0)
        dim = tl.arange(0, BLOCK_D)
        for j in tl.range(c0, hi_col, BLOCK_N, num_stages=STAGES):
            col = j + tl.arange(0, BLOCK_N)
            if K_MODE == 0:
                page = tl.load(table_ptr + col // PAGE, mask=col < longest, other=-1)
                key_ok = (page >= 0) & (page < pages)
                inside = key_ok[:, None] & (col[:, None] < length[None, :])
                base = cache_ptr + page.to(tl.int64) * page_stride
                slot = col % PAGE
            else:
                known = (page_next >= 0) & (page_next < pages)
                page = page_next.to(tl.int64)
                key_ok = col < tl.where(known, longest, 0)
                inside = col[:, None] < tl.where(known, length, 0)[None, :]
                page_next = tl.load(table_ptr + (j + BLOCK_N) // PAGE, mask=j + BLOCK_N < hi_col, other=0)
                base = cache_ptr + page * page_stride
                slot = j % PAGE + tl.arange(0, BLOCK_N)
            scale_ptr = (base + PAGE * D + slot * 4).to(tl.pointer_type(tl.float32))
            scale = tl.load(scale_ptr, mask=key_ok, other=0.0)
            if K_MODE == 2:
                k = tl.reshape(k_desc.load([page.to(tl.int32), j % PAGE, 0]), (BLOCK_N, BLOCK_D))
                k = fp8_operand(k, OPERAND)
            else:
                if K_MODE == 0:
                    k_ptr = base[:, None] + (slot * D)[:, None] + dim[None, :]
                else:
                    k_ptr = base + (slot * D)[:, None] + dim[None, :]
                k_mask = key_ok[:, None] & (dim < D)[None, :]
                if OPERAND == tl.float8e4nv:
                    k_ptr = k_ptr.to(tl.pointer_type(tl.float8e4nv))
                    k = tl.load(k_ptr, mask=k_mask, other=0.0)
                else:
                    k = fp8_operand(tl.load(k_ptr, mask=k_mask, other=0), OPERAND)
            s = _relu_head_sum(k, q_t, w, ROWS, BLOCK_H, BLOCK_N) * (0.5 * scale)[:, None]
            s = tl.where(inside, s, float("-inf"))
            ptr = out_ptr + out_row[None, :] * out_stride + col[:, None]
            tl.store(ptr, s, mask=row_ok[None, :] & (col < c1)[:, None], cache_modifier=".cs")


@dataclass(frozen=True)
class LogitsConfig:
    """Launch configuration. ``waves``: blocks per multiprocessor aimed at when work is cut along the keys."""

    rows: int
    block_n: int
    warps: int
    stages: int
    tma: bool
    waves: int
    maxnreg: int | None
    provenance: str


_H200 = "H200, Triton 3.6.0, torch 2.11, 2026-11-22: the fastest of a sweep"
_DERIVED = "derived: no measurement; 128 columns of rows and heads fit 99 KiB with bf16 operands"

_BLACKWELL = LogitsConfig(2, 64, 4, 3, False, 16, None, _DERIVED)  # with 128 keys it spills 48 bytes, Triton 3.9

# Keyed by compute capability; "any" is what an architecture without measurements gets.
_MQA_TABLE: dict[Any, LogitsConfig] = {
    90: LogitsConfig(2, 128, 4, 3, True, 16, None, _H200),
    # 128 keys: one 16-row slice of them for each of the 4 warps and its instruction, so that no key is read, or decoded
    # from bytes, by two warps. By the compiled loops, mma.sync is then at its peak or near it (0.95 to 1), with 64 keys
    # at 0.4 to 0.6.
    "any": LogitsConfig(2, 128, 4, 3, False, 16, None, _DERIVED),
    100: _BLACKWELL,
    103: _BLACKWELL,
}
_PAGED_TABLE: dict[Any, LogitsConfig] = {
    90: LogitsConfig(4, 64, 4, 3, True, 4, None, _H200),
    "any": LogitsConfig(4, 64, 4, 3, False, 4, None, _DERIVED),
}


@dataclass(frozen=True)
class HopperConfig:
    """Launch configuration of the warp-specialised ``mqa_logits`` kernel."""

    keys: int
    consumers: int
    stages: int
    regs: int
    provenance: str


# The warp-specialised kernel, from this many rows on (each block takes 2 * consumers of them).
_HOPPER_ROWS = 4
_HOPPER = HopperConfig(128, 2, 6, 232, _H200)


def _launch_hopper(q, k, k_scale, weights, row_starts, row_ends, out, config: HopperConfig, sms: int) -> None:
    """The warp-specialised kernel: 64 heads of 128, q contiguous, k rows 16-byte aligned, full form."""
    m, n = q.shape[0], k.shape[0]
    hopper = variant("logits_hopper")
    q_desc = hopper.boxes(q, [m * 64, 128], [128, 1], [128, 128], 8)
    k_desc = hopper.boxes(k, [n, 128], [k.stride(0), 1], [config.keys, 128], 8)
    row_blocks = cdiv(m, 2 * config.consumers)
    chunk = _balanced_chunk(n, row_blocks, config.keys, sms)
    launch(
        hopper.mqa_hopper_kernel,
        (min(sms, row_blocks * cdiv(n, chunk)),),
        q_desc,
        k_desc,
        k_scale,
        weights,
        row_starts,
        row_ends,
        out,
        m,
        n,
        weights.stride(0),
        out.stride(0),
        chunk,
        KEYS=config.keys,
        CONSUMERS=config.consumers,
        STAGES=config.stages,
        CONSUMER_REGS=config.regs,
        num_warps=4,
    )


def _operand(arch: Arch) -> Any:
    if arch.interpret:
        return tl.float32
    return tl.float8e4nv if arch.native_fp8 else tl.bfloat16


def _fit(config: LogitsConfig, arch: Arch, rows_wanted: int, block_h: int, block_d: int) -> LogitsConfig:
    """Bound rows x heads by what the tile was made for (128 columns, 256 for the paged kernel's rows), and
    drop stages until operands fit shared memory."""
    size = 1 if arch.native_fp8 else 2
    rows = max(1, min(config.rows * max(1, 64 // block_h), pow2(rows_wanted)))
    stages = config.stages
    while (
        stages > 1
        and rows * block_h * block_d * size + (stages + size - 1) * config.block_n * block_d > arch.smem - 8192
    ):
        stages -= 1
    return replace(config, rows=rows, stages=stages)


def _plain_mqa_config(arch: Arch, m: int, block_h: int, block_d: int) -> LogitsConfig:
    # m decides only whether more than one row can be used: two variants at most
    config = _MQA_TABLE.get(arch.cc, _MQA_TABLE["any"])
    return _fit(config, arch, config.rows * max(1, 64 // block_h) if m > 1 else 1, block_h, block_d)


def _mqa_config(arch: Arch, m: int, block_h: int, block_d: int) -> LogitsConfig | HopperConfig:
    fits = arch.cc == 90 and not arch.interpret and m >= _HOPPER_ROWS and (block_h, block_d) == (64, 128)
    if fits and variant("logits_hopper") is not None:
        return _HOPPER
    return _plain_mqa_config(arch, m, block_h, block_d)


def _chunk(columns: int, other_blocks: int, block_n: int, waves: int, sms: int) -> int:
    """Columns per block: as many as keep ``waves`` blocks per multiprocessor, a multiple of the tile."""
    wanted = cdiv(waves * sms, max(other_blocks, 1))
    return max(1, cdiv(cdiv(columns, wanted), block_n)) * block_n


def _balanced_chunk(columns: int, row_blocks: int, block_n: int, sms: int) -> int:
    """Columns per item of the persistent kernel: the number of pieces whose last round is fullest, where
    each more costs about 2 % of a block's time (refetched queries)."""
    pieces = range(1, max(8, cdiv(sms, row_blocks)) + 1)
    best = min(pieces, key=lambda c: cdiv(row_blocks * c, sms) / c * (1 + 0.02 * c))
    return cdiv(cdiv(columns, best), block_n) * block_n


def _bytes(t: torch.Tensor, operand: Any) -> torch.Tensor:
    """The tensor as the kernel's element type: e4m3 where native, else uint8."""
    return t.view(torch.float8_e4m3fn if operand == tl.float8e4nv else torch.uint8)


def _mqa_constants(
    config: LogitsConfig, h: int, d: int, compressed: bool, tma: bool, aligned: bool, operand: Any
) -> dict[str, Any]:
    return dict(
        H=h,
        D=d,
        BLOCK_H=pow2(h, 16),
        BLOCK_D=pow2(d, 32),
        ROWS=config.rows,
        BLOCK_N=config.block_n,
        COMPRESSED=compressed,
        K_TMA=tma,
        ALIGNED=aligned,
        OPERAND=operand,
        STAGES=config.stages,
    )


def _paged_constants(
    config: LogitsConfig, h: int, d: int, page_size: int, k_mode: int, aligned: bool, operand: Any
) -> dict[str, Any]:
    return dict(
        H=h,
        D=d,
        PAGE=page_size,
        BLOCK_H=pow2(h, 16),
        BLOCK_D=pow2(d, 32),
        ROWS=config.rows,
        BLOCK_N=config.block_n,
        K_MODE=k_mode,
        ALIGNED=aligned,
        OPERAND=operand,
        STAGES=config.stages,
    )


def mqa_logits(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    row_starts: torch.Tensor,
    row_ends: torch.Tensor,
    *,
    max_seqlen_k: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Indexer logits of ``m`` queries over ``n`` contiguous keys.

    ``q`` [m, h, d] e4m3, ``k`` [n, d] e4m3, ``k_scale`` [n] fp32, ``weights`` [m, h] fp32, ``row_starts`` and
    ``row_ends`` [m] int32, half open, clamped to [0, n]. Returns fp32 [m, n], -inf outside the row's range;
    with ``max_seqlen_k`` the compressed [m, max_seqlen_k] whose column j is key ``start + j``, -inf beyond
    the row's end. No workspace.
    """
    return _mqa_logits(q, k, k_scale, weights, row_starts, row_ends, max_seqlen_k, out)


def _mqa_logits(
    q, k, k_scale, weights, row_starts, row_ends, max_seqlen_k=None, out=None, config=None, batch_invariant=False
):
    m, h, d = q.shape
    n = k.shape[0]
    compressed = max_seqlen_k is not None
    n_cols = max_seqlen_k if compressed else n
    if out is None:
        out = torch.empty((m, n_cols), dtype=torch.float32, device=q.device)
    if m == 0 or n_cols == 0:
        return out
    arch = arch_of(q.device)
    operand = _operand(arch)
    block_h, block_d = pow2(h, 16), pow2(d, 32)
    # The mode that is batch-invariant has for few rows what many have.
    rows = max(m, _HOPPER_ROWS) if batch_invariant else m
    if config is None:
        choose = _plain_mqa_config if compressed else _mqa_config
        config = choose(arch, rows, block_h, block_d)
    q, k = _bytes(q, operand), _bytes(k, operand)
    if isinstance(config, HopperConfig):
        contiguous = q.stride(2) == 1 and q.stride(1) == 128 and (rows == 1 or q.stride(0) == 8192)
        pointers = (q.data_ptr() | k.data_ptr()) % 16 == 0 and k.stride(0) % 16 == 0 and k.stride(0) >= 128
        if (h, d) == (64, 128) and not compressed and contiguous and pointers:
            _launch_hopper(q, k, k_scale, weights, row_starts, row_ends, out, config, arch.sms)
            return out
        config = _plain_mqa_config(arch, rows, block_h, block_d)
    aligned = q.stride(0) % 16 == 0 and q.stride(1) % 16 == 0 and k.stride(0) % 16 == 0
    tma = config.tma and k.stride(0) % 16 == 0 and k.data_ptr() % 16 == 0 and n > 0 and d == block_d
    k_src = TensorDescriptor(k, [n, d], [k.stride(0), 1], [config.block_n, block_d]) if tma else k
    row_blocks = cdiv(m, config.rows)
    chunk = _chunk(n_cols, row_blocks, config.block_n, config.waves, arch.sms)
    launch(
        _mqa_logits_kernel,
        (row_blocks, cdiv(n_cols, chunk)),
        q,
        k_src,
        k_scale,
        weights,
        row_starts,
        row_ends,
        out,
        m,
        n,
        n_cols,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        weights.stride(0),
        out.stride(0),
        chunk,
        **_mqa_constants(config, h, d, compressed, tma, aligned, operand),
        num_warps=config.warps,
        maxnreg=config.maxnreg,
    )
    return out


def paged_mqa_logits(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    max_context_len: int,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Indexer logits over the paged key cache.

    ``q`` [b, next_n, h, d] e4m3; ``k_cache`` uint8 [pages, page_size, (1,) d + 4], page-split: ``page_size``
    keys of d e4m3 bytes, then ``page_size`` fp32 scales; ``weights`` [b * next_n, h] fp32; ``context_lens``
    [b] or [b, next_n] int32; ``block_table`` [b, max_blocks] int32. Returns fp32 [b * next_n,
    max_context_len], -inf at and beyond the row's length and the table's end, and where the table names a page that
    the cache does not have. Keys are read once for all ``next_n`` rows. No
    workspace.
    """
    return _paged_mqa_logits(q, k_cache, weights, context_lens, block_table, max_context_len, out, None)


def _key_mode(config: LogitsConfig, page_size: int, d: int) -> int:
    """How the paged kernel fetches keys: see its docstring."""
    if page_size % config.block_n:
        return 0
    return 2 if config.tma and d == pow2(d, 32) else 1


def _paged_config(arch: Arch, next_n: int, block_h: int, block_d: int) -> LogitsConfig:
    config = _PAGED_TABLE.get(arch.cc, _PAGED_TABLE["any"])
    return _fit(config, arch, next_n, block_h, block_d)


def _paged_mqa_logits(q, k_cache, weights, context_lens, block_table, max_context_len, out, config):
    b, next_n, h, d = q.shape
    page_size = k_cache.shape[1]
    if out is None:
        out = torch.empty((b * next_n, max_context_len), dtype=torch.float32, device=q.device)
    if b * next_n == 0 or max_context_len == 0:
        return out
    arch = arch_of(q.device)
    operand = _operand(arch)
    block_h, block_d = pow2(h, 16), pow2(d, 32)
    if config is None:
        config = _paged_config(arch, next_n, block_h, block_d)
    q = _bytes(q, operand)
    page_stride = k_cache.stride(0)
    aligned = page_stride % 16 == 0 and all(s % 16 == 0 for s in q.stride()[:3])
    k_mode, k_desc = _key_mode(config, page_size, d), None
    if k_mode == 2:
        if page_stride % 16 == 0 and k_cache.data_ptr() % 16 == 0 and k_cache.shape[0] > 0:
            shape, strides = [k_cache.shape[0], page_size, d], [page_stride, d, 1]
            k_desc = TensorDescriptor(_bytes(k_cache, operand), shape, strides, [1, config.block_n, block_d])
        else:
            k_mode = 1
    groups = cdiv(next_n, config.rows)
    chunk = _chunk(max_context_len, b * groups, config.block_n, config.waves, arch.sms)
    len_n = context_lens.stride(1) if context_lens.dim() == 2 else 0
    launch(
        _paged_mqa_logits_kernel,
        (b, cdiv(max_context_len, chunk), groups),
        q,
        k_cache,
        k_desc,
        weights,
        context_lens,
        block_table,
        out,
        next_n,
        max_context_len,
        min(max_context_len, page_size * block_table.shape[1]),
        k_cache.shape[0],
        q.stride(0),
        q.stride(1),
        q.stride(2),
        page_stride,
        weights.stride(0),
        context_lens.stride(0),
        len_n,
        block_table.stride(0),
        out.stride(0),
        chunk,
        **_paged_constants(config, h, d, page_size, k_mode, aligned, operand),
        num_warps=config.warps,
        maxnreg=config.maxnreg,
    )
    return out
