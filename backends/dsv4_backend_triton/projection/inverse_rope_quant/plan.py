"""``inverse_rope_quant`` and ``inverse_rope``: what a call is to their kernels."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...arch import Arch


class Shape(NamedTuple):
    """All that a plan follows from."""

    arch: Arch


class Call(NamedTuple):
    """A call, its results allocated as they lie in memory; ``scale`` is None without quantisation."""

    shape: Shape
    x: Tensor
    positions: Tensor
    cos_sin: Tensor
    groups: int
    out: Tensor
    scale: Tensor | None

    @property
    def aligned(self) -> bool:
        """Rows lie on 16-byte boundaries."""
        x, table = self.x, self.cos_sin
        strides = x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0 and table.stride(0) % 4 == 0
        return strides and x.data_ptr() % 16 == 0 and table.data_ptr() % 16 == 0
