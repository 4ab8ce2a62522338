"""Sparse MLA: gather the keys that each query names, then softmax attention in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_backends.contract import layouts
from dsv4_backends.contract.settings import matmul

from .memory import row_chunks
from .settings import under_any_setting

HEAD_DIM = layouts.HEAD_DIM


def _attend(
    q: Tensor, keys: Tensor, valid: Tensor, sm_scale: float, sink: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over keys already gathered.

    Args:
        q: ``[n, h, 512]``.
        keys: fp32 ``[n, k, 512]``; 0 where not valid.
        valid: bool ``[n, k]``.
        sink: fp32 ``[h]`` or None.

    Returns:
        fp32 out ``[n, h, 512]``, and max_logits and lse ``[n, h]``.
    """
    logits = matmul(q.float(), keys.transpose(1, 2)) * sm_scale
    logits = logits.masked_fill_(~valid.unsqueeze(1), -torch.inf)
    # A column of -inf, so that the maximum over a row without keys exists.
    max_logits = torch.nn.functional.pad(logits, (0, 1), value=-torch.inf).amax(-1)
    empty = max_logits == -torch.inf
    p = torch.exp_(logits.sub_(max_logits.masked_fill(empty, 0.0).unsqueeze(-1)))
    total = p.sum(-1)
    lse = max_logits + total.log()
    out = matmul(p, keys) / total.unsqueeze(-1)
    if sink is not None:
        out = out * torch.sigmoid(lse - sink).unsqueeze(-1)
    out = out.masked_fill(empty.unsqueeze(-1), 0.0)
    return out, max_logits, lse.masked_fill(empty, torch.inf)


@under_any_setting
def sparse_mla_prefill(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    *,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``dsv4_backends.ops.sparse_mla_prefill``."""
    s_q, h_q, _ = q.shape
    s_kv, topk = kv.shape[0], indices.shape[-1]
    kv, indices = kv.reshape(s_kv, HEAD_DIM), indices.reshape(s_q, topk)
    if out is None:
        out = torch.empty((s_q, h_q, HEAD_DIM), dtype=torch.bfloat16, device=q.device)
    max_logits = torch.empty((s_q, h_q), dtype=torch.float32, device=q.device)
    lse = torch.empty_like(max_logits)

    valid = (indices >= 0) & (indices < s_kv)
    if topk_length is not None:
        valid &= torch.arange(topk, device=q.device) < topk_length.unsqueeze(-1)
    if s_kv == 0:  # no keys: every entry is invalid, and any row can be in its place
        kv = kv.new_zeros(1, HEAD_DIM)
    for rows in row_chunks(s_q, 4 * max(topk, h_q) * HEAD_DIM):
        here = valid[rows]
        keys = kv[indices[rows].masked_fill(~here, 0)].float()
        keys.masked_fill_(~here.unsqueeze(-1), 0.0)
        out[rows], max_logits[rows], lse[rows] = _attend(q[rows], keys, here, sm_scale, attn_sink)
    return out, max_logits, lse


def _gather(cache: Tensor, slots: Tensor, length: Tensor | None) -> tuple[Tensor, Tensor]:
    """The fp32 keys ``[n, k, 512]`` in the slots ``[n, k]`` of a cache, and which of them are valid."""
    pages, page_size = cache.shape[:2]
    valid = (slots >= 0) & (slots < pages * page_size)
    if length is not None:
        valid &= torch.arange(slots.shape[1], device=slots.device) < length.unsqueeze(-1)
    if pages * page_size == 0:
        return torch.zeros((*slots.shape, HEAD_DIM), dtype=torch.float32, device=slots.device), valid
    safe = slots.masked_fill(~valid, 0).long().flatten()
    keys = layouts.read_kv(cache, safe).float().view(*slots.shape, HEAD_DIM)
    return keys.masked_fill_(~valid.unsqueeze(-1), 0.0), valid


@under_any_setting
def sparse_mla_decode(
    q: Tensor,
    k_cache: Tensor,
    indices: Tensor,
    sm_scale: float,
    *,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``dsv4_backends.ops.sparse_mla_decode``."""
    b, s_q, h_q, _ = q.shape
    if out is None:
        out = torch.empty((b, s_q, h_q, HEAD_DIM), dtype=torch.bfloat16, device=q.device)
    lse = torch.empty((b, s_q, h_q), dtype=torch.float32, device=q.device)
    scopes = [(k_cache, indices, topk_length)]
    if extra_k_cache is not None and extra_indices is not None:
        scopes.append((extra_k_cache, extra_indices, extra_topk_length))
    keys_per_row = sum(index.shape[-1] for _, index, _ in scopes)

    for token in range(s_q):
        for rows in row_chunks(b, 4 * max(keys_per_row, h_q) * HEAD_DIM):
            gathered = [
                _gather(cache, index[rows, token], None if length is None else length[rows])
                for cache, index, length in scopes
            ]
            keys = torch.cat([keys for keys, _ in gathered], 1)
            valid = torch.cat([valid for _, valid in gathered], 1)
            out[rows, token], _, lse[rows, token] = _attend(q[rows, token], keys, valid, sm_scale, attn_sink)
    return out, lse


@under_any_setting
def gather_dequant_kv(
    k_cache: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    out: Tensor,
    *,
    gather_lens: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """See ``dsv4_backends.ops.gather_dequant_kv``."""
    pages, page_size = k_cache.shape[:2]
    room = page_size * block_table.shape[1]
    lens = seq_lens.long().clamp(0, room)
    counts = lens if gather_lens is None else gather_lens.long().clamp(min=0).minimum(lens)
    # The host reads no length. Every row that could change is written; rows that do not change get their own values.
    for part in row_chunks(max(min(out.shape[1] - offset, room), 0), 4 * HEAD_DIM):
        row = torch.arange(part.start, part.stop, device=out.device)
        for request in range(out.shape[0]):
            entry = (lens[request] - counts[request] + row).clamp(max=room - 1)
            page = block_table[request, entry // page_size].long()
            there = (page >= 0) & (page < pages)
            target = out[request, offset:][part]
            if pages:
                keys = layouts.read_kv(k_cache, page.masked_fill(~there, 0) * page_size + entry % page_size)
                keys.masked_fill_(~there.unsqueeze(-1), 0.0)
            else:
                keys = torch.zeros_like(target)
            target.copy_(torch.where((row < counts[request]).unsqueeze(-1), keys, target))
    return out
