"""Rotary embeddings inside kernels: the last 64 elements of a head, in pairs of neighbours."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def table_rows(positions, tokens, valid, most):
    """The rows of a table of ``most`` positions at which tokens are: clamped to it."""
    position = tl.load(positions + tokens, mask=valid, other=0).to(tl.int64)
    return tl.minimum(tl.maximum(position, 0), most - 1)


@triton.jit
def rotate(x, cos_sin, at, BACK: tl.constexpr):
    """fp32 ``x [N, 128]`` with the last 64 of each row rotated, or rotated back; the first 64 as they are.

    ``at``: where the row's rotation lies from ``cos_sin`` on, ``[N]`` or one for all: 32 cosines, then 32 sines.
    """
    pair = tl.arange(0, 64)[None, :]
    turned = pair >= 32
    if len(at.shape) == 1:
        source = cos_sin + at[:, None] + (pair - 32)
    else:
        source = cos_sin + at + (pair - 32)
    cos = tl.load(source, mask=turned, other=1.0)
    sin = tl.load(source + 32, mask=turned, other=0.0)
    if BACK:
        sin = -sin
    left, right = tl.split(x.reshape(x.shape[0], 64, 2))
    first = tl.where(turned, left * cos - right * sin, left)
    second = tl.where(turned, left * sin + right * cos, right)
    return tl.join(first, second).reshape(x.shape[0], 128)
