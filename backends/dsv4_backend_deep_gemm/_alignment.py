"""Operands aligned to 16 bytes, as the tensor memory accelerator needs them."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNMENT = 16


def _copied(x: Tensor) -> Tensor:
    # New memory is aligned. `contiguous` would return a contiguous tensor at an unaligned address unchanged.
    return x.clone(memory_format=torch.contiguous_format)


def aligned(x: Tensor) -> Tensor:
    """x if it and each of its rows are aligned, and rows do not overlap; else a contiguous copy."""
    fits = not x.data_ptr() % ALIGNMENT and all(
        stride >= x.shape[-1] and not stride * x.element_size() % ALIGNMENT for stride in x.stride()[:-1]
    )
    return x if fits else _copied(x)


def dense(x: Tensor) -> Tensor:
    """x if it is contiguous and aligned, else a copy that is."""
    return x if x.is_contiguous() and not x.data_ptr() % ALIGNMENT else _copied(x)
