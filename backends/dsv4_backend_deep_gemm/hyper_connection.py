"""``hc_prenorm_gemm`` by DeepGEMM's ``tf32_hc_prenorm_gemm``."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_backends.provider import Reason, elsewhere, on_its_device

from ._alignment import ALIGNMENT, aligned
from ._device import library_for, refuses_device

_BLOCK = 64
_MAX_N = 32
"""The limit of SM90. SM100 takes 128, which no model needs."""


def hc_prenorm_gemm_refuses(
    x: Tensor,
    fn: Tensor,
    *,
    num_splits: int | None = None,
    out: Tensor | None = None,
    sqr_sum: Tensor | None = None,
) -> Reason | None:
    """Sizes that the kernel does not support."""
    if (reason := refuses_device(x)) is not None:
        return reason
    k, n = x.shape[1], fn.shape[0]
    if k == 0 or k % _BLOCK:
        return Reason("shape", f"needs k to be a multiple of 64 and not 0, this call has {k}")
    if n == 0 or n % 8 or n > _MAX_N:
        return Reason("shape", f"needs n to be 8, 16, 24 or 32, this call has {n}")
    return None


def hc_prenorm_gemm(
    x: Tensor,
    fn: Tensor,
    *,
    num_splits: int | None = None,
    out: Tensor | None = None,
    sqr_sum: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``dsv4_backends.contract.hyper_connection``. Splits beyond the blocks of k are 0."""
    if elsewhere(x):
        with on_its_device(x):
            return hc_prenorm_gemm(x, fn, num_splits=num_splits, out=out, sqr_sum=sqr_sum)
    m, k = x.shape
    n = fn.shape[0]
    lead = () if num_splits is None else (num_splits,)
    mixes = fn.new_empty((*lead, m, n)) if out is None else out
    squares = fn.new_empty((*lead, m)) if sqr_sum is None else sqr_sum
    if m == 0:
        return mixes, squares
    if (
        not (x.data_ptr() | fn.data_ptr() | mixes.data_ptr()) % ALIGNMENT
        and x.stride(0) >= k
        and not x.stride(0) % 8
        and fn.is_contiguous()
        and mixes.is_contiguous()
        and squares.is_contiguous()
        and (num_splits is None or num_splits * _BLOCK <= k)
    ):
        library_for(x).prenorm_gemm(x, fn, mixes, squares, num_splits)
        return mixes, squares
    direct = mixes.is_contiguous() and squares.is_contiguous() and mixes.data_ptr() % ALIGNMENT == 0
    d = mixes if direct else torch.empty_like(mixes, memory_format=torch.contiguous_format)
    s = squares if direct else torch.empty_like(squares, memory_format=torch.contiguous_format)
    splits = num_splits
    if num_splits is not None and num_splits > k // _BLOCK:  # the kernel needs a block of k for each split
        splits = k // _BLOCK
        d[splits:].zero_()
        s[splits:].zero_()
    used = (d, s) if splits == num_splits else (d[:splits], s[:splits])
    library_for(x).prenorm_gemm(aligned(x), aligned(fn), *used, splits)
    if not direct:
        mixes.copy_(d)
        squares.copy_(s)
    return mixes, squares
