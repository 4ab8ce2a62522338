"""The grouped output projection's forward, with a weight that is quantised once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...contract import layouts
from . import chunks
from .chunks import cut
from .fused import quantise
from .replaced import Mode


def quantise_weight(module: Any) -> tuple[Tensor, Tensor]:
    """The weight as e4m3 ``[groups, d, r]`` with a scale for each 128 x 128, fp32 ``[groups, d / 128, r / 128]``."""
    weight = module.weight.detach().view(module.n_groups, -1, module.weight.shape[1])
    values, scales = [], []
    for group in weight:  # one group at a time, to bound the memory of the copies
        d, r = group.shape
        padded = nn.functional.pad(group, (0, -r % 128, 0, -d % 128))
        blocks = padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).transpose(1, 2)  # [d / 128, r / 128, 128, 128]
        quantised, scale = layouts.quantize_e4m3(blocks.flatten(2), 128 * 128)
        square = quantised.view(torch.uint8).view(blocks.shape).transpose(1, 2).reshape(padded.shape)[:d, :r]
        values.append(square)
        scales.append(scale.squeeze(-1))
    return torch.stack(values).view(torch.float8_e4m3fn), torch.stack(scales)


def grouped_linear(self: Any, mode: Mode, weight: Tensor, weight_scale: Tensor, x: Tensor) -> Tensor:
    """``DeepseekV4GroupedLinear.forward``: x ``[..., groups, r]`` -> ``[..., groups, d]``."""
    flat = x.reshape(-1, *x.shape[-2:])
    out = torch.empty((len(flat), *weight.shape[:2]), dtype=torch.bfloat16, device=x.device)
    for rows in chunks.row_chunks(len(flat), 2 * flat.shape[1] * flat.shape[2]):
        values, scale = quantise(cut(flat, rows), 128)
        ops.fp8_einsum(values, scale, weight, weight_scale, out=cut(out, rows))
    return out.view(*x.shape[:-1], -1)
