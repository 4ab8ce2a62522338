"""The hyper-connection's prenorm GEMM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..arguments import Args, Form, Rule, ScalarArg, TensorArg, tensor

if TYPE_CHECKING:
    from torch import Tensor


def hc_prenorm_gemm(
    x: Tensor,
    fn: Tensor,
    *,
    num_splits: int | None = None,
    out: Tensor | None = None,
    sqr_sum: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The GEMM before the norm of a hyper-connection, and the sum of squares that the norm needs::

        out     = x @ fn.T
        sqr_sum = sum over k of x ** 2

    in one pass over x, which holds the residual streams of a token side by side. No norm is applied. With
    ``num_splits`` the results are partial sums over a leading dimension. The provider decides where k is split, so only
    the sums over that dimension are defined. A split without elements is 0.

    At least TF32: x is exact in it, fn may be rounded or truncated to 10 bits of mantissa; sqr_sum is fp32.

    Args:
        x: bf16 ``[m, k]``.
        fn: fp32 ``[n, k]``; DeepSeek V4: n = 24, k = 4 * hidden, or k = hidden for the broadcast first layer.
        num_splits: Number of partials, at least 1; None for the finished sums.
        out: fp32 ``[m, n]``, or ``[num_splits, m, n]``, to write to; needs no initial value.
        sqr_sum: fp32 ``[m]``, or ``[num_splits, m]``; given exactly if ``out`` is.

    Returns:
        out: fp32 ``[m, n]``, or ``[num_splits, m, n]``.
        sqr_sum: fp32 ``[m]``, or ``[num_splits, m]``.

    Raises:
        ContractError: an argument breaks the above.

    Source: DeepGEMM ``tf32_hc_prenorm_gemm`` and DeepSeek's ``hc_pre``.
    """
    import torch

    lead = () if num_splits is None else (num_splits,)
    m, n = x.shape[0], fn.shape[0]
    product = torch.empty((*lead, m, n), dtype=torch.float32, device=x.device) if out is None else out
    squares = torch.empty((*lead, m), dtype=torch.float32, device=x.device) if sqr_sum is None else sqr_sum
    return product, squares


PRENORM_ARGS: Args = {
    "x": tensor("bfloat16", "m, k", "residual streams of each token, side by side"),
    "fn": tensor("float32", "n, k", "gate and mixing weights"),
    "num_splits": ScalarArg("int", 1, about="partials over a leading dimension"),
    "out": TensorArg(
        (
            Form("float32", "m, n", when="num_splits is None"),
            Form("float32", "num_splits, m, n", when="num_splits is not None"),
        ),
        about="result buffer",
    ),
    "sqr_sum": TensorArg(
        (
            Form("float32", "m", when="num_splits is None"),
            Form("float32", "num_splits, m", when="num_splits is not None"),
        ),
        about="buffer for the sums of squares",
    ),
}
PRENORM_RULES = (Rule("sqr_sum", "(out is None) == (sqr_sum is None)", "out and sqr_sum together, or neither"),)
