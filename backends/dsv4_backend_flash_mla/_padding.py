"""Pad and copy arguments that FlashMLA does not accept. Decided by shapes and strides only."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

ALIGNMENT = 16
"""Bytes: the tensor memory accelerator and vector loads read rows 16 bytes at a time."""


def copied(x: Tensor) -> Tensor:
    """x in new memory, which is aligned. ``contiguous`` would return a contiguous unaligned x unchanged."""
    return x.clone(memory_format=torch.contiguous_format)


def heads_for(count: int) -> int:
    """The head count of the kernel that serves ``count`` heads."""
    return 64 if count <= 64 else 128


def padded_heads(q: Tensor, heads: int) -> Tensor:
    """q ``[..., h_q, 512]`` with ``heads`` heads and aligned rows."""
    missing = heads - q.shape[-2]
    if missing:
        return pad(q, (0, 0, 0, missing))
    row, token = q.stride(-2), q.stride(-3)
    aligned = all(stride * q.element_size() % ALIGNMENT == 0 for stride in q.stride()[:-1])
    # On SM100 the stride of tokens must divide the stride of requests.
    even = q.dim() == 3 or (token > 0 and q.stride(0) % token == 0)
    return q if aligned and even and row > 0 and q.data_ptr() % ALIGNMENT == 0 else copied(q)


def padded_sink(sink: Tensor | None, heads: int) -> Tensor | None:
    """The sink of ``heads`` heads; that of added heads is -inf."""
    if sink is None or sink.shape[0] == heads:
        return sink
    return pad(sink, (0, heads - sink.shape[0]), value=-torch.inf)


def padded_indices(indices: Tensor, multiple: int) -> Tensor:
    """Indices ``[..., topk]`` padded with -1 to a multiple, at least one, with aligned rows."""
    topk = indices.shape[-1]
    missing = (-topk % multiple) if topk else multiple
    if missing:
        return pad(indices, (0, missing), value=-1)
    if indices.is_contiguous() and not indices.data_ptr() % ALIGNMENT:  # so every row is aligned
        return indices
    aligned = all(stride * 4 % ALIGNMENT == 0 for stride in indices.stride()[:-1])
    return indices if aligned and indices.data_ptr() % ALIGNMENT == 0 else copied(indices)
