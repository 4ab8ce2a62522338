"""The provider's function for ``paged_indexer_topk``, and what a call is to its kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import variants
from ...batch_invariant import has_mode
from ..selection import Shape, shape_of


class Call(NamedTuple):
    """A call, its result allocated. ``columns``: of the logits."""

    shape: Shape
    q: Tensor
    k_cache: Tensor
    weights: Tensor
    lens: Tensor
    table: Tensor
    topk: int
    columns: int
    out: Tensor


@has_mode
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
    batch_invariant: bool = False,
) -> Tensor:
    """See ``dsv4_backends.ops.paged_indexer_topk``. The workspace is the logits of some requests, at most 256 MiB."""
    b, next_n = q.shape[:2]
    columns = min(max_context_len, k_cache.shape[1] * block_table.shape[1])
    if out is None:
        out = torch.empty((b * next_n, topk), dtype=torch.int32, device=q.device)
    if b and columns and k_cache.shape[0]:
        shape = shape_of(out, columns, batch_invariant)
        given = (q, k_cache, weights, context_lens, block_table)
        variants.run("paged_indexer_topk", Call(shape, *given, topk, columns, out))
    else:
        out.fill_(-1)
    return out
