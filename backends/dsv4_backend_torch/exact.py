"""What keeps PyTorch's settings from changing the reference's numbers.

``torch.autocast`` is switched off within an op. How exact an fp32 product is, is a setting of the whole process
(``torch.set_float32_matmul_precision``, ``torch.backends.cuda.matmul.allow_tf32``, ``fp32_precision``): to change it
for a call would change it for other threads, so products are taken in fp64 instead while it says less than
fp32. Dtypes and devices are said at every allocation, so neither default counts.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from dsv4_backends.contract.autocast import without_autocast

_F = TypeVar("_F", bound=Callable[..., Any])
_LIBRARY = {"cpu": "mkldnn", "cuda": "cuda"}


def _rounds(device: torch.device) -> bool:
    """Whether PyTorch may round the operands of an fp32 product on this device."""
    library = _LIBRARY[device.type]
    if library == "mkldnn":  # its own setting, which PyTorch does not tell
        modes = (os.environ.get(f"{name}_DEFAULT_FPMATH_MODE", "STRICT") for name in ("ONEDNN", "DNNL"))
        if any(mode.upper() != "STRICT" for mode in modes):
            return True
    return getattr(torch.backends, library).matmul.fp32_precision not in ("ieee", "none")


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of fp32 tensors, in fp32 or better."""
    return (a.double() @ b.double()).float() if _rounds(a.device) else a @ b


def under_any_setting(function: _F) -> _F:
    """For an op: without autocast and gradients, and into the caller's buffers even if inference mode made them."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        buffers = (kwargs.get("out"), kwargs.get("sqr_sum"))
        inference = any(buffer is not None and buffer.is_inference() for buffer in buffers)
        with without_autocast(), torch.inference_mode() if inference else torch.no_grad():
            return function(*args, **kwargs)

    return cast("_F", run)
