"""The provider's function for ``paged_mqa_logits``, and a call as its kernels take it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import variants
from ...arch import Arch, arch_of


class Shape(NamedTuple):
    """All that a plan depends on."""

    arch: Arch
    next_n: int
    h: int
    d: int


class Call(NamedTuple):
    """A call with its result allocated; ``q`` in the kernels' element type. ``fill``: write -inf beyond the lengths."""

    shape: Shape
    q: Tensor
    k_cache: Tensor
    weights: Tensor
    lens: Tensor
    table: Tensor
    out: Tensor
    fill: bool


def paged_mqa_logits(
    q: Tensor,
    k_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    max_context_len: int,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """See ``dsv4_backends.ops.paged_mqa_logits``. Keys are read once for all ``next_n`` rows. No workspace."""
    if out is None:
        out = torch.empty((q.shape[0] * q.shape[1], max_context_len), dtype=torch.float32, device=q.device)
    write_logits(q, k_cache, weights, context_lens, block_table, out)
    return out


def write_logits(
    q: Tensor,
    k_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    out: Tensor,
    *,
    fill: bool = True,
) -> None:
    """The logits of each row, and with ``fill`` -inf at and beyond its length, which is otherwise left as it is."""
    if out.numel():
        arch, (_, next_n, h, d) = arch_of(q.device), q.shape
        shape = Shape(arch, next_n, h, d)
        call = Call(shape, q.view(arch.fp8_view), k_cache, weights, context_lens, block_table, out, fill)
        variants.run("paged_mqa_logits", call)
