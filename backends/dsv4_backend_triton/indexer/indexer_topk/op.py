"""The provider's function for ``indexer_topk``, and what a call is to its kernels."""

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
    k: Tensor
    k_scale: Tensor
    weights: Tensor
    starts: Tensor
    ends: Tensor
    topk: int
    columns: int
    out: Tensor


@has_mode
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
    batch_invariant: bool = False,
) -> Tensor:
    """See ``dsv4_backends.ops.indexer_topk``. The workspace is the logits of some rows, at most 256 MiB."""
    m, n = q.shape[0], k.shape[0]
    columns = n if max_seqlen_k is None else min(max_seqlen_k, n)
    if out is None:
        out = torch.empty((m, topk), dtype=torch.int32, device=q.device)
    if m and columns:
        shape = shape_of(out, columns, batch_invariant)
        given = (q, k, k_scale, weights, row_starts, row_ends)
        variants.run("indexer_topk", Call(shape, *given, topk, columns, out))
    else:
        out.fill_(-1)
    return out
