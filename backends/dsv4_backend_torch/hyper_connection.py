"""The hyper-connection's prenorm GEMM in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_backends.contract.settings import matmul

from .memory import row_chunks
from .settings import under_any_setting


@under_any_setting
def hc_prenorm_gemm(
    x: Tensor,
    fn: Tensor,
    *,
    num_splits: int | None = None,
    out: Tensor | None = None,
    sqr_sum: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``dsv4_backends.ops.hc_prenorm_gemm``. Split s takes the s-th share of k."""
    (m, k), n = x.shape, fn.shape[0]
    wanted = 1 if num_splits is None else num_splits
    if out is None or sqr_sum is None:
        lead = () if num_splits is None else (num_splits,)
        out = torch.empty((*lead, m, n), dtype=torch.float32, device=x.device)
        sqr_sum = torch.empty((*lead, m), dtype=torch.float32, device=x.device)
    mixes, squares = (out.unsqueeze(0), sqr_sum.unsqueeze(0)) if num_splits is None else (out, sqr_sum)
    splits = max(1, min(wanted, -(-k // 64)))  # a share has at least 64 columns; the other splits are 0
    mixes[splits:], squares[splits:] = 0, 0
    for split in range(splits if m else 0):
        share = slice(split * k // splits, (split + 1) * k // splits)
        for rows in row_chunks(m, 4 * k):
            part = x[rows, share].float()
            mixes[split, rows] = matmul(part, fn[:, share].T)
            squares[split, rows] = part.square_().sum(-1)
    return out, sqr_sum
