"""Keeps PyTorch's settings from changing results.

Every allocation passes its dtype and device, so the defaults do not matter. The other settings are handled here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LIBRARIES = {"cpu": "mkldnn", "cuda": "cuda"}


_as_it_is: AbstractContextManager[None] = nullcontext()


def without_autocast() -> AbstractContextManager[None]:
    """A block in which ``torch.autocast`` casts nothing, on any device: the contract fixes an op's dtypes."""
    import torch

    kinds = [kind for kind in _LIBRARIES if torch.is_autocast_enabled(kind)]
    return _autocast_off(kinds) if kinds else _as_it_is


@contextmanager
def _autocast_off(kinds: list[str]) -> Iterator[None]:
    import torch

    with ExitStack() as entered:
        for kind in kinds:
            entered.enter_context(torch.autocast(kind, enabled=False))
        yield


def _rounds(device: torch.device) -> bool:
    """Whether PyTorch may round the operands of an fp32 product on this device."""
    import torch

    library = _LIBRARIES[device.type]
    if library == "mkldnn":  # it also has its own setting, which PyTorch does not expose
        modes = (os.environ.get(f"{name}_DEFAULT_FPMATH_MODE", "STRICT") for name in ("ONEDNN", "DNNL"))
        if any(mode.upper() != "STRICT" for mode in modes):
            return True
    return getattr(torch.backends, library).matmul.fp32_precision not in ("ieee", "none")


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of fp32 tensors, in fp32 or better.

    The precision of fp32 products is a setting of the whole process (``torch.set_float32_matmul_precision``,
    ``torch.backends.cuda.matmul.allow_tf32``, ``fp32_precision``). Changing it for a call would change it for other
    threads. So the product is computed in fp64 while the setting allows less than fp32.
    """
    return (a.double() @ b.double()).float() if _rounds(a.device) else a @ b
