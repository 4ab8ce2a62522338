"""``mqa_logits`` and ``paged_mqa_logits`` by DeepGEMM's kernels of these names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4_backends.provider import Reason, elsewhere, on_its_device, once_a_step

from ._alignment import ALIGNMENT, dense
from ._device import library_for, refuses_device
from ._finish import bounds, finish
from .probe import DeepGEMM, deep_gemm

_HEADS = (32, 64)
_HEAD_DIMS = (32, 64, 128)


def _head_refusal(heads: int, dim: int) -> Reason | None:
    if heads > _HEADS[-1]:
        return Reason("shape", f"needs at most {_HEADS[-1]} indexer heads, this call has {heads}")
    if dim not in _HEAD_DIMS:
        return Reason("shape", f"needs a head dimension of 32, 64 or 128, this call has {dim}")
    return None


def _padded_heads(q: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous q and weights with a head count that the kernels support; added heads have weight 0."""
    *rows, heads, dim = q.shape
    wanted = next(count for count in _HEADS if count >= heads)
    wide = torch.zeros((*rows, wanted, dim), dtype=torch.uint8, device=q.device)  # zero as e4m3
    wide[..., :heads, :] = q.view(torch.uint8)
    return wide.view(q.dtype), torch.nn.functional.pad(weights, (0, wanted - heads))


def _tensor(result: Any) -> Tensor:
    # SGLang's builds go through tvm-ffi.
    return result if isinstance(result, Tensor) else torch.utils.dlpack.from_dlpack(result)


# ------------------------------------------------------------------------------------------------- contiguous


def mqa_logits_refuses(
    q: Tensor,
    k: Tensor,
    k_scale: Tensor,
    weights: Tensor,
    row_starts: Tensor,
    row_ends: Tensor,
    *,
    max_seqlen_k: int | None = None,
    out: Tensor | None = None,
) -> Reason | None:
    """Head counts and dimensions that the kernels do not support."""
    return refuses_device(q) or _head_refusal(q.shape[1], q.shape[2])


