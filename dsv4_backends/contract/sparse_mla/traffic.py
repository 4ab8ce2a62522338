"""The calls that serving makes of sparse MLA."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..inputs import PIECE, Draw
from ..models import Rank
from ..traffic import (
    BENCH_CONTEXT,
    BLOCK,
    INDEXER_RATIO,
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
from .meaning import HEAD_DIM

if TYPE_CHECKING:
    from torch import Tensor

TOPK_MULTIPLE = 128
"""Engines round the number of indices of a row up to this."""
FEW_KEYS = 256
"""Up to this many keys a prefill row attends to little more than its window."""
PREFILL_TOKENS = (512, 4096)
GATHERS = ((1, 2048), (1, 8192), (1, 32768), (4, 2048), (4, 8192), (4, 32768))
"""Requests of a prefill chunk, and entries of the longest of them."""
GATHERED = 4
"""Requests whose keys an engine gathers at a time."""
DECODE_BATCHES = (1, 8, 16, 32, 64, 128)
SKEWED = ((64, INDEXER_RATIO, 131072, 2000), (64, 128, 131072, 39200), (16, 128, 1048576, 100000))
"""Requests of a decode batch, the layer's ratio, the longest context that the engine admits, and the mean of the
contexts. Few of them are long. An engine's rows of indices are as wide as the longest context needs."""
FIRST_CHUNK = 4096
"""Tokens of a chunk that begins its context: its rows are as wide as any, and hold fewer keys."""


def prefill(heads: int, tokens: int, keys: int, topk: int, *, lengths: bool = True, sink: bool = True) -> Arguments:
    """``tokens`` queries over ``keys`` gathered keys."""
    return {
        "q": meta("bfloat16", tokens, heads, HEAD_DIM),
        "kv": meta("bfloat16", keys, 1, HEAD_DIM),
        "indices": meta("int32", tokens, 1, topk),
        "sm_scale": HEAD_DIM**-0.5,
        "attn_sink": meta("float32", heads) if sink else None,
        "topk_length": meta("int32", tokens) if lengths else None,
    }


def decode(heads: int, b: int, s_q: int, window: int, extra: tuple[int, int] | None) -> Arguments:
    """``extra`` has the indices and the page size of the second scope."""
    from ..layouts import KV_BYTES

    made = {
        "q": meta("bfloat16", b, s_q, heads, HEAD_DIM),
        "k_cache": meta("uint8", 1024, WINDOW_PAGE, 1, KV_BYTES),
        "indices": meta("int32", b, s_q, window),
        "sm_scale": HEAD_DIM**-0.5,
        "attn_sink": meta("float32", heads),
        "topk_length": meta("int32", b),
    }
    if extra is not None:
        made["extra_k_cache"] = meta("uint8", 1024, extra[1], 1, KV_BYTES)
        made["extra_indices"] = meta("int32", b, s_q, extra[0])
        made["extra_topk_length"] = meta("int32", b)
    return made


