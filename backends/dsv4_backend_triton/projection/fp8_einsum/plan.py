"""``fp8_einsum``: what a call is to its kernels."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...arch import Arch
from ...lib.sizes import cdiv

# How a scale tensor stores its values.
FP32, E8M0, PACKED = 0, 1, 2


class Shape(NamedTuple):
    """All that a plan follows from. ``w_rows``: scales of w are per row, not per 128."""

    arch: Arch
    b: int
    h: int
    d: int
    w_rows: bool
    batch_invariant: bool

    @property
    def alone(self) -> bool:
        """Every block of 64 outputs has a multiprocessor of its own: what keeps memory busy is the bytes that one waits
        for, in one block or in two."""
        return cdiv(self.d, 64) * self.h <= self.arch.sms


class Call(NamedTuple):
    """A call, its result allocated; operands in the kernels' element type, and the kinds of the scales."""

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
