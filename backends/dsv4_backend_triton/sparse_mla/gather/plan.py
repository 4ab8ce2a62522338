"""``gather_dequant_kv``: a call as its kernels take it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...arch import Arch


class Shape(NamedTuple):
    """All that a plan depends on. ``unit``: bytes that pages are aligned to, 16, 8 or 1."""

    arch: Arch
    unit: int


class Call(NamedTuple):
    """A call of at least one row. ``cache``: the cache's bytes, ``[pages, page_size, 584]`` by its strides; ``rows``:
    the most rows of a request."""

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
        """Whether rows of the result lie on 16-byte boundaries."""
        out = self.out
        return out.stride(0) % 8 == 0 and out.stride(1) % 8 == 0 and out.data_ptr() % 16 == 0
