"""The forwards of the hyper-connections and of their head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import ops
from . import chunks, exact
from .fused import kernels_for
from .replaced import Mode


def _mixes(streams: Tensor, fn: Tensor) -> tuple[Tensor, Tensor]:
    """The streams ``[B, S, 4, d]`` times ``fn``, fp32 ``[B S, n]``, and their squares, fp32 ``[B S]``."""
    gemm: Callable[..., tuple[Tensor, Tensor]] = ops.hc_prenorm_gemm
    if streams.dtype is not torch.bfloat16:
        gemm = exact.hc_prenorm_gemm
    return gemm(streams.view(-1, fn.shape[1]), fn.float())


def _normalised(mixes: Tensor, squares: Tensor, fn: Tensor, eps: float) -> Tensor:
    """The mixes times the factor of the norm, which ``_mixes`` does not apply."""
    return mixes * torch.rsqrt(squares / fn.shape[1] + eps).unsqueeze(-1)


def _hyper_kernel(streams: Tensor) -> Any:
    """The kernel for all steps after ``_mixes``; None if it does not take these streams."""
    kernels = kernels_for(streams, streams.shape[2]) if streams.dtype is torch.bfloat16 else None
    return None if kernels is None else kernels.hyper_connection


def _collapse(pre: Tensor, streams: Tensor) -> Tensor:
    """The streams ``[B, S, 4, d]`` weighted by ``pre`` ``[B, S, 4]``, summed in fp32."""
    batch, length, count, d = streams.shape
    out = torch.empty((batch * length, d), dtype=streams.dtype, device=streams.device)
    pre, streams = pre.flatten(0, 1), streams.flatten(0, 1)
    for rows in chunks.row_chunks(batch * length, 4 * count * d):
        out[rows] = (pre[rows].unsqueeze(-1) * streams[rows]).sum(1).to(out.dtype)
    return out.view(batch, length, d)


def _doubly_stochastic(logits: Tensor, eps: float, iterations: int) -> Tensor:
    """Normalise ``[..., n, n]``: rows by softmax, then columns and rows in turn, columns last.

    transformers divides by each sum plus ``eps``: three kernels for each division, 39 divisions a module, most of the
    launches of a decode step. After the first division no sum is far below 1 (each row and column has an entry that is
    not small), so ``eps`` does not matter. Without it a division is a log-softmax: one kernel.
    """
    comb = torch.softmax(logits, -1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    if iterations == 1:
        return comb
    logs = torch.log_softmax(comb.log(), -1)
    for _ in range(iterations - 2):
        logs = torch.log_softmax(torch.log_softmax(logs, -2), -1)
    return torch.softmax(logs, -2)


def hyper_connection(self: Any, mode: Mode, hidden_streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``DeepseekV4HyperConnection.forward``, with post and comb rounded to the streams' dtype, as the layer does."""
    n, eps, iterations, streams = self.hc_mult, self.hc_eps, self.hc_sinkhorn_iters, hidden_streams.contiguous()
    mixes, squares = _mixes(streams, self.fn)
    if (kernel := _hyper_kernel(streams)) is not None:
        made: tuple[Tensor, Tensor, Tensor] = kernel(
            mixes,
            squares,
            self.scale,
            self.base,
            streams,
            norm_eps=self.input_norm.eps,
            eps=eps,
            iterations=iterations,
        )
        return made
    mixes = _normalised(mixes, squares, self.fn, self.input_norm.eps).view(*streams.shape[:2], -1)
    pre, post, comb = mixes.split([n, n, n * n], -1)
    pre_base, post_base, comb_base = self.base.split([n, n, n * n])
    pre = torch.sigmoid(pre * self.scale[0] + pre_base) + eps
    post = 2 * torch.sigmoid(post * self.scale[1] + post_base)
    comb = (comb * self.scale[2] + comb_base).unflatten(-1, (n, n))
    comb = _doubly_stochastic(comb, eps, iterations)
    return post.to(streams.dtype), comb.to(streams.dtype), _collapse(pre, streams)


def hyper_head(self: Any, mode: Mode, x: Tensor) -> Tensor:
    """``DeepseekV4HyperHead.forward``."""
    streams = x.contiguous()
    mixes, squares = _mixes(streams, self.hc_fn)
    if (kernel := _hyper_kernel(streams)) is not None:
        norm_eps, eps = self.input_norm.eps, self.eps
        collapsed: Tensor = kernel(
            mixes, squares, self.hc_scale, self.hc_base, streams, norm_eps=norm_eps, eps=eps, iterations=0
        )[2]
        return collapsed
    mixes = _normalised(mixes, squares, self.hc_fn, self.input_norm.eps).view(*streams.shape[:2], -1)
    return _collapse(torch.sigmoid(mixes * self.hc_scale.float() + self.hc_base.float()) + self.eps, streams)
