"""What both adapters do to arguments that FlashMLA does not take as they are. Shapes and strides decide."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

ALIGNMENT = 16
"""Bytes: rows are read 16 at a time, by the tensor memory accelerator and by vector loads."""


def copied(x: Tensor) -> Tensor:
    """x in new memory, which is aligned. ``contiguous`` gives back what is contiguous at an odd address."""
    return x.clone(memory_format=torch.contiguous_format)


def heads_for(count: int) -> int:
    """The head count of the kernel that serves ``count`` heads."""
    return 64 if count <= 64 else 128


def padded_heads(q: Tensor, heads: int) -> Tensor:
    """q ``[..., h_q, 512]`` with ``heads`` heads, in rows that the kernels can read."""
    missing = heads - q.shape[-2]
    if missing:
        return pad(q, (0, 0, 0, missing))
    row, token = q.stride(-2), q.stride(-3)
    aligned = all(stride * q.element_size() % ALIGNMENT == 0 for stride in q.stride()[:-1])
    # SM100 wants a request's tokens at a stride that divides the request's.
    even = q.dim() == 3 or (token > 0 and q.stride(0) % token == 0)
    return q if aligned and even and row > 0 and q.data_ptr() % ALIGNMENT == 0 else copied(q)


def padded_sink(sink: Tensor | None, heads: int) -> Tensor | None:
    """The sink of ``heads`` heads; those that were added have none."""
    if sink is None or sink.shape[0] == heads:
        return sink
    return pad(sink, (0, heads - sink.shape[0]), value=-torch.inf)


def padded_indices(indices: Tensor, multiple: int) -> Tensor:
    """Indices ``[..., topk]`` filled with -1 up to a multiple, at least one, in rows that the kernels can read."""
    topk = indices.shape[-1]
    missing = (-topk % multiple) if topk else multiple
    if missing:
        return pad(indices, (0, missing), value=-1)
    if indices.is_contiguous() and not indices.data_ptr() % ALIGNMENT:  # so every row is aligned
        return indices
    aligned = all(stride * 4 % ALIGNMENT == 0 for stride in indices.stride()[:-1])
    return indices if aligned and indices.data_ptr() % ALIGNMENT == 0 else copied(indices)
