"""The provider's function for ``mqa_logits``."""

from __future__ import annotations

import torch

from ... import variants
from ...arch import arch_of
from ..heads import as_bytes
from .plan import Call, Shape

_INVARIANT_ROWS = 4
"""The batch-invariant mode has for few rows what so many have."""


def mqa_logits(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    row_starts: torch.Tensor,
    row_ends: torch.Tensor,
    *,
    max_seqlen_k: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Indexer logits of ``m`` queries over ``n`` contiguous keys.

    ``q`` [m, h, d] e4m3, ``k`` [n, d] e4m3, ``k_scale`` [n] fp32, ``weights`` [m, h] fp32, ``row_starts`` and
    ``row_ends`` [m] int32, half open, clamped to [0, n]. Returns fp32 [m, n], -inf outside the row's range;
    with ``max_seqlen_k`` the compressed [m, max_seqlen_k] whose column j is key ``start + j``, -inf beyond
    the row's end. No workspace.
    """
    return logits(q, k, k_scale, weights, row_starts, row_ends, max_seqlen_k, out)


def logits(q, k, k_scale, weights, row_starts, row_ends, max_seqlen_k=None, out=None, batch_invariant=False):
    m, h, d = q.shape
    compressed = max_seqlen_k is not None
    if out is None:
        out = torch.empty((m, max_seqlen_k if compressed else k.shape[0]), dtype=torch.float32, device=q.device)
    if out.numel():
        arch = arch_of(q.device)
        shape = Shape(arch, max(m, _INVARIANT_ROWS) if batch_invariant else m, h, d, compressed)
        call = Call(shape, as_bytes(q, arch), as_bytes(k, arch), k_scale, weights, row_starts, row_ends, out)
        variants.run("mqa_logits", call)
    return out
