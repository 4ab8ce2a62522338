"""The provider's function for ``fp8_einsum``."""

from __future__ import annotations

import torch
import triton.language as tl

from ... import variants
from ...arch import arch_of
from .plan import E8M0, FP32, PACKED, Call, Shape


def fp8_einsum(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``out[b, h, d] = sum_r x[b, h, r] * w[h, d, r]`` on block-scaled e4m3 operands, bf16 out.

    ``x`` [b, h, r] and ``w`` [h, d, r] e4m3 with r contiguous. ``x_scale`` [b, h, ceil(r/128)] fp32 or e8m0,
    or int32 [b, h, ceil(r/512)] of four packed E8M0; ``w_scale`` likewise [h, ceil(d/128) or d, ...]; any
    strides. Deterministic. No workspace.
    """
    return einsum(x, x_scale, w, w_scale, out)


def einsum(x, x_scale, w, w_scale, out=None, batch_invariant=False):
    b, h, r = x.shape
    d = w.shape[1]
    if out is None:
        out = torch.empty((b, h, d), dtype=torch.bfloat16, device=x.device)
    if out.numel() == 0:
        return out
    if r == 0:
        return out.zero_()
    arch = arch_of(x.device)
    view = torch.float8_e4m3fn if arch.fp8 == tl.float8e4nv else torch.uint8
    shape = Shape(arch, b, h, d, w_scale.shape[1] == d and d > 1, batch_invariant)
    call = Call(shape, x.view(view), *_scale(x_scale), w.view(view), *_scale(w_scale), out)
    variants.run("fp8_einsum", call)
    return out


def _scale(scale: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A scale tensor as the kernels take it, and its kind."""
    if scale.dtype == torch.float32:
        return scale, FP32
    if scale.dtype == torch.int32:
        return scale, PACKED
    return scale.view(torch.uint8), E8M0
