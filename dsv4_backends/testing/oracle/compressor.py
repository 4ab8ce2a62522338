"""The compressor: one window at a time; pages are addressed by byte arithmetic."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .codes import F64, block_scale, e4m3, e8m0, nearest_e4m3, rotated
from .indexer import sylvester


def _bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(F64)


def _compressed(state: Tensor, pages: Tensor, position: int, ratio: int, dim: int) -> Tensor:
    """The softmax-weighted sum of the window that ends at a position; ``pages``: the request's row of the table."""
    page_size, half = state.shape[1], state.shape[2] // 2
    kv, scores = [], []
    for back in range((half // dim) * ratio):
        at = position - back
        if not 0 <= at < page_size * len(pages) or not 0 <= (page := int(pages[at // page_size])) < state.shape[0]:
            continue
        # With overlap the second half of the channels is this window's, the first half the window's before it.
        first = half - dim if back < ratio else 0
        row = state[page, at % page_size].to(F64)
        kv.append(row[first : first + dim])
        scores.append(row[half + first : half + first + dim])
    if not kv:
        return torch.zeros(dim, dtype=F64, device=state.device)
    score = torch.stack(scores)
    top = score.amax(0)
    share = torch.exp(score - torch.where(top == -math.inf, 0.0, top))
    total = share.sum(0)
    return torch.where(total > 0, (share * torch.stack(kv)).sum(0) / total, 0.0)


def _entries(
    positions: Tensor,
    requests: Tensor,
    slots: Tensor,
    state: Tensor,
    block_table: Tensor,
    norm_weight: Tensor,
    eps: float,
    cos_sin: Tensor,
    ratio: int,
    size: int,
) -> tuple[Tensor, Tensor]:
    """The slots that are written and their values before rounding: int64 ``[n]`` and fp64 ``[n, dim]``."""
    dim = norm_weight.shape[0]
    written, entries = [], []
    for token in zip(positions.tolist(), requests.tolist(), slots.tolist(), strict=True):
        position, request, slot = token
        if position < 0 or (position + 1) % ratio or not 0 <= request < len(block_table) or not 0 <= slot < size:
            continue
        c = _compressed(state, block_table[request], position, ratio, dim)
        mean = c.square().mean() + eps
        n = c / mean.sqrt() * norm_weight.to(F64) if mean else c
        start = torch.tensor([position // ratio * ratio], device=state.device)
        n[-64:] = rotated(n[-64:].view(1, 1, 64), start, cos_sin).flatten()
        written.append(slot)
        entries.append(n)
    at = torch.tensor(written, dtype=torch.int64, device=state.device)
    return at, torch.stack(entries) if entries else torch.empty((0, dim), dtype=F64, device=state.device)


def compress_norm_rope_insert(k_cache: Tensor, **inputs: Any) -> tuple[Tensor, ...]:
    cache = read_kv("k_cache", k_cache)
    at, n = _entries(**inputs, size=len(cache))
    n = _bf16(n)
    blocks = n[:, :448].unflatten(1, (7, 64))
    scale = block_scale(blocks.abs().amax(-1)).unsqueeze(-1)
    cache[at] = torch.cat([(nearest_e4m3(blocks / scale) * scale).flatten(1), n[:, 448:], n.new_zeros(len(n), 1)], 1)
    return (cache,)


def indexer_compress_insert(k_cache: Tensor, hadamard: bool = False, **inputs: Any) -> tuple[Tensor, ...]:
    cache = read_keys("k_cache", k_cache)
    at, n = _entries(**inputs, size=len(cache))
    n = _bf16(n)
    if hadamard:
        n = _bf16(n @ sylvester(128, n.device) * 128**-0.5)
    scale = block_scale(n.abs().amax(-1, keepdim=True))
    cache[at] = torch.cat([nearest_e4m3(n / scale) * scale, n.new_zeros(len(n), 1)], 1)
    return (cache,)


def _raw(cache: Tensor, data: int, tail: int) -> tuple[Tensor, Tensor]:
    """The bytes of every entry's two parts: uint8 ``[pages * page_size, data]`` and ``[..., tail]``."""
    pages, page_size, stride = cache.shape[0], cache.shape[1], cache.stride(0)
    last = (pages - 1) * stride + page_size * (data + tail) if pages else 0
    raw = cache.as_strided((last,), (1,), cache.storage_offset())
    slot = torch.arange(pages * page_size, device=cache.device)
    page, offset = slot // page_size * stride, slot % page_size
    first = (page + offset * data).unsqueeze(1) + torch.arange(data, device=cache.device)
    second = (page + page_size * data + offset * tail).unsqueeze(1) + torch.arange(tail, device=cache.device)
    return raw[first], raw[second]


def read_kv(name: str, cache: Tensor, arguments: Any = None) -> Tensor:
    """A KV cache as fp64 ``[pages * page_size, 513]``: the values of each entry, and its eighth scale byte / 256."""
    data, scales = _raw(cache, 576, 8)
    nope = e4m3(data[:, :448]).unflatten(1, (7, 64)) * e8m0(scales[:, :7]).unsqueeze(-1)
    rope = data[:, 448:].contiguous().view(torch.bfloat16).to(F64)
    return torch.cat([nope.flatten(1), rope, scales[:, 7:].to(F64) / 256], 1)


def read_keys(name: str, cache: Tensor, arguments: Any = None) -> Tensor:
    """An indexer cache as fp64 ``[pages * page_size, 129]``: the values of each entry, and 0 if its scale is a power of
    two."""
    data, scales = _raw(cache, 128, 4)
    scale = scales.contiguous().view(torch.float32).to(F64)
    mantissa, _ = torch.frexp(scale)
    return torch.cat([e4m3(data) * scale, mantissa - 0.5], 1)
