"""``indexer_q_rope_quant``: a call as its kernels take it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...arch import Arch


class Shape(NamedTuple):
    """All that a plan depends on."""

    arch: Arch
    h: int
    hadamard: bool


class Call(NamedTuple):
    """A call with its results allocated."""

    shape: Shape
    q: Tensor
    positions: Tensor
    cos_sin: Tensor
    weights: Tensor
    scale: float
    q_fp8: Tensor
    weights_out: Tensor

    @property
    def aligned(self) -> bool:
        """Whether rows lie on 16-byte boundaries."""
        q, table = self.q, self.cos_sin
        strides = q.stride(0) % 8 == 0 and q.stride(1) % 8 == 0 and table.stride(0) % 4 == 0
        return strides and q.data_ptr() % 16 == 0 and table.data_ptr() % 16 == 0
