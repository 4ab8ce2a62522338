"""Sparse MLA decode: the launch of a split kernel, and the kernel that combines the splits of a row."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from ...launch import entry, launch_kernel
from ...lib.sizes import cdiv, pow2
from ...lib.softmax import LN2, LOG2E, NEGATIVE
from .by_lengths import MOST_ROWS, lengths_of, splits_of, tiles_of
from .plan import Call, Plan

_BLOCK_OF_ONE = 8  # heads that are combined at a time where most rows have one split


def launch_splits(
    kernel: Any, call: Call, plan: Plan, *, words: bool, block_heads: int, num_warps: int, **constants: Any
) -> None:
    """Launch a split kernel and, if there are several splits, the kernel that combines them.

    Args:
        words: Whether the kernel takes the caches as 32-bit words, not as bytes.
        block_heads: Heads of one program.
    """
    arch, scopes, q, out, lse = call.shape.arch, call.scopes, call.q, call.out, call.lse
    b, s_q, heads, _ = q.shape
    rows, splits = b * s_q, plan.splits
    part, part_lse = lse, lse
    if splits > 1:
        part = torch.empty((rows, splits, heads, 512), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((rows, splits, heads), dtype=torch.float32, device=q.device)
    has_sink, sink = int(call.sink is not None), lse if call.sink is None else call.sink
    cache1, cache2 = scopes.cache1, scopes.cache2
    if words:
        cache1, cache2 = cache1.view(torch.int32), cache2.view(torch.int32)
    blocks = cdiv(heads, block_heads)
    launch_kernel(
        kernel, (rows * blocks, splits), *(q, out, lse, part, part_lse, sink),
        *(cache1, scopes.idx1, scopes.len1, cache2, scopes.idx2, scopes.len2),
        *(has_sink, scopes.has_len1, scopes.has_len2), call.sm_scale * LOG2E.value * 2.0**60,
        *(heads, block_heads, blocks, s_q, splits), *(x // call.q_unit for x in (*q.stride()[:3], *out.stride()[:3])),
        *scopes.strides, *(scopes.topk1, scopes.topk2), *scopes.pages, **constants, SPLIT=splits > 1, PDL=arch.pdl,
        num_warps=num_warps,
    )  # fmt: skip
    if splits == 1:
        return
    o_unit = min(call.q_unit, 4)
    o_strides = [x // o_unit for x in out.stride()[:3]]
    pdl = {"launch_pdl": True} if arch.pdl else {}
    if plan.even:
        one, half = plan.even == 1, _at_once(plan.even)
        lengths = scopes.has_len1, scopes.has_len2, scopes.topk1, scopes.topk2
        block = _BLOCK_OF_ONE if one else 1
        launch_kernel(
            _combine_by_lengths_kernel, (rows * cdiv(heads, block),),
            *(part, part_lse, sink, out, lse, scopes.len1, scopes.len2), *(has_sink, *lengths),
            *(heads, s_q, b, plan.even, splits), *o_strides, KEYS=plan.tile.keys, ONE=one, HALF=1 if one else half,
            BH=block, O_UNIT=o_unit, PDL=arch.pdl, num_warps=8 if one else 2 if half <= 4 else 4, num_stages=1, **pdl,
        )  # fmt: skip
        return
    at_once = _at_once(splits)
    launch_kernel(
        _combine_kernel, (rows * heads,), *(part, part_lse, sink, out, lse), *(has_sink, heads, s_q, splits),
        *o_strides, BS=at_once, O_UNIT=o_unit, PDL=arch.pdl, num_warps=2 if at_once <= 8 else 4, num_stages=1, **pdl,
    )  # fmt: skip


def _at_once(splits: int) -> int:
    """The number of splits that a combining kernel is compiled for."""
    return pow2(splits, 2) if splits <= 8 else 4 * cdiv(splits, 4)


@triton.jit
def combined(values, lses, sink_value, acc, BS: tl.constexpr):
    """The result of splits that have ``values`` and base-2 ``lses``, as two factors, and its LSE. ``acc`` is zeros."""
    m_i = lses[0]
    for i in tl.static_range(1, BS):
        m_i = tl.maximum(m_i, lses[i])
    m_i = tl.maximum(m_i, NEGATIVE)
    l_i = 0.0
    for i in tl.static_range(BS):
        scale = tl.exp2(lses[i] - m_i)
        l_i += scale
        # select, do not multiply: a split without keys has written no values
        acc += tl.where(lses[i] != float("-inf"), values[i] * scale, 0.0)
    has_keys = l_i != 0.0
    l_i = tl.where(has_keys, l_i, 1.0)
    row_lse = tl.where(has_keys, (m_i + tl.log2(l_i)) * LN2, float("inf"))
    inverse = tl.where(has_keys, 1.0 / (l_i * (1.0 + tl.exp(sink_value - row_lse))), 0.0)
    return acc, inverse, row_lse


@entry(triton.jit, "has_sink", any_alignment=["sink", "lse", "part_lse"])
def _combine_kernel(
    part, part_lse, sink, out, lse,
    has_sink: tl.int32, heads: tl.int32, s_q: tl.int32, splits: tl.int32,
    o_sb: tl.int64, o_ss: tl.int64, o_sh: tl.int64,  # in O_UNIT elements
    BS: tl.constexpr, O_UNIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Combine the splits of one (row, head), at most ``BS``, into the output. All loads are issued before the first is
    waited for, and no data moves between threads."""
    pid = tl.program_id(0)
    row = pid // heads
    head = pid - row * heads
    b = row // s_q
    s = row - b * s_q
    d = tl.arange(0, 512)
    first = row.to(tl.int64) * splits * heads + head
    part_lse += first
    part += first * 512
    o_row = out + (b.to(tl.int64) * o_sb + s.to(tl.int64) * o_ss + head.to(tl.int64) * o_sh) * O_UNIT
    sink_value = tl.load(sink + head, mask=has_sink != 0, other=float("-inf"))
    if PDL:
        gdc_wait()
    values = ()
    for i in tl.static_range(BS):
        there = d < tl.where(i < splits, 512, 0)  # a vector, since the interpreter does not take a scalar
        values += (tl.load(part + i * heads * 512 + d, mask=there, other=0.0),)  # type: ignore[assignment]
    # Loaded after the partial outputs, else the compiler starts reducing before all loads are in flight.
    lses = ()
    for i in tl.static_range(BS):
        lses += (tl.load(part_lse + i * heads, mask=i < splits, other=float("-inf")),)  # type: ignore[assignment]
    acc, inverse, row_lse = combined(values, lses, sink_value, tl.zeros([512], tl.float32), BS)
    tl.store(lse + pid, row_lse)
    tl.store(o_row + d, (acc * inverse).to(tl.bfloat16))


