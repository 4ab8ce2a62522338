"""The grouped FP8 output projection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..arguments import Args, Form, Rule, TensorArg, tensor

if TYPE_CHECKING:
    from torch import Tensor


def fp8_einsum(
    x: Tensor,
    x_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """``"bhr,hdr->bhd"`` over FP8 operands with a scale for every 128 of r::

        out[b, h, d] = bf16( sum over blocks of x_scale[b, h, block] * w_scale[h, d's block, block]
                             * sum over r in block of x[b, h, r] * w[h, d, r] )

    accumulated in fp32. b counts tokens, h groups of heads, r the input width of a group (4096 in DeepSeek V4), d its
    output width. r and d need not be multiples of 128; the last block is then short.

    Scales are logical: a dtype, a shape, and any strides (engines keep ``x_scale`` with the tokens contiguous and
    padded). Three dtypes mean the same: fp32; ``float8_e8m0fnu``; and int32 that packs four E8M0 codes, the first
    block in the lowest byte, so that its last dimension is ``ceil(r / 512)``. E8M0 code c means 2^(c - 127); 0 means
    2^-127 and 255 means NaN. ``w_scale`` has one row for 128 of d, or one for each d.

    Args:
        x: e4m3 ``[b, h, r]``; r contiguous, other strides free.
        x_scale: fp32 or e8m0 ``[b, h, ceil(r / 128)]``, or int32 ``[b, h, ceil(r / 512)]``.
        w: e4m3 ``[h, d, r]``; r contiguous.
        w_scale: fp32 or e8m0 ``[h, ceil(d / 128) or d, ceil(r / 128)]``, or int32 with ``ceil(r / 512)`` last.
        out: bf16 ``[b, h, d]`` to write to; d contiguous, other strides free.

    Returns:
        bf16 ``[b, h, d]``; 0 where r is 0.

    Raises:
        ContractError: an argument breaks the above.

    Source: DeepGEMM ``fp8_einsum`` with recipes (1, 128, 128) and (1, 1, 128).
    """
    import torch

    if out is not None:
        return out
    b, h, _ = x.shape
    return torch.empty((b, h, w.shape[1]), dtype=torch.bfloat16, device=x.device)


EINSUM_ARGS: Args = {
    "x": tensor("float8_e4m3fn", "b, h, r", "activations"),
    "x_scale": TensorArg(
        (
            Form("float32 float8_e8m0fnu", "b, h, ceil(r, 128)"),
            Form("int32", "b, h, ceil(r, 512)"),
        ),
        layout="any",
        about="one scale for 128 of r",
    ),
    "w": tensor("float8_e4m3fn", "h, d, r", "weights"),
    "w_scale": TensorArg(
        (
            Form("float32 float8_e8m0fnu", "h, ceil(d, 128), ceil(r, 128)"),
            Form("float32 float8_e8m0fnu", "h, d, ceil(r, 128)"),
            Form("int32", "h, ceil(d, 128), ceil(r, 512)"),
            Form("int32", "h, d, ceil(r, 512)"),
        ),
        layout="any",
        about="one scale for 128 of r and 128 of d, or each d",
    ),
    "out": tensor("bfloat16", "b, h, d", "result buffer"),
}
EINSUM_RULES = (Rule("w", "h > 0 and d > 0", "at least one group and one output"),)
