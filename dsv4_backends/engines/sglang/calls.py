"""The replacements: the ops, with the arguments of SGLang's functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...compat import deep_gemm, flash_mla
from ...contract.layouts import HEAD_DIM, KV_BYTES
from ...errors import UnsupportedError


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: Any,
    num_splits: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    descale_q: Tensor | None = None,
    descale_k: Tensor | None = None,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    kv_format: str | None = None,
    *,
    use_legacy: bool = True,
) -> tuple[Tensor, Tensor]:
    """``flash_mla_interface.flash_mla_with_kvcache``, whose arguments have another order than the library's."""
    return flash_mla.flash_mla_with_kvcache(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        head_dim_v,
        tile_scheduler_metadata,
        num_splits,
        softmax_scale,
        causal,
        is_fp8_kvcache,
        indices,
        attn_sink,
        extra_k_cache,
        extra_indices_in_kvcache,
        topk_length,
        extra_topk_length,
        use_legacy=use_legacy,
        kv_format=kv_format,
        descale_q=descale_q,
        descale_k=descale_k,
    )


def flash_mla_sparse_fwd(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int = HEAD_DIM,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    *,
    use_legacy: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``flash_mla_interface.flash_mla_sparse_fwd``: with ``use_legacy`` the lse is to base 2."""
    log2 = True if use_legacy else None
    return flash_mla.flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v, attn_sink, topk_length, return_log2_lse=log2)


def get_mla_metadata(
    cache_seqlens: Tensor | None = None,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
) -> tuple[flash_mla.FlashMLASchedMeta, None]:
    """``flash_mla_interface.get_mla_metadata``, without the form for other models, which takes lengths."""
    if cache_seqlens is not None:
        raise UnsupportedError("get_mla_metadata: argument cache_seqlens: expected None, got a tensor")
    return flash_mla.get_mla_metadata()


def tf32_hc_prenorm_gemm(x: Tensor, fn: Tensor, out: Tensor, sqrsum: Tensor, num_splits: int | None) -> None:
    """``deep_gemm_wrapper.entrypoint.tf32_hc_prenorm_gemm``."""
    deep_gemm.tf32_hc_prenorm_gemm(x, fn, out, sqrsum, num_splits)


def product_is_ours() -> bool:
    """``_use_deep_gemm_hc_prenorm``: the user's setting alone, whether or not DeepGEMM is installed."""
    from sglang.srt.environ import envs  # type: ignore[import-not-found]

    return bool(envs.SGLANG_OPT_DEEPGEMM_HC_PRENORM.get())


def dequantize_k_cache_paged_dsv4(
    quant_k_cache: Tensor,
    page_table_1_flattened: Tensor,
    page_size: int,
    out: Tensor | None = None,
    layout: Any = "v4",
) -> Tensor:
    """The keys in slots of a cache ``[pages, bytes]``, as bf16 ``[n, 1, 512]``.

    For the op, each slot is the last token of a request that gathers one token.
    """
    function = "dequantize_k_cache_paged_dsv4"
    name = str(getattr(layout, "value", layout)).lower()
    if name != "v4":
        raise UnsupportedError(f"{function}: argument layout: expected v4, got {name}")
    cache = quant_k_cache.view(torch.uint8)
    pages, width = cache.shape
    if width < page_size * KV_BYTES:
        raise UnsupportedError(
            f"{function}: argument quant_k_cache: expected {page_size} entries of {KV_BYTES} bytes, got {width} bytes"
        )
    slots = page_table_1_flattened
    if out is None:
        out = torch.empty((len(slots), 1, HEAD_DIM), dtype=torch.bfloat16, device=cache.device)
    table = slots.div(page_size, rounding_mode="floor").to(torch.int32).unsqueeze(1)
    lens = (slots.remainder(page_size) + 1).to(torch.int32)
    entries = cache[:, : page_size * KV_BYTES].view(pages, page_size, KV_BYTES)
    return ops.gather_dequant_kv(entries, lens, table, out, gather_lens=torch.ones_like(lens))


class _WithMarlin:
    """SGLang's platform, reported as 12.x: Marlin's check asks for 9.0 or 12.x, while its kernel runs from 8.0 on."""

    is_sm120 = True

    def __init__(self, platform: Any) -> None:
        self._platform = platform

    def __getattr__(self, name: str) -> Any:
        return getattr(self._platform, name)


def platform_with_marlin(own: Callable[[], Any]) -> Any:
    """``get_platform`` in ``mxfp4_marlin_moe``."""
    return _WithMarlin(own())
