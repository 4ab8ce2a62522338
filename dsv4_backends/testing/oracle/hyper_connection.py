"""The prenorm GEMM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .codes import F64


def hc_prenorm_gemm(x: Tensor, fn: Tensor, **others: Any) -> tuple[Tensor, ...]:
    """The finished sums, since only the sum of the partials is defined."""
    mixes = torch.empty((x.shape[0], fn.shape[0]), dtype=F64, device=x.device)
    squares = torch.empty(x.shape[0], dtype=F64, device=x.device)
    for rows in torch.arange(x.shape[0], device=x.device).split(256):
        part = x[rows].to(F64)
        mixes[rows] = part @ fn.to(F64).T
        squares[rows] = (part * part).sum(-1)
    return mixes, squares
