"""The indexer's logits: one matrix product per chunk of rows, then a weighted sum over heads. Also its queries, and its
selection: the logits of some rows at a time, then ``torch.topk``."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_backends.contract import layouts
from dsv4_backends.contract.settings import matmul

from .memory import row_chunks
from .rope import rotate
from .settings import under_any_setting


def walsh_hadamard(x: Tensor) -> Tensor:
    """The Walsh-Hadamard transform of the last dimension, a power of two, in Sylvester order, times n^-0.5."""
    n = x.shape[-1]
    half = 1
    while half < n:
        left, right = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        x = torch.stack([left + right, left - right], -2).flatten(-3)
        half *= 2
    return x.mul(n**-0.5)


@under_any_setting
def indexer_q_rope_quant(
    q: Tensor, positions: Tensor, cos_sin: Tensor, weights: Tensor, scale: float, *, hadamard: bool = False
) -> tuple[Tensor, Tensor]:
    """See ``dsv4_backends.ops.indexer_q_rope_quant``."""
    t, h, d = q.shape
    q_fp8 = torch.empty((t, h, d), dtype=torch.float8_e4m3fn, device=q.device)
    weights_out = torch.empty((t, h), dtype=torch.float32, device=q.device)
    for rows in row_chunks(t, 4 * h * d):
        part = q[rows].float()
        rotate(part[..., -layouts.ROPE_DIM :], positions[rows], cos_sin)
        part = part.to(torch.bfloat16)
        if hadamard:
            part = walsh_hadamard(part.float()).to(torch.bfloat16)
        q_fp8[rows], own = layouts.quantize_e4m3(part, d)
        weights_out[rows] = weights[rows].float() * own.squeeze(-1) * scale
    return q_fp8, weights_out


def _logits(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    """fp32 ``[n, keys]`` from q ``[n, h, d]``, k fp32 ``[keys, d]`` or ``[n, keys, d]`` and weights ``[n, h]``."""
    products = matmul(q.float(), k.transpose(-1, -2)).relu_()
    return matmul(weights.unsqueeze(1), products).squeeze(1)


@under_any_setting
def mqa_logits(
    q: Tensor,
    k: Tensor,
    k_scale: Tensor,
    weights: Tensor,
    row_starts: Tensor,
    row_ends: Tensor,
    *,
    max_seqlen_k: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See ``dsv4_backends.ops.mqa_logits``."""
    m, h, _ = q.shape
    n = k.shape[0]
    width = n if max_seqlen_k is None else max_seqlen_k
    if out is None:
        out = torch.empty((m, width), dtype=torch.float32, device=q.device)
    starts, ends = row_starts.clamp(0, n).unsqueeze(-1), row_ends.clamp(0, n).unsqueeze(-1)
    keys, columns = k.float(), torch.arange(width, device=q.device)
    for rows in row_chunks(m, 4 * h * max(n, 1)):
        logits = _logits(q[rows], keys, weights[rows]) * k_scale
        if max_seqlen_k is None:
            inside = (columns >= starts[rows]) & (columns < ends[rows])
        else:
            source = starts[rows] + columns
            inside = source < ends[rows]
            padded = torch.nn.functional.pad(logits, (0, 1))  # so that column 0 exists
            logits = padded.gather(1, source.masked_fill(~inside, n).long())
        out[rows] = torch.where(inside, logits, -torch.inf)
    return out


@under_any_setting
def paged_mqa_logits(
    q: Tensor,
    k_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    max_context_len: int,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """See ``dsv4_backends.ops.paged_mqa_logits``."""
    b, next_n, h, d = q.shape
    pages, page_size = k_cache.shape[:2]
    if out is None:
        out = torch.empty((b * next_n, max_context_len), dtype=torch.float32, device=q.device)
    lens = context_lens if context_lens.dim() == 2 else context_lens.unsqueeze(1)
    lens = lens.expand(b, next_n).reshape(b * next_n, 1)
    positions = torch.arange(max_context_len, device=q.device)
    blocks = block_table.shape[1]
    block = (positions // page_size).clamp(max=max(blocks - 1, 0))
    usable = pages > 0 and blocks > 0
    # One request at a time, since its rows share the keys. The products and the keys bound a chunk of keys.
    for request in range(b):
        rows = slice(request * next_n, (request + 1) * next_n)
        for part in row_chunks(max_context_len, 4 * max(next_n * h, d)):
            inside = (positions[part] < lens[rows]) & (positions[part] < page_size * blocks)
            if usable:
                named = block_table[request, block[part]]
                page = named.clamp(0, pages - 1).long()
                inside &= named == page
                keys, scale = layouts.read_indexer_keys(k_cache, page * page_size + positions[part] % page_size)
                logits = _logits(q[request], keys.float(), weights[rows]) * scale
                out[rows, part] = torch.where(inside, logits, -torch.inf)
            else:
                out[rows, part] = -torch.inf
    return out


def _select(logits: Tensor, topk: int) -> Tensor:
    """The columns of the largest logits of each row, -1 where there is none above -inf."""
    found = logits.topk(min(topk, logits.shape[1]))  # largest first, so -inf is last; NaN is above every number
    columns = torch.where(found.values == -torch.inf, -1, found.indices).int()
    return torch.nn.functional.pad(columns, (0, topk - columns.shape[1]), value=-1)


@under_any_setting
def indexer_topk(
    q: Tensor,
    k: Tensor,
    k_scale: Tensor,
    weights: Tensor,
    row_starts: Tensor,
    row_ends: Tensor,
    topk: int,
    *,
    max_seqlen_k: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See ``dsv4_backends.ops.indexer_topk``."""
    m, width = q.shape[0], k.shape[0] if max_seqlen_k is None else max_seqlen_k
    if out is None:
        out = torch.empty((m, topk), dtype=torch.int32, device=q.device)
    for rows in row_chunks(m, 12 * max(width, topk)):  # a value and an index
        given = (row_starts[rows], row_ends[rows])
        out[rows] = _select(mqa_logits(q[rows], k, k_scale, weights[rows], *given, max_seqlen_k=width), topk)
    return out


@under_any_setting
def paged_indexer_topk(
    q: Tensor,
    k_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    max_context_len: int,
    topk: int,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """See ``dsv4_backends.ops.paged_indexer_topk``."""
    b, next_n = q.shape[:2]
    if out is None:
        out = torch.empty((b * next_n, topk), dtype=torch.int32, device=q.device)
    for part in row_chunks(b, 12 * next_n * max(max_context_len, topk)):
        rows = slice(part.start * next_n, part.stop * next_n)
        given = (weights[rows], context_lens[part], block_table[part], max_context_len)
        out[rows] = _select(paged_mqa_logits(q[part], k_cache, *given), topk)
    return out
