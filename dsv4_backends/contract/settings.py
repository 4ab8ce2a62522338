"""What keeps PyTorch's settings from changing numbers.

Dtypes and devices are said at every allocation, so that neither default counts. The rest is here.
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
    """Within the block ``torch.autocast`` casts nothing, on any device: what an op means has its dtypes already."""
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
    if library == "mkldnn":  # it has a setting of its own besides, which PyTorch does not tell
        modes = (os.environ.get(f"{name}_DEFAULT_FPMATH_MODE", "STRICT") for name in ("ONEDNN", "DNNL"))
        if any(mode.upper() != "STRICT" for mode in modes):
            return True
    return getattr(torch.backends, library).matmul.fp32_precision not in ("ieee", "none")


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of fp32 tensors, in fp32 or better.

    How exact an fp32 product is, is a setting of the whole process (``torch.set_float32_matmul_precision``,
    ``torch.backends.cuda.matmul.allow_tf32``, ``fp32_precision``). To change it for a call would change it for other
    threads, so the product is in fp64 while it says less than fp32.
    """
    return (a.double() @ b.double()).float() if _rounds(a.device) else a @ b
