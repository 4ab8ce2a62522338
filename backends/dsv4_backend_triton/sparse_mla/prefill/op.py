"""The provider's function for ``sparse_mla_prefill``."""

from __future__ import annotations

import torch

from ... import variants
from ...arch import arch_of
from .plan import Call


def sparse_mla_prefill(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    *,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of ``q`` [s_q, h, 512] bf16, each row over the rows of ``kv`` [s_kv, (1,) 512] it names.

    ``indices`` [s_q, (1,) topk] int32, anything outside [0, s_kv) masked; ``topk_length`` [s_q] int32;
    ``attn_sink`` [h] fp32. Returns ``out`` [s_q, h, 512] bf16, ``max_logits`` and ``lse`` [s_q, h] fp32
    (natural log, with the scale, without the sink; 0, -inf and +inf where a row has no key). No workspace.
    """
    s_q, heads, _ = q.shape
    if out is None:
        out = torch.empty(q.shape, dtype=torch.bfloat16, device=q.device)
    max_logits = torch.empty((s_q, heads), dtype=torch.float32, device=q.device)
    lse = torch.empty_like(max_logits)
    if q.numel():
        arguments = (q, kv, indices, sm_scale, attn_sink, topk_length, out, max_logits, lse)
        variants.run("sparse_mla_prefill", Call.of(arch_of(q.device), *arguments))
    return out, max_logits, lse
