"""The compressor: a window of token states to one entry of a compressed cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..arguments import Args, Rule, ScalarArg, Values, tensor

if TYPE_CHECKING:
    from torch import Tensor

HEAD_DIM = 512
INDEX_DIM = 128
MAX_RATIO = 128


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
    return k_cache


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
    return k_cache


def _args(dim: int, entry: int) -> Args:
    return {
        "positions": tensor("int64 int32", "t", "position of each token in its request", layout="vector"),
        "requests": tensor("int32", "t", "rows of block_table", layout="vector"),
        "slots": tensor("int64 int32", "t", "slots of the cache; outside of it nothing is written", layout="vector"),
        "state": tensor("float32", "state_pages, state_page_size, width", "kv, then scores", layout="page"),
        "block_table": tensor("int32", "r, blocks", "pages of the state"),
        "norm_weight": tensor("bfloat16 float32", f"{dim}", "weight of the norm", layout="vector"),
        "eps": ScalarArg("float", about="added to the mean square"),
        "cos_sin": tensor("float32", "max_positions, 64", "32 cosines, then 32 sines"),
        "ratio": ScalarArg("int", 1, about="tokens of a window"),
        "k_cache": tensor(
            "uint8", f"pages, page_size, {entry} | pages, page_size, 1, {entry}", "written, page-split", layout="page"
        ),
    }


def _rules(dim: int, entry: int) -> tuple[Rule, ...]:
    wide = f"a width of {2 * dim} (without overlap) or {4 * dim} (with)"
    return (
        Rule("state", f"width == {2 * dim} or width == {4 * dim}", wide),
        Rule("state", "0 < state_page_size and state_page_size * width < 2**29", "pages of 1 token to 2 GiB"),
        Rule("eps", "eps >= 0", "0 or more"),
        Rule("cos_sin", "max_positions > 0", "at least one position"),
        Rule("ratio", f"ratio <= {MAX_RATIO}", f"1 to {MAX_RATIO} tokens of a window"),
        Rule("k_cache", "page_size > 0", "at least one entry in a page"),
        Rule("k_cache", f"page_size * {entry} < 2**31", "pages of less than 2 GiB"),
    )


_NOTHING = "nothing is written"

MAIN_ARGS = _args(HEAD_DIM, 584)
MAIN_RULES = _rules(HEAD_DIM, 584)
INDEXER_ARGS: Args = {**_args(INDEX_DIM, 132), "hadamard": ScalarArg("bool", about="transform before quantising")}
INDEXER_RULES = _rules(INDEX_DIM, 132)
VALUES = (
    Values("positions", "0", "max_positions - 1", f"below: {_NOTHING}; above: rotated as the table's last position"),
    Values("requests", "-1", "r - 1", _NOTHING),
    Values("slots", "-1", "pages * page_size - 1", _NOTHING),
)
