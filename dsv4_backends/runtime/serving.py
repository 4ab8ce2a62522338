"""The calls that serving a model makes on one rank, as arguments without storage.

Shapes decide everything in this package, so tensors of the meta device are enough to ask who would serve a call, what
it would compile, and how much memory it would take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..contract.models import Rank

WINDOW_PAGE = 64
"""Tokens in a page of the window's cache, and keys in one of the indexer's."""
BLOCK = 256
"""Tokens of context that one page of a compressed cache stands for: 64 keys at ratio 4, 2 at ratio 128."""
TOPK_MULTIPLE = 128
"""Engines round the number of indices of a row up to this."""
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """How far a server goes.

    Attributes:
        max_tokens: Query tokens of one step: the prefill chunk, or the tokens of a decode batch if that is more.
        max_requests: Requests of one decode step.
        max_context: Tokens of the longest context.
        next_n: Most tokens of one request in a decode step: 1, or more with speculative decoding.
        heads: Heads of an attention call; 0: the rank's own. vLLM pads them to 64 or 128.

    Raises:
        ValueError: a limit that is no int, or below 1 (``heads``: below 0).
    """

    max_tokens: int = 8192
    max_requests: int = 256
    max_context: int = 131072
    next_n: int = 1
    heads: int = 0

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_requests", "max_context", "next_n", "heads"):
            least = int(name != "heads")
            value = getattr(self, name)
            if not isinstance(value, int):
                raise ValueError(f"{name}: expected an int, got {value!r}")
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _meta(dtype: str, *shape: int) -> Any:
    import torch

    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


def prefill(heads: int, tokens: int, keys: int, topk: int, *, lengths: bool = True, sink: bool = True) -> Arguments:
    """``sparse_mla_prefill`` of ``tokens`` queries over ``keys`` gathered keys."""
    return {
        "q": _meta("bfloat16", tokens, heads, 512),
        "kv": _meta("bfloat16", keys, 1, 512),
        "indices": _meta("int32", tokens, 1, topk),
        "sm_scale": 512**-0.5,
        "attn_sink": _meta("float32", heads) if sink else None,
        "topk_length": _meta("int32", tokens) if lengths else None,
    }


def decode(heads: int, b: int, s_q: int, window: int, extra: tuple[int, int] | None) -> Arguments:
    """``sparse_mla_decode``; ``extra`` has the indices and the page size of the second scope."""
    from ..contract.layouts import KV_BYTES

    made = {
        "q": _meta("bfloat16", b, s_q, heads, 512),
        "k_cache": _meta("uint8", 1024, WINDOW_PAGE, 1, KV_BYTES),
        "indices": _meta("int32", b, s_q, window),
        "sm_scale": 512**-0.5,
        "attn_sink": _meta("float32", heads),
        "topk_length": _meta("int32", b),
    }
    if extra is not None:
        made["extra_k_cache"] = _meta("uint8", 1024, extra[1], 1, KV_BYTES)
        made["extra_indices"] = _meta("int32", b, s_q, extra[0])
        made["extra_topk_length"] = _meta("int32", b)
    return made


def mqa(rank: Rank, tokens: int, keys: int, *, compressed: bool = True) -> Arguments:
    """``mqa_logits``."""
    h, d = rank.model.index_heads, rank.model.index_dim
    return {
        "q": _meta("float8_e4m3fn", tokens, h, d),
        "k": _meta("float8_e4m3fn", keys, d),
        "k_scale": _meta("float32", keys),
        "weights": _meta("float32", tokens, h),
        "row_starts": _meta("int32", tokens),
        "row_ends": _meta("int32", tokens),
        "max_seqlen_k": keys if compressed else None,
    }


def paged(rank: Rank, b: int, next_n: int, keys: int) -> Arguments:
    """``paged_mqa_logits``."""
    from ..contract.layouts import INDEXER_SCALE_BYTES

    h, d = rank.model.index_heads, rank.model.index_dim
    return {
        "q": _meta("float8_e4m3fn", b, next_n, h, d),
        "k_cache": _meta("uint8", 1024, WINDOW_PAGE, 1, d + INDEXER_SCALE_BYTES),
        "weights": _meta("float32", b * next_n, h),
        "context_lens": _meta("int32", b, next_n),
        "block_table": _meta("int32", b, -(-keys // WINDOW_PAGE)),
        "max_context_len": keys,
    }


def einsum(rank: Rank, tokens: int, *, packed: bool = False, token_minor: bool = True) -> Arguments:
    """``fp8_einsum``: fp32 scales, or packed E8M0 per row as engines keep them from compute capability 10 on."""
    groups, inner, width = rank.o_groups, rank.o_in, rank.model.o_lora_rank
    dtype, blocks = ("int32", -(-inner // 512)) if packed else ("float32", -(-inner // 128))
    if token_minor:
        x_scale = _meta(dtype, groups, blocks, round_up(tokens, 4))[..., :tokens].permute(2, 0, 1)
    else:
        x_scale = _meta(dtype, tokens, groups, blocks)
    return {
        "x": _meta("float8_e4m3fn", groups, tokens, inner).transpose(0, 1),
        "x_scale": x_scale,
        "w": _meta("float8_e4m3fn", groups, width, inner),
        "w_scale": _meta(dtype, groups, width if packed else -(-width // 128), blocks),
    }


def hyper_connection(tokens: int, k: int, n: int, num_splits: int | None = None) -> Arguments:
    """``hc_prenorm_gemm``."""
    made = {"x": _meta("bfloat16", tokens, k), "fn": _meta("float32", n, k)}
    return made if num_splits is None else made | {"num_splits": num_splits}


def _counts(most: int) -> list[int]:
    """Token counts at which a launch configuration may change: the small ones, and both sides of round ones."""
    edges = {*range(64, 1025, 16), *range(1152, most + 1, 128)}
    return sorted(n for n in {*range(1, 65), *edges, *(edge + 1 for edge in edges), most} if n <= most)


def second_scope(rank: Rank, ratio: int, max_context: int) -> tuple[int, int] | None:
    """Most indices, and page size, of the second scope of decode in a layer that compresses ``ratio`` keys to one.

    A layer of ratio 0 has no second scope.
    """
    if ratio == 0:
        return None
    width = rank.model.index_topk if ratio == 4 else round_up(-(-max_context // ratio), TOPK_MULTIPLE)
    return width, BLOCK // ratio


def compressed_widths(rank: Rank, max_context: int) -> Iterator[tuple[int, int]]:
    """Indices and page size of the second scope of decode, for each kind of layer that the model has."""
    for ratio in (4, 128):
        if ratio in rank.model.compress_ratios and (scope := second_scope(rank, ratio, max_context)) is not None:
            most, page_size = scope
            # Of ratio 4 an engine takes all; of ratio 128 as many as the longest context of the step has.
            widths = range(most if ratio == 4 else TOPK_MULTIPLE, most + 1, TOPK_MULTIPLE)
            yield from ((width, page_size) for width in widths)


def connections(rank: Rank) -> tuple[tuple[str, int, int], ...]:
    """What asks for ``hc_prenorm_gemm``, with its k and n."""
    streams, hidden = rank.hc_k, rank.model.hidden
    return (
        ("hyper-connections", streams, rank.hc_n),
        ("first layer's streams", hidden, rank.hc_n),
        ("head's streams", streams, rank.model.hc_mult),
    )


def calls(op: str, rank: Rank, limits: Limits, *, packed_scales: bool = False) -> Iterator[Arguments]:
    """Arguments of every call of ``op`` that differs in what could be compiled for it.

    Args:
        op: One of ``dsv4_backends.OPS``.
        rank: The model and its tensor parallelism.
        limits: How far the server goes.
        packed_scales: The engine packs the scales of the output projection (compute capability 10 and newer).
    """
    model = rank.model
    heads = limits.heads or rank.heads
    tokens = _counts(limits.max_tokens)
    compressed = -(-limits.max_context // 4)
    widths = list(compressed_widths(rank, limits.max_context))
    makers: dict[str, Callable[[], Iterator[Arguments]]] = {
        "sparse_mla_prefill": lambda: (
            prefill(heads, t, limits.max_context, round_up(model.window + width, TOPK_MULTIPLE), lengths=n, sink=s)
            for width in sorted({0, widths[0][0], widths[-1][0]} if widths else {0})
            for n in (True, False)
            for s in (True, False)
            for t in tokens
        ),
        "sparse_mla_decode": lambda: (
            decode(heads, b, s_q, model.window, extra)
            for extra in (None, *widths)
            # An engine may give each token of a request a row of its own.
            for s_q in range(1, limits.next_n + 1)
            for b in range(1, limits.max_requests * (limits.next_n if s_q == 1 else 1) + 1)
        ),
        "mqa_logits": lambda: (mqa(rank, t, compressed, compressed=form) for form in (True, False) for t in tokens),
        "paged_mqa_logits": lambda: (
            paged(rank, b, next_n, compressed)
            for next_n in range(1, limits.next_n + 1)
            for b in range(1, limits.max_requests + 1)
        ),
        "fp8_einsum": lambda: (
            einsum(rank, t, packed=packed, token_minor=minor)
            for packed in sorted({False, packed_scales})
            for minor in (True, False)
            for t in tokens
        ),
        "hc_prenorm_gemm": lambda: (
            hyper_connection(t, k, n, splits)
            for _, k, n in connections(rank)
            for splits in (None, 2, 8, 32)
            for t in tokens
        ),
    }
    return makers[op]()
