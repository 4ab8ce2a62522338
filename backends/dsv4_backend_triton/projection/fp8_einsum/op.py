"""The provider's function for ``fp8_einsum``, and a call as its kernels take it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import variants
from ...arch import Arch, arch_of
from ...batch_invariant import has_mode
from ...lib.sizes import cdiv

# How a scale tensor stores its values.
FP32, E8M0, PACKED = 0, 1, 2


class Shape(NamedTuple):
    """All that a plan depends on. ``w_rows``: scales of w are per row, not per 128."""

    arch: Arch
    b: int
    h: int
    d: int
    w_rows: bool
    batch_invariant: bool

    @property
    def alone(self) -> bool:
        """Every block of 64 outputs has a multiprocessor of its own. The bytes in flight on a multiprocessor keep the
        memory busy: those of one block must then be as many as those of two elsewhere."""
        return cdiv(self.d, 64) * self.h <= self.arch.sms


class Call(NamedTuple):
    """A call with its result allocated; operands in the kernels' element type, and the kinds of the scales."""

    shape: Shape
    x: Tensor
    xs: Tensor
    x_kind: int
    w: Tensor
    ws: Tensor
    w_kind: int
    out: Tensor

    @property
    def operands_aligned(self) -> bool:
        return all(stride % 16 == 0 for t in (self.x, self.w) for stride in t.stride()[:2])

    @property
    def aligned(self) -> bool:
        fits = self.out.stride(0) % 8 == 0 and self.out.stride(1) % 8 == 0
        return self.operands_aligned and fits and self.shape.d % 8 == 0


@has_mode
def fp8_einsum(
    x: Tensor,
    x_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    *,
    out: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """See ``dsv4_backends.ops.fp8_einsum``. Deterministic. No workspace."""
    b, h, r = x.shape
    d = w.shape[1]
    if out is None:
        out = torch.empty((b, h, d), dtype=torch.bfloat16, device=x.device)
    if out.numel() == 0:
        return out
    if r == 0:
        return out.zero_()
    arch = arch_of(x.device)
    shape = Shape(arch, b, h, d, w_scale.shape[1] == d and d > 1, batch_invariant)
    call = Call(shape, x.view(arch.fp8_view), *_scale(x_scale), w.view(arch.fp8_view), *_scale(w_scale), out)
    variants.run("fp8_einsum", call)
    return out


def _scale(scale: Tensor) -> tuple[Tensor, int]:
    """A scale tensor as the kernels take it, and its kind."""
    if scale.dtype == torch.float32:
        return scale, FP32
    if scale.dtype == torch.int32:
        return scale, PACKED
    return scale.view(torch.uint8), E8M0
