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
from .plan import Call, Plan


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
    at_once = pow2(splits, 2) if splits <= 8 else 4 * cdiv(splits, 4)
    o_unit = min(call.q_unit, 4)
    launch_kernel(
        _combine_kernel, (rows * heads,), *(part, part_lse, sink, out, lse), *(has_sink, heads, s_q, splits),
        *(x // o_unit for x in out.stride()[:3]), BS=at_once, O_UNIT=o_unit, PDL=arch.pdl,
        num_warps=2 if at_once <= 8 else 4, num_stages=1, **({"launch_pdl": True} if arch.pdl else {}),
    )  # fmt: skip


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
    m_i = lses[0]  # type: ignore[misc]
    for i in tl.static_range(1, BS):
        m_i = tl.maximum(m_i, lses[i])
    m_i = tl.maximum(m_i, NEGATIVE)
    l_i = 0.0
    acc = tl.zeros([512], tl.float32)
    for i in tl.static_range(BS):
        scale = tl.exp2(lses[i] - m_i)
        l_i += scale
        # select, do not multiply: a split without keys has written no values
        acc += tl.where(lses[i] != float("-inf"), values[i] * scale, 0.0)
    has_keys = l_i != 0.0
    l_i = tl.where(has_keys, l_i, 1.0)
    row_lse = tl.where(has_keys, (m_i + tl.log2(l_i)) * LN2, float("inf"))
    inverse = tl.where(has_keys, 1.0 / (l_i * (1.0 + tl.exp(sink_value - row_lse))), 0.0)
    tl.store(lse + pid, row_lse)
    tl.store(o_row + d, (acc * inverse).to(tl.bfloat16))
