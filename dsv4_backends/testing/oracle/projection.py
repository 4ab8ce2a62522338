"""The output projection, one block of 128 at a time, and the ops that make its activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .codes import F64, block_scale, e4m3, e8m0, nearest_e4m3, rotated


def _scale(scale: Tensor, blocks: int) -> Tensor:
    if scale.dtype is torch.int32:
        codes = torch.stack([(scale >> 8 * byte) & 0xFF for byte in range(4)], -1)
        return e8m0(codes.flatten(-2)[..., :blocks])
    if scale.dtype is torch.float8_e8m0fnu:
        return e8m0(scale.contiguous().view(torch.uint8))
    return scale.to(F64)


def inverse_rope(x: Tensor, positions: Tensor, cos_sin: Tensor, groups: int, **others: Any) -> tuple[Tensor, ...]:
    wide = x.to(F64)
    turned = torch.cat([wide[..., :448], rotated(wide[..., 448:], positions, cos_sin, back=True)], -1)
    return (turned.reshape(x.shape[0], groups, x.shape[1] // groups * 512),)


def inverse_rope_quant(x: Tensor, positions: Tensor, cos_sin: Tensor, groups: int, **others: Any) -> tuple[Tensor, ...]:
    (turned,) = inverse_rope(x, positions, cos_sin, groups)
    blocks = turned.unflatten(-1, (-1, 128))
    scale = block_scale(blocks.abs().amax(-1))
    return nearest_e4m3(blocks / scale.unsqueeze(-1)).flatten(-2), scale


def read(name: str, result: Tensor, arguments: Any = None) -> Tensor:
    """The results of ``inverse_rope_quant`` as numbers."""
    if name == "x_fp8":
        return e4m3(result)
    return _scale(result, 4 * result.shape[-1] if result.dtype is torch.int32 else result.shape[-1])


def fp8_einsum(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, **others: Any) -> tuple[Tensor, ...]:
    b, h, r = x.shape
    d = w.shape[1]
    blocks = (r + 127) // 128
    x_s, w_s = _scale(x_scale, blocks), _scale(w_scale, blocks)
    out = torch.zeros((b, h, d), dtype=F64, device=x.device)
    row = torch.arange(d, device=x.device) // (1 if w_s.shape[1] == d else 128)
    for group in range(h):
        for block in range(blocks):
            part = slice(block * 128, min(block * 128 + 128, r))
            left = e4m3(x[:, group, part]) * x_s[:, group, block, None]
            right = e4m3(w[group, :, part]) * w_s[group, row, block, None]
            out[:, group] += left @ right.T
    return (out,)
