"""The lightning indexer: its queries, quantised, its logits over contiguous keys (prefill) and over the paged key cache
(decode), and the keys with the largest logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..arguments import Args, Form, Rule, ScalarArg, TensorArg, Values, tensor

if TYPE_CHECKING:
    from torch import Tensor

INDEX_DIM = 128
"""Dimensions of a query that is rotated and quantised."""
MOST_TOPK = 2048
"""Keys that can be selected for a query."""


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
    import torch

    q_fp8 = torch.empty(q.shape, dtype=torch.float8_e4m3fn, device=q.device)
    return q_fp8, torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)


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
    import torch

    if out is not None:
        return out
    width = k.shape[0] if max_seqlen_k is None else max_seqlen_k
    return torch.empty((q.shape[0], width), dtype=torch.float32, device=q.device)


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
    import torch

    if out is not None:
        return out
    rows = q.shape[0] * q.shape[1]
    return torch.empty((rows, max_context_len), dtype=torch.float32, device=q.device)


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
    import torch

    return torch.empty((q.shape[0], topk), dtype=torch.int32, device=q.device) if out is None else out


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
    import torch

    rows = q.shape[0] * q.shape[1]
    return torch.empty((rows, topk), dtype=torch.int32, device=q.device) if out is None else out


Q_ARGS: Args = {
    "q": tensor("bfloat16", "t, h, 128", "queries"),
    "positions": tensor("int64 int32", "t", "position of each token", layout="vector"),
    "cos_sin": tensor("float32", "max_positions, 64", "32 cosines, then 32 sines"),
    "weights": tensor("bfloat16 float32", "t, h", "weight of each head"),
    "scale": ScalarArg("float", about="factor of all weights"),
    "hadamard": ScalarArg("bool", about="transform the queries"),
}
Q_RULES = (
    Rule("q", "h > 0", "at least one head"),
    Rule("cos_sin", "max_positions > 0", "at least one position"),
)
Q_VALUES = (Values("positions", "0", "max_positions - 1", "clamped"),)

MQA_ARGS: Args = {
    "q": tensor("float8_e4m3fn", "m, h, d", "queries, scale folded into weights"),
    "k": tensor("float8_e4m3fn", "n, d", "keys"),
    "k_scale": tensor("float32", "n", "one scale per key", layout="vector"),
    "weights": tensor("float32", "m, h", "weight of each head"),
    "row_starts": tensor("int32", "m", "first key of a row", layout="vector"),
    "row_ends": tensor("int32", "m", "one past its last key", layout="vector"),
    "max_seqlen_k": ScalarArg("int", 0, about="columns of the compressed form"),
    "out": TensorArg(
        (
            Form("float32", "m, n", when="max_seqlen_k is None"),
            Form("float32", "m, max_seqlen_k", when="max_seqlen_k is not None"),
        ),
        about="result buffer",
    ),
}
MQA_RULES = (Rule("q", "h > 0 and d > 0", "at least one head and one dimension"),)
MQA_VALUES = (
    Values("row_starts", "0", "n", "clamped"),
    Values("row_ends", "row_starts", "n", "clamped; below its start: an empty row"),
)

PAGED_ARGS: Args = {
    "q": tensor("float8_e4m3fn", "b, next_n, h, d", "queries, scale folded into weights"),
    "k_cache": tensor(
        "uint8",
        "pages, page_size, d + 4 | pages, page_size, 1, d + 4",
        "indexer keys, page-split",
        layout="page",
    ),
    "weights": tensor("float32", "b * next_n, h", "weight of each head"),
    "context_lens": tensor("int32", "b, next_n | b", "keys of each row", layout="vector"),
    "block_table": tensor("int32", "b, blocks", "pages of each request"),
    "max_context_len": ScalarArg("int", 0, about="columns of the result"),
    "out": tensor("float32", "b * next_n, max_context_len", "result buffer"),
}
PAGED_RULES = (
    Rule("q", "h > 0 and d > 0 and next_n > 0", "at least one token, one head and one dimension"),
    Rule("k_cache", "page_size > 0", "at least one token in a page"),
    Rule("k_cache", "_stride[0] % 4 == 0 or pages <= 1", "a page stride that is a multiple of 4"),
    Rule("k_cache", "page_size * (d + 4) < 2**31", "pages of less than 2 GiB"),
)
PAGED_VALUES = (
    Values("context_lens", "0", "min(max_context_len, page_size * blocks)", "clamped"),
    Values("block_table", "0", "pages - 1", "keys of -inf", used="ceil(context_lens, page_size)"),
)

_TOPK = ScalarArg("int", 1, about="keys to select for a row")
_TOPK_RULE = Rule("topk", f"topk <= {MOST_TOPK}", f"at most {MOST_TOPK}")
TOPK_ARGS: Args = {
    **{name: arg for name, arg in MQA_ARGS.items() if name not in ("max_seqlen_k", "out")},
    "topk": _TOPK,
    "max_seqlen_k": ScalarArg("int", 0, about="the most keys of a row"),
    "out": tensor("int32", "m, topk", "result buffer"),
}
TOPK_RULES = (*MQA_RULES, _TOPK_RULE)
PAGED_TOPK_ARGS: Args = {
    **{name: arg for name, arg in PAGED_ARGS.items() if name != "out"},
    "topk": _TOPK,
    "out": tensor("int32", "b * next_n, topk", "result buffer"),
}
PAGED_TOPK_RULES = (*PAGED_RULES, _TOPK_RULE)
