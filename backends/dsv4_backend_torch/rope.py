"""Rotary embeddings: the last 64 elements of a head, in pairs of neighbours."""

from __future__ import annotations

from torch import Tensor


def rotate(x: Tensor, positions: Tensor, cos_sin: Tensor, *, back: bool = False) -> None:
    """Rotate fp32 ``x [t, h, 64]`` in place at the tokens' positions, which are clamped to the table."""
    turns = cos_sin[positions.clamp(0, cos_sin.shape[0] - 1).long()].unsqueeze(1)
    cos, sin = turns[..., :32], -turns[..., 32:] if back else turns[..., 32:]
    left, right = x[..., 0::2].clone(), x[..., 1::2].clone()
    x[..., 0::2] = left * cos - right * sin
    x[..., 1::2] = left * sin + right * cos
