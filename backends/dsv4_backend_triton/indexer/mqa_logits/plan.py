"""``mqa_logits``: what a call is to its kernels."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...arch import Arch


class Shape(NamedTuple):
    """All that a plan follows from. ``many``: there are rows enough for a kernel of many rows; the batch-invariant mode
    has for few rows what many have."""

    arch: Arch
    rows: int
    h: int
    d: int
    compressed: bool


class Call(NamedTuple):
    """A call, its result allocated; ``q`` and ``k`` in the kernels' element type."""

    shape: Shape
    q: Tensor
    k: Tensor
    k_scale: Tensor
    weights: Tensor
    starts: Tensor
    ends: Tensor
    out: Tensor
