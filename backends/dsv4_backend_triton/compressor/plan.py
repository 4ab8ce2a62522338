"""The compressors: a call as their kernels take it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..arch import Arch


class Shape(NamedTuple):
    """All that a plan depends on. ``dim``: 512, or 128 for the indexer."""

    arch: Arch
    op: str
    dim: int
    ratio: int
    overlap: bool
    hadamard: bool

    @property
    def rows(self) -> int:
        """Rows of a window."""
        return self.ratio * (1 + self.overlap)


class Call(NamedTuple):
    """A call that is not empty."""

    shape: Shape
    positions: Tensor
    requests: Tensor
    slots: Tensor
    state: Tensor
    block_table: Tensor
    norm_weight: Tensor
    eps: float
    cos_sin: Tensor
    k_cache: Tensor
