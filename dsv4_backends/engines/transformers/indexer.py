"""The indexer: which compressed keys each query of a ratio-4 layer sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...contract import layouts
from . import chunks, exact
from .chunks import FEW_TOKENS, cut
from .entries import angles_of, counts_of, new_entries, rotate
from .fused import kernels_for, quantise
from .handover import Selected, once
from .pages import COMPRESSED_PAGE
from .replaced import Mode


def select(indexer: Any, mode: Mode, cache: Any, hidden: Tensor, q_residual: Tensor, position_ids: Tensor) -> Selected:
    """The ``index_topk`` compressed keys of each query with the highest scores."""
    batch, length, _ = hidden.shape
    keys = new_entries(indexer, cache, "indexer", hidden, position_ids, overlap=True)
    pages = None
    if cache is not None and hasattr(cache, "append"):
        pages = cache.append("indexer", keys, COMPRESSED_PAGE["compressed_sparse_attention"])
        cache.entry_count["indexer"] = total = pages.length
    else:
        keys = keys if cache is None else cache.update_compressor_states("indexer", keys)
        total = keys.shape[1]
    topk = min(indexer.index_topk, total)
    key = indexer.compress_rate, total, topk

    def counts() -> tuple[Tensor, Tensor]:
        count = counts_of(position_ids, indexer.compress_rate, total)
        return count.expand(batch, -1).contiguous(), count.clamp(max=topk)

    count, taken = once(key, position_ids, counts)
    if total <= topk:  # all keys are selected without scores
        return Selected(taken, total, None, key)
    score = _scorer(mode, cache, keys, pages, key, total, position_ids)
    positions = position_ids.expand(batch, -1)
    entries = torch.empty((batch, length, topk), dtype=torch.int32, device=hidden.device)
    for sequences in chunks.sequences_of(batch, length):
        together = sequences.stop - sequences.start
        for rows in chunks.row_chunks(length, 4 * total * together):
            here = sequences, rows
            if together == batch and rows == slice(0, length):
                angles = once("queries", position_ids, lambda: angles_of(indexer, hidden, positions))
            else:
                angles = angles_of(indexer, hidden, positions[here])
            q, weights = _queries(indexer, mode, cut(hidden, *here), cut(q_residual, *here), angles)
            scores = score(sequences, q, weights, cut(count, *here))
            # Sorted, so that -inf comes last, beyond every count.
            cut(entries, *here).copy_(scores.topk(topk, dim=-1).indices.view(together, -1, topk))
    return Selected(taken, topk, entries, key)


def _queries(
    indexer: Any, mode: Mode, hidden: Tensor, q_residual: Tensor, angles: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The rotated queries ``[b, n, h, d]``, in e4m3 for the ops, and their weights, fp32 ``[b, n, h]``."""
    q = indexer.q_b_proj(q_residual).unflatten(-1, (-1, indexer.head_dim))
    weights = indexer.scorer.weights_proj(hidden)
    factor = indexer.scorer.softmax_scale * indexer.scorer.weights_scaling
    if mode.fp8 and (kernels := kernels_for(q, q.shape[-1])) is not None:
        queries: tuple[Tensor, Tensor] = kernels.indexer_queries(q, *angles, weights, factor)
        return queries
    q = rotate(q, angles, 2)
    weights = weights.float() * factor
    if not mode.fp8:
        return q, weights
    values, scale = layouts.quantize_e4m3(q, q.shape[-1])
    return values, weights * scale.squeeze(-1)  # the query's scale is positive, so it is folded into the weight


def _scorer(
    mode: Mode, cache: Any, keys: Tensor, pages: Any, key: Any, total: int, position_ids: Tensor
) -> Callable[[slice, Tensor, Tensor, Tensor], Tensor]:
    """A function of sequences, q and weights of ``_queries`` and counts ``[b, n]``: scores ``[b n, T]``."""

    def exact_scores(sequences: slice, q: Tensor, weights: Tensor, count: Tensor) -> Tensor:
        own = keys[sequences]
        return torch.cat([exact.scores(*row) for row in zip(q, own, weights, count, strict=True)])

    if not mode.fp8:
        return exact_scores

    length = position_ids.shape[1]

    def paged_scores(sequences: slice, q: Tensor, weights: Tensor, count: Tensor) -> Tensor:
        return ops.paged_mqa_logits(q, pages.cache, weights.flatten(0, 1), count, pages.block_table(), total)

    if pages is not None and length <= FEW_TOKENS:
        return paged_scores

    k, k_scale = _quantised_keys(cache, keys) if pages is None else pages.read_keys()

    def scores(sequences: slice, q: Tensor, weights: Tensor, count: Tensor) -> Tensor:
        together, n = count.shape

        def bounds() -> tuple[Tensor, Tensor]:
            starts = (torch.arange(together, device=q.device, dtype=torch.int32) * total).repeat_interleave(n)
            return starts, starts + count.flatten()

        shared = n == length and sequences.start == 0 and together == len(k)
        starts, ends = once(("bounds", key), position_ids, bounds) if shared else bounds()
        return ops.mqa_logits(
            q.flatten(0, 1),
            cut(k, sequences).flatten(0, 1),
            cut(k_scale, sequences).flatten(),
            weights.flatten(0, 1),
            starts,
            ends,
            max_seqlen_k=total if together > 1 else None,
        )

    return scores


def _quantised_keys(cache: Any, keys: Tensor) -> tuple[Tensor, Tensor]:
    """The indexer's keys in FP8, kept in the cache object until keys are added."""
    known = getattr(cache, "dsv4_indexer_keys", None)
    if known is None or known[0] is not keys:
        values, scale = quantise(keys, keys.shape[-1])
        known = keys, values, scale.squeeze(-1)
        if cache is not None:
            cache.dsv4_indexer_keys = known
    return known[1], known[2]
