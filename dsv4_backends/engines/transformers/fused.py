"""Whether the small Triton kernels of ``kernels.py`` run; if not, the plain torch beside each call does the same."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor

from ...contract import layouts


@functools.cache
def kernels_on(device: torch.device) -> Any:
    """The module of small Triton kernels if they run on ``device``, else None."""
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (8, 0):
            return None
    elif os.environ.get("TRITON_INTERPRET", "0") != "1":
        return None
    try:
        from . import kernels
    except ImportError:
        return None
    return kernels


def kernels_for(x: Tensor, size: int) -> Any:
    """The kernels if they run on x's device and ``size`` is a power of two; else None."""
    return kernels_on(x.device) if size.bit_count() == 1 else None


def quantise(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """``layouts.quantize_e4m3``."""
    kernels = kernels_for(x, block) if x.shape[-1] % block == 0 else None
    return layouts.quantize_e4m3(x, block) if kernels is None else kernels.quantise(x.contiguous(), block)
