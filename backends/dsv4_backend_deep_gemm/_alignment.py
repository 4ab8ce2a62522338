"""Operands where the tensor memory accelerator takes them: at multiples of 16 bytes."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNMENT = 16


def _copied(x: Tensor) -> Tensor:
    # In new memory, which is aligned: `contiguous` gives back what is contiguous at an odd address.
    return x.clone(memory_format=torch.contiguous_format)


def aligned(x: Tensor) -> Tensor:
    """x if it and each of its rows begin at such a place, and rows do not overlap; else a contiguous copy."""
    fits = not x.data_ptr() % ALIGNMENT and all(
        stride >= x.shape[-1] and not stride * x.element_size() % ALIGNMENT for stride in x.stride()[:-1]
    )
    return x if fits else _copied(x)


def dense(x: Tensor) -> Tensor:
    """x if it is contiguous and begins at such a place, else a copy that is and does."""
    return x if x.is_contiguous() and not x.data_ptr() % ALIGNMENT else _copied(x)
