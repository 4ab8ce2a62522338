"""The provider's function for ``mqa_logits``, and a call as its kernels take it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import variants
from ...arch import Arch, arch_of
from ...batch_invariant import has_mode

_INVARIANT_ROWS = 4  # the batch-invariant mode plans for at least as many


class Shape(NamedTuple):
    """All that a plan depends on. ``rows``: of the call, in the batch-invariant mode at least 4."""

    arch: Arch
    rows: int
    h: int
    d: int
    compressed: bool


class Call(NamedTuple):
    """A call with its result allocated; ``q`` and ``k`` in the kernels' element type."""

    shape: Shape
    q: Tensor
    k: Tensor
    k_scale: Tensor
    weights: Tensor
    starts: Tensor
    ends: Tensor
    out: Tensor


@has_mode
def mqa_logits(
    q: Tensor,
    k: Tensor,
    k_scale: Tensor,
    weights: Tensor,
    row_starts: Tensor,
    row_ends: Tensor,
    *,
    max_seqlen_k: int | None = None,
    out: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """See ``dsv4_backends.ops.mqa_logits``. No workspace."""
    m, h, d = q.shape
    if out is None:
        columns = k.shape[0] if max_seqlen_k is None else max_seqlen_k
        out = torch.empty((m, columns), dtype=torch.float32, device=q.device)
    if out.numel():
        arch = arch_of(q.device)
        q, k = q.view(arch.fp8_view), k.view(arch.fp8_view)
        shape = Shape(arch, max(m, _INVARIANT_ROWS) if batch_invariant else m, h, d, max_seqlen_k is not None)
        call = Call(shape, q, k, k_scale, weights, row_starts, row_ends, out)
        variants.run("mqa_logits", call)
    return out
