"""The indexer's logits, one row at a time, with pages addressed by byte arithmetic; its selection; and its queries."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .codes import F64, block_scale, e4m3, nearest_e4m3, rotated


def sylvester(n: int, device: torch.device) -> Tensor:
    """The Walsh-Hadamard matrix of order n, a power of two: H(2n) = [[H, H], [H, -H]]."""
    made = torch.ones(1, 1, dtype=F64, device=device)
    while len(made) < n:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return made


def indexer_q_rope_quant(
    q: Tensor, positions: Tensor, cos_sin: Tensor, weights: Tensor, scale: float, hadamard: bool = False, **others: Any
) -> tuple[Tensor, ...]:
    wide = q.to(F64)
    turned = torch.cat([wide[..., :64], rotated(wide[..., 64:], positions, cos_sin)], -1).bfloat16().to(F64)
    if hadamard:
        turned = (turned @ sylvester(128, q.device) * 128**-0.5).bfloat16().to(F64)
    own = block_scale(turned.abs().amax(-1))
    return nearest_e4m3(turned / own.unsqueeze(-1)), weights.to(F64) * own * scale


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
        if len(raw) == 0:  # a cache without pages has no key that could replace the missing ones
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


def _with_faults(scores: Tensor, faults: Tensor) -> Tensor:
    """Scores, and in a last column infinity for each row with faults."""
    return torch.cat([scores, torch.where(faults, math.inf, 0.0).to(F64).unsqueeze(1)], 1)


def indexer_topk(topk: int, max_seqlen_k: int | None = None, **others: Any) -> tuple[Tensor, ...]:
    """The logits of all keys of each row from its start on, and a column of zeros."""
    others["max_seqlen_k"] = len(others["k"]) if max_seqlen_k is None else max_seqlen_k
    (scores,) = mqa_logits(**others)
    return (_with_faults(scores, torch.zeros(len(scores), dtype=torch.bool, device=scores.device)),)


def paged_indexer_topk(topk: int, **others: Any) -> tuple[Tensor, ...]:
    """As ``indexer_topk``, over the paged cache."""
    (scores,) = paged_mqa_logits(**others)
    return (_with_faults(scores, torch.zeros(len(scores), dtype=torch.bool, device=scores.device)),)


def read_topk(name: str, result: Tensor, arguments: dict[str, Any]) -> Tensor:
    """A selection in the oracle's form: the logits of all keys. A key that should be selected and is not, or is and
    should not be, has the least selected logit T in place of its own, so that its error is its distance from T. The
    last column has infinity for a row with an index that is no key, that repeats or that follows a -1, or with another
    number of keys than there should be."""
    return _selected(result, indexer_topk(**arguments)[0][:, :-1])


def read_paged_topk(name: str, result: Tensor, arguments: dict[str, Any]) -> Tensor:
    """As ``read_topk``, over the paged cache."""
    return _selected(result, paged_indexer_topk(**arguments)[0][:, :-1])


def _selected(indices: Tensor, scores: Tensor) -> Tensor:
    rows, columns = scores.shape
    indices = indices.long()
    inside = (indices >= 0) & (indices < columns)
    named = torch.zeros((rows, columns + 1), dtype=torch.long, device=scores.device)
    named.scatter_add_(1, torch.where(inside, indices, columns), torch.ones_like(indices))
    count = named[:, :-1]
    selectable = scores != -math.inf
    best = selectable.sum(1).clamp(max=indices.shape[1])
    faults = ((count > 1) | ((count > 0) & ~selectable)).any(1) | (inside.sum(1) != best)
    faults |= (inside != (torch.arange(indices.shape[1], device=scores.device) < best[:, None])).any(1)
    faults |= (~inside & (indices != -1)).any(1)
    # NaN is above every number.
    order = scores.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    ordered = order.sort(1, descending=True).values
    if columns:
        least = ordered.gather(1, (best - 1).clamp(min=0)[:, None])
        wrong = torch.where(count > 0, order < least, order > least) & (best > 0)[:, None]
        scores = torch.where(wrong, least, scores)
    return _with_faults(scores, faults)
