"""Chains of small steps, one Triton kernel each, since the time of a decode step is the launches.

For bf16 models on GPUs of compute capability 8.0 or newer. Otherwise the plain torch beside each call computes the same
and defines the meaning. Nothing waits for the GPU. Offsets are 64 bits wide, so any number of rows is possible.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...contract.layouts import (
    AMAX_FLOOR,
    E4M3_MAX,
    INDEXER_SCALE_BYTES,
    KV_BLOCK,
    KV_DATA_BYTES,
    KV_SCALE_BYTES,
    NOPE_DIM,
)
from ...runtime.launching import cache_error, elsewhere, on_its_device

_FLOOR = tl.constexpr(AMAX_FLOOR)
_OVER_MAX = tl.constexpr(1.0 / E4M3_MAX)
_DATA = tl.constexpr(KV_DATA_BYTES)
_SCALES = tl.constexpr(KV_SCALE_BYTES)
_NOPE_BLOCKS = tl.constexpr(NOPE_DIM // KV_BLOCK)
_KEY_SCALE = tl.constexpr(INDEXER_SCALE_BYTES)


def _launch(kernel: Any, grid: tuple[int, ...], where: Tensor, *arguments: Any, **constants: Any) -> None:
    """Launch on the device of ``where``."""
    try:
        with on_its_device(where) if elsewhere(where) else nullcontext():
            # Passed at every launch: Triton 3.9 warns without it, and 3.10 changes the default.
            kernel[grid](*arguments, **constants, enable_fp_fusion=True)
    except Exception as error:
        if (named := cache_error(error)) is not None:
            raise named from error
        raise


@triton.jit
def _bf16(x):
    """fp32 to bf16, rounded to nearest by its bits, since the interpreter's own cast truncates."""
    bits = x.to(tl.int32, bitcast=True)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return tl.where(x == x, nearest, x).to(tl.bfloat16)


