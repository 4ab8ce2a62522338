"""The compressors in plain Triton: a block looks at ``group`` tokens and makes the entries of those that complete a
window, one after the other.

    role   does
    all    the window's rows, all loaded at once: softmax and sum for each channel; norm, rotation, quantisation, store

              DIM channels
    ROWS rows [ kv ] [ scores ]     in registers

    PHASE 0 does all of that. The rows of a long window would not fit one block, and one multiprocessor would take long
    to read them (20 us for 512 KiB on an H200). So a block of PHASE 1 does DIM of the HEAD channels and leaves the sums
    in a workspace, from which a second launch, PHASE 2, makes the entries.

    How many tokens a block looks at changes no entry.

    shared memory: that of reductions
    barriers: of the whole block, placed by Triton
    strides: of the state, the table and cos_sin in elements, of the cache in bytes
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..configurations import configured
from ..launch import launch as launch_kernel
from ..lib.bits import quantize, round_to
from ..lib.hadamard import hadamard128
from ..lib.rope import rotations, turn
from ..lib.sizes import cdiv, pow2
from .plan import Call, Shape


class Config(NamedTuple):
    """``splits``: of the channels. ``blocks``: for each multiprocessor, from where on one looks at several tokens."""

    warps: int
    splits: int
    blocks: int


def plan(shape: Shape) -> Config:
    """About 32 elements of kv and as many scores for each thread."""
    return Config(**configured(shape.op, "portable", shape.arch, size=shape.rows))


def launch(call: Call, config: Config) -> None:
    _, positions, requests, slots, state, table, weight, eps, cos_sin, cache = call
    arch, _, dim, ratio, overlap, hadamard = call.shape
    tokens, pages, splits = len(positions), cache.shape[0], config.splits
    # No more than one window of a request's tokens, which lie one after the other.
    group = max(1, min(ratio, tokens // (arch.sms * config.blocks)))
    sums = state if splits == 1 else torch.empty((tokens, dim), dtype=torch.float32, device=state.device)
    pdl = splits > 1 and arch.pdl

    def phase(number: int, channels: int, warps: int, **options: Any) -> None:
        launch_kernel(
            _compress_kernel, (cdiv(tokens, group), dim // channels),
            state, positions, requests, slots, table, weight, cos_sin, cache, sums,
            eps, tokens, group, state.shape[0], table.shape[0], table.shape[1], cos_sin.shape[0], pages,
            state.stride(0), table.stride(0), cos_sin.stride(0), cache.stride(0),
            HEAD=dim, DIM=channels, RATIO=ratio, OVERLAP=overlap, STATE_PAGE=state.shape[1], PAGE=cache.shape[1],
            GROUP=pow2(ratio), ROWS=pow2(call.shape.rows), HADAMARD=hadamard, PHASE=number, PDL=pdl,
            STATE_ALIGNED=state.stride(0) % 4 == 0, ALIGNED=cache.stride(0) % 16 == 0 and cache.data_ptr() % 16 == 0,
            NATIVE=arch.native_fp8, OPERAND=arch.bf16, num_warps=warps, **options,
        )  # fmt: skip

    if splits == 1:
        phase(0, dim, config.warps)
    else:
        phase(1, dim // splits, config.warps)
        phase(2, dim, dim // 128, **({"launch_pdl": True} if pdl else {}))


@triton.jit
def _compressed(
    state_ptr, table_ptr, position, state_pages, blocks, state_stride,
    HEAD: tl.constexpr, DIM: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr, STATE_PAGE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The sum [DIM] of a window's kv by the softmax of its scores. ``table_ptr``: the request's row."""
    WIDTH: tl.constexpr = HEAD * 4 if OVERLAP else HEAD * 2
    WINDOW: tl.constexpr = RATIO * 2 if OVERLAP else RATIO
    row = tl.arange(0, ROWS)
    at = position - (WINDOW - 1) + row
    ok = (row < WINDOW) & (at >= 0) & (at < blocks.to(tl.int64) * STATE_PAGE)
    page = tl.load(table_ptr + at // STATE_PAGE, mask=ok, other=-1)
    ok = ok & (page >= 0) & (page < state_pages)
    start = page.to(tl.int64) * state_stride + (at % STATE_PAGE) * WIDTH
    if OVERLAP:
        start += (row // RATIO) * HEAD
    source = state_ptr + start[:, None] + tl.arange(0, DIM)[None, :]
    kv = tl.load(source, mask=ok[:, None], other=0.0)
    score = tl.load(source + WIDTH // 2, mask=ok[:, None], other=float("-inf"))
    top = tl.maximum(tl.max(score, 0), -3.4028234663852886e38)  # of -inf alone too
    share = tl.exp2((score - top[None, :]) * 1.4426950408889634)
    total = tl.sum(share, 0)
    return tl.where(total > 0, tl.div_rn(tl.sum(kv * share, 0), total), 0.0)


@triton.jit
def _write(
    n, cos, sin, page, offset,
    DIM: tl.constexpr, PAGE: tl.constexpr, HADAMARD: tl.constexpr, ALIGNED: tl.constexpr, NATIVE: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """Rotate, round and quantise the normed ``n`` [DIM], and write it at ``offset`` of the page of the cache."""
    x = n.reshape(DIM // 128, 128)
    turned = turn(x, cos, sin)
    if DIM == 512:
        block = tl.arange(0, 8)[:, None]
        column = tl.arange(0, 64)[None, :]
        nope = tl.arange(0, 8) < 7
        x = tl.where((tl.arange(0, 4) == 3)[:, None], turned, x)  # the last 128 alone
        y = round_to(x, tl.bfloat16, OPERAND).reshape(8, 64)
        code, _, exponent = quantize(y.to(tl.float32), NATIVE)
        entry = page + offset * 576
        tl.store(entry + block * 64 + column, code, mask=nope[:, None])
        tl.store(page + PAGE * 576 + offset * 8 + tl.arange(0, 8), tl.where(nope, exponent, 0).to(tl.uint8))
        last = (block == 7) & (column >= 0)
        if ALIGNED:
            tl.store((entry + 448).to(tl.pointer_type(tl.bfloat16)) + block * 0 + column, y, mask=last)
        else:
            bits = y.to(tl.int16, bitcast=True)
            rope = entry + 448 + block * 0 + column * 2
            tl.store(rope, (bits & 0xFF).to(tl.uint8), mask=last)
            tl.store(rope + 1, ((bits >> 8) & 0xFF).to(tl.uint8), mask=last)
    else:
        y = round_to(turned, tl.bfloat16, OPERAND).to(tl.float32)
        if HADAMARD:
            y = round_to(hadamard128(y), tl.bfloat16, OPERAND).to(tl.float32)
        code, scale, _ = quantize(y, NATIVE)
        tl.store(page + offset * 128 + tl.arange(0, 1)[:, None] + tl.arange(0, 128)[None, :], code)
        byte = tl.arange(0, 4)[None, :]
        bits = scale.to(tl.int32, bitcast=True)[:, None] >> (8 * byte)
        tl.store(page + PAGE * 128 + offset * 4 + byte, (bits & 0xFF).to(tl.uint8))


_SIZES = (
    "tokens group state_pages requests blocks most pages state_stride table_stride cos_sin_stride cache_stride"
).split()
_ANY_ALIGNMENT = ["positions", "requests_ptr", "slots", "table_ptr"]


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def _compress_kernel(
    state_ptr, positions, requests_ptr, slots, table_ptr, weight_ptr, cos_sin, cache_ptr, sums,
    eps,
    tokens, group, state_pages, requests, blocks, most, pages,  # most: positions of cos_sin
    state_stride, table_stride, cos_sin_stride,  # in elements
    cache_stride,  # in bytes
    HEAD: tl.constexpr, DIM: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr, STATE_PAGE: tl.constexpr,
    PAGE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HADAMARD: tl.constexpr,
    PHASE: tl.constexpr, PDL: tl.constexpr, STATE_ALIGNED: tl.constexpr, ALIGNED: tl.constexpr, NATIVE: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    if PDL and PHASE == 1:
        gdc_launch_dependents()
    state_stride, cache_stride = state_stride.to(tl.int64), cache_stride.to(tl.int64)
    if STATE_ALIGNED:
        state_stride = tl.multiple_of(state_stride, 4)
    if ALIGNED:
        cache_stride = tl.multiple_of(cache_stride, 16)
    first = tl.program_id(0) * group
    each = tl.arange(0, GROUP)
    ok = each < tl.minimum(group, tokens - first)
    p = tl.load(positions + first + each, mask=ok, other=-1)
    r = tl.load(requests_ptr + first + each, mask=ok, other=-1)
    s = tl.load(slots + first + each, mask=ok, other=-1)
    ok = (p >= 0) & (p % RATIO == RATIO - 1) & (r >= 0) & (r < requests)
    ok = ok & (s >= 0) & (s < pages.to(tl.int64) * PAGE)
    token = tl.min(tl.where(ok, each, GROUP), 0)
    if PDL and PHASE == 2:
        gdc_wait()
    while token < GROUP:
        position = tl.load(positions + first + token).to(tl.int64)
        request = tl.load(requests_ptr + first + token).to(tl.int64)
        slot = tl.load(slots + first + token).to(tl.int64)
        mine = sums + (first + token).to(tl.int64) * HEAD + tl.program_id(1) * DIM + tl.arange(0, DIM)
        if PHASE != 1:
            weight = tl.load(weight_ptr + tl.arange(0, DIM)).to(tl.float32)
            start = tl.minimum(position // RATIO * RATIO, most - 1)
            cos, sin = rotations(cos_sin, start * cos_sin_stride)
        if PHASE == 2:
            c = tl.load(mine)
        else:
            c = _compressed(
                state_ptr + tl.program_id(1) * DIM, table_ptr + request * table_stride, position, state_pages,
                blocks, state_stride, HEAD, DIM, RATIO, OVERLAP, STATE_PAGE, ROWS,
            )  # fmt: skip
        if PHASE == 1:
            tl.store(mine, c)
        else:
            mean = tl.sum(c * c, 0) / DIM + eps
            norm = tl.where(mean > 0, tl.div_rn(1.0, tl.sqrt_rn(mean)), 0.0)
            page, offset = cache_ptr + slot // PAGE * cache_stride, slot % PAGE
            _write(c * norm * weight, cos, sin, page, offset, DIM, PAGE, HADAMARD, ALIGNED, NATIVE, OPERAND)
        token = tl.min(tl.where(ok & (each > token), each, GROUP), 0)
