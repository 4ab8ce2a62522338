"""``sparse_mla_decode`` by ``flash_mla_with_kvcache``."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_backends.contract.layouts import KV_BYTES
from dsv4_backends.provider import Reason, elsewhere, on_its_device, once_a_step

from ._bounds import Scope, bounded
from ._padding import ALIGNMENT, heads_for, padded_heads, padded_sink
from .probe import flash_mla

_TOPK_MULTIPLE = 64
_BLACKWELL_PAGE = 576


def refuses(
    q: Tensor,
    k_cache: Tensor,
    indices: Tensor,
    sm_scale: float,
    *,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    out: Tensor | None = None,
) -> Reason | None:
    """Pages that are not aligned to 16 bytes."""
    for name, cache in (("k_cache", k_cache), ("extra_k_cache", extra_k_cache)):
        if cache is not None and cache.shape[0] > 1:
            # Not run on hardware: on SM100 the distance between pages must be a multiple of 576.
            multiple = _BLACKWELL_PAGE if _major(cache) >= 10 else ALIGNMENT
            if cache.stride(0) % multiple:
                message = f"{name}: needs pages at a multiple of {multiple} bytes, these are {cache.stride(0)} apart"
                return Reason("shape", message, "pad each page, e.g. to a multiple of 576 bytes")
    return None


def _major(cache: Tensor) -> int:
    if cache.is_cuda:
        return torch.cuda.get_device_capability(cache.device)[0]
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 9


def _scope(cache: Tensor, indices: Tensor, length: Tensor | None) -> tuple[Tensor, Scope, tuple[int, int]]:
    """A cache that the kernels accept, the bounds of its indices, and the page size with the number of indices."""
    shape, strides, topk = cache.shape, cache.stride(), indices.shape[-1]
    pages, page_size = shape[0], shape[1]
    slots = min(pages * page_size, 2**31 - 1)
    if pages == 0:  # an index of -1 still reads slot 0
        cache, pages, strides = cache.new_zeros((1, page_size, KV_BYTES)), 1, ()
    # FlashMLA reads the strides of dimensions of size 1, which torch leaves arbitrary.
    stride = page_size * KV_BYTES if pages == 1 else strides[0]
    if strides != (stride, KV_BYTES, KV_BYTES, 1):
        cache = cache.as_strided((pages, page_size, 1, KV_BYTES), (stride, KV_BYTES, KV_BYTES, 1))
    width = topk + -topk % _TOPK_MULTIPLE or _TOPK_MULTIPLE
    return cache, Scope(indices, length, slots, width), (page_size, width)


def sparse_mla_decode(
    q: Tensor,
    k_cache: Tensor,
    indices: Tensor,
    sm_scale: float,
    *,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``dsv4_backends.contract.sparse_mla``. Heads are padded to 64 or 128, indices to multiples of 64.

    FlashMLA skips only -1 among invalid indices and does not bound lengths: one launch makes both safe.
    FlashMLA's schedule is made in every call, or once in a ``dsv4_backends.step()`` block.
    """
    if elsewhere(q):
        with on_its_device(q):
            return sparse_mla_decode(
                q,
                k_cache,
                indices,
                sm_scale,
                attn_sink=attn_sink,
                topk_length=topk_length,
                extra_k_cache=extra_k_cache,
                extra_indices=extra_indices,
                extra_topk_length=extra_topk_length,
                out=out,
            )
    b, s_q, count, _ = q.shape
    if b == 0 or s_q == 0:
        result = torch.zeros_like(q, memory_format=torch.contiguous_format) if out is None else out
        return result, torch.empty((b, s_q, count), dtype=torch.float32, device=q.device)
    library = flash_mla()
    heads = heads_for(count)
    extra_scope: tuple[int, int] | None = None
    second: Scope | None = None
    k_cache, first, scope = _scope(k_cache, indices, topk_length)
    if extra_k_cache is not None and extra_indices is not None and extra_indices.shape[-1] > 0:
        extra_k_cache, second, extra_scope = _scope(extra_k_cache, extra_indices, extra_topk_length)
    else:  # a scope without entries is dropped
        extra_k_cache, extra_indices, extra_topk_length = None, None, None
    schedule = once_a_step(
        ("flash_mla", b, s_q, heads, scope, extra_scope, q.get_device()),
        (topk_length, extra_topk_length),
        lambda: library.metadata()[0],  # empty; the first call with it fills it
    )
    (indices, topk_length), *others = bounded(first, second)
    if others:
        extra_indices, extra_topk_length = others[0]
    if heads != count or not q.is_contiguous() or q.data_ptr() % ALIGNMENT:
        q, attn_sink = padded_heads(q, heads), padded_sink(attn_sink, heads)
    options = library.decode_options
    direct = out is not None and library.decode_out and heads == count and out.is_contiguous()
    if direct:
        options = {**options, "out": out}
    result, lse = library.decode(
        q,
        k_cache,
        None,
        None,
        512,
        schedule,
        None,
        sm_scale,
        False,
        True,
        indices,
        attn_sink,
        extra_k_cache,
        extra_indices,
        topk_length,
        extra_topk_length,
        **options,
    )
    lse = lse.mT
    if heads != count:
        result, lse = result[:, :, :count], lse[:, :, :count]
    if not lse.is_contiguous() and lse.stride(-1) != 1:
        lse = lse.contiguous()
    if out is not None and not direct:
        out.copy_(result)
    return result if out is None else out, lse
