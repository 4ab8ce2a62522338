"""``gather_dequant_kv``: what a call is to its kernels."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...arch import Arch


class Shape(NamedTuple):
    """All that a plan follows from. ``unit``: bytes that pages are aligned to, 16, 8 or 1."""

    arch: Arch
    unit: int


class Call(NamedTuple):
    """A call of at least one row. ``cache``: its bytes, ``[pages, page_size, 584]`` by stride; ``rows``: most of a
    request."""

    shape: Shape
    cache: Tensor
    page_size: int
    seq_lens: Tensor
    block_table: Tensor
    out: Tensor
    gather_lens: Tensor | None
    offset: int
    rows: int

    @property
    def aligned(self) -> bool:
        """Rows of the result lie on 16-byte boundaries."""
        out = self.out
        return out.stride(0) % 8 == 0 and out.stride(1) % 8 == 0 and out.data_ptr() % 16 == 0
