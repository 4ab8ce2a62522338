"""``inverse_rope_quant`` and ``inverse_rope``: a call as their kernels take it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...arch import Arch


class Shape(NamedTuple):
    """All that a plan depends on."""

    arch: Arch


class Call(NamedTuple):
    """A call with its results allocated, by their layout in memory; ``scale`` is None without quantisation."""

    shape: Shape
    x: Tensor
    positions: Tensor
    cos_sin: Tensor
    groups: int
    out: Tensor
    scale: Tensor | None

    @property
    def aligned(self) -> bool:
        """Whether rows lie on 16-byte boundaries."""
        x, table = self.x, self.cos_sin
        strides = x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0 and table.stride(0) % 4 == 0
        return strides and x.data_ptr() % 16 == 0 and table.data_ptr() % 16 == 0
