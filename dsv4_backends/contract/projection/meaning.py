"""The attention's output: its rotation undone and quantised, and the grouped FP8 projection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..arguments import Args, Form, Rule, ScalarArg, TensorArg, Values, tensor

if TYPE_CHECKING:
    from torch import Tensor

HEAD_DIM = 512


def inverse_rope_quant(
    x: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    groups: int,
    *,
    packed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Undo the rotation of the attention's output and quantise it for ``fp8_einsum``.

    The last 64 elements of every head are rotated back, in pairs of neighbours, at the token's position p::

        (a, b) -> (a * cos[p, i] + b * sin[p, i], b * cos[p, i] - a * sin[p, i])    for pair i = 0..31

    in fp32, without a rounding to bf16. Then every 128 elements of a head are quantised by the scale rule
    (``contract/layouts.py``): the scale is the least power of two not below max(amax, 1e-4) / 448, and the values are
    e4m3 of element / scale, to the nearest, ties to even.

    Group g has heads g * h / groups to (g + 1) * h / groups - 1, one after the other: D = h / groups * 512 elements.
    Values are laid out with the groups outermost, scales with the tokens innermost and padded to a multiple of 4 (T4),
    which ``fp8_einsum`` takes without a copy. The padding is not written.

    Positions are clamped to the table. A NaN or an infinity changes only the results of its 128 elements and their
    scale. What lies between the rows of ``x`` (padded heads), and rows of ``cos_sin`` that no token is at,
    may hold NaN.

    Args:
        x: bf16 ``[t, h, 512]``; the last dimension contiguous, other strides free.
        positions: int64 or int32 ``[t]``.
        cos_sin: fp32 ``[max_positions, 64]``: 32 cosines, then 32 sines.
        groups: Groups of heads; h is a multiple.
        packed: Scales as E8M0 codes, four in an int32, the first block in the lowest byte.

    Returns:
        x_fp8: e4m3 ``[t, groups, D]`` with strides ``(D, t * D, 1)``.
        x_scale: fp32 ``[t, groups, D / 128]`` with strides ``(1, D / 128 * T4, T4)``; if packed int32
            ``[t, groups, D / 512]`` with strides ``(1, D / 512 * T4, T4)``.

    Raises:
        ContractError: an argument breaks the above.

    Source: vLLM ``fused_inv_rope_fp8_quant``.
    """
    import torch

    t, h, _ = x.shape
    heads = h // groups
    x_fp8 = torch.empty((groups, t, heads * HEAD_DIM), dtype=torch.float8_e4m3fn, device=x.device)
    blocks, dtype = (heads, torch.int32) if packed else (heads * 4, torch.float32)
    x_scale = torch.empty((groups, blocks, t + -t % 4), dtype=dtype, device=x.device)
    return x_fp8.transpose(0, 1), x_scale[..., :t].permute(2, 0, 1)


def inverse_rope(x: Tensor, positions: Tensor, cos_sin: Tensor, groups: int) -> Tensor:
    """Undo the rotation of the attention's output, for a projection in bf16.

    The rotation of ``inverse_rope_quant``, rounded once to bf16; the other 448 elements of a head are copied bit for
    bit. Groups and their layout are the same.

    Args:
        x: bf16 ``[t, h, 512]``; the last dimension contiguous, other strides free.
        positions: int64 or int32 ``[t]``, clamped to the table.
        cos_sin: fp32 ``[max_positions, 64]``: 32 cosines, then 32 sines.
        groups: Groups of heads; h is a multiple.

    Returns:
        bf16 ``[t, groups, D]`` with D = h / groups * 512 and strides ``(D, t * D, 1)``.

    Raises:
        ContractError: an argument breaks the above.

    Source: vLLM ``fused_inv_rope_fp8_quant`` without quantisation.
    """
    import torch

    t, h, _ = x.shape
    out = torch.empty((groups, t, h // groups * HEAD_DIM), dtype=torch.bfloat16, device=x.device)
    return out.transpose(0, 1)


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


INVERSE_ARGS: Args = {
    "x": tensor("bfloat16", "t, h, 512", "attention output, rotated in the last 64"),
    "positions": tensor("int64 int32", "t", "position of each token", layout="vector"),
    "cos_sin": tensor("float32", "max_positions, 64", "32 cosines, then 32 sines"),
    "groups": ScalarArg("int", 1, about="groups of heads"),
}
INVERSE_QUANT_ARGS: Args = {**INVERSE_ARGS, "packed": ScalarArg("bool", about="scales as packed E8M0 codes")}
INVERSE_RULES = (
    Rule("x", "h > 0", "at least one head"),
    Rule("cos_sin", "max_positions > 0", "at least one position"),
    Rule("groups", "h % groups == 0", "a divisor of the heads"),
)
INVERSE_VALUES = (Values("positions", "0", "max_positions - 1", "clamped"),)

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
