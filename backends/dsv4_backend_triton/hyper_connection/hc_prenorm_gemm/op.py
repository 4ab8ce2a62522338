"""The provider's function for ``hc_prenorm_gemm``, a call as its kernels take it, and the number of pieces of k."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import variants
from ...arch import Arch, arch_of
from ...batch_invariant import has_mode
from ...lib.sizes import cdiv

_INVARIANT_ROWS, _INVARIANT_SPLITS = 256, 16
"""The number of rows that the batch-invariant mode is planned for, and of the pieces of k in it. With fewer pieces, few
rows keep fewer multiprocessors busy; with more, many rows write more partials."""


class Shape(NamedTuple):
    """All that a plan depends on. ``aligned``: rows of x and fn lie on 16-byte boundaries and do not overlap."""

    arch: Arch
    m: int
    n: int
    k: int
    aligned: bool
    batch_invariant: bool

    @property
    def planned_rows(self) -> int:
        return _INVARIANT_ROWS if self.batch_invariant else self.m


class Call(NamedTuple):
    """A call. ``out`` and ``sqr_sum`` have no dimension of partials where ``num_splits`` is None."""

    shape: Shape
    x: Tensor
    fn: Tensor
    num_splits: int | None
    out: Tensor
    sqr_sum: Tensor

    def pieces(self, config: Any) -> int:
        """The number of pieces of k, of at least two k steps each. If the caller asks for fewer partials than keep the
        GPU busy, there are more pieces, and each partial is the sum of several."""
        shape, results = self.shape, self.num_splits or 1
        busy = min(config.blocks * shape.arch.sms // cdiv(shape.m, config.block_m), 32)
        wanted = min(_INVARIANT_SPLITS if shape.batch_invariant else busy, shape.k // (2 * config.block_k))
        return results * max(1, wanted // results)


@has_mode
def hc_prenorm_gemm(
    x: Tensor,
    fn: Tensor,
    *,
    num_splits: int | None = None,
    out: Tensor | None = None,
    sqr_sum: Tensor | None = None,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """See ``dsv4_backends.ops.hc_prenorm_gemm``. Deterministic. Workspace: if k is cut into more pieces than the
    caller asks for (``Call.pieces``), pieces * m * (n + 1) fp32.
    """
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
    if n == 0:  # the sums of squares are still to be computed
        fn = fn.new_zeros((1, k))
        hc_prenorm_gemm(x, fn, num_splits=num_splits, sqr_sum=sqr_sum, batch_invariant=batch_invariant)
        return out, sqr_sum
    if num_splits is not None and num_splits > (blocks := cdiv(k, 64)):  # a grid of more than 65535 is not launched
        out[blocks:].zero_()
        sqr_sum[blocks:].zero_()
        first, first_sums = out[:blocks], sqr_sum[:blocks]
        hc_prenorm_gemm(x, fn, num_splits=blocks, out=first, sqr_sum=first_sums, batch_invariant=batch_invariant)
        return out, sqr_sum
    aligned = x.stride(0) % 8 == 0 and fn.stride(0) % 4 == 0
    aligned = aligned and x.data_ptr() % 16 == 0 and fn.data_ptr() % 16 == 0
    aligned = aligned and (m == 1 or x.stride(0) >= k) and (n == 1 or fn.stride(0) >= k)
    shape = Shape(arch_of(x.device), m, n, k, aligned, batch_invariant)
    variants.run("hc_prenorm_gemm", Call(shape, x, fn, num_splits, out, sqr_sum))
    return out, sqr_sum
