"""Rotary embeddings inside kernels: the last 64 elements of a head, in pairs of neighbours."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def table_rows(positions, tokens, valid, most):
    """Tokens' rows in a table of ``most`` positions, to which their positions are clamped."""
    position = tl.load(positions + tokens, mask=valid, other=0).to(tl.int64)
    return tl.minimum(tl.maximum(position, 0), most - 1)


@triton.jit
def rotations(cos_sin, at):
    """Cosines and sines of the 64 pairs of a row [N, 64]: 1 and 0 for the first 32, then those of the table.

    ``at``: the offset from ``cos_sin`` of the row's 32 cosines and then 32 sines, ``[N]`` or one for all.
    """
    pair = tl.arange(0, 64)[None, :]
    turned = pair >= 32
    if len(at.shape) == 1:
        source = cos_sin + at[:, None] + (pair - 32)
    else:
        source = cos_sin + at + (pair - 32)
    return tl.load(source, mask=turned, other=1.0), tl.load(source + 32, mask=turned, other=0.0)


@triton.jit
def turn(x, cos, sin):
    """fp32 ``x [N, 128]`` with the last 64 of each row rotated; the first 64 as they are."""
    turned = tl.arange(0, 64)[None, :] >= 32
    left, right = tl.split(x.reshape(x.shape[0], 64, 2))
    first = tl.where(turned, left * cos - right * sin, left)
    second = tl.where(turned, left * sin + right * cos, right)
    return tl.join(first, second).reshape(x.shape[0], 128)


@triton.jit
def rotate(x, cos_sin, at, BACK: tl.constexpr):
    """fp32 ``x [N, 128]`` with the last 64 of each row rotated, or rotated back, by ``rotations(cos_sin, at)``."""
    cos, sin = rotations(cos_sin, at)
    if BACK:
        sin = -sin
    return turn(x, cos, sin)
