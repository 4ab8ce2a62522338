"""``sparse_mla_prefill`` by ``flash_mla_sparse_fwd``."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_backends.provider import elsewhere, on_its_device

from ._padding import ALIGNMENT, copied, heads_for, padded_heads, padded_indices, padded_sink
from .probe import flash_mla

_TOPK_MULTIPLE = 128
"""The multiple of SM90. Some of SM100's kernels take multiples of 64, all take multiples of 128."""


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
    """See ``dsv4_backends.contract.sparse_mla``. Heads are padded to 64 or 128, indices to a multiple of 128."""
    if elsewhere(q):
        with on_its_device(q):
            return sparse_mla_prefill(q, kv, indices, sm_scale, attn_sink=attn_sink, topk_length=topk_length, out=out)
    s_q, count, _ = q.shape
    if s_q == 0 or kv.numel() == 0 or indices.numel() == 0:  # FlashMLA asserts, or would read a key
        result = torch.zeros_like(q, memory_format=torch.contiguous_format) if out is None else out.zero_()
        max_logits = torch.full((s_q, count), -torch.inf, dtype=torch.float32, device=q.device)
        return result, max_logits, torch.full_like(max_logits, torch.inf)
    library = flash_mla()
    heads = heads_for(count)
    if heads != count or not q.is_contiguous() or q.data_ptr() % ALIGNMENT:
        q, attn_sink = padded_heads(q, heads), padded_sink(attn_sink, heads)
    kv = kv if kv.dim() == 3 else kv.unsqueeze(1)
    if kv.data_ptr() % ALIGNMENT or (not kv.is_contiguous() and kv.stride(0) * 2 % ALIGNMENT):
        kv = copied(kv)
    if topk_length is not None:  # FlashMLA reads as many indices as the length says
        topk_length = topk_length.clamp(0, indices.shape[-1])
    indices = padded_indices(indices if indices.dim() == 3 else indices.unsqueeze(1), _TOPK_MULTIPLE)
    options = library.prefill_options
    direct = out is not None and library.prefill_out and heads == count and out.is_contiguous()
    if direct:
        options = {**options, "out": out}
    result, max_logits, lse = library.prefill(q, kv, indices, sm_scale, 512, attn_sink, topk_length, **options)
    if heads != count:
        result, max_logits, lse = result[:, :count], max_logits[:, :count], lse[:, :count]
    if out is not None and not direct:
        result = out.copy_(result)
    return result if out is None else out, max_logits, lse