def second_scope(rank: Rank, ratio: int, max_context: int) -> tuple[int, int] | None:
    """Most indices, and page size, of the second scope of decode in a layer that compresses ``ratio`` keys to one.

    A layer of ratio 0 has no second scope.
    """
    if ratio == 0:
        return None
    most = -(-max_context // ratio)
    return rank.model.index_topk if ratio == INDEXER_RATIO else round_up(most, TOPK_MULTIPLE), BLOCK // ratio


def compressed_widths(rank: Rank, max_context: int) -> Iterator[tuple[int, int]]:
    """Indices and page size of the second scope of decode, for each kind of layer that the model has."""
    for ratio in (4, 128):
        if ratio in rank.model.compress_ratios and (scope := second_scope(rank, ratio, max_context)) is not None:
            most, page_size = scope
            # An engine takes all selected keys of ratio 4; of ratio 128 as many as the longest context of the step has.
            widths = range(most if ratio == INDEXER_RATIO else TOPK_MULTIPLE, most + 1, TOPK_MULTIPLE)
            yield from ((width, page_size) for width in widths)


def gather(r: int, entries: int, rows: int, page_size: int, *, given: bool = False) -> Arguments:
    """At most ``entries`` of each of ``r`` requests, into ``rows`` of the workspace."""
    from ..layouts import KV_BYTES

    return {
        "k_cache": meta("uint8", 1024, page_size, 1, KV_BYTES),
        "seq_lens": meta("int32", r),
        "block_table": meta("int32", r, -(-entries // page_size)),
        "out": meta("bfloat16", r, rows, HEAD_DIM),
        "gather_lens": meta("int32", r) if given else None,
    }


def _caches(server: Deployment) -> Iterator[tuple[str, int, int, bool]]:
    """The caches that a prefill chunk gathers from: their layers, entries and page size, and whether only the last
    entries are gathered.
    """
    limits = server.limits
    yield "window", min(limits.max_tokens + server.model.window, limits.max_context), WINDOW_PAGE, True
    for ratio in (INDEXER_RATIO, 128):
        if ratio in server.model.compress_ratios:
            yield f"ratio {ratio}", -(-limits.max_context // ratio), BLOCK // ratio, False


def _workspace_rows(server: Deployment) -> int:
    return max(entries for _, entries, _, _ in _caches(server)) + server.model.window + server.limits.max_tokens


def _gather_calls(server: Deployment) -> Iterator[Arguments]:
    for _, entries, page_size, _ in _caches(server):
        for given in (False, True):
            for r in server.batches:
                made = gather(r, entries, _workspace_rows(server), page_size, given=given)
                yield made
                yield made | {"offset": entries}


def _prefill_calls(server: Deployment) -> Iterator[Arguments]:
    context = server.limits.max_context
    widths = [width for width, _ in compressed_widths(server.rank, context)]
    for width in sorted({0, widths[0], widths[-1]} if widths else {0}):
        topk = round_up(server.model.window + width, TOPK_MULTIPLE)
        for lengths in (True, False):
            for sink in (True, False):
                for tokens in server.tokens:
                    yield prefill(server.heads, tokens, context, topk, lengths=lengths, sink=sink)


def _decode_calls(server: Deployment) -> Iterator[Arguments]:
    limits = server.limits
    for extra in (None, *compressed_widths(server.rank, limits.max_context)):
        for s_q in range(1, limits.next_n + 1):
            for b in server.rows if s_q == 1 else server.batches:
                yield decode(server.heads, b, s_q, server.model.window, extra)


def _scopes(server: Deployment) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """The kinds of layers that the model has, with their second scopes at the longest context."""
    ratios = server.model.compress_ratios
    speculative = server.limits.next_n > 1 and server.model.speculative_layers > 0
    for ratio in (0, 4, 128):
        if ratio in ratios or (ratio == 0 and speculative):
            name = f"ratio {ratio} layers" if ratio else "window layers" if ratio in ratios else "speculative layers"
            yield name, second_scope(server.rank, ratio, server.limits.max_context)


def _prefill_needs(server: Deployment) -> Iterator[Need]:
    heads, tokens, keys = server.heads, server.limits.max_tokens, server.limits.max_context
    for layers, extra in _scopes(server):
        topk = round_up(server.model.window + (extra[0] if extra else 0), TOPK_MULTIPLE)
        sizes = {"s_q": tokens, "h_q": heads, "topk": topk}
        make = functools.partial(prefill, heads, tokens, keys, topk)
        yield Need("sparse_mla_prefill", f"{layers}, prefill", sizes, make)


def _decode_needs(server: Deployment) -> Iterator[Need]:
    heads, b, s_q, window = server.heads, server.limits.max_requests, server.limits.next_n, server.model.window
    for layers, extra in _scopes(server):
        sizes = {"b": b, "s_q": s_q, "h_q": heads, "topk": window, "page_size": WINDOW_PAGE}
        sizes |= {"extra_topk": extra[0], "extra_page_size": extra[1]} if extra else {}
        make = functools.partial(decode, heads, b, s_q, window, extra)
        yield Need("sparse_mla_decode", f"{layers}, decode", sizes, make)


def _gather_needs(server: Deployment) -> Iterator[Need]:
    r = min(GATHERED, server.limits.max_requests)
    rows = _workspace_rows(server)
    for keys, entries, page_size, given in _caches(server):
        sizes = {"r": r, "entries": entries, "m": rows, "page_size": page_size}
        make = functools.partial(gather, r, entries, rows, page_size, given=given)
        yield Need("gather_dequant_kv", f"keys, {keys}, prefill", sizes, make)


def _gather_class(k_cache: Shape, out: Shape) -> tuple[str, int]:
    return "all", out[0] * out[1]


def _gather_shapes(row: Mapping[str, Any]) -> tuple[Shape, Shape]:
    return (), (row["r"], row["entries"], HEAD_DIM)


def _prefill_class(q: Shape, indices: Shape) -> tuple[str, int]:
    return f"h_q={q[1]} topk{'<=' if indices[-1] <= FEW_KEYS else '>'}{FEW_KEYS}", q[0]


def _decode_class(q: Shape, indices: Shape) -> tuple[str, int]:
    return f"h_q={q[2]}", q[0] * q[1]


def _prefill_shapes(row: Mapping[str, Any]) -> tuple[Shape, Shape]:
    return (row["s_q"], row["h_q"], HEAD_DIM), (row["s_q"], row.get("width", row["window"] + row["selected"]))


def _decode_shapes(row: Mapping[str, Any]) -> tuple[Shape, Shape]:
    return (row["b"], row["s_q"], row["h_q"], HEAD_DIM), (row["b"], row["s_q"], row["window"])


def _prefill_rows(label: str, rank: Rank) -> Iterator[Row]:
    heads, window, selected = rank.heads, rank.model.window, rank.model.index_topk
    for s_q in PREFILL_TOKENS:
        common = {"s_q": s_q, "h_q": heads, "window": window}
        name = f"{label} s_q={s_q} h={heads} topk={window + selected}"
        compressed = BENCH_CONTEXT // INDEXER_RATIO
        yield Row("sparse_mla_prefill", name, {**common, "selected": selected, "compressed": compressed})
        if 0 in rank.model.compress_ratios:
            name = f"{label} window only s_q={s_q} h={heads} topk={window}"
            yield Row("sparse_mla_prefill", name, {**common, "selected": 0, "compressed": 0})
    s_q, common = FIRST_CHUNK, {"s_q": FIRST_CHUNK, "h_q": heads, "window": window}
    name = f"{label} first chunk s_q={s_q} h={heads} topk={window + selected}"
    params = {"selected": selected, "compressed": s_q // INDEXER_RATIO, "start": 0}
    yield Row("sparse_mla_prefill", name, {**common, **params})
    keys = BENCH_CONTEXT // 128
    width = window + 2 * keys
    name = f"{label} ratio=128 s_q={s_q} h={heads} topk={width} of which {window + keys}"
    yield Row("sparse_mla_prefill", name, {**common, "selected": keys, "compressed": keys, "width": width})


def _decode_rows(label: str, rank: Rank) -> Iterator[Row]:
    heads, window, selected = rank.heads, rank.model.window, rank.model.index_topk
    for b, s_q in (*((b, 1) for b in DECODE_BATCHES), (32, 2)):
        name = f"{label} b={b} {f's_q={s_q} ' if s_q > 1 else ''}h={heads} topk={window}+{selected}"
        params = {"b": b, "s_q": s_q, "h_q": heads, "window": window}
        params |= {"selected": selected, "compressed": BENCH_CONTEXT // INDEXER_RATIO}
        yield Row("sparse_mla_decode", name, params)
    for b, ratio, most, mean in SKEWED:
        scope = second_scope(rank, ratio, most)
        assert scope is not None
        contexts = f"contexts=lognormal mean {mean} seed 1"
        name = f"{label} b={b} h={heads} ratio={ratio} topk={window}+{scope[0]} {contexts}"
        params = {"b": b, "s_q": 1, "h_q": heads, "window": window, "selected": scope[0], "compressed": most // ratio}
        yield Row("sparse_mla_decode", name, params | {"ratio": ratio, "mean": mean, "seed": 1})


def _gather_rows(label: str, rank: Rank) -> Iterator[Row]:
    for r, entries in GATHERS:
        yield Row("gather_dequant_kv", f"r={r} entries={entries}", {"r": r, "entries": entries})


def _draw_gather(draw: Draw, *, r: int, entries: int) -> Arguments:
    """The first request has all entries, every further one half as many as the one before."""
    import torch

    table = draw.pages(r, -(-entries // WINDOW_PAGE))
    rows = (r, entries, HEAD_DIM)
    return {
        "k_cache": _draw_cache(draw, table.numel()),
        "seq_lens": draw.full(entries, r) // 2 ** draw.range(r).int(),
        "block_table": table.int(),
        "out": torch.zeros(rows, dtype=torch.bfloat16, device=draw.device),
    }


def _selected(draw: Draw, keys: Tensor, *shape: int) -> Tensor:
    """Numbers of keys below ``keys`` for each row: drawn, or all in order where they fit. Further places have any."""
    import torch

    place = draw.range(shape[-1])
    drawn = draw.integers(0, 1 << 30, *shape) % keys.clamp(min=1)
    return torch.where(keys <= shape[-1], torch.minimum(place, (keys - 1).clamp(min=0)), drawn)


def _draw_prefill(
    draw: Draw,
    *,
    s_q: int,
    h_q: int,
    window: int,
    selected: int,
    compressed: int,
    start: int = BENCH_CONTEXT,
    width: int = 0,
) -> Arguments:
    """A chunk of ``s_q`` tokens that begins at ``start``. Keys: the compressed ones of the context, the window before
    the chunk, its own. Where rows of ``width`` hold fewer keys, these come first and their number is given."""
    import torch

    kv = draw.normal(compressed + window + s_q, HEAD_DIM, dtype="bfloat16")
    back = draw.range(window) + 1 - window
    near = compressed + window + draw.range(s_q).unsqueeze(1) + back
    seen = (draw.full(compressed, s_q) if start else (draw.range(s_q) + 1) // INDEXER_RATIO).unsqueeze(1)
    far = _selected(draw, seen, s_q, selected)
    indices = torch.cat([near, far], 1)
    arguments = {
        "q": draw.normal(s_q, h_q, HEAD_DIM, dtype="bfloat16"),
        "kv": kv,
        "indices": indices.int(),
        "sm_scale": HEAD_DIM**-0.5,
        "attn_sink": draw.normal(h_q),
    }
    if start and not width:
        return arguments
    inside = start + draw.range(s_q).unsqueeze(1) + back >= 0
    valid = torch.cat([inside, draw.range(selected) < seen], 1)
    first = valid.int().argsort(dim=1, descending=True, stable=True)
    rows = draw.full(-1, s_q, width or window + selected)
    rows[:, : indices.shape[1]] = torch.where(valid, indices, -1).gather(1, first).int()
    return arguments | {"indices": rows, "topk_length": valid.sum(1).int()}


def _draw_cache(draw: Draw, pages: int, page: int = WINDOW_PAGE) -> Tensor:
    import torch

    from .. import layouts

    stride = round_up(page * layouts.KV_BYTES, layouts.PAGE_ALIGNMENT)
    raw = torch.zeros((pages, stride), dtype=torch.uint8, device=draw.device)
    cache = raw.as_strided((pages, page, layouts.KV_BYTES), (stride, layouts.KV_BYTES, 1))
    for slots in draw.range(pages * page).split(PIECE):
        layouts.write_kv(cache, slots, draw.normal(len(slots), HEAD_DIM, dtype="bfloat16"))
    return cache


def _draw_decode(
    draw: Draw,
    *,
    b: int,
    s_q: int,
    h_q: int,
    window: int,
    selected: int,
    compressed: int,
    ratio: int = INDEXER_RATIO,
    mean: int = 0,
    seed: int = 0,
) -> Arguments:
    """A batch in which every request has its own window of pages and its own compressed keys. All contexts are full, or
    long-tailed with a mean; a request then has as many indices as keys, at most ``selected``, and -1 behind them."""
    import torch

    def slots(table: Tensor, keys: Tensor, page: int) -> Tensor:
        """The slots of ``keys [b, s_q, n]``, by number within a request."""
        return (table.gather(1, (keys // page).flatten(1)).view(keys.shape) * page + keys % page).int()

    if mean:
        contexts = torch.tensor(long_tailed(b, mean, compressed * ratio, seed), device=draw.device)
    else:
        contexts = draw.full(compressed * ratio, b)
    near_count, far_keys = contexts.clamp(max=window), contexts // ratio
    far_count = far_keys.clamp(max=selected)
    near_table = draw.pages(b, -(-(window + s_q + WINDOW_PAGE) // WINDOW_PAGE))
    first = draw.integers(0, WINDOW_PAGE, b, 1, 1)
    near = first + draw.range(s_q).view(1, s_q, 1) + draw.range(window)
    far_page = BLOCK // ratio
    far_table = draw.pages(b, max(1, -(-int(far_keys.max()) // far_page)))
    far = _selected(draw, far_keys.view(b, 1, 1), b, s_q, selected)
    far_slots = slots(far_table, far, far_page)
    far_slots = torch.where(draw.range(selected) < far_count.view(b, 1, 1), far_slots, -1)
    return {
        "q": draw.normal(b, s_q, h_q, HEAD_DIM, dtype="bfloat16"),
        "k_cache": _draw_cache(draw, near_table.numel()),
        "indices": slots(near_table, near, WINDOW_PAGE),
        "sm_scale": HEAD_DIM**-0.5,
        "attn_sink": draw.normal(h_q),
        "topk_length": near_count.int(),
        "extra_k_cache": _draw_cache(draw, far_table.numel(), far_page),
        "extra_indices": far_slots,
        "extra_topk_length": far_count.int(),
    }


_TINY = {"h_q": 8, "window": 16}

PREFILL = Traffic(
    calls=_prefill_calls,
    needs=_prefill_needs,
    classes=Classes((0, 2), "s_q", _prefill_class, _prefill_shapes),
    rows=_prefill_rows,
    tiny=(
        Row("sparse_mla_prefill", "tiny s_q=4 h=8 topk=48", {"s_q": 4, **_TINY, "selected": 32, "compressed": 64}),
        Row(
            "sparse_mla_prefill",
            "tiny window only s_q=4 h=8 topk=16",
            {"s_q": 4, **_TINY, "selected": 0, "compressed": 0},
        ),
        Row(
            "sparse_mla_prefill",
            "tiny first chunk s_q=40 h=8 topk=24",
            {"s_q": 40, **_TINY, "selected": 8, "compressed": 10, "start": 0},
        ),
    ),
    draw=_draw_prefill,
)

DECODE = Traffic(
    calls=_decode_calls,
    needs=_decode_needs,
    classes=Classes((0, 2), "b * s_q", _decode_class, _decode_shapes),
    rows=_decode_rows,
    tiny=(
        Row(
            "sparse_mla_decode",
            "tiny b=2 h=8 topk=16+32",
            {"b": 2, "s_q": 1, **_TINY, "selected": 32, "compressed": 64},
        ),
        Row(
            "sparse_mla_decode",
            "tiny b=3 h=8 ratio=128 topk=16+32 contexts=lognormal mean 300 seed 1",
            {"b": 3, "s_q": 1, **_TINY, "selected": 32, "compressed": 32, "ratio": 128, "mean": 300, "seed": 1},
        ),
    ),
    draw=_draw_decode,
    held=("k_cache", "extra_k_cache"),
)

GATHER = Traffic(
    calls=_gather_calls,
    needs=_gather_needs,
    classes=Classes((0, 3), "r * m", _gather_class, _gather_shapes),
    rows=_gather_rows,
    tiny=(Row("gather_dequant_kv", "tiny r=2 entries=100", {"r": 2, "entries": 100}),),
    draw=_draw_gather,
    held=("k_cache",),
)
