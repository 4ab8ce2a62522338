"""The provider's function for ``inverse_rope``."""

from __future__ import annotations

import torch

from ... import variants
from ...arch import arch_of
from ..inverse_rope_quant.plan import Call, Shape


def inverse_rope(x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, groups: int) -> torch.Tensor:
    """The last 64 of every head of ``x`` [t, h, 512] bf16 rotated back at ``positions`` [t], rounded once to bf16.

    Returns bf16 [t, groups, D], groups outermost in memory. Deterministic. No workspace.
    """
    t, h, width = x.shape
    out = torch.empty((groups, t, h // groups * width), dtype=torch.bfloat16, device=x.device)
    if t:
        variants.run("inverse_rope", Call(Shape(arch_of(x.device)), x, positions, cos_sin, groups, out, None))
    return out.transpose(0, 1)
