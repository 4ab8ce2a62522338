"""The provider's function for ``paged_mqa_logits``."""

from __future__ import annotations

import torch

from ... import variants
from ...arch import arch_of
from ..heads import as_bytes
from .plan import Call, Shape


def paged_mqa_logits(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    max_context_len: int,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Indexer logits over the paged key cache.

    ``q`` [b, next_n, h, d] e4m3; ``k_cache`` uint8 [pages, page_size, (1,) d + 4], page-split: ``page_size``
    keys of d e4m3 bytes, then ``page_size`` fp32 scales; ``weights`` [b * next_n, h] fp32; ``context_lens``
    [b] or [b, next_n] int32; ``block_table`` [b, max_blocks] int32. Returns fp32 [b * next_n,
    max_context_len], -inf at and beyond the row's length and the table's end, and where the table names a page that
    the cache does not have. Keys are read once for all ``next_n`` rows. No
    workspace.
    """
    if out is None:
        out = torch.empty((q.shape[0] * q.shape[1], max_context_len), dtype=torch.float32, device=q.device)
    write_logits(q, k_cache, weights, context_lens, block_table, out)
    return out


def write_logits(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    out: torch.Tensor,
    *,
    fill: bool = True,
) -> None:
    """The logits of each row, and with ``fill`` -inf at and beyond its length, which is otherwise left as it is."""
    if out.numel():
        arch, (_, next_n, h, d) = arch_of(q.device), q.shape
        shape = Shape(arch, next_n, h, d)
        call = Call(shape, as_bytes(q, arch), k_cache, weights, context_lens, block_table, out, fill)
        variants.run("paged_mqa_logits", call)
