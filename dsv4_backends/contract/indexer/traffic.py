"""The calls that serving makes of the indexer."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from ..inputs import PIECE, Draw
from ..models import Rank
from ..traffic import (
    BENCH_CONTEXT,
    INDEXER_RATIO,
    POSITIONS,
    WINDOW_PAGE,
    Arguments,
    Classes,
    Deployment,
    Need,
    Row,
    Shape,
    Traffic,
    long_tailed,
    meta,
    round_up,
)
from .meaning import INDEX_DIM

TOKENS = (1, 8, 32, 128, 1024, 4096, 8192)
CHUNKS = ((1, 4096), (37, 16384), (64, 4096), (512, 16384), (1024, 8192), (4096, 16384), (4096, 65536), (8192, 28672))
"""Queries of a chunk at the end of its context, and compressed keys."""
BATCHES = ((1, 16384, 1), (32, 16384, 1), (48, 16384, 2), (128, 4096, 1), (64, 65536, 1))
"""Requests, compressed keys of each, and tokens of each."""
WIDTH, WIDEST = 131072 // INDEXER_RATIO, 1048576 // INDEXER_RATIO
"""Columns of every request in an engine: the compressed keys of its longest context."""
SKEWED = (
    (1, WIDEST, 1, 3000, 1),
    (16, 131072, 1, 25000, 1),
    (64, WIDTH, 1, 7300, 1),
    (64, WIDTH, 2, 7300, 1),
    (48, WIDTH, 3, 7300, 1),
    (32, WIDEST, 4, 20000, 1),
    (256, 131072, 1, 9800, 1),
    (256, WIDEST, 1, 1500, 1),
)
"""Requests, columns, tokens of each, and the mean and the seed of the lengths. Few lengths are long."""

TOPK_CHUNKS = (
    (1, 32768), (64, 32768), (1024, 32768), (8192, 32768), (1, 65536), (64, 65536), (2048, 65536),
    (1, WIDEST), (16, WIDEST), (256, WIDEST), (8192, WIDEST),
)  # fmt: skip
"""Queries of a chunk at the end of its context, and compressed keys, of which some are selected."""
TOPK_BATCHES = (
    (1, WIDTH, 0), (8, WIDTH, 0), (64, WIDTH, 0), (1, 65536, 0), (16, 65536, 0), (64, 65536, 0),
    (1, WIDEST, 0), (8, WIDEST, 0), (64, WIDEST, 0), (64, WIDTH, 7300), (64, WIDEST, 20000),
)  # fmt: skip
"""Requests, columns, and the mean of long-tailed lengths; 0: all are full."""


def queries(rank: Rank, tokens: int, *, dtype: str = "int64", weights: str = "bfloat16") -> Arguments:
    """The queries of a step, in the layout of the projections' output."""
    h, d = rank.model.index_heads, rank.model.index_dim
    return {
        "q": meta("bfloat16", tokens, h, d),
        "positions": meta(dtype, tokens),
        "cos_sin": meta("float32", rank.model.max_positions, 64),
        "weights": meta(weights, tokens, h),
        "scale": (h * d) ** -0.5,
    }


def mqa(rank: Rank, tokens: int, keys: int, *, compressed: bool = True) -> Arguments:
    """``tokens`` queries over ``keys`` contiguous keys."""
    h, d = rank.model.index_heads, rank.model.index_dim
    return {
        "q": meta("float8_e4m3fn", tokens, h, d),
        "k": meta("float8_e4m3fn", keys, d),
        "k_scale": meta("float32", keys),
        "weights": meta("float32", tokens, h),
        "row_starts": meta("int32", tokens),
        "row_ends": meta("int32", tokens),
        "max_seqlen_k": keys if compressed else None,
    }


