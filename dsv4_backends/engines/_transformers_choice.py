"""Which way a small step goes: what counts as few tokens, and where the integration's own kernels run."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor

FEW_TOKENS = 8
"""Up to this many new tokens a call is bound by what the host does for each layer."""


@functools.cache
def kernels_on(device: torch.device) -> Any:
    """The module of small Triton kernels where they run on ``device``, else None."""
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (8, 0):
            return None
    elif os.environ.get("TRITON_INTERPRET", "0") != "1":
        return None
    try:
        from . import _transformers_kernels
    except ImportError:
        return None
    return _transformers_kernels


def kernels_for(x: Tensor, size: int) -> Any:
    """The kernels where they run on x's device and take the size at hand, a power of two; else None."""
    return kernels_on(x.device) if size.bit_count() == 1 else None
