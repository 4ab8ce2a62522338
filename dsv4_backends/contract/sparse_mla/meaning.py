"""Sparse multi-head latent attention: prefill over bf16 keys, decode over the packed FP8 cache, and the cache's entries
as bf16 keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..arguments import Args, Rule, ScalarArg, Values, tensor

if TYPE_CHECKING:
    from torch import Tensor

HEAD_DIM = 512
MAX_HEADS = 128


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
    import torch

    s_q, h_q, _ = q.shape
    result = torch.empty((s_q, h_q, HEAD_DIM), dtype=torch.bfloat16, device=q.device) if out is None else out
    max_logits = torch.empty((s_q, h_q), dtype=torch.float32, device=q.device)
    return result, max_logits, torch.empty_like(max_logits)


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
    import torch

    b, s_q, h_q, _ = q.shape
    shape = (b, s_q, h_q, HEAD_DIM)
    result = torch.empty(shape, dtype=torch.bfloat16, device=q.device) if out is None else out
    return result, torch.empty((b, s_q, h_q), dtype=torch.float32, device=q.device)


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
    return out


_CACHE = "pages, page_size, 584 | pages, page_size, 1, 584"
_EXTRA = "extra_pages, extra_page_size, 584 | extra_pages, extra_page_size, 1, 584"
_BYTES = "uint8 int8 float8_e4m3fn"
_HEADS = Rule("q", f"0 < h_q <= {MAX_HEADS}", f"1 to {MAX_HEADS} heads")
_NO_KEY, _CLAMPED = "no key", "clamped"

PREFILL_ARGS: Args = {
    "q": tensor("bfloat16", "s_q, h_q, 512", "queries"),
    "kv": tensor("bfloat16", "s_kv, 512 | s_kv, 1, 512", "keys, also the values"),
    "indices": tensor("int32", "s_q, topk | s_q, 1, topk", "rows of kv; outside [0, s_kv) is invalid"),
    "sm_scale": ScalarArg("float", about="softmax scale"),
    "attn_sink": tensor("float32", "h_q", "natural log, denominator only", layout="vector"),
    "topk_length": tensor("int32", "s_q", "entries of a row that count", layout="vector"),
    "out": tensor("bfloat16", "s_q, h_q, 512", "result buffer"),
}
PREFILL_RULES = (_HEADS,)
PREFILL_VALUES = (
    Values("topk_length", "0", "topk", _CLAMPED),
    Values("indices", "-1", "s_kv - 1", _NO_KEY, used="topk_length"),
)

DECODE_ARGS: Args = {
    "q": tensor("bfloat16", "b, s_q, h_q, 512", "queries"),
    "k_cache": tensor(_BYTES, _CACHE, "packed FP8 cache, page-split", layout="page"),
    "indices": tensor("int32", "b, s_q, topk", "slots; outside [0, pages * page_size) is invalid"),
    "sm_scale": ScalarArg("float", about="softmax scale"),
    "attn_sink": tensor("float32", "h_q", "natural log, denominator only", layout="vector"),
    "topk_length": tensor("int32", "b", "entries of a row that count", layout="vector"),
    "extra_k_cache": tensor(_BYTES, _EXTRA, "second scope's cache", layout="page"),
    "extra_indices": tensor("int32", "b, s_q, extra_topk", "second scope's slots"),
    "extra_topk_length": tensor("int32", "b", "second scope's lengths", layout="vector"),
    "out": tensor("bfloat16", "b, s_q, h_q, 512", "result buffer"),
}
DECODE_RULES = (
    _HEADS,
    Rule("k_cache", "page_size > 0", "at least one token in a page"),
    Rule("extra_k_cache", "extra_k_cache is None or extra_page_size > 0", "at least one token in a page"),
    Rule("k_cache", "page_size * 584 < 2**31", "pages of less than 2 GiB"),
    Rule(
        "extra_k_cache",
        "extra_k_cache is None or extra_page_size * 584 < 2**31",
        "pages of less than 2 GiB",
    ),
    Rule(
        "extra_indices",
        "(extra_k_cache is None) == (extra_indices is None)",
        "extra_k_cache and extra_indices together, or neither",
    ),
    Rule(
        "extra_topk_length",
        "extra_topk_length is None or extra_k_cache is not None",
        "extra_k_cache wherever extra_topk_length is given",
    ),
)
DECODE_VALUES = (
    Values("topk_length", "0", "topk", _CLAMPED),
    Values("indices", "-1", "pages * page_size - 1", _NO_KEY, used="topk_length"),
    Values("extra_topk_length", "0", "extra_topk", _CLAMPED),
    Values("extra_indices", "-1", "extra_pages * extra_page_size - 1", _NO_KEY, used="extra_topk_length"),
)

GATHER_ARGS: Args = {
    "k_cache": tensor(_BYTES, _CACHE, "packed FP8 cache, page-split", layout="page"),
    "seq_lens": tensor("int32", "r", "entries of each request", layout="vector"),
    "block_table": tensor("int32", "r, blocks", "pages of each request"),
    "out": tensor("bfloat16", "r, m, 512", "workspace, written in place"),
    "gather_lens": tensor("int32", "r", "how many entries, from the end", layout="vector"),
    "offset": ScalarArg("int", 0, about="first row that is written"),
}
GATHER_RULES = (
    Rule("k_cache", "page_size > 0", "at least one token in a page"),
    Rule("k_cache", "page_size * 584 < 2**31", "pages of less than 2 GiB"),
)
GATHER_VALUES = (
    Values("seq_lens", "0", "page_size * blocks", _CLAMPED),
    Values("gather_lens", "0", "seq_lens", _CLAMPED),
    Values("block_table", "0", "pages - 1", "entries of 0", used="ceil(seq_lens, page_size)"),
)