def paged(rank: Rank, b: int, next_n: int, keys: int) -> Arguments:
    """``next_n`` tokens of each of ``b`` requests over at most ``keys`` keys."""
    from ..layouts import INDEXER_SCALE_BYTES

    h, d = rank.model.index_heads, rank.model.index_dim
    return {
        "q": meta("float8_e4m3fn", b, next_n, h, d),
        "k_cache": meta("uint8", 1024, WINDOW_PAGE, 1, d + INDEXER_SCALE_BYTES),
        "weights": meta("float32", b * next_n, h),
        "context_lens": meta("int32", b, next_n),
        "block_table": meta("int32", b, -(-keys // WINDOW_PAGE)),
        "max_context_len": keys,
    }


def topk(rank: Rank, tokens: int, keys: int, *, compressed: bool = True) -> Arguments:
    """As ``mqa``, with the number of keys to select."""
    return mqa(rank, tokens, keys, compressed=compressed) | {"topk": rank.model.index_topk}


def paged_topk(rank: Rank, b: int, next_n: int, keys: int) -> Arguments:
    """As ``paged``, with the number of keys to select."""
    return paged(rank, b, next_n, keys) | {"topk": rank.model.index_topk}


def _q_calls(server: Deployment) -> Iterator[Arguments]:
    for weights in ("bfloat16", "float32"):
        for dtype in POSITIONS:
            for tokens in server.tokens:
                yield queries(server.rank, tokens, dtype=dtype, weights=weights)
    for tokens in server.tokens:  # as in DeepSeek's own model
        yield queries(server.rank, tokens) | {"hadamard": True}


def _mqa_calls(server: Deployment) -> Iterator[Arguments]:
    for compressed in (True, False):
        for tokens in server.tokens:
            yield mqa(server.rank, tokens, server.compressed_keys, compressed=compressed)


def _paged_calls(server: Deployment) -> Iterator[Arguments]:
    for next_n in range(1, server.limits.next_n + 1):
        for b in server.batches:
            yield paged(server.rank, b, next_n, server.compressed_keys)


def _topk_calls(server: Deployment) -> Iterator[Arguments]:
    for call in _mqa_calls(server):
        yield call | {"topk": server.model.index_topk}


def _paged_topk_calls(server: Deployment) -> Iterator[Arguments]:
    for call in _paged_calls(server):
        yield call | {"topk": server.model.index_topk}


def _sizes(server: Deployment) -> dict[str, int]:
    return {"h": server.model.index_heads, "d": server.model.index_dim, "n": server.compressed_keys}


def _q_needs(server: Deployment) -> Iterator[Need]:
    if INDEXER_RATIO in server.model.compress_ratios:
        for step, tokens in server.steps:
            sizes = {"t": tokens, "h": server.model.index_heads}
            make = functools.partial(queries, server.rank, tokens)
            yield Need("indexer_q_rope_quant", f"indexer queries, {step}", sizes, make)


def _mqa_needs(server: Deployment) -> Iterator[Need]:
    if INDEXER_RATIO in server.model.compress_ratios:
        tokens = server.limits.max_tokens
        make = functools.partial(mqa, server.rank, tokens, server.compressed_keys)
        yield Need("mqa_logits", "indexer, prefill", {"m": tokens, **_sizes(server)}, make)


def _paged_needs(server: Deployment) -> Iterator[Need]:
    if INDEXER_RATIO in server.model.compress_ratios:
        b, next_n = server.limits.max_requests, server.limits.next_n
        sizes = {"b": b, "next_n": next_n, **_sizes(server), "page_size": WINDOW_PAGE}
        make = functools.partial(paged, server.rank, b, next_n, server.compressed_keys)
        yield Need("paged_mqa_logits", "indexer, decode", sizes, make)


def _topk_needs(server: Deployment) -> Iterator[Need]:
    if INDEXER_RATIO in server.model.compress_ratios:
        tokens = server.limits.max_tokens
        make = functools.partial(topk, server.rank, tokens, server.compressed_keys)
        sizes = {"m": tokens, **_sizes(server), "topk": server.model.index_topk}
        yield Need("indexer_topk", "indexer selection, prefill", sizes, make)


def _paged_topk_needs(server: Deployment) -> Iterator[Need]:
    if INDEXER_RATIO in server.model.compress_ratios:
        b, next_n = server.limits.max_requests, server.limits.next_n
        sizes = {"b": b, "next_n": next_n, **_sizes(server), "page_size": WINDOW_PAGE, "topk": server.model.index_topk}
        make = functools.partial(paged_topk, server.rank, b, next_n, server.compressed_keys)
        yield Need("paged_indexer_topk", "indexer selection, decode", sizes, make)


def _q_class(q: Shape, positions: Shape) -> tuple[str, int]:
    return f"h={q[1]}", q[0]


def _mqa_class(q: Shape, k: Shape) -> tuple[str, int]:
    return f"h={q[1]} d={q[2]}", q[0] * k[0]


def _paged_class(q: Shape, k_cache: Shape) -> tuple[str, int]:
    return f"h={q[2]} d={q[3]}", q[0] * q[1]


def _q_shapes(row: Mapping[str, Any]) -> tuple[Shape, Shape]:
    return (row["t"], row["h"], INDEX_DIM), (row["t"],)


def _mqa_shapes(row: Mapping[str, Any]) -> tuple[Shape, Shape]:
    return (row["m"], row["h"], row["d"]), (row["n"], row["d"])


def _paged_shapes(row: Mapping[str, Any]) -> tuple[Shape, Shape]:
    return (row["b"], row.get("next_n", 1), row["h"], row["d"]), ()


def _q_rows(label: str, rank: Rank) -> Iterator[Row]:
    h = rank.model.index_heads
    for t in TOKENS:
        yield Row("indexer_q_rope_quant", f"t={t} h={h}", {"t": t, "h": h})


def _mqa_rows(label: str, rank: Rank) -> Iterator[Row]:
    h, d = rank.model.index_heads, rank.model.index_dim
    for m, n in CHUNKS:
        params = {"m": m, "n": n, "h": h, "d": d}
        yield Row("mqa_logits", f"m={m} n={n} h={h} d={d}", params)
        yield Row("mqa_logits", f"m={m} n={n} h={h} d={d} compressed", {**params, "compressed": True})


def _paged_rows(label: str, rank: Rank) -> Iterator[Row]:
    h, d = rank.model.index_heads, rank.model.index_dim
    for b, keys, next_n in BATCHES:
        tokens = f"next_n={next_n} " if next_n > 1 else ""
        params = {"b": b, "next_n": next_n, "keys": keys, "h": h, "d": d}
        yield Row("paged_mqa_logits", f"b={b} {tokens}keys={keys} h={h} d={d}", params)
    for b, columns, next_n, mean, seed in SKEWED:
        lengths = f"lognormal mean {mean} seed {seed}"
        params = {"b": b, "next_n": next_n, "keys": columns, "mean": mean, "seed": seed, "h": h, "d": d}
        name = f"b={b} next_n={next_n} max_context_len={columns} lengths={lengths} h={h} d={d}"
        yield Row("paged_mqa_logits", name, params)


def _topk_rows(label: str, rank: Rank) -> Iterator[Row]:
    h, d, topk = rank.model.index_heads, rank.model.index_dim, rank.model.index_topk
    for m, n in TOPK_CHUNKS:
        yield Row(
            "indexer_topk", f"m={m} n={n} h={h} d={d} topk={topk}", {"m": m, "n": n, "h": h, "d": d, "topk": topk}
        )


def _paged_topk_rows(label: str, rank: Rank) -> Iterator[Row]:
    h, d, topk = rank.model.index_heads, rank.model.index_dim, rank.model.index_topk
    for b, keys, mean in TOPK_BATCHES:
        params = {"b": b, "keys": keys, "h": h, "d": d, "topk": topk} | ({"mean": mean, "seed": 1} if mean else {})
        lengths = f"max_context_len={keys} lengths=lognormal mean {mean} seed 1" if mean else f"keys={keys}"
        yield Row("paged_indexer_topk", f"b={b} {lengths} h={h} d={d} topk={topk}", params)


def _draw_q(draw: Draw, *, t: int, h: int) -> Arguments:
    """A chunk at the end of its context."""
    return {
        "q": draw.normal(t, h, INDEX_DIM, dtype="bfloat16"),
        "positions": BENCH_CONTEXT + draw.range(t),
        "cos_sin": draw.cos_sin(BENCH_CONTEXT + t),
        "weights": draw.normal(t, h, dtype="bfloat16"),
        "scale": (h * INDEX_DIM) ** -0.5,
    }


def _draw_mqa(draw: Draw, *, m: int, n: int, h: int, d: int, compressed: bool = False) -> Arguments:
    """A chunk at the end of its context: a key represents four tokens, and the last query sees them all."""
    k = draw.normal(n, d, dtype="float8_e4m3fn")
    ends = n - (m - 1 - draw.range(m)) // INDEXER_RATIO
    return {
        "q": draw.normal(m, h, d, dtype="float8_e4m3fn"),
        "k": k,
        "k_scale": draw.powers(n),
        "weights": draw.normal(m, h, scale=h**-0.5),
        "row_starts": draw.full(0, m),
        "row_ends": ends.int(),
        "max_seqlen_k": n if compressed else None,
    }


def _draw_paged(
    draw: Draw, *, b: int, keys: int, h: int, d: int, next_n: int = 1, mean: int = 0, seed: int = 0
) -> Arguments:
    """``next_n`` tokens of each request in tables and rows of ``keys`` columns. All contexts are full, or their lengths
    long-tailed with a mean; the last token sees them all. Entries of the table that no key needs are page 0."""
    import torch

    from .. import layouts

    lengths = torch.tensor(long_tailed(b, mean, keys, seed) if mean else [keys] * b, device=draw.device).unsqueeze(1)
    needed = draw.range(-(-keys // WINDOW_PAGE)) * WINDOW_PAGE < lengths
    dealt = draw.pages(1, int(needed.sum())).flatten()
    table = torch.zeros(needed.shape, dtype=torch.int32, device=draw.device)
    table[needed] = dealt.int()
    each = d + layouts.INDEXER_SCALE_BYTES
    stride = round_up(WINDOW_PAGE * each, layouts.PAGE_ALIGNMENT)
    raw = torch.zeros((dealt.numel(), stride), dtype=torch.uint8, device=draw.device)
    cache = raw.as_strided((dealt.numel(), WINDOW_PAGE, each), (stride, each, 1))
    for slots in draw.range(dealt.numel() * WINDOW_PAGE).split(4 * PIECE):
        layouts.write_indexer_keys(cache, slots, draw.normal(len(slots), d))
    return {
        "q": draw.normal(b, next_n, h, d, dtype="float8_e4m3fn"),
        "k_cache": cache,
        "weights": draw.normal(b * next_n, h, scale=h**-0.5),
        "context_lens": (lengths - draw.range(next_n).flip(0)).clamp(min=0).int(),
        "block_table": table,
        "max_context_len": keys,
    }


def _draw_topk(draw: Draw, *, topk: int, **params: Any) -> Arguments:
    return _draw_mqa(draw, **params) | {"topk": topk}


def _draw_paged_topk(draw: Draw, *, topk: int, **params: Any) -> Arguments:
    return _draw_paged(draw, **params) | {"topk": topk}


MQA = Traffic(
    calls=_mqa_calls,
    needs=_mqa_needs,
    classes=Classes((0, 1), "m * n", _mqa_class, _mqa_shapes),
    rows=_mqa_rows,
    tiny=(Row("mqa_logits", "tiny m=8 n=96", {"m": 8, "n": 96, "h": 8, "d": 64}),),
    draw=_draw_mqa,
)

PAGED = Traffic(
    calls=_paged_calls,
    needs=_paged_needs,
    classes=Classes((0, 1), "b * next_n", _paged_class, _paged_shapes),
    rows=_paged_rows,
    tiny=(
        Row("paged_mqa_logits", "tiny b=2 keys=100", {"b": 2, "keys": 100, "h": 8, "d": 64}),
        Row(
            "paged_mqa_logits",
            "tiny b=3 next_n=2 max_context_len=300 lengths=lognormal mean 50 seed 1",
            {"b": 3, "next_n": 2, "keys": 300, "mean": 50, "seed": 1, "h": 8, "d": 64},
        ),
    ),
    draw=_draw_paged,
    held=("k_cache",),
)

TOPK = Traffic(
    calls=_topk_calls,
    needs=_topk_needs,
    classes=Classes((0, 1), "m * n", _mqa_class, _mqa_shapes),
    rows=_topk_rows,
    tiny=(Row("indexer_topk", "tiny m=8 n=96 topk=16", {"m": 8, "n": 96, "h": 8, "d": 64, "topk": 16}),),
    draw=_draw_topk,
)

PAGED_TOPK = Traffic(
    calls=_paged_topk_calls,
    needs=_paged_topk_needs,
    classes=Classes((0, 1), "b * next_n", _paged_class, _paged_shapes),
    rows=_paged_topk_rows,
    tiny=(Row("paged_indexer_topk", "tiny b=2 keys=100 topk=16", {"b": 2, "keys": 100, "h": 8, "d": 64, "topk": 16}),),
    draw=_draw_paged_topk,
    held=("k_cache",),
)

Q = Traffic(
    calls=_q_calls,
    needs=_q_needs,
    classes=Classes((0, 1), "t", _q_class, _q_shapes),
    rows=_q_rows,
    tiny=(Row("indexer_q_rope_quant", "tiny t=3 h=8", {"t": 3, "h": 8}),),
    draw=_draw_q,
    held=("cos_sin",),
)
