"""Plain torch in the model's own dtype, for what no op serves: float32 models, and an indexer without FP8.

The functions have the signatures of the ops, as far as the integration uses them. With them the tests compare the
integration with transformers' eager model in float32. They are not providers, and ``stats()`` does not count them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...contract.settings import matmul
from . import chunks


def sparse_mla_prefill(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    *,
    attn_sink: Tensor,
    topk_length: Tensor,
    out: Tensor,
) -> None:
    """``ops.sparse_mla_prefill`` for any float dtype; writes to ``out``."""
    columns = torch.arange(indices.shape[1], device=q.device)
    for rows in chunks.row_chunks(q.shape[0], 4 * max(indices.shape[1], q.shape[1]) * q.shape[2]):
        index = indices[rows]
        valid = (index >= 0) & (columns < topk_length[rows].unsqueeze(-1))
        keys = kv[index.masked_fill(~valid, 0)].float().masked_fill_(~valid.unsqueeze(-1), 0.0)
        logits = matmul(q[rows].float(), keys.transpose(1, 2)) * sm_scale
        logits = logits.masked_fill_(~valid.unsqueeze(1), -torch.inf)
        # The sink is one more column, whose value is 0. A row without valid entries attends to it only.
        sink = attn_sink.view(1, -1, 1).expand(len(logits), -1, 1)
        share = torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
        out[rows] = matmul(share, keys).to(out.dtype)


def hc_prenorm_gemm(x: Tensor, fn: Tensor) -> tuple[Tensor, Tensor]:
    """``ops.hc_prenorm_gemm`` for any float dtype."""
    wide = x.float()
    return matmul(wide, fn.T), wide.square().sum(-1)


def scores(q: Tensor, k: Tensor, weights: Tensor, row_ends: Tensor) -> Tensor:
    """The indexer's scores without quantisation.

    Args:
        q: ``[m, h, d]``, any float dtype.
        k: ``[n, d]``.
        weights: fp32 ``[m, h]``.
        row_ends: int32 ``[m]``, the number of keys that a row may see.

    Returns:
        fp32 ``[m, n]``, -inf at and beyond a row's end.
    """
    out = torch.empty((q.shape[0], k.shape[0]), dtype=torch.float32, device=q.device)
    keys, columns = k.float().T, torch.arange(k.shape[0], device=q.device)
    for rows in chunks.row_chunks(q.shape[0], 4 * q.shape[1] * k.shape[0]):
        products = matmul(q[rows].float(), keys).relu_()
        total = matmul(weights[rows].unsqueeze(1), products).squeeze(1)
        out[rows] = total.masked_fill_(columns >= row_ends[rows].unsqueeze(-1), -torch.inf)
    return out
