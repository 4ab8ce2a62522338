"""vLLM's hyper-connections without TileLang: in torch, with the op ``hc_prenorm_gemm``.

They are slower than TileLang's fused kernels, without which vLLM itself does not run the model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import ops


def pre(
    residual: Tensor,
    fn: Tensor,
    hc_scale: Tensor,
    hc_base: Tensor,
    rms_eps: float,
    hc_pre_eps: float,
    hc_sinkhorn_eps: float,
    hc_post_mult_value: float,
    sinkhorn_repeat: int,
    n_splits: int = 1,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """``mhc_pre_tilelang``: the mixes of ``[..., hc, hidden]`` streams, and the normed input of the layer."""
    *outer, hc, hidden = residual.shape
    streams = residual.view(-1, hc, hidden)
    epsilons = (rms_eps, hc_pre_eps, hc_sinkhorn_eps)
    weights, post, comb = _mixes(
        streams.flatten(1), fn, hc, hc_scale, hc_base, epsilons, hc_post_mult_value, sinkhorn_repeat
    )
    y = (weights.unsqueeze(-1) * streams.float()).sum(1)
    return (
        post.view(*outer, hc, 1),
        comb.view(*outer, hc, hc),
        _normed(y, norm_weight, norm_eps).view(*outer, hidden),
    )


def pre_broadcast(
    residual: Tensor,
    fn: Tensor,
    hc_scale: Tensor,
    hc_base: Tensor,
    rms_eps: float,
    hc_pre_eps: float,
    hc_sinkhorn_eps: float,
    hc_post_mult_value: float,
    sinkhorn_repeat: int,
    n_splits: int = 1,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    fn_broadcast: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``mhc_pre_broadcast_tilelang``: as ``pre``, where all streams are still equal to ``residual [t, hidden]``."""
    assert fn_broadcast is not None
    hc = fn.shape[1] // residual.shape[-1]
    epsilons = (rms_eps, hc_pre_eps, hc_sinkhorn_eps)
    weights, post, comb = _mixes(
        residual, fn_broadcast, hc, hc_scale, hc_base, epsilons, hc_post_mult_value, sinkhorn_repeat
    )
    y = weights.sum(-1, keepdim=True) * residual.float()
    streams = residual.unsqueeze(1).expand(-1, hc, -1).contiguous()
    return streams, post.unsqueeze(-1), comb, _normed(y, norm_weight, norm_eps)


def post(x: Tensor, residual: Tensor, post_layer_mix: Tensor, comb_res_mix: Tensor) -> Tensor:
    """``mhc_post_tilelang``: the streams after a layer."""
    weights = post_layer_mix if post_layer_mix.dim() == residual.dim() else post_layer_mix.unsqueeze(-1)
    mixed = torch.einsum("...ij,...ih->...jh", comb_res_mix.float(), residual.float())
    return (mixed + weights.float() * x.unsqueeze(-2).float()).to(residual.dtype)


def fused_post_pre(
    x: Tensor,
    residual: Tensor,
    post_layer_mix: Tensor,
    comb_res_mix: Tensor,
    fn: Tensor,
    hc_scale: Tensor,
    hc_base: Tensor,
    rms_eps: float,
    hc_pre_eps: float,
    hc_sinkhorn_eps: float,
    hc_post_mult_value: float,
    sinkhorn_repeat: int,
    n_splits: int = 1,
    tile_n: int = 1,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``mhc_fused_post_pre_tilelang``: the end of a layer and the beginning of the next."""
    streams = post(x, residual, post_layer_mix, comb_res_mix)
    return streams, *pre(
        streams,
        fn,
        hc_scale,
        hc_base,
        rms_eps,
        hc_pre_eps,
        hc_sinkhorn_eps,
        hc_post_mult_value,
        sinkhorn_repeat,
        norm_weight=norm_weight,
        norm_eps=norm_eps,
    )


def head(hs_flat: Tensor, fn: Tensor, hc_scale: Tensor, hc_base: Tensor, rms_eps: float, hc_eps: float) -> Tensor:
    """``hc_head_fused_kernel_tilelang``: the weighted sum of the streams ``[t, hc, hidden]``."""
    products, squares = ops.hc_prenorm_gemm(hs_flat.flatten(1), fn)
    mixes = products * torch.rsqrt(squares / fn.shape[1] + rms_eps).unsqueeze(-1)
    weights = torch.sigmoid(mixes * hc_scale[0] + hc_base) + hc_eps
    return (weights.unsqueeze(-1) * hs_flat.float()).sum(1).to(torch.bfloat16)


def _mixes(
    x: Tensor,
    fn: Tensor,
    hc: int,
    scale: Tensor,
    base: Tensor,
    epsilons: tuple[float, float, float],
    post_factor: float,
    rounds: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The weights before the layer ``[t, hc]``, those after it, and the doubly stochastic ``[t, hc, hc]``."""
    rms_eps, pre_eps, sinkhorn_eps = epsilons
    products, squares = ops.hc_prenorm_gemm(x, fn)
    mixes = products * torch.rsqrt(squares / fn.shape[1] + rms_eps).unsqueeze(-1)
    before = torch.sigmoid(mixes[:, :hc] * scale[0] + base[:hc]) + pre_eps
    after = torch.sigmoid(mixes[:, hc : 2 * hc] * scale[1] + base[hc : 2 * hc]) * post_factor
    comb = mixes[:, 2 * hc :].unflatten(1, (hc, hc)) * scale[2] + base[2 * hc :].view(1, hc, hc)
    comb = torch.softmax(comb, -1) + sinkhorn_eps
    comb = comb / (comb.sum(-2, keepdim=True) + sinkhorn_eps)
    for _ in range(rounds - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + sinkhorn_eps)
        comb = comb / (comb.sum(-2, keepdim=True) + sinkhorn_eps)
    return before, after, comb


def _normed(y: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS norm with the rounding of TileLang's kernel: the mean square is of fp32 values, the result of bf16 ones."""
    if weight is None:
        return y.to(torch.bfloat16)
    root = torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y.to(torch.bfloat16).float() * root * weight.float()).to(torch.bfloat16)
