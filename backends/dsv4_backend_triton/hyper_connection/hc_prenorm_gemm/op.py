"""The provider's function for ``hc_prenorm_gemm``."""

from __future__ import annotations

import torch

from ... import variants
from ...arch import arch_of
from ...lib.sizes import cdiv
from .plan import Call, Shape


def hc_prenorm_gemm(
    x: torch.Tensor,
    fn: torch.Tensor,
    *,
    num_splits: int | None = None,
    out: torch.Tensor | None = None,
    sqr_sum: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``mixes = x @ fn.T`` [m, n] fp32 and ``sqr_sum = (x * x).sum(1)`` [m] fp32.

    ``x`` [m, k] bf16, ``fn`` [n, k] fp32. With ``num_splits`` S the results are partials [S, m, n] and [S,
    m] that sum to them. Deterministic. Workspace: where k is cut into more pieces than the caller asks for
    (``default_splits``), pieces * m * (n + 1) fp32.
    """
    return prenorm_gemm(x, fn, num_splits, out, sqr_sum)


def prenorm_gemm(x, fn, num_splits=None, out=None, sqr_sum=None, batch_invariant=False):
    m, k = x.shape
    n = fn.shape[0]
    lead = () if num_splits is None else (num_splits,)
    if out is None:
        out = torch.empty((*lead, m, n), dtype=torch.float32, device=x.device)
    if sqr_sum is None:
        sqr_sum = torch.empty((*lead, m), dtype=torch.float32, device=x.device)
    if m == 0:
        return out, sqr_sum
    if k == 0:
        return out.zero_(), sqr_sum.zero_()
    if n == 0:  # the sums of squares are wanted all the same
        prenorm_gemm(x, fn.new_zeros((1, k)), num_splits, None, sqr_sum, batch_invariant)
        return out, sqr_sum
    if num_splits is not None and num_splits > (blocks := cdiv(k, 64)):  # a grid of more than 65535 is not launched
        out[blocks:].zero_()
        sqr_sum[blocks:].zero_()
        prenorm_gemm(x, fn, blocks, out[:blocks], sqr_sum[:blocks], batch_invariant)
        return out, sqr_sum
    aligned = x.stride(0) % 8 == 0 and fn.stride(0) % 4 == 0
    aligned = aligned and x.data_ptr() % 16 == 0 and fn.data_ptr() % 16 == 0
    shape = Shape(arch_of(x.device), m, n, k, aligned, batch_invariant)
    variants.run("hc_prenorm_gemm", Call(shape, x, fn, num_splits, out, sqr_sum))
    return out, sqr_sum
