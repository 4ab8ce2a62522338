"""The calls that serving makes of the compressors."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from ..inputs import Draw
from ..models import Model, Rank
from ..traffic import (
    BENCH_CONTEXT,
    BLOCK,
    INDEXER_RATIO,
    POSITIONS,
    Arguments,
    Classes,
    Deployment,
    Need,
    Row,
    Shape,
    Traffic,
    meta,
    round_up,
)
from .meaning import HEAD_DIM, INDEX_DIM

STATE_PAGES = {4: 4, 128: 8}
"""Tokens in a page of the state, by ratio: in engines such a page has the size of a page of the compressed cache."""
BATCHES = (1, 8, 32, 128)
CHUNKS = (1024, 4096, 8192)


def rows_of(ratio: int) -> int:
    """Rows of a window: a ratio-4 layer compresses with overlap."""
    return 2 * ratio if ratio == INDEXER_RATIO else ratio


def compress(
    dim: int, ratio: int, tokens: int, requests: int, context: int, max_positions: int, *, dtype: str = "int64"
) -> Arguments:
    """A step of ``tokens`` tokens in a layer that compresses ``ratio`` of them to one key of ``dim``."""
    page, overlap = STATE_PAGES[ratio], rows_of(ratio) // ratio
    return {
        "positions": meta(dtype, tokens),
        "requests": meta("int32", tokens),
        "slots": meta(dtype, tokens),
        "state": meta("float32", 1024, page, 2 * overlap * dim),
        "block_table": meta("int32", requests, -(-context // page)),
        "norm_weight": meta("bfloat16", dim),
        "eps": 1e-6,
        "cos_sin": meta("float32", max_positions, 64),
        "ratio": ratio,
        "k_cache": meta("uint8", 1024, BLOCK // ratio, _entry(dim)),
    }


def _entry(dim: int) -> int:
    from .. import layouts

    return layouts.KV_BYTES if dim == HEAD_DIM else dim + layouts.INDEXER_SCALE_BYTES


def _layers(model: Model, op: str) -> Iterator[tuple[int, int, str]]:
    """The ratios at which the model has such compressors, with the width of a key and the name of their users."""
    for ratio in (4, 128):
        if ratio in model.compress_ratios and op == "compress_norm_rope_insert":
            yield ratio, model.head_dim, f"ratio {ratio}"
        elif ratio in model.compress_ratios and ratio == INDEXER_RATIO:
            yield ratio, model.index_dim, "indexer"


def _arguments(server: Deployment, ratio: int, dim: int, tokens: int, dtype: str = "int64") -> Arguments:
    limits = server.limits
    most = server.model.max_positions
    return compress(dim, ratio, tokens, limits.max_requests, limits.max_context, most, dtype=dtype)


def _calls(op: str, server: Deployment) -> Iterator[Arguments]:
    for ratio, dim, _ in _layers(server.model, op):
        for dtype in POSITIONS:
            for norm in ("bfloat16", "float32"):
                for tokens in server.tokens:
                    made = _arguments(server, ratio, dim, tokens, dtype) | {"norm_weight": meta(norm, dim)}
                    yield made
                    if dim != HEAD_DIM:
                        yield made | {"hadamard": True}


def _needs(op: str, server: Deployment) -> Iterator[Need]:
    for step, tokens in server.steps:
        for ratio, dim, whose in _layers(server.model, op):
            sizes = {"t": tokens, "ratio": ratio, "page_size": BLOCK // ratio}
            make = functools.partial(_arguments, server, ratio, dim, tokens)
            yield Need(op, f"compressor, {whose}, {step}", sizes, make)


def _class(positions: Shape, state: Shape) -> tuple[str, int]:
    return f"width={state[2]}", positions[0]


def _shapes(row: Mapping[str, Any]) -> tuple[Shape, Shape]:
    dim, ratio = row["dim"], row["ratio"]
    return (row["t"],), (1, STATE_PAGES[ratio], 2 * rows_of(ratio) // ratio * dim)


def _rows(op: str, label: str, rank: Rank) -> Iterator[Row]:
    """All models have the same shapes here."""
    for ratio, dim, _ in _layers(rank.model, op):
        yield from (_row(op, f"decode t={t} ratio={ratio}", dim, ratio, t, t) for t in BATCHES)
        yield from (_row(op, f"chunk t={t} ratio={ratio}", dim, ratio, t, 1) for t in CHUNKS)


def _row(op: str, name: str, dim: int, ratio: int, t: int, requests: int) -> Row:
    return Row(op, name, {"t": t, "requests": requests, "ratio": ratio, "dim": dim})


def _draw(draw: Draw, *, t: int, requests: int, ratio: int, dim: int) -> Arguments:
    """A chunk of one request at the end of its context, or a token of each of many, at positions of which one in
    ``ratio`` (and one at least) completes a window.

    Each request has pages for its tokens and the window before them: engines free older ones.
    """
    import torch

    from .. import layouts

    page, rows = STATE_PAGES[ratio], rows_of(ratio)
    each = t // requests
    first = BENCH_CONTEXT + ratio * draw.range(requests) + (ratio - 1 - draw.range(requests) % ratio) * (each == 1)
    positions = (first.unsqueeze(1) + draw.range(each)).flatten()
    owner = draw.range(requests).repeat_interleave(each)
    kept = -(-(rows + ratio + each) // page) + 1
    table = torch.full((requests, -(-(BENCH_CONTEXT + ratio * requests + each) // page) + 1), -1, device=draw.device)
    last = (first + each - 1) // page
    table.scatter_(1, last.unsqueeze(1) - draw.range(kept), draw.pages(requests, kept))
    overlap = rows // ratio
    stride = round_up(page * 2 * overlap * dim * 4, layouts.PAGE_ALIGNMENT) // 4
    raw = draw.normal(requests * kept, stride)
    entry, page_size = _entry(dim), BLOCK // ratio
    pages = -(-(each // ratio + 1) // page_size)
    padded = round_up(page_size * entry, layouts.PAGE_ALIGNMENT)
    slots = draw.pages(requests, pages)[owner, (positions - first[owner]) // ratio // page_size] * page_size
    slots = slots + (positions - first[owner]) // ratio % page_size
    return {
        "positions": positions,
        "requests": owner.int(),
        "slots": torch.where((positions + 1) % ratio == 0, slots, -1),
        "state": raw.as_strided((requests * kept, page, 2 * overlap * dim), (stride, 2 * overlap * dim, 1)),
        "block_table": table.int(),
        "norm_weight": 1 + draw.normal(dim, scale=0.1).bfloat16(),
        "eps": 1e-6,
        "cos_sin": draw.cos_sin(BENCH_CONTEXT + ratio * requests + each),
        "ratio": ratio,
        "k_cache": torch.zeros((requests * pages, padded), dtype=torch.uint8, device=draw.device).as_strided(
            (requests * pages, page_size, entry), (padded, entry, 1)
        ),
    }


def _traffic(op: str, tiny: tuple[Row, ...]) -> Traffic:
    return Traffic(
        calls=functools.partial(_calls, op),
        needs=functools.partial(_needs, op),
        classes=Classes((0, 3), "t", _class, _shapes),
        rows=functools.partial(_rows, op),
        tiny=tiny,
        draw=_draw,
        held=("state", "norm_weight", "cos_sin", "k_cache"),
    )


MAIN = _traffic(
    "compress_norm_rope_insert",
    (
        _row("compress_norm_rope_insert", "tiny chunk t=16 ratio=4", HEAD_DIM, 4, 16, 1),
        _row("compress_norm_rope_insert", "tiny decode t=2 ratio=128", HEAD_DIM, 128, 2, 2),
    ),
)
INDEXER = _traffic(
    "indexer_compress_insert", (_row("indexer_compress_insert", "tiny chunk t=16 ratio=4", INDEX_DIM, 4, 16, 1),)
)
