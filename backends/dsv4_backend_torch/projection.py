"""The grouped FP8 projection: dequantise, then one fp32 matrix product per group and chunk of tokens. Also the ops that
make its activations.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dsv4_backends.contract import layouts
from dsv4_backends.contract.settings import matmul

from .memory import row_chunks
from .rope import rotate
from .settings import under_any_setting

BLOCK = 128
HEAD_DIM, NOPE_DIM = layouts.HEAD_DIM, layouts.NOPE_DIM


def _rows(x: Tensor, positions: Tensor, cos_sin: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The tokens in chunks, each with its heads in fp32 ``[n, h, 512]``, rotated back."""
    for rows in row_chunks(x.shape[0], 4 * x.shape[1] * HEAD_DIM):
        part = x[rows].float()
        rotate(part[..., NOPE_DIM:], positions[rows], cos_sin, back=True)
        yield rows, part


@under_any_setting
def inverse_rope_quant(
    x: Tensor, positions: Tensor, cos_sin: Tensor, groups: int, *, packed: bool = False
) -> tuple[Tensor, Tensor]:
    """See ``dsv4_backends.ops.inverse_rope_quant``."""
    t, h, _ = x.shape
    heads = h // groups
    x_fp8 = torch.empty((groups, t, heads * HEAD_DIM), dtype=torch.float8_e4m3fn, device=x.device).transpose(0, 1)
    blocks, dtype = (heads, torch.int32) if packed else (heads * HEAD_DIM // BLOCK, torch.float32)
    padded = torch.empty((groups, blocks, t + -t % 4), dtype=dtype, device=x.device)
    x_scale = padded[..., :t].permute(2, 0, 1)
    for rows, part in _rows(x, positions, cos_sin):
        values, scale = layouts.quantize_e4m3(part.reshape(-1, groups, heads * HEAD_DIM), BLOCK)
        x_fp8[rows] = values
        x_scale[rows] = layouts.e8m0_pack(layouts.e8m0_encode(scale)) if packed else scale
    return x_fp8, x_scale


@under_any_setting
def inverse_rope(x: Tensor, positions: Tensor, cos_sin: Tensor, groups: int) -> Tensor:
    """See ``dsv4_backends.ops.inverse_rope``."""
    t, h, _ = x.shape
    out = torch.empty((groups, t, h // groups * HEAD_DIM), dtype=torch.bfloat16, device=x.device).transpose(0, 1)
    for rows, part in _rows(x, positions, cos_sin):
        turned = part.to(torch.bfloat16)
        turned[..., :NOPE_DIM] = x[rows, :, :NOPE_DIM]  # bit for bit
        out[rows] = turned.reshape(-1, groups, h // groups * HEAD_DIM)
    return out


def _scales(scale: Tensor, blocks: int) -> Tensor:
    """Scales in any of the contract's dtypes as fp32 ``[..., blocks]``."""
    if scale.dtype is torch.int32:
        return layouts.e8m0_decode(layouts.e8m0_unpack(scale)[..., :blocks])
    if scale.dtype is torch.float8_e8m0fnu:
        return layouts.e8m0_decode(scale.contiguous())
    return scale


def _expand(scale: Tensor, dim: int, size: int) -> Tensor:
    """Repeat blocks of 128 along ``dim`` and cut to ``size``."""
    return scale.repeat_interleave(BLOCK, dim).narrow(dim, 0, size)


@under_any_setting
def fp8_einsum(
    x: Tensor,
    x_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """See ``dsv4_backends.ops.fp8_einsum``."""
    b, h, r = x.shape
    d = w.shape[1]
    if out is None:
        out = torch.empty((b, h, d), dtype=torch.bfloat16, device=x.device)
    blocks = -(-r // BLOCK)
    x_scales, w_scales = _scales(x_scale, blocks), _scales(w_scale, blocks)
    for group in range(h):
        rows_of_w = w_scales[group] if w_scales.shape[1] == d else _expand(w_scales[group], 0, d)
        weight = w[group].float() * _expand(rows_of_w, 1, r)
        for tokens in row_chunks(b, 4 * max(r, d)):
            inputs = x[tokens, group].float() * _expand(x_scales[tokens, group], 1, r)
            out[tokens, group] = matmul(inputs, weight.T).to(torch.bfloat16)
    return out
