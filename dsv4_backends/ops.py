"""The functions that people call. Each is bound to a provider once per device and policy, then called directly.

``tools/docs.py`` writes them from the contract, whose words they have. An op that it has not written yet is here all
the same. Schema and fake of the ``torch.library`` ops exist from the import of this module on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .contract import CONTRACTS, OPS
from .runtime.dispatch import define as _define

if TYPE_CHECKING:
    from torch import Tensor

__all__ = list(OPS)

# generated: functions, by tools/docs.py

_sparse_mla_prefill = _define(CONTRACTS["sparse_mla_prefill"])


def sparse_mla_prefill(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    *,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of every query over the keys that its row of ``indices`` names. Keys are also the values.

    With ``valid(i)`` the entries of row i that count, ``P[i, h, j] = sm_scale * <q[i, h], kv[j]>``::

        max_logits[i, h] = max of P over valid(i)
        lse[i, h]        = ln sum of exp(P) over valid(i)
        out[i, h]        = sum of exp(P) kv[j] over valid(i) / (exp(lse[i, h]) + exp(attn_sink[h]))

    An entry k of row i counts where ``0 <= indices[i, k] < s_kv`` and, if lengths are given,
    ``k < topk_length[i]``. Every other value, the extremes of int32 included, is invalid. Lengths are clamped to
    ``[0, topk]``. An index that appears twice counts twice; order does not matter. The last 64 of the 512 dimensions
    carry RoPE.

    A row with nothing valid gives out 0, max_logits -inf and lse +inf, whatever the sink.
    A row of ``kv`` that no in-range index names may hold NaN.

    Args:
        q: bf16 ``[s_q, h_q, 512]``; 1 to 128 heads.
        kv: bf16 ``[s_kv, 512]`` or ``[s_kv, 1, 512]``.
        indices: int32 ``[s_q, topk]`` or ``[s_q, 1, topk]``, rows of ``kv``.
        sm_scale: Softmax scale, for DeepSeek V4 512 ** -0.5.
        attn_sink: fp32 ``[h_q]``, natural-log units, in the denominator only. +inf gives out 0; -inf is no sink.
        topk_length: int32 ``[s_q]``.
        out: bf16 ``[s_q, h_q, 512]`` to write to.

    Returns:
        out: bf16 ``[s_q, h_q, 512]``.
        max_logits: fp32 ``[s_q, h_q]``, natural log units, ``sm_scale`` included, sink excluded.
        lse: fp32 ``[s_q, h_q]``, natural log, sink excluded.

    Raises:
        ContractError: an argument breaks the above.

    Source: FlashMLA ``flash_mla_sparse_fwd`` and DeepSeek's ``sparse_attn``.
    """
    return _sparse_mla_prefill(q, kv, indices, sm_scale, attn_sink=attn_sink, topk_length=topk_length, out=out)