def mqa_logits(
    q: Tensor,
    k: Tensor,
    k_scale: Tensor,
    weights: Tensor,
    row_starts: Tensor,
    row_ends: Tensor,
    *,
    max_seqlen_k: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See ``dsv4_backends.contract.indexer``. Heads are padded to 32 or 64.

    DeepGEMM 2.5 and 2.6 set undefined logits of the full form to -inf. Those of the compressed form are set here. From
    2.8 on the full form is made from the compressed one.
    """
    if elsewhere(q):
        with on_its_device(q):
            return mqa_logits(q, k, k_scale, weights, row_starts, row_ends, max_seqlen_k=max_seqlen_k, out=out)
    m, heads, _ = q.shape
    n = k.shape[0]
    width = n if max_seqlen_k is None else max_seqlen_k
    if m == 0 or n == 0 or width == 0:
        empty = torch.empty((m, width), dtype=torch.float32, device=q.device) if out is None else out
        return empty.fill_(-torch.inf)
    library = library_for(q)
    q, weights = (dense(q), dense(weights)) if heads in _HEADS else _padded_heads(q, weights)
    k, k_scale = dense(k), dense(k_scale)
    starts, ends = once_a_step(
        ("mqa_logits", n, width), (row_starts, row_ends), lambda: bounds(row_starts, row_ends, n, width)
    )
    full = max_seqlen_k is None
    if not library.cleans:
        logits = _tensor(library.mqa_logits((q, None), (k, k_scale), weights, starts, ends, width))
    else:
        logits = _tensor(library.mqa_logits(q, (k, k_scale), weights, starts, ends, full, 0 if full else width))
        if full:
            return logits if out is None else out.copy_(logits)
    return finish(logits, starts, ends, width, shifted=full, out=out)


# ------------------------------------------------------------------------------------------------------ paged


def paged_mqa_logits_refuses(
    q: Tensor,
    k_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    max_context_len: int,
    *,
    out: Tensor | None = None,
) -> Reason | None:
    """Head counts, dimensions and pages that the kernels do not support."""
    if (reason := refuses_device(q) or _head_refusal(q.shape[2], q.shape[3])) is not None:
        return reason
    sizes = (64,) if deep_gemm().cleans else (32, 64)
    if k_cache.shape[1] not in sizes:
        wanted = " or ".join(map(str, sizes))
        return Reason("shape", f"needs pages of {wanted} keys, this call has {k_cache.shape[1]}")
    if k_cache.shape[0] > 1 and k_cache.stride(0) % ALIGNMENT:
        return Reason("shape", f"needs pages at a multiple of 16 bytes, these are {k_cache.stride(0)} apart")
    return None


def _schedule(
    library: DeepGEMM, context_lens: Tensor, requests: int, tokens: int, page_size: int, limit: int
) -> tuple[Tensor, Tensor]:
    """Lengths that are safe for the kernels, and the schedule made from them.

    The kernels read only the last length of a request. They read the table and write logits up to it. No length may be
    0: 2.8 skips a request without keys but keeps its queries, and multiplies them with the keys of the next request;
    2.5 may read beyond its table if every length is 0. A length of 1 costs one block; its logits are set to -inf later.
    """
    lens = context_lens.clamp(1, limit)
    if tokens == 1 and (lens.shape != (requests, 1) or not lens.is_contiguous()):  # split requests
        rows = lens.reshape(-1)
        lens = rows if rows.shape[0] == requests else rows.repeat_interleave(requests // rows.shape[0])
        lens = lens.view(requests, 1)
    elif tokens > 1:
        longest = lens.view(requests, 1) if lens.dim() == 1 else lens.amax(1, keepdim=True)
        lens = longest.expand(requests, tokens).contiguous()
    # Requests of four tokens run on pairs of multiprocessors.
    sms = library.num_sms() // (2 if tokens == 4 else 1)
    return lens, _tensor(library.schedule(lens, page_size, sms))


def paged_mqa_logits(
    q: Tensor,
    k_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    max_context_len: int,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """See ``dsv4_backends.contract.indexer``. Heads are padded to 32 or 64.

    Requests with a number of tokens that has no kernel are split into requests of one token. DeepGEMM's schedule is
    made in every call, or once in a ``dsv4_backends.step()`` block. The kernel reads keys through a tensor map, which
    gives zeros for a page that the cache does not have. Its logits are set to -inf with those beyond the lengths.
    """
    if elsewhere(q):
        with on_its_device(q):
            return paged_mqa_logits(q, k_cache, weights, context_lens, block_table, max_context_len, out=out)
    b, next_n, heads, dim = q.shape
    table = block_table
    shape, strides = k_cache.shape, k_cache.stride()
    pages, page_size = shape[0], shape[1]
    if b == 0 or max_context_len == 0 or pages == 0 or block_table.numel() == 0:
        size = (b * next_n, max_context_len)
        empty = torch.empty(size, dtype=torch.float32, device=q.device) if out is None else out
        return empty.fill_(-torch.inf)
    library = library_for(q)
    q, weights = (dense(q), dense(weights)) if heads in _HEADS else _padded_heads(q, weights)
    requests, tokens = b, next_n
    if next_n not in ((1, 2) if library.cleans else (1, 2, 4)):
        requests, tokens = b * next_n, 1
        q = q.view(requests, 1, *q.shape[2:])
        block_table = block_table.repeat_interleave(next_n, 0)
    limit = min(max_context_len, page_size * block_table.shape[1])
    lens, schedule = once_a_step(
        ("paged_mqa_logits", requests, tokens, page_size, limit),
        (context_lens,),
        lambda: _schedule(library, context_lens, requests, tokens, page_size, limit),
    )
    row = dim + 4
    stride = strides[0] if pages > 1 else page_size * row
    # DeepGEMM reads the strides of dimensions of size 1, which torch leaves arbitrary.
    cache = k_cache
    if strides != (stride, row, row, 1):
        cache = k_cache.as_strided((pages, page_size, 1, row), (stride, row, row, 1))
    if library.cleans:
        found = library.paged_mqa_logits(q, cache, weights, lens, block_table, schedule, max_context_len, False)
    else:
        found = library.paged_mqa_logits((q, None), cache, weights, lens, block_table, schedule, max_context_len)
    logits, lens, cache_size = _tensor(found), context_lens.contiguous(), (pages, page_size)
    return finish(logits, None, lens, max_context_len, out=out, table=table, cache=cache_size)