@entry(triton.jit, "has_sink", any_alignment=["sink", "lse", "part_lse", "len1", "len2"])
def _combine_by_lengths_kernel(
    part, part_lse, sink, out, lse, len1, len2,
    has_sink: tl.int32, has_len1: tl.int32, has_len2: tl.int32, topk1: tl.int32, topk2: tl.int32,
    heads: tl.int32, s_q: tl.int32, batch: tl.int32, even: tl.int32, splits: tl.int32,
    o_sb: tl.int64, o_ss: tl.int64, o_sh: tl.int64,  # in O_UNIT elements
    KEYS: tl.constexpr, ONE: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, O_UNIT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Combine the splits of a row and BH of its heads, if it has several. ``HALF`` is ``even`` or more. The values of
    the first ``even`` splits are requested before the number of splits is known; with ``ONE``, which is
    ``even == 1``, nothing is requested before."""
    pid = tl.program_id(0)
    blocks = (heads + BH - 1) // BH
    row = pid // blocks
    head = (pid - row * blocks) * BH + tl.arange(0, BH)[:, None]
    b = row // s_q
    s = row - b * s_q
    lengths, counts = (len1, len2, has_len1, has_len2, topk1, topk2), (batch, even, splits)
    lane = tl.arange(0, MOST_ROWS)
    all1, all2 = lengths_of(lane, lane < batch, lengths)
    own1, own2 = lengths_of(b, True, lengths)
    count = splits_of(tiles_of(own1, own2, lengths, KEYS), lane, all1, all2, lengths, counts, KEYS)
    if ONE:
        # The first program waits all the same: the kernel after this one may not start before the split kernel ends.
        if (count == 1) & (pid > 0):
            return
    d = tl.arange(0, 512)[None, :]
    head_ok = head < heads
    first = row.to(tl.int64) * splits * heads + head
    part_lse += first
    part += first * 512
    o_row = out + (b.to(tl.int64) * o_sb + s.to(tl.int64) * o_ss + head.to(tl.int64) * o_sh) * O_UNIT
    sink_value = tl.load(sink + head, mask=head_ok & (has_sink != 0), other=float("-inf"))
    if PDL:
        gdc_wait()
    values = ()
    for i in tl.static_range(HALF):
        there = head_ok & (i < even)
        values += (tl.load(part + i * heads * 512 + d, mask=there & (d < 512), other=0.0),)  # type: ignore[assignment]
    for i in tl.static_range(HALF):
        there = head_ok & (even + i < count)
        values += (tl.load(part + (even + i) * heads * 512 + d, mask=there & (d < 512), other=0.0),)  # type: ignore[assignment]
    lses = ()
    for i in tl.static_range(HALF):
        there = head_ok & (i < tl.minimum(even, count))
        lses += (tl.load(part_lse + i * heads, mask=there, other=float("-inf")),)  # type: ignore[assignment]
    for i in tl.static_range(HALF):
        there = head_ok & (even + i < count)
        lses += (tl.load(part_lse + (even + i) * heads, mask=there, other=float("-inf")),)  # type: ignore[assignment]
    acc, inverse, row_lse = combined(values, lses, sink_value, tl.zeros([BH, 512], tl.float32), 2 * HALF)
    there = head_ok & (count > 1)
    tl.store(lse + row.to(tl.int64) * heads + head, row_lse, mask=there)
    tl.store(o_row + d, (acc * inverse).to(tl.bfloat16), mask=there & (d < 512))
