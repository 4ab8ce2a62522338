"""The provider's function for ``inverse_rope_quant``."""

from __future__ import annotations

import torch

from ... import variants
from ...arch import arch_of
from .plan import Call, Shape


def inverse_rope_quant(
    x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, groups: int, *, packed: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last 64 of every head of ``x`` [t, h, 512] bf16 rotated back at ``positions`` [t], all of it quantised.

    Returns e4m3 [t, groups, D], groups outermost in memory, and a scale for each 128: fp32 [t, groups, D / 128] or,
    ``packed``, int32 of four E8M0 codes, tokens innermost in memory and padded to 4. Deterministic. No workspace.
    """
    t, h, width = x.shape
    heads = h // groups
    values = torch.empty((groups, t, heads * width), dtype=torch.float8_e4m3fn, device=x.device)
    blocks, dtype = (heads, torch.int32) if packed else (heads * 4, torch.float32)
    scale = torch.empty((groups, blocks, t + -t % 4), dtype=dtype, device=x.device)
    if t:
        call = Call(Shape(arch_of(x.device)), x, positions, cos_sin, groups, values, scale)
        variants.run("inverse_rope_quant", call)
    return values.transpose(0, 1), scale[..., :t].permute(2, 0, 1)
