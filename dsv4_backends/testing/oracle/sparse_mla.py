"""Sparse MLA: one row at a time; pages are addressed by byte arithmetic."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .codes import F64, e4m3, e8m0


def _softmax_row(q: Tensor, keys: Tensor, sm_scale: float, sink: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """One query row: q fp64 ``[h, 512]`` over keys fp64 ``[k, 512]``, all of them valid."""
    h = q.shape[0]
    if len(keys) == 0:
        nothing = torch.full((h,), -math.inf, dtype=F64, device=q.device)
        return torch.zeros_like(q), nothing, -nothing
    logits = q @ keys.T * sm_scale
    top = logits.amax(-1)
    total = torch.exp(logits - top[:, None]).sum(-1)
    lse = top + total.log()
    out = torch.exp(logits - lse[:, None]) @ keys
    if sink is not None:
        # 1 / (1 + exp(sink - lse)): 0 for a sink of +inf, 1 for one of -inf.
        out /= (1 + torch.exp(sink.to(F64) - lse))[:, None]
    return out, top, lse


def sparse_mla_prefill(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, ...]:
    s_q, s_kv = q.shape[0], kv.shape[0]
    kv, indices = kv.view(s_kv, -1) if s_kv else kv, indices.view(s_q, -1) if s_q else indices
    out = torch.empty(q.shape, dtype=F64, device=q.device)
    top = torch.empty(q.shape[:2], dtype=F64, device=q.device)
    lse = torch.empty_like(top)
    for i in range(s_q):
        row = indices[i] if topk_length is None else indices[i][: max(int(topk_length[i]), 0)]
        row = row[(row >= 0) & (row < s_kv)].long()
        out[i], top[i], lse[i] = _softmax_row(q[i].to(F64), kv[row].to(F64), sm_scale, attn_sink)
    return out, top, lse


def _cache_keys(cache: Tensor, slots: Tensor) -> Tensor:
    """fp64 keys ``[n, 512]`` at valid slots, by the byte addresses of the page-split layout."""
    page_size, stride = cache.shape[1], cache.stride(0)
    last = (cache.shape[0] - 1) * stride + page_size * 584
    raw = cache.view(torch.uint8).as_strided((max(last, 0),), (1,), cache.storage_offset())
    page, offset = slots // page_size, slots % page_size
    data = (page * stride + offset * 576)[:, None]
    scale = (page * stride + page_size * 576 + offset * 8)[:, None]
    columns = torch.arange(448, device=cache.device)
    nope = e4m3(raw[data + columns]) * e8m0(raw[scale + columns // 64])
    rope = raw[data + 448 + torch.arange(128, device=cache.device)].view(torch.bfloat16)
    return torch.cat([nope, rope.to(F64)], -1)


def sparse_mla_decode(
    q: Tensor,
    k_cache: Tensor,
    indices: Tensor,
    sm_scale: float,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, ...]:
    out = torch.empty(q.shape, dtype=F64, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=F64, device=q.device)
    for i in range(q.shape[0]):
        for s in range(q.shape[1]):
            keys = []
            for cache, index, length in (
                (k_cache, indices, topk_length),
                (extra_k_cache, extra_indices, extra_topk_length),
            ):
                if cache is not None and index is not None:
                    row = index[i, s] if length is None else index[i, s, : max(int(length[i]), 0)]
                    row = row[(row >= 0) & (row < cache.shape[0] * cache.shape[1])].long()
                    keys.append(_cache_keys(cache, row))
            out[i, s], _top, lse[i, s] = _softmax_row(q[i, s].to(F64), torch.cat(keys), sm_scale, attn_sink)
    return out, lse


def gather_dequant_kv(
    k_cache: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    out: Tensor,
    gather_lens: Tensor | None = None,
    offset: int = 0,
    **others: Any,
) -> tuple[Tensor, ...]:
    pages, page_size = k_cache.shape[:2]
    expected = out.to(F64)
    for i in range(len(seq_lens)):
        n = min(max(int(seq_lens[i]), 0), page_size * block_table.shape[1])
        g = n if gather_lens is None else min(max(int(gather_lens[i]), 0), n)
        count = max(min(g, out.shape[1] - offset), 0)
        entry = torch.arange(n - g, n - g + count, device=out.device)
        page = block_table[i][entry // page_size].long()
        there = (page >= 0) & (page < pages)
        keys = torch.zeros((count, 512), dtype=F64, device=out.device)
        if there.any():
            keys[there] = _cache_keys(k_cache, (page * page_size + entry % page_size)[there])
        expected[i, offset : offset + count] = keys.bfloat16().to(F64)
    return (expected,)
