"""Tensor maps for Gluon kernels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


@cache
def _layout(bits: int, swizzle: int) -> Any:
    """Made once: it takes as long as the launch of a small kernel."""
    return NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=bits, rank=2)


def boxes(
    t: Tensor, shape: Sequence[int], strides: Sequence[int], box: Sequence[int], bits: int, *, swizzle: int = 128
) -> Any:
    """A tensor map over a matrix in ``t``, from which boxes of elements of ``bits`` go to swizzled shared memory."""
    return TensorDescriptor(t, list(shape), list(strides), list(box), _layout(bits, swizzle))
