"""The provider's functions for ``indexer_topk`` and ``paged_indexer_topk``, and a call as their kernels take it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ... import variants
from ...arch import Arch, arch_of
from ...batch_invariant import has_mode
from ...lib.sizes import pow2
from ..mqa_logits.op import mqa_logits
from ..paged_mqa_logits.op import write_logits


class Shape(NamedTuple):
    """All that a plan depends on. ``rows``, ``columns`` and ``topk``: rounded up to powers of two. In the
    batch-invariant mode every row is searched like the only row of a call."""

    op: str
    arch: Arch
    rows: int
    columns: int
    topk: int
    batch_invariant: bool


class Rows(NamedTuple):
    """The keys of each row: row ``i * next_n + j`` of a call has those from ``starts[i]`` (None: 0) to ``ends[i, j]``,
    both clamped to ``limit``. In the compressed form they begin at column 0."""

    starts: Tensor | None
    ends: Tensor
    next_n: int
    stride_i: int
    stride_j: int
    limit: int
    compressed: bool


class Call(NamedTuple):
    """A call with its result allocated.

    Attributes:
        items: The number of items, such as requests, of ``rows.next_n`` rows each.
        columns: The number of columns of the logits.
        write: Writes the logits of some items into a buffer. What is in it beyond a row's keys is not read.
    """

    shape: Shape
    items: int
    columns: int
    rows: Rows
    out: Tensor
    write: Callable[[slice, Tensor], None]


def _run(op: str, items: int, columns: int, rows: Rows, out: Tensor, write: Callable[..., None], mode: bool) -> None:
    if not (items and columns):
        out.fill_(-1)
        return
    shape = Shape(op, arch_of(out.device), pow2(out.shape[0]), pow2(columns), pow2(out.shape[1], 32), mode)
    variants.run(op, Call(shape, items, columns, rows, out, write))


@has_mode
def indexer_topk(
    q: Tensor,
    k: Tensor,
    k_scale: Tensor,
    weights: Tensor,
    row_starts: Tensor,
    row_ends: Tensor,
    topk: int,
    *,
    max_seqlen_k: int | None = None,
    out: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """See ``dsv4_backends.ops.indexer_topk``. The workspace is the logits of some rows, at most 256 MiB.

    If ``max_seqlen_k`` is not below the number of keys, the logits are in the full form. Its kernels
    are at least as fast.
    """
    m, n = q.shape[0], k.shape[0]
    width = None if max_seqlen_k is None or max_seqlen_k >= n else max_seqlen_k
    if out is None:
        out = torch.empty((m, topk), dtype=torch.int32, device=q.device)

    def write(part: slice, logits: Tensor) -> None:
        given = (q[part], k, k_scale, weights[part], row_starts[part], row_ends[part])
        mqa_logits(*given, max_seqlen_k=width, out=logits, batch_invariant=batch_invariant)

    rows = Rows(row_starts, row_ends, 1, 1, 0, n, width is not None)
    _run("indexer_topk", m, n if width is None else width, rows, out, write, batch_invariant)
    return out


@has_mode
def paged_indexer_topk(
    q: Tensor,
    k_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    max_context_len: int,
    topk: int,
    *,
    out: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """See ``dsv4_backends.ops.paged_indexer_topk``. The workspace is the logits of some requests, at most 256 MiB."""
    b, next_n = q.shape[:2]
    columns = min(max_context_len, k_cache.shape[1] * block_table.shape[1])
    if out is None:
        out = torch.empty((b * next_n, topk), dtype=torch.int32, device=q.device)

    def write(part: slice, logits: Tensor) -> None:
        own = weights[part.start * next_n : part.stop * next_n]
        write_logits(q[part], k_cache, own, context_lens[part], block_table[part], logits, fill=False)

    strides = (context_lens.stride(0), context_lens.stride(1) if context_lens.dim() == 2 else 0)
    rows = Rows(None, context_lens, next_n, *strides, columns, compressed=True)
    _run("paged_indexer_topk", b, columns, rows, out, write, batch_invariant)
    return out
