"""The grouped FP8 projection: dequantise, then one fp32 matrix product per group and chunk of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_backends.contract import layouts
from dsv4_backends.contract.settings import matmul

from .memory import row_chunks
from .settings import under_any_setting

BLOCK = 128


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