@triton.jit
def _e4m3(x):
    """fp32 to the code of the nearest e4m3; larger values give NaN. By integer arithmetic, since SM80 has no e4m3."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(bits & 0x7FFFFFFF, 0x7F800000)
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # The last bit of 2^14 in fp32 is e4m3's least value, so the sum rounds as e4m3's subnormals do.
    subnormal = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - (141 << 23)
    code = tl.minimum(tl.where(magnitude < (121 << 23), subnormal, normal), 0x7F)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _quantised(x):
    """e4m3 codes of fp32 ``[n, block]`` and the bits of the scales ``[n, 1]``, by the rule of ``layouts``."""
    amax = tl.maximum(tl.max(tl.abs(x), 1, keep_dims=True), _FLOOR)
    scale = ((amax * _OVER_MAX).to(tl.int32, bitcast=True) + 0x7FFFFF) & -0x800000
    inverse = ((254 << 23) - scale).to(tl.float32, bitcast=True)  # of a power of two: exact
    return _e4m3(x * inverse), scale


@triton.jit(do_not_specialize=["rows"])
def _quantise_kernel(x, values, scales, rows, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    at = row * BLOCK + tl.arange(0, BLOCK)[None, :]
    codes, scale = _quantised(tl.load(x + at, mask=row < rows, other=0.0).to(tl.float32))
    tl.store(values + at, codes, mask=row < rows)
    tl.store(scales + row, scale.to(tl.float32, bitcast=True), mask=row < rows)


def quantise(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """``layouts.quantize_e4m3``, bit for bit.

    Args:
        x: bf16 or fp32 ``[..., n]``, contiguous.
        block: Elements per scale, a power of two that divides n.

    Returns:
        e4m3 ``[..., n]`` and fp32 powers of two ``[..., n / block]``.
    """
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((*x.shape[:-1], x.shape[-1] // block), dtype=torch.float32, device=x.device)
    if (rows := x.numel() // block) > 0:
        each = max(1, 2048 // block)
        arguments = (x, values.view(torch.uint8), scales, rows)
        _launch(_quantise_kernel, (-(-rows // each),), x, *arguments, ROWS=each, BLOCK=block)
    return values, scales


@triton.jit
def _rotated(x, places, cos, sin, token, within, D: tl.constexpr, ROPE: tl.constexpr):
    """bf16 ``[n, D]`` at ``places``, the last ROPE rotated in pairs, in fp32."""
    column = tl.arange(0, D)[None, :]
    in_rope = column >= D - ROPE
    angle = token * (ROPE // 2) + tl.maximum(column - (D - ROPE), 0) // 2
    c = tl.load(cos + angle, mask=in_rope, other=1.0).to(tl.float32)
    s = tl.load(sin + angle, mask=in_rope, other=0.0).to(tl.float32)
    own = tl.load(x + places + column, mask=within, other=0.0).to(tl.float32)
    other = tl.load(x + places + (column ^ 1), mask=within & in_rope, other=0.0).to(tl.float32)
    return own * c + tl.where(column % 2 == 0, -other, other) * s


@triton.jit(do_not_specialize=["angles"])
def _queries_kernel(
    q,
    cos,
    sin,
    weights,
    values,
    scaled,
    factor,
    angles,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[:, None]
    row = token * HEADS + head
    within = head < HEADS
    x = _bf16(_rotated(q, row * D, cos, sin, token % angles, within, D, ROPE)).to(tl.float32)
    codes, scale = _quantised(x)
    tl.store(values + row * D + tl.arange(0, D)[None, :], codes, mask=within)
    weight = tl.load(weights + row, mask=within, other=0.0).to(tl.float32) * factor
    tl.store(scaled + row, weight * scale.to(tl.float32, bitcast=True), mask=within)


def indexer_queries(q: Tensor, cos: Tensor, sin: Tensor, weights: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """The indexer's queries, rotated and quantised, with the scale of each folded into its weight.

    Args:
        q: bf16 ``[B, S, h, d]``, contiguous, d a power of two.
        cos, sin: ``[B or 1, S, r / 2]``, contiguous, for the last r of d.
        weights: ``[B, S, h]``, contiguous.
        factor: Another factor of the weights.

    Returns:
        e4m3 ``[B, S, h, d]`` and fp32 ``[B, S, h]``.
    """
    batch, length, heads, d = q.shape
    values = torch.empty(q.shape, dtype=torch.float8_e4m3fn, device=q.device)
    scaled = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    _launch(
        _queries_kernel,
        (batch * length, -(-heads // 16)),
        q,
        q,
        cos,
        sin,
        weights,
        values.view(torch.uint8),
        scaled,
        factor,
        cos.shape[0] * length,
        HEADS=heads,
        D=d,
        ROPE=2 * cos.shape[-1],
        BLOCK=16,
    )
    return values, scaled


@triton.jit(do_not_specialize=["start", "count", "capacity", "batch", "sequence_stride", "token_stride"])
def _write_kernel(
    x,
    cache,
    start,
    count,
    capacity,
    batch,
    sequence_stride,
    token_stride,
    KV: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64) // count
    new = tl.program_id(0).to(tl.int64) % count
    position = (start + new) % capacity
    page = cache + (position // PAGE * batch + sequence) * PAGE_STRIDE
    token = position % PAGE
    block = tl.arange(0, BLOCKS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    source = x + sequence * sequence_stride + new * token_stride
    own = tl.load(source + block * BLOCK + column).to(tl.float32)
    codes, scale = _quantised(own)
    if KV:
        is_nope = block < _NOPE_BLOCKS
        tl.store(page + token * _DATA + block * BLOCK + column, codes, mask=is_nope)
        # The last block is RoPE, two bytes a value.
        bits = _bf16(own).to(tl.float32).to(tl.int32, bitcast=True) >> 16
        rope = page + token * _DATA + _NOPE_BLOCKS * BLOCK + 2 * column + 0 * block
        tl.store(rope, (bits & 0xFF).to(tl.uint8), mask=block == _NOPE_BLOCKS)
        tl.store(rope + 1, ((bits >> 8) & 0xFF).to(tl.uint8), mask=block == _NOPE_BLOCKS)
        code = tl.where(is_nope, scale >> 23, 0).to(tl.uint8)
        tl.store(page + PAGE * _DATA + token * _SCALES + block, code)
    else:
        tl.store(page + token * BLOCK + column + 0 * block, codes)
        byte = tl.arange(0, _KEY_SCALE)[None, :]
        target = page + PAGE * BLOCK + token * _KEY_SCALE + byte + 0 * block
        tl.store(target, ((scale >> (8 * byte)) & 0xFF).to(tl.uint8))


def write_tokens(cache: Tensor, x: Tensor, start: int, capacity: int, *, kv: bool) -> None:
    """Quantise tokens into pages; sequence b of a batch owns the pages ``j * batch + b``.

    Args:
        cache: uint8 ``[pages, page_size, bytes]``, KV pages or those of indexer keys.
        x: bf16 or fp32 ``[batch, n, d]``, d contiguous; d is 512 for KV pages, else a power of two.
        start: The position of the first token.
        capacity: Of a sequence; positions count modulo it.
        kv: Which of the two formats.
    """
    batch, count, d = x.shape
    _launch(
        _write_kernel,
        (batch * count,),
        x,
        x,
        cache,
        start,
        count,
        capacity,
        batch,
        x.stride(0),
        x.stride(1),
        KV=kv,
        BLOCKS=d // KV_BLOCK if kv else 1,
        BLOCK=KV_BLOCK if kv else d,
        PAGE=cache.shape[1],
        PAGE_STRIDE=cache.stride(0),
    )


@triton.jit
def _hyper_kernel(
    mixes,
    squares,
    scale,
    base,
    streams,
    post,
    comb,
    collapsed,
    N: tl.constexpr,
    D: tl.constexpr,
    NORM_EPS: tl.constexpr,
    EPS: tl.constexpr,
    ITERATIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    norm = tl.rsqrt(tl.load(squares + row) / (N * D) + NORM_EPS)
    # The head has no iterations and only the N mixes of the collapse.
    mixes += row * (N if ITERATIONS == 0 else N * (N + 2))
    streams += row * (N * D)
    first = tl.load(scale).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for n in tl.static_range(N):
        pre = tl.sigmoid(tl.load(mixes + n) * norm * first + tl.load(base + n).to(tl.float32)) + EPS
        total += pre * tl.load(streams + n * D + column, mask=column < D, other=0.0).to(tl.float32)
    tl.store(collapsed + row * D + column, _bf16(total), mask=column < D)
    if ITERATIONS > 0:
        if tl.program_id(1) == 0:
            i = tl.arange(0, N)
            at = N + i
            logits = tl.load(mixes + at) * norm * tl.load(scale + 1).to(tl.float32) + tl.load(base + at).to(tl.float32)
            tl.store(post + row * N + i, _bf16(2 * tl.sigmoid(logits)))
            place = i[:, None] * N + i[None, :]
            at = 2 * N + place
            logits = tl.load(mixes + at) * norm * tl.load(scale + 2).to(tl.float32) + tl.load(base + at).to(tl.float32)
            share = tl.exp(logits - tl.max(logits, 1, keep_dims=True))
            share = share / tl.sum(share, 1, keep_dims=True) + EPS
            share = share / (tl.sum(share, 0, keep_dims=True) + EPS)
            for _ in range(ITERATIONS - 1):
                share = share / (tl.sum(share, 1, keep_dims=True) + EPS)
                share = share / (tl.sum(share, 0, keep_dims=True) + EPS)
            tl.store(comb + row * (N * N) + place, _bf16(share))


def hyper_connection(
    mixes: Tensor,
    squares: Tensor,
    scale: Tensor,
    base: Tensor,
    streams: Tensor,
    *,
    norm_eps: float,
    eps: float,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The steps after ``hc_prenorm_gemm`` in a hyper-connection or, without iterations, in the head.

    Args:
        mixes: fp32 ``[m, n (n + 2)]``, for the head ``[m, n]``; contiguous.
        squares: fp32 ``[m]``.
        scale, base: The module's, any float dtype: three scales and one base for each mix, for the head one scale.
        streams: bf16 ``[..., n, d]`` with m rows, contiguous; n a power of two.
        norm_eps, eps: Of the norm, and of the mixes.
        iterations: Of Sinkhorn's normalisation.

    Returns:
        post ``[..., n]``, comb ``[..., n, n]`` (both empty for the head) and collapsed ``[..., d]``, all bf16.
    """
    *lead, n, d = streams.shape
    rows, mixed = len(mixes), min(iterations, 1)
    post = streams.new_empty((*lead, n * mixed))
    comb = streams.new_empty((*lead, n * mixed, n))
    collapsed = streams.new_empty((*lead, d))
    block = min(1024, triton.next_power_of_2(d))
    if rows > 0:
        _launch(
            _hyper_kernel,
            (rows, -(-d // block)),
            streams,
            mixes,
            squares,
            scale,
            base,
            streams,
            post,
            comb,
            collapsed,
            N=n,
            D=d,
            NORM_EPS=norm_eps,
            EPS=eps,
            ITERATIONS=iterations,
            BLOCK=block,
        )
    return post, comb, collapsed
