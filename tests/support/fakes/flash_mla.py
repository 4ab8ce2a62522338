"""FlashMLA's builds: ``source`` (upstream and tokenspeed), ``sgl`` (``use_legacy=True``), ``vllm`` (``out=``).

``appmana`` is another library of that name.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from dsv4_backends.testing import oracle

BUILT_FOR = b"\0Sparse Attention Forward Kernel is only supported on SM90a and SM100f architectures.\0"
SINCE_2026_09_30 = (
    b"\0Sparse Attention Decode Kernel (sparse_decode_fwd) is only supported on SM100f architectures.\0"
    b"Sparse Attention Prefill Kernel (sparse_prefill_fwd) is only supported on SM100f architectures.\0"
)


@dataclasses.dataclass
class FlashMLASchedMeta:
    """Empty at first; the first call fills it."""

    have_initialized: bool = False
    config: Any = None
    lengths: Any = None


def get_mla_metadata(*args: Any, **kwargs: Any) -> tuple[FlashMLASchedMeta, None]:
    return FlashMLASchedMeta(), None


def _prefill(q: Tensor, kv: Tensor, indices: Tensor, sm_scale: float, d_v: int, sink: Any, length: Any) -> Any:
    s_q, h_q, d = q.shape
    topk = indices.shape[2]
    assert q.dtype == kv.dtype == torch.bfloat16
    assert h_q in (64, 128)
    assert d == d_v == 512
    assert kv.shape[1:] == (1, 512)
    assert kv.shape[0] > 0
    assert s_q > 0
    assert indices.dtype == torch.int32
    assert indices.shape[:2] == (s_q, 1)
    assert topk > 0
    assert topk % 128 == 0
    assert q.stride(-1) == kv.stride(-1) == indices.stride(-1) == 1
    assert q.stride(0) % 8 == q.stride(1) % 8 == kv.stride(0) % 8 == 0
    assert indices.stride(0) % 4 == 0
    assert sink is None or sink.shape == (h_q,)
    assert length is None or ((length >= 0) & (length <= topk)).all(), "indices would be read beyond their row"
    out, top, lse = oracle.of("sparse_mla_prefill")(q, kv, indices, sm_scale, sink, length)
    return out.bfloat16(), top.float(), lse.float()


def _lengths(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.tolist() for t in tensors]


def _decode(
    q: Tensor,
    k_cache: Tensor,
    d_v: int,
    meta: FlashMLASchedMeta,
    scale: float,
    indices: Tensor,
    sink: Tensor | None,
    extra_k_cache: Tensor | None,
    extra_indices: Tensor | None,
    topk_length: Tensor | None,
    extra_topk_length: Tensor | None,
) -> Any:
    b, s_q, h_q, d = q.shape
    assert isinstance(meta, FlashMLASchedMeta)
    assert b > 0
    assert s_q > 0
    assert h_q in (64, 128)
    assert d == d_v == 512
    assert q.stride(-1) == 1
    assert q.stride(0) % q.stride(1) == 0
    assert sink is None or sink.shape == (h_q,)
    assert (extra_k_cache is None) == (extra_indices is None)
    assert extra_topk_length is None or extra_k_cache is not None
    shapes = []
    for cache, index, length in (
        (k_cache, indices, topk_length),
        (extra_k_cache, extra_indices, extra_topk_length),
    ):
        if cache is None or index is None:
            continue
        pages, page_size, one, size = cache.shape
        assert (one, size) == (1, 584)
        assert pages > 0
        assert cache.stride(1) == 584
        assert cache.stride(0) % 16 == 0
        assert index.dtype == torch.int32
        assert index.shape[:2] == (b, s_q)
        assert index.shape[2] > 0
        assert index.shape[2] % 64 == 0
        assert index.stride(-1) == 1
        columns = torch.arange(index.shape[2])
        counts = torch.full((b,), index.shape[2]) if length is None else length
        assert ((counts >= 0) & (counts <= index.shape[2])).all(), "indices would be read beyond their row"
        used = index[columns.expand_as(index) < counts[:, None, None]]
        assert ((used >= -1) & (used < pages * page_size)).all(), "an illegal read"
        shapes.append((page_size, index.shape[2]))
    config = (b, s_q, h_q, *shapes)
    lengths = _lengths(topk_length, extra_topk_length)
    if not meta.have_initialized:
        meta.have_initialized, meta.config, meta.lengths = True, config, lengths
    assert meta.config == config, "sched_meta of other shapes"
    assert meta.lengths == lengths, "a stale schedule, which the library itself does not notice"
    caches = (c if c is None else c[:, :, 0] for c in (k_cache, extra_k_cache))
    main, extra = caches
    out, lse = oracle.of("sparse_mla_decode")(
        q, main, indices, scale, sink, topk_length, extra, extra_indices, extra_topk_length
    )
    return out.bfloat16(), lse.float().transpose(1, 2)


def source() -> dict[str, Any]:
    """tokenspeed-flashmla 1.0.0.post20260429, as upstream in April 2026."""

    def flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None):
        return _prefill(q, kv, indices, sm_scale, d_v, attn_sink, topk_length)

    def flash_mla_with_kvcache(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        head_dim_v,
        tile_scheduler_metadata,
        num_splits=None,
        softmax_scale=None,
        causal=False,
        is_fp8_kvcache=False,
        indices=None,
        attn_sink=None,
        extra_k_cache=None,
        extra_indices_in_kvcache=None,
        topk_length=None,
        extra_topk_length=None,
    ):
        assert block_table is None
        assert cache_seqlens is None
        assert num_splits is None
        assert not causal
        assert is_fp8_kvcache
        scopes = (extra_k_cache, extra_indices_in_kvcache, topk_length, extra_topk_length)
        first = (q, k_cache, head_dim_v, tile_scheduler_metadata, softmax_scale)
        return _decode(*first, indices, attn_sink, *scopes)

    return {
        "flash_mla_sparse_fwd": flash_mla_sparse_fwd,
        "flash_mla_with_kvcache": flash_mla_with_kvcache,
        "get_mla_metadata": get_mla_metadata,
    }


def sgl(legacy: bool = True) -> dict[str, Any]:
    """sgl-flash-mla 1.0.0; ``legacy`` says whether its second half was built."""
    inner = source()

    def flash_mla_sparse_fwd(
        q,
        kv,
        indices,
        sm_scale,
        d_v=512,
        attn_sink=None,
        topk_length=None,
        use_legacy=False,
        return_log2_lse=None,
    ):
        assert use_legacy, "only supported on SM100f"
        return inner["flash_mla_sparse_fwd"](q, kv, indices, sm_scale, d_v, attn_sink, topk_length)

    def flash_mla_with_kvcache(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        head_dim_v,
        tile_scheduler_metadata,
        num_splits=None,
        softmax_scale=None,
        causal=False,
        is_fp8_kvcache=None,
        indices=None,
        attn_sink=None,
        extra_k_cache=None,
        extra_indices_in_kvcache=None,
        topk_length=None,
        extra_topk_length=None,
        enable_batch_invariant=False,
        use_legacy=False,
        kv_format=None,
        descale_q=None,
        descale_k=None,
    ):
        assert use_legacy, "Unsupported bytes_per_token for d_qk=512: 584"
        return inner["flash_mla_with_kvcache"](
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
        )

    return {
        "flash_mla_sparse_fwd": flash_mla_sparse_fwd,
        "flash_mla_with_kvcache": flash_mla_with_kvcache,
        "get_mla_metadata": get_mla_metadata,
        "has_legacy": lambda: legacy,
    }


def vllm() -> dict[str, Any]:
    """The copy in vLLM 0.33.0: results may be written to the caller's buffer."""
    inner = source()

    def written(results: tuple[Tensor, ...], out: Tensor | None) -> tuple[Tensor, ...]:
        if out is None:
            return results
        assert out.is_contiguous()
        return out.copy_(results[0]), *results[1:]

    def flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None, out=None):
        return written(inner["flash_mla_sparse_fwd"](q, kv, indices, sm_scale, d_v, attn_sink, topk_length), out)

    def flash_mla_with_kvcache(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        head_dim_v,
        tile_scheduler_metadata,
        num_splits=None,
        softmax_scale=None,
        causal=False,
        is_fp8_kvcache=False,
        indices=None,
        attn_sink=None,
        extra_k_cache=None,
        extra_indices_in_kvcache=None,
        topk_length=None,
        extra_topk_length=None,
        out=None,
        enable_batch_invariant=False,
    ):
        results = inner["flash_mla_with_kvcache"](
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
        )
        return written(results, out)

    return {
        "flash_mla_sparse_fwd": flash_mla_sparse_fwd,
        "flash_mla_with_kvcache": flash_mla_with_kvcache,
        "get_mla_metadata": get_mla_metadata,
    }


LINES = {"source": source, "sgl": sgl, "vllm": vllm}


def appmana() -> dict[str, Any]:
    """AppMana's flash-mla 2.0.0 for SM8x and SM12x: FlashMLA's names of 2025, and sparse functions of its own."""

    def get_mla_metadata(cache_seqlens, num_heads_per_head_k, num_heads_k):
        raise AssertionError("not FlashMLA's")

    def flash_mla_with_kvcache(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        head_dim_v,
        tile_scheduler_metadata,
        num_splits,
        softmax_scale=None,
        causal=False,
        warp_spec=True,
    ):
        raise AssertionError("not FlashMLA's")

    def flash_sparse_mla_decode(q, swa_cache, swa_indices, swa_lens, scale=None, attn_sink=None):
        return "AppMana's own"

    return locals()
