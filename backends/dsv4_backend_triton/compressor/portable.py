"""The compressors in plain Triton: a block has one token or, for long windows, ``group`` tokens. It makes the
compressed keys (entries) of those that complete a window, one after the other.

    role   does
    all    the window's rows, all loaded at once: softmax and sum for each channel; norm, rotation, quantisation, store

              DIM channels
    ROWS rows [ kv ] [ scores ]     in registers

    PHASE 0 does all of that; a thread has its channels of every row. The rows of a long window would not fit one block,
    and one multiprocessor would take long to read them (20 us for 512 KiB on an H200). So a block of PHASE 1 does DIM
    of the HEAD channels, rows spread over its threads, and leaves the sums in a workspace, from which a second launch,
    PHASE 2, makes the entries.

    The number of tokens of a block changes no entry.

    shared memory: that of reductions
    barriers: of the whole block, placed by Triton
    strides: of the state, the table and cos_sin in elements, of the cache in bytes

A small batch is bound by latency: position, table and state are read one after the other (1 to 2 us on an H200: see
tools/launch_floor.py), and code is read from memory too. So what does not depend on these is loaded first, rows of a
page have one address, and a thread has few elements.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..configurations import configured
from ..launch import entry, launch_kernel
from ..lib.bits import quantize, round_to
from ..lib.hadamard import hadamard128
from ..lib.rope import rotations, turn
from ..lib.sizes import cdiv, pow2
from .plan import Call, Shape


class Config(NamedTuple):
    """``splits``: of the channels; 1 is for 16 rows or fewer. ``blocks``: with split channels, the number for each
    multiprocessor from which on a block has several tokens."""

    warps: int
    splits: int
    blocks: int


def plan(shape: Shape) -> Config:
    return Config(**configured(shape.op, "portable", shape.arch, size=shape.rows))


def launch(call: Call, config: Config) -> None:
    _, positions, requests, slots, state, table, weight, eps, cos_sin, cache = call
    arch, _, dim, ratio, overlap, hadamard = call.shape
    tokens, pages, splits = len(positions), cache.shape[0], config.splits
    # At most as many tokens as a window has: those of one request, which are adjacent, complete one entry at most.
    group = 1 if splits == 1 else max(1, min(ratio, tokens * splits // (arch.sms * config.blocks)))
    sums = state if splits == 1 else torch.empty((tokens, dim), dtype=torch.float32, device=state.device)
    pdl = splits > 1 and arch.pdl
    # Each aligned run of so many rows of a window lies on one page. A power of two.
    run = math.gcd(ratio, state.shape[1])
    run &= -run

    def phase(number: int, channels: int, warps: int, **options: Any) -> None:
        launch_kernel(
            _compress_kernel, (cdiv(tokens, group), dim // channels),
            state, positions, requests, slots, table, weight, cos_sin, cache, sums,
            eps, tokens, group, state.shape[0], table.shape[0], table.shape[1], cos_sin.shape[0], pages,
            state.stride(0), table.stride(0), cos_sin.stride(0), cache.stride(0),
            HEAD=dim, DIM=channels, RATIO=ratio, OVERLAP=overlap, STATE_PAGE=state.shape[1], PAGE=cache.shape[1],
            GROUP=1 if splits == 1 else pow2(ratio), RUN=run, HADAMARD=hadamard, PHASE=number, PDL=pdl,
            STATE_ALIGNED=state.stride(0) % 4 == 0, ALIGNED=cache.stride(0) % 16 == 0 and cache.data_ptr() % 16 == 0,
            NATIVE=arch.native_fp8, OPERAND=arch.bf16, num_warps=warps, **options,
        )  # fmt: skip

    if splits == 1:
        phase(0, dim, config.warps)
    else:
        phase(1, dim // splits, config.warps)
        phase(2, dim, dim // 64, **({"launch_pdl": True} if pdl else {}))


@triton.jit
def _run(window, first, WIDTH: tl.constexpr, STATE_PAGE: tl.constexpr):
    """The addresses of the runs of rows that begin at the positions ``first``, and whether their pages exist."""
    state_ptr, table_ptr, state_pages, blocks, state_stride = window
    at = first.to(tl.uint64)  # a negative position becomes one far beyond the blocks
    ok = at // STATE_PAGE < blocks.to(tl.uint64)
    page = tl.load(table_ptr + at // STATE_PAGE, mask=ok, other=-1)
    ok = ok & (page >= 0) & (page < state_pages)
    return state_ptr + (page.to(tl.int64) * state_stride + (at % STATE_PAGE).to(tl.int32) * WIDTH), ok


@triton.jit
def _rows_in_turn(
    window, position,
    HEAD: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr, STATE_PAGE: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """The sum [HEAD] of a window's kv by the softmax of its scores."""
    WIDTH: tl.constexpr = HEAD * 4 if OVERLAP else HEAD * 2
    WINDOW: tl.constexpr = RATIO * 2 if OVERLAP else RATIO
    channel = tl.arange(0, HEAD)
    kvs = ()
    scores = ()
    for first in tl.static_range(0, WINDOW, RUN):
        run, there = _run(window, position - (WINDOW - 1 - first), WIDTH, STATE_PAGE)
        ok = channel < tl.where(there, HEAD, 0)  # the interpreter cannot combine a mask and a scalar by and
        run += first // RATIO * HEAD
        for row in tl.static_range(RUN):
            source = run + row * WIDTH + channel
            kvs += (tl.load(source, mask=ok, other=0.0),)  # type: ignore[assignment]
            scores += (tl.load(source + WIDTH // 2, mask=ok, other=float("-inf")),)  # type: ignore[assignment]
    top = tl.full((HEAD,), -3.4028234663852886e38, tl.float32)  # of -inf alone too
    for i in tl.static_range(WINDOW):
        top = tl.maximum(top, scores[i])
    total = tl.zeros((HEAD,), tl.float32)
    weighted = tl.zeros((HEAD,), tl.float32)
    for i in tl.static_range(WINDOW):
        share = tl.exp2((scores[i] - top) * 1.4426950408889634)
        total += share
        weighted += share * kvs[i]
    return weighted / tl.where(total > 0, total, 1.0)


@triton.jit
def _rows_at_once(
    window, position,
    HEAD: tl.constexpr, DIM: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr, STATE_PAGE: tl.constexpr,
    RUN: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """As ``_rows_in_turn``, for DIM channels from the state's first on. ``RUNS``: a power of two."""
    WIDTH: tl.constexpr = HEAD * 4 if OVERLAP else HEAD * 2
    WINDOW: tl.constexpr = RATIO * 2 if OVERLAP else RATIO
    first = tl.arange(0, RUNS) * RUN
    run, ok = _run(window, position - (WINDOW - 1) + first, WIDTH, STATE_PAGE)
    ok = (ok & (first < WINDOW))[:, None, None]
    run += first // RATIO * HEAD
    source = run[:, None, None] + (tl.arange(0, RUN) * WIDTH)[None, :, None] + tl.arange(0, DIM)[None, None, :]
    kv = tl.load(source, mask=ok, other=0.0).reshape(RUNS * RUN, DIM)
    score = tl.load(source + WIDTH // 2, mask=ok, other=float("-inf")).reshape(RUNS * RUN, DIM)
    top = tl.maximum(tl.max(score, 0), -3.4028234663852886e38)  # of -inf alone too
    share = tl.exp2((score - top[None, :]) * 1.4426950408889634)
    total = tl.sum(share, 0)
    return tl.sum(kv * share, 0) / tl.where(total > 0, total, 1.0)


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
        x = tl.where((tl.arange(0, 4) == 3)[:, None], turned, x)  # the last 128 only
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


@triton.jit
def _compress(
    token, p, r, s, window, table_stride, rotation, entries, sums, weight, eps,
    HEAD: tl.constexpr, DIM: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr, STATE_PAGE: tl.constexpr,
    PAGE: tl.constexpr, RUN: tl.constexpr, HADAMARD: tl.constexpr, PHASE: tl.constexpr, PDL: tl.constexpr,
    ALIGNED: tl.constexpr, NATIVE: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """The entry of the window that a token completes: position ``p`` of request ``r``, written to slot ``s``."""
    position, slot = p.to(tl.int64), s.to(tl.int64)
    if PHASE != 1:
        cos_sin, most, cos_sin_stride = rotation
        start = tl.minimum(position // RATIO * RATIO, most - 1) * cos_sin_stride
        cos, sin = rotations(cos_sin, start + tl.zeros((HEAD // 128,), tl.int64))
    state_ptr, table_ptr, state_pages, blocks, state_stride = window
    channels = tl.program_id(1) * DIM
    rows = (state_ptr + channels, table_ptr + r.to(tl.int64) * table_stride, state_pages, blocks, state_stride)
    sums += token.to(tl.int64) * HEAD + channels + tl.arange(0, DIM)
    if PHASE == 0:
        c = _rows_in_turn(rows, position, HEAD, RATIO, OVERLAP, STATE_PAGE, RUN)
    elif PHASE == 1:
        WINDOW: tl.constexpr = RATIO * 2 if OVERLAP else RATIO
        RUNS: tl.constexpr = triton.next_power_of_2(WINDOW // RUN)
        c = _rows_at_once(rows, position, HEAD, DIM, RATIO, OVERLAP, STATE_PAGE, RUN, RUNS)
    else:
        if PDL:
            gdc_wait()
        c = tl.load(sums)
    if PHASE == 1:
        tl.store(sums, c)
    else:
        cache_ptr, cache_stride = entries
        mean = tl.sum(c * c, 0) / DIM + eps
        norm = tl.rsqrt(tl.where(mean > 0, mean, 1.0))  # a mean of 0 means that all of c is 0
        page, offset = cache_ptr + slot // PAGE * cache_stride, slot % PAGE
        _write(c * norm * weight, cos, sin, page, offset, DIM, PAGE, HADAMARD, ALIGNED, NATIVE, OPERAND)


@entry(triton.jit, "tokens", any_alignment=["positions", "requests_ptr", "slots", "table_ptr"])
def _compress_kernel(
    state_ptr, positions, requests_ptr, slots, table_ptr, weight_ptr, cos_sin, cache_ptr, sums,
    eps,
    tokens, group, state_pages, requests, blocks, most, pages,  # most: positions of cos_sin
    state_stride, table_stride, cos_sin_stride,  # in elements
    cache_stride,  # in bytes
    HEAD: tl.constexpr, DIM: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr, STATE_PAGE: tl.constexpr,
    PAGE: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, HADAMARD: tl.constexpr,
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
    window = (state_ptr, table_ptr, state_pages, blocks, state_stride)
    rotation, entries = (cos_sin, most, cos_sin_stride), (cache_ptr, cache_stride)
    weight = 0.0 if PHASE == 1 else tl.load(weight_ptr + tl.arange(0, DIM)).to(tl.float32)
    first = tl.program_id(0) * group
    each = tl.arange(0, GROUP)
    if GROUP == 1:
        p = tl.load(positions + first)
        r = tl.load(requests_ptr + first)
        s = tl.load(slots + first)
    else:
        mine = each < tl.minimum(group, tokens - first)
        p = tl.load(positions + first + each, mask=mine, other=-1)
        r = tl.load(requests_ptr + first + each, mask=mine, other=-1)
        s = tl.load(slots + first + each, mask=mine, other=-1)
    ok = (p >= 0) & (p % RATIO == RATIO - 1) & (r >= 0) & (r < requests)
    ok = ok & (s >= 0) & (s < pages.to(tl.int64) * PAGE)
    if GROUP == 1:
        if ok:
            _compress(
                first, p, r, s, window, table_stride, rotation, entries, sums, weight, eps,
                HEAD, DIM, RATIO, OVERLAP, STATE_PAGE, PAGE, RUN, HADAMARD, PHASE, PDL, ALIGNED, NATIVE, OPERAND,
            )  # fmt: skip
    else:
        token = tl.min(tl.where(ok, each, GROUP), 0)
        while token < GROUP:
            at = first + token
            _compress(
                at, tl.load(positions + at), tl.load(requests_ptr + at), tl.load(slots + at), window, table_stride,
                rotation, entries, sums, weight, eps,
                HEAD, DIM, RATIO, OVERLAP, STATE_PAGE, PAGE, RUN, HADAMARD, PHASE, PDL, ALIGNED, NATIVE, OPERAND,
            )  # fmt: skip
            token = tl.min(tl.where(ok & (each > token), each, GROUP), 0)
    if PDL and PHASE == 2:
        gdc_wait()  # so that no later launch starts while the first one still reads
