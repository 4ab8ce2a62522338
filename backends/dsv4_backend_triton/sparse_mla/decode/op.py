"""The provider's function for ``sparse_mla_decode``."""

from __future__ import annotations

import torch

from ... import variants
from ...arch import arch_of
from ...batch_invariant import has_mode
from ...lib.sizes import common_unit
from .plan import Call, Scopes, Shape


@has_mode
def sparse_mla_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    *,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    extra_k_cache: torch.Tensor | None = None,
    extra_indices: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``dsv4_backends.ops.sparse_mla_decode``. E8M0 codes are exact up to 194 (2^67).

    Workspace (``dsv4_backends.workspace_bytes`` returns it): if the keys are split, 513 fp32 for each row, split and
    head; if keys are decoded to bf16 first, 1 KiB + 4 bytes for each index and 4 bytes for each row and (row, head).
    """
    b, s_q, heads, _ = q.shape
    if out is None:
        out = torch.empty((b, s_q, heads, 512), dtype=torch.bfloat16, device=q.device)
    lse = torch.empty((b, s_q, heads), dtype=torch.float32, device=q.device)
    if not q.numel():
        return out, lse
    cache1 = cache2 = k_cache.view(torch.uint8)
    idx2, topk2, strides2 = indices, 0, (0, 0)
    if extra_k_cache is not None and extra_indices is not None:
        cache2, idx2, topk2 = extra_k_cache.view(torch.uint8), extra_indices, extra_indices.shape[2]
        strides2 = (idx2.stride(0), idx2.stride(1))
    scopes = Scopes(
        cache1,
        cache2,
        indices,
        idx2,
        indices if topk_length is None else topk_length,
        indices if extra_topk_length is None else extra_topk_length,
        int(topk_length is not None),
        int(extra_topk_length is not None),
        (indices.stride(0), indices.stride(1), *strides2),
        indices.shape[2],
        topk2,
        # page_size * 576 is a multiple of 64, so the scales are aligned if the pages are
        unit=common_unit(cache1.data_ptr(), cache2.data_ptr(), cache1.stride(0), cache2.stride(0)),
        pow2=all(cache.shape[1] & (cache.shape[1] - 1) == 0 for cache in (cache1, cache2)),
    )
    aligned = common_unit(q.data_ptr(), out.data_ptr(), *(2 * x for t in (q, out) for x in t.stride()[:3])) == 16
    vectors, unaligned = scopes.unit == 16 and scopes.pow2 and aligned, scopes.unit == 1
    sizes = (b * s_q, heads, scopes.topk1, scopes.topk2)
    lengths2 = extra_topk_length is not None
    shape = Shape(arch_of(q.device), *sizes, vectors, unaligned, batch_invariant, lengths2, cache2.shape[1])
    variants.run("sparse_mla_decode", Call(shape, q, scopes, sm_scale, attn_sink, out, lse, 8 if aligned else 1))
    return out, lse
