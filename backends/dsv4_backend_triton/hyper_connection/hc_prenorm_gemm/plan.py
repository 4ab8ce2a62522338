"""``hc_prenorm_gemm``: what a call is to its kernels, and into how many pieces k is cut."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ...arch import Arch
from ...lib.sizes import cdiv

_INVARIANT_ROWS, _INVARIANT_SPLITS = 256, 16
"""The rows that the batch-invariant mode is laid out for, and into how many pieces it cuts k. With fewer pieces, few
rows keep fewer multiprocessors busy; with more, many rows write more partials."""


class Shape(NamedTuple):
    """All that a plan follows from. ``aligned``: rows of x and fn lie on 16-byte boundaries."""

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
        """A caller that asks for few partials gets the sums of more of them: cheaper than an idle machine."""
        if config.splits is not None:
            return int(config.splits)
        shape, results = self.shape, self.num_splits or 1
        wanted = default_splits(shape.arch, shape.m, shape.k, config)
        if shape.batch_invariant:
            wanted = min(_INVARIANT_SPLITS, shape.k // (2 * config.block_k))
        return results * max(1, wanted // results)


def default_splits(arch: Arch, m: int, k: int, config: Any) -> int:
    """Pieces of k that keep the machine busy, of at least two k steps each."""
    wanted = config.blocks * arch.sms // cdiv(m, config.block_m)
    return max(1, min(wanted, 32, k // (2 * config.block_k)))
