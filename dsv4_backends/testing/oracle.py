"""What every op means, written a second time: one row at a time, in fp64, straight from the formula.

These judge all providers, the torch reference included, so they share no code with any: e4m3 and E8M0 are decoded by
tables computed from their definitions, pages are addressed by byte arithmetic. Slow, and free to synchronise.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..contract import CONTRACTS
from ..contract.settings import without_autocast
from ..runtime.bind import load_target

F64 = torch.float64


def _e4m3_value(code: int) -> float:
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 0xF, code & 0x7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


_E4M3 = torch.tensor([_e4m3_value(code) for code in range(256)], dtype=F64, device="cpu")
_E8M0 = torch.tensor([2.0 ** (code - 127) for code in range(255)] + [math.nan], dtype=F64, device="cpu")


def e4m3(x: Tensor) -> Tensor:
    """fp64 values of e4m3 codes, given as bytes or as e4m3."""
    return _E4M3.to(x.device)[x.contiguous().view(torch.uint8).int()]


def e8m0(codes: Tensor) -> Tensor:
    """fp64 values of E8M0 codes (uint8)."""
    return _E8M0.to(codes.device)[codes.int()]


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


def _logits_row(q: Tensor, keys: Tensor, scale: Tensor, weights: Tensor) -> Tensor:
    return (e4m3(q) @ keys.T).clamp(min=0).mul_(weights.to(F64)[:, None]).sum(0) * scale.to(F64)


def mqa_logits(
    q: Tensor,
    k: Tensor,
    k_scale: Tensor,
    weights: Tensor,
    row_starts: Tensor,
    row_ends: Tensor,
    max_seqlen_k: int | None = None,
    **others: Any,
) -> tuple[Tensor, ...]:
    m, n = q.shape[0], k.shape[0]
    keys = e4m3(k)
    out = torch.full((m, n if max_seqlen_k is None else max_seqlen_k), -math.inf, dtype=F64, device=q.device)
    for i in range(m):
        start, end = (min(max(int(bound[i]), 0), n) for bound in (row_starts, row_ends))
        if max_seqlen_k is not None:
            end = min(end, start + max_seqlen_k)
        if end > start:
            shift = 0 if max_seqlen_k is None else start
            part = slice(start, end)
            out[i, start - shift : end - shift] = _logits_row(q[i], keys[part], k_scale[part], weights[i])
    return (out,)


def paged_mqa_logits(
    q: Tensor,
    k_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    max_context_len: int,
    **others: Any,
) -> tuple[Tensor, ...]:
    b, next_n, _, d = q.shape
    page_size, stride = k_cache.shape[1], k_cache.stride(0)
    last = (k_cache.shape[0] - 1) * stride + page_size * (d + 4)
    raw = k_cache.as_strided((max(last, 0),), (1,), k_cache.storage_offset())
    out = torch.full((b * next_n, max_context_len), -math.inf, dtype=F64, device=q.device)
    for i in range(b):
        lengths = [int(context_lens[i] if context_lens.dim() == 1 else context_lens[i, j]) for j in range(next_n)]
        lengths = [min(max(length, 0), max_context_len, page_size * block_table.shape[1]) for length in lengths]
        n = torch.arange(max(lengths), device=q.device)
        page = block_table[i][n // page_size].long()
        missing = (page < 0) | (page >= k_cache.shape[0])
        if len(raw) == 0:  # a cache without pages has no key to stand in for those that are missing
            continue
        base = torch.where(missing, 0, page) * stride
        offset = n % page_size
        keys = e4m3(raw[(base + offset * d)[:, None] + torch.arange(d, device=q.device)])
        scale_at = (base + page_size * d + offset * 4)[:, None] + torch.arange(4, device=q.device)
        scale = raw[scale_at].flatten().view(torch.float32)
        for j, length in enumerate(lengths):
            row = i * next_n + j
            found = _logits_row(q[i, j], keys[:length], scale[:length], weights[row])
            out[row, :length] = torch.where(missing[:length], -math.inf, found)
    return (out,)


def _scale(scale: Tensor, blocks: int) -> Tensor:
    if scale.dtype is torch.int32:
        codes = torch.stack([(scale >> 8 * byte) & 0xFF for byte in range(4)], -1)
        return e8m0(codes.flatten(-2)[..., :blocks])
    if scale.dtype is torch.float8_e8m0fnu:
        return e8m0(scale.contiguous().view(torch.uint8))
    return scale.to(F64)


def fp8_einsum(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, **others: Any) -> tuple[Tensor, ...]:
    b, h, r = x.shape
    d = w.shape[1]
    blocks = (r + 127) // 128
    x_s, w_s = _scale(x_scale, blocks), _scale(w_scale, blocks)
    out = torch.zeros((b, h, d), dtype=F64, device=x.device)
    row = torch.arange(d, device=x.device) // (1 if w_s.shape[1] == d else 128)
    for group in range(h):
        for block in range(blocks):
            part = slice(block * 128, min(block * 128 + 128, r))
            left = e4m3(x[:, group, part]) * x_s[:, group, block, None]
            right = e4m3(w[group, :, part]) * w_s[group, row, block, None]
            out[:, group] += left @ right.T
    return (out,)


def hc_prenorm_gemm(x: Tensor, fn: Tensor, **others: Any) -> tuple[Tensor, ...]:
    """The finished sums: partials are only defined by what they sum to."""
    mixes = torch.empty((x.shape[0], fn.shape[0]), dtype=F64, device=x.device)
    squares = torch.empty(x.shape[0], dtype=F64, device=x.device)
    for rows in torch.arange(x.shape[0], device=x.device).split(256):
        part = x[rows].to(F64)
        mixes[rows] = part @ fn.to(F64).T
        squares[rows] = (part * part).sum(-1)
    return mixes, squares


def expected(op: str, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """The op's results in fp64, in the order of the contract's ``returns``, by the oracle that the contract names."""
    with without_autocast():
        results: tuple[Tensor, ...] = load_target(CONTRACTS[op].oracle)(**arguments)
        return results


def finished(op: str, arguments: dict[str, Any], results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Results as the oracle gives them: partial sums added up, in fp64."""
    if arguments.get(CONTRACTS[op].partials) is not None:
        return tuple(result.to(F64).sum(0) for result in results)
    return results
