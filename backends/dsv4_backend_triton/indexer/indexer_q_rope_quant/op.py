"""The provider's function for ``indexer_q_rope_quant``."""

from __future__ import annotations

import torch

from ... import variants
from ...arch import arch_of
from .plan import Call, Shape


def indexer_q_rope_quant(
    q: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    weights: torch.Tensor,
    scale: float,
    *,
    hadamard: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last 64 of every head of ``q`` [t, h, 128] bf16 rotated at ``positions`` [t], all of it quantised.

    Returns e4m3 [t, h, 128] and fp32 [t, h]: ``weights`` times the head's scale times ``scale``. With ``hadamard`` the
    heads are transformed in between. Deterministic. No workspace.
    """
    t, h, _ = q.shape
    q_fp8 = torch.empty(q.shape, dtype=torch.float8_e4m3fn, device=q.device)
    weights_out = torch.empty((t, h), dtype=torch.float32, device=q.device)
    if t:
        shape = Shape(arch_of(q.device), h, hadamard)
        call = Call(shape, q, positions, cos_sin, weights, scale, q_fp8, weights_out)
        variants.run("indexer_q_rope_quant", call)
    return q_fp8, weights_out
