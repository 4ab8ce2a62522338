"""``paged_mqa_logits``: what a call is to its kernels."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...arch import Arch


class Shape(NamedTuple):
    """All that a plan follows from."""

    arch: Arch
    next_n: int
    h: int
    d: int


class Call(NamedTuple):
    """A call, its result allocated; ``q`` in the kernels' element type. ``fill``: -inf beyond the lengths."""

    shape: Shape
    q: Tensor
    k_cache: Tensor
    weights: Tensor
    lens: Tensor
    table: Tensor
    out: Tensor
    fill: bool