_sparse_mla_decode = _define(CONTRACTS["sparse_mla_decode"])


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
    """Attention of every query over slots of the packed FP8 cache, in one or two scopes.

    Means what ``sparse_mla_prefill`` means, over the union of both scopes' valid entries in one softmax (for
    DeepSeek V4: the sliding window, and the compressed keys). A slot's key is 448 e4m3 values, each times the
    power of two of its block of 64, and 64 bf16 values; ``contract/layouts.py`` gives the bytes.

    Entry k of row (i, s) counts where ``0 <= indices[i, s, k] < pages * page_size`` and, if lengths are given,
    ``k < topk_length[i]``; likewise in the second scope. Every other value is invalid, and lengths are clamped to
    ``[0, topk]``. Slots that nothing references may hold NaN bytes, slot 0 included.

    A row with nothing valid in either scope gives out 0 and lse +inf, whatever the sink.

    Args:
        q: bf16 ``[b, s_q, h_q, 512]``; 1 to 128 heads.
        k_cache: uint8, int8 or e4m3 ``[pages, page_size, 584]`` or ``[pages, page_size, 1, 584]``; page-split, bytes
            contiguous within a page, page stride free.
        indices: int32 ``[b, s_q, topk]``, slots ``page * page_size + offset``.
        sm_scale: Softmax scale, for DeepSeek V4 512 ** -0.5.
        attn_sink: fp32 ``[h_q]``, natural-log units, in the denominator only; may be +inf or -inf.
        topk_length: int32 ``[b]``, shared by the ``s_q`` queries of a row.
        extra_k_cache: The second scope's cache, with its own page size.
        extra_indices: int32 ``[b, s_q, extra_topk]``; given exactly if ``extra_k_cache`` is.
        extra_topk_length: int32 ``[b]``.
        out: bf16 ``[b, s_q, h_q, 512]`` to write to.

    Returns:
        out: bf16 ``[b, s_q, h_q, 512]``.
        lse: fp32 ``[b, s_q, h_q]``, natural log, sink excluded.

    Raises:
        ContractError: an argument breaks the above.

    Source: FlashMLA ``flash_mla_with_kvcache`` (its lse is ``[b, h_q, s_q]``).
    """
    return _sparse_mla_decode(
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


_gather_dequant_kv = _define(CONTRACTS["gather_dequant_kv"])


def gather_dequant_kv(
    k_cache: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    out: Tensor,
    *,
    gather_lens: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """Copy the last entries of each request from the packed cache into a workspace of bf16 keys, as
    ``sparse_mla_prefill`` takes them.

    Entry e of request i is slot ``e % page_size`` of page ``block_table[i, e // page_size]``. With
    ``n = seq_lens[i]`` clamped to ``[0, page_size * blocks]``, blocks being the width of ``block_table``, and
    ``g = gather_lens[i]`` clamped to ``[0, n]``, or n without ``gather_lens``::

        out[i, offset + j] = entry n - g + j    for 0 <= j < min(g, m - offset)

    No other row of ``out`` is changed. The first 448 elements of an entry are e4m3 times their E8M0 scale,
    rounded once to bf16, which is exact wherever bf16 holds the product; the last 64 are copied bit for bit. E8M0 code
    c means 2^(c - 127); 0 means 2^-127 and 255 means NaN. An entry on a page that the cache does not have, outside
    ``[0, pages)``, is 0. Pages without entries, and ``block_table`` beyond the lengths, may hold anything.

    Args:
        k_cache: uint8, int8 or e4m3 ``[pages, page_size, 584]`` or ``[pages, page_size, 1, 584]``, page-split (see
            ``contract/layouts.py``); bytes contiguous within a page, page stride free.
        seq_lens: int32 ``[r]``, entries of each request.
        block_table: int32 ``[r, blocks]``; rows may have a stride.
        out: bf16 ``[r, m, 512]``, written in place; the last dimension contiguous, other strides free.
        gather_lens: int32 ``[r]``, how many entries, counted from the end.
        offset: First row of ``out`` that is written, the same for each request.

    Returns:
        ``out``.

    Raises:
        ContractError: an argument breaks the above.

    Source: vLLM ``dequantize_and_gather_k_cache``.
    """
    return _gather_dequant_kv(k_cache, seq_lens, block_table, out, gather_lens=gather_lens, offset=offset)


_mqa_logits = _define(CONTRACTS["mqa_logits"])


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
    """Weighted sum over heads of the clipped query-key products, within each row's range of keys::

        logits[i, n] = k_scale[n] * sum over h of relu(<q[i, h], k[n]>) * weights[i, h]

    for ``row_starts[i] <= n < row_ends[i]``; every other element is exactly -inf. Bounds are clamped to ``[0, n]``; a
    row whose end is not above its start is all -inf. Weights may be negative; relu is on the product alone. The query
    has no separate scale: callers fold it into ``weights``. Keys and scales outside every range may hold NaN.

    With ``max_seqlen_k`` the result is compressed: column j of row i is key ``row_starts[i] + j``, and -inf where
    that is not below ``row_ends[i]``. Keys at and beyond ``max_seqlen_k`` columns are not returned.

    Args:
        q: e4m3 ``[m, h, d]``.
        k: e4m3 ``[n, d]``.
        k_scale: fp32 ``[n]``.
        weights: fp32 ``[m, h]``.
        row_starts: int32 ``[m]``, inclusive.
        row_ends: int32 ``[m]``, exclusive.
        max_seqlen_k: Columns of the compressed form; None for the full form.
        out: fp32 ``[m, n]`` or ``[m, max_seqlen_k]`` to write to; rows may have a stride.

    Returns:
        fp32 ``[m, n]``, or ``[m, max_seqlen_k]``.

    Raises:
        ContractError: an argument breaks the above.

    Source: DeepGEMM ``fp8_mqa_logits`` (2.5 to 2.6) and ``fp8_fp4_mqa_logits`` (2.6 to 2.8).
    """
    return _mqa_logits(q, k, k_scale, weights, row_starts, row_ends, max_seqlen_k=max_seqlen_k, out=out)


_paged_mqa_logits = _define(CONTRACTS["paged_mqa_logits"])


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
    """The logits of ``mqa_logits`` over a paged key cache.

    Key n of request i is slot ``n % page_size`` of page ``block_table[i, n // page_size]``. Row ``i * next_n + j`` of
    the result belongs to query (i, j) and holds keys ``0 <= n < context_lens[i, j]`` (``context_lens[i]`` for all j
    in the 1-D form); every element at and beyond that length is exactly -inf. Lengths are clamped to
    ``[0, min(max_context_len, page_size * blocks)]``, blocks being the width of ``block_table``. The keys of a page
    that the cache does not have, an entry of ``block_table`` outside ``[0, pages)``, are -inf. Pages and entries of
    ``block_table`` beyond the lengths may hold anything, and the queries of a row of length 0 too.

    Args:
        q: e4m3 ``[b, next_n, h, d]``; next_n counts the tokens of one request in this step.
        k_cache: uint8 ``[pages, page_size, d + 4]`` or ``[pages, page_size, 1, d + 4]``; page-split (see
            ``contract/layouts.py``), bytes contiguous within a page, page stride free, a multiple of 4.
        weights: fp32 ``[b * next_n, h]``.
        context_lens: int32 ``[b, next_n]`` or ``[b]``.
        block_table: int32 ``[b, blocks]``; rows may have a stride.
        max_context_len: Columns of the result.
        out: fp32 ``[b * next_n, max_context_len]`` to write to; rows may have a stride.

    Returns:
        fp32 ``[b * next_n, max_context_len]``.

    Raises:
        ContractError: an argument breaks the above.

    Source: DeepGEMM ``fp8_paged_mqa_logits`` and ``fp8_fp4_paged_mqa_logits``.
    """
    return _paged_mqa_logits(q, k_cache, weights, context_lens, block_table, max_context_len, out=out)


_indexer_topk = _define(CONTRACTS["indexer_topk"])


def indexer_topk(
    q: Tensor,
    k: Tensor,
    k_scale: Tensor,
    weights: Tensor,
    row_starts: Tensor,
    row_ends: Tensor,
    topk: int,
    *,
    max_seqlen_k: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The keys with the ``topk`` largest logits of each row, without a tensor of all logits.

    The logits are those of ``mqa_logits`` with the same arguments. Index j of row i is key ``row_starts[i] + j``, the
    column of the compressed form: indices count from the row's start (clamped to ``[0, n]``), as in vLLM's
    ``top_k_per_row_prefill``. A row with fewer than ``topk`` keys has all of them, then -1; a row without keys is all
    -1. No index repeats, and no index follows a -1. Their order is not specified, nor is the choice among equal logits.

    A logit of -inf is never selected. NaN is above every number. With ``max_seqlen_k`` only the first ``max_seqlen_k``
    keys of a row count. The workspace of our providers has at most 256 MiB (the reference: 1 GiB) up to 2^25 columns.

    Args:
        q: e4m3 ``[m, h, d]``.
        k: e4m3 ``[n, d]``.
        k_scale: fp32 ``[n]``.
        weights: fp32 ``[m, h]``.
        row_starts: int32 ``[m]``, inclusive.
        row_ends: int32 ``[m]``, exclusive.
        topk: Keys to select for a row, up to 2048.
        max_seqlen_k: The most keys of a row, where that is known: less workspace and time; None for n.
        out: int32 ``[m, topk]`` to write to; rows may have a stride.

    Returns:
        int32 ``[m, topk]``.

    Raises:
        ContractError: an argument breaks the above.

    Source: vLLM ``fp8_fp4_mqa_logits`` followed by ``top_k_per_row_prefill``.
    """
    return _indexer_topk(q, k, k_scale, weights, row_starts, row_ends, topk, max_seqlen_k=max_seqlen_k, out=out)


_paged_indexer_topk = _define(CONTRACTS["paged_indexer_topk"])


def paged_indexer_topk(
    q: Tensor,
    k_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    max_context_len: int,
    topk: int,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The keys with the ``topk`` largest logits of each row over a paged key cache, without a tensor of all logits.

    The logits are those of ``paged_mqa_logits`` with the same arguments, and what is selected is as in
    ``indexer_topk``. Index n of a row is key n of its request. Lengths are clamped to
    ``[0, min(max_context_len, page_size * blocks)]``. The keys of a page that the cache does not have have logits of
    -inf, so they are not selected.

    Args:
        q: e4m3 ``[b, next_n, h, d]``; next_n counts the tokens of one request in this step.
        k_cache: uint8 ``[pages, page_size, d + 4]`` or ``[pages, page_size, 1, d + 4]``; page-split (see
            ``contract/layouts.py``), bytes contiguous within a page, page stride free, a multiple of 4.
        weights: fp32 ``[b * next_n, h]``.
        context_lens: int32 ``[b, next_n]`` or ``[b]``.
        block_table: int32 ``[b, blocks]``; rows may have a stride.
        max_context_len: The most keys of a row.
        topk: Keys to select for a row, up to 2048.
        out: int32 ``[b * next_n, topk]`` to write to; rows may have a stride.

    Returns:
        int32 ``[b * next_n, topk]``.

    Raises:
        ContractError: an argument breaks the above.

    Source: vLLM ``fp8_fp4_paged_mqa_logits`` followed by ``top_k_per_row_decode``.
    """
    return _paged_indexer_topk(q, k_cache, weights, context_lens, block_table, max_context_len, topk, out=out)


_indexer_q_rope_quant = _define(CONTRACTS["indexer_q_rope_quant"])


def indexer_q_rope_quant(
    q: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    weights: Tensor,
    scale: float,
    *,
    hadamard: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotate and quantise the indexer's queries, and fold their scales into the weights, for ``mqa_logits`` and
    ``paged_mqa_logits``.

    The last 64 elements of every head are rotated, in pairs of neighbours, at the token's position p::

        (a, b) -> (a * cos[p, i] - b * sin[p, i], a * sin[p, i] + b * cos[p, i])    for pair i = 0..31

    in fp32, and rounded to bf16; the first 64 are not changed. With ``hadamard`` the 128 are then transformed by the
    Walsh-Hadamard matrix in Sylvester order times 128^-0.5, in fp32, and rounded to bf16 again. DeepSeek's own model
    does this, engines do not. Keys and queries must be treated alike. The 128 are quantised by the scale rule
    (``contract/layouts.py``): the scale is the least power of two not below max(amax, 1e-4) / 448, and the values are
    e4m3 of element / scale, to the nearest, ties to even. In fp32::

        weights_out[i, h] = weights[i, h] * scale of (i, h) * scale

    Positions are clamped to the table. A NaN or an infinity changes only the results of its head and token. Rows of
    ``cos_sin`` at positions of no token may hold NaN.

    Args:
        q: bf16 ``[t, h, 128]``; the last dimension contiguous, other strides free.
        positions: int64 or int32 ``[t]``.
        cos_sin: fp32 ``[max_positions, 64]``: 32 cosines, then 32 sines.
        weights: bf16 or fp32 ``[t, h]``.
        scale: A factor of all weights: DeepSeek V4 has ``128^-0.5 * h^-0.5``.
        hadamard: Transform the queries, for keys that are.

    Returns:
        q_fp8: e4m3 ``[t, h, 128]``, contiguous.
        weights_out: fp32 ``[t, h]``, contiguous.

    Raises:
        ContractError: an argument breaks the above.

    Source: vLLM ``fused_indexer_q_rope_quant``; with ``hadamard`` DeepSeek's ``inference/model.py``.
    """
    return _indexer_q_rope_quant(q, positions, cos_sin, weights, scale, hadamard=hadamard)


_compress_norm_rope_insert = _define(CONTRACTS["compress_norm_rope_insert"])


def compress_norm_rope_insert(
    positions: Tensor,
    requests: Tensor,
    slots: Tensor,
    state: Tensor,
    block_table: Tensor,
    norm_weight: Tensor,
    eps: float,
    cos_sin: Tensor,
    ratio: int,
    k_cache: Tensor,
) -> Tensor:
    """Write the compressed key of every window that one of the tokens completes into the packed FP8 cache.

    A token at position p of its request completes a window where ``p >= 0`` and ``(p + 1) % ratio == 0``. It writes
    entry ``slots[i]`` of the cache if that is in ``[0, pages * page_size)`` and ``requests[i]`` is in ``[0, r)``. No
    other byte of the cache changes. If several tokens write one entry, its content is unspecified.

    **State.** A row for each token: the first half of its ``width`` channels are kv, the second half scores (with the
    positional bias added). Row q of a request is row ``q % state_page_size`` of page
    ``block_table[requests[i], q // state_page_size]``. Width 1024 is a compressor without overlap, 2048 one with::

        without overlap:  rows p - ratio + 1 .. p, channels 0 .. 511 of kv and scores
        with overlap:     rows p - 2 * ratio + 1 .. p - ratio, channels 0 .. 511 (the window before this one), and
                          rows p - ratio + 1 .. p, channels 512 .. 1023 (this one)

    A row is absent if its position is below 0, beyond the blocks of the table, or on a page that the state does not
    have (outside ``[0, state_pages)``). Absent rows, and all channels not named above, may hold NaN.

    **Entry.** For each channel of 512, over the rows that are there::

        c = sum of softmax(scores) * kv                    0 where no row is there, or every score is -inf
        n = c * rsqrt(mean over channels of c ** 2 + eps) * norm_weight        0 where that mean and eps are 0
        (a, b) -> (a * cos[s, i] - b * sin[s, i], a * sin[s, i] + b * cos[s, i])
                                                           pair i = 0 .. 31 of the last 64 of n, at the window's first
                                                           position s = (p // ratio) * ratio, clamped to the table

    all in fp32; then each of the 512 is rounded once to bf16. The first 448 are quantised to e4m3 by the scale rule of
    ``contract/layouts.py``, one E8M0 scale for 64, and written with the 64 bf16 as its KV page has them; the eighth
    scale byte is 0. Scores are finite or -inf, kv is finite; else the entry is unspecified.

    DeepSeek's own model also rounds to bf16 before and after the norm. Engines do not, and this op does not.

    Args:
        positions: int64 or int32 ``[t]``, of each token in its request.
        requests: int32 ``[t]``, rows of ``block_table``.
        slots: int64 or int32 ``[t]``, ``page * page_size + offset``; -1 for tokens that write nothing.
        state: fp32 ``[state_pages, state_page_size, width]``; contiguous within a page, page stride free.
        block_table: int32 ``[r, blocks]``, pages of the state; rows may have a stride.
        norm_weight: bf16 or fp32 ``[512]``.
        eps: Added to the mean square; 0 or more.
        cos_sin: fp32 ``[max_positions, 64]``, 32 cosines, then 32 sines; rows may have a stride.
        ratio: Tokens of a window, 1 to 128. DeepSeek V4 has 4 with overlap and 128 without.
        k_cache: uint8 ``[pages, page_size, 584]`` or ``[pages, page_size, 1, 584]``, written in place; page-split,
            bytes contiguous within a page, page stride free.

    Returns:
        ``k_cache``.

    Raises:
        ContractError: an argument breaks the above.

    Source: vLLM ``compress_norm_rope_store_triton`` (head 512) and DeepSeek's ``Compressor``.
    """
    return _compress_norm_rope_insert(
        positions, requests, slots, state, block_table, norm_weight, eps, cos_sin, ratio, k_cache
    )


_indexer_compress_insert = _define(CONTRACTS["indexer_compress_insert"])


def indexer_compress_insert(
    positions: Tensor,
    requests: Tensor,
    slots: Tensor,
    state: Tensor,
    block_table: Tensor,
    norm_weight: Tensor,
    eps: float,
    cos_sin: Tensor,
    ratio: int,
    k_cache: Tensor,
    *,
    hadamard: bool = False,
) -> Tensor:
    """Write the indexer's key of every window that one of the tokens completes into its paged cache.

    Like ``compress_norm_rope_insert``, with 128 channels instead of 512: which tokens write, which rows are in a window
    (width 256 without overlap, 512 with it) and which of them are absent, softmax, norm, and the rotation of the last
    64 channels, in fp32. Then::

        k = bf16(rotated n)                                all 128 channels, rounded once
        k = bf16(H k * 128 ** -0.5)                        if ``hadamard``: H the Walsh-Hadamard matrix in Sylvester
                                                           order, the product in fp32

    and k is quantised to e4m3 by the scale rule of ``contract/layouts.py`` with one scale, a power of two, written as
    fp32 where the indexer's page has it.

    DeepSeek's own model has the Hadamard step in keys and queries (and FP4 instead of e4m3); engines omit it in both.
    Without quantisation the logits are the same. So ``indexer_q_rope_quant`` must have the ``hadamard`` of the keys.

    Args:
        positions: int64 or int32 ``[t]``, of each token in its request.
        requests: int32 ``[t]``, rows of ``block_table``.
        slots: int64 or int32 ``[t]``, ``page * page_size + offset``; -1 for tokens that write nothing.
        state: fp32 ``[state_pages, state_page_size, width]``; contiguous within a page, page stride free.
        block_table: int32 ``[r, blocks]``, pages of the state; rows may have a stride.
        norm_weight: bf16 or fp32 ``[128]``.
        eps: Added to the mean square; 0 or more.
        cos_sin: fp32 ``[max_positions, 64]``, 32 cosines, then 32 sines; rows may have a stride.
        ratio: Tokens of a window, 1 to 128. DeepSeek V4 has 4 with overlap.
        k_cache: uint8 ``[pages, page_size, 132]`` or ``[pages, page_size, 1, 132]``, written in place; page-split,
            bytes contiguous within a page, page stride free.
        hadamard: Transform the key before it is quantised.

    Returns:
        ``k_cache``.

    Raises:
        ContractError: an argument breaks the above.

    Source: vLLM ``compress_norm_rope_store_triton`` (head 128) and DeepSeek's ``Compressor`` with ``rotate``.
    """
    return _indexer_compress_insert(
        positions, requests, slots, state, block_table, norm_weight, eps, cos_sin, ratio, k_cache, hadamard=hadamard
    )


_fp8_einsum = _define(CONTRACTS["fp8_einsum"])


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
    return _fp8_einsum(x, x_scale, w, w_scale, out=out)


_inverse_rope_quant = _define(CONTRACTS["inverse_rope_quant"])


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
    return _inverse_rope_quant(x, positions, cos_sin, groups, packed=packed)


_inverse_rope = _define(CONTRACTS["inverse_rope"])


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
    return _inverse_rope(x, positions, cos_sin, groups)


_hc_prenorm_gemm = _define(CONTRACTS["hc_prenorm_gemm"])


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
    return _hc_prenorm_gemm(x, fn, num_splits=num_splits, out=out, sqr_sum=sqr_sum)


# end of generated

_not_written = {op: _define(contract) for op, contract in CONTRACTS.items() if op not in globals()}


def __getattr__(name: str) -> Any:
    if name in _not_written:
        return _not_written[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
