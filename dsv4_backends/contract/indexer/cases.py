"""Seeded cases of the indexer, the tolerances of its results, and the cost of a call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import inputs as draw
from ..spec import Case, Cost, Tolerance
from .meaning import INDEX_DIM

if TYPE_CHECKING:
    import torch
    from torch import Tensor


TOLERANCES = {
    "out": Tolerance(
        rtol=1e-3,
        atol_rms=1e-2,
        calc_diff=5e-6,
        why="products of e4m3 are exact; FP8 tensor cores keep about 14 bits of a running sum (2^-13 of the largest "
        "partial sum), and a relu near 0 turns that into an absolute error. calc_diff is DeepGEMM's own bound.",
    )
}


TOPK_TOLERANCES = {
    "out": Tolerance(
        rtol=2e-3,
        atol_rms=2e-2,
        calc_diff=5e-6,
        why="the error is the distance between the logit of a wrongly selected, or wrongly left, key and the least "
        "selected logit, as a share of the logits: of two keys each may be off by the tolerance of mqa_logits.",
    )
}


Q_TOLERANCES = {
    "q_fp8": Tolerance(
        rtol=2**-3,
        atol=2**-9,
        calc_diff=1e-6,
        why="one code: the rotation in fp32 gives a neighbouring bf16 for one element in 2^14, of which one in 16 "
        "rounds to a neighbouring code. calc_diff bounds how often: rounding other than to the nearest has 1e-3. With "
        "the transform one such element would change its whole head, so its cases rotate by right angles, exactly.",
    ),
    "weights_out": Tolerance(rtol=2**-22, why="two products in fp32; the scale is a power of two."),
}


def make_q(
    device: torch.device,
    generator: torch.Generator,
    *,
    t: int,
    h: int = 64,
    max_positions: int = 64,
    positions: str = "within",
    dtype: str = "int64",
    values: str = "normal",
    weights: str = "float32",
    layout: str = "plain",
    hadamard: bool | None = False,
) -> dict[str, Any]:
    import torch

    q = draw.normal(generator, t, h, INDEX_DIM)
    if values == "wide":  # from below the floor of the largest magnitude to near the end of bf16
        q *= draw.powers(generator, -40, 118, t, h, 1)
        q[:, ::3, : INDEX_DIM // 2] = 0.0
    q = q.bfloat16()
    factors = draw.normal(generator, t, h).to(getattr(torch, weights))
    at = draw.positions(generator, t, max_positions, dtype, positions)
    table = draw.cos_sin(max_positions, at, quarters=bool(hadamard))
    if layout == "strided":
        q, factors, table = draw.spread(q), draw.spread(factors), draw.spread(table)
    elif layout == "padded":
        wide = torch.full((t, h + 5, INDEX_DIM), float("nan"), dtype=torch.bfloat16)
        q = wide[:, :h].copy_(q)
    elif layout == "unaligned":
        wide = torch.full((t, h, INDEX_DIM + 7), float("nan"), dtype=torch.bfloat16)
        q = wide[..., 3 : 3 + INDEX_DIM].copy_(q)
    made = {"q": q, "positions": at, "cos_sin": table, "weights": factors}
    moved: dict[str, Any] = {name: draw.move(value, device) for name, value in made.items()}
    moved["scale"] = INDEX_DIM**-0.5 * h**-0.5
    return moved if hadamard is None else moved | {"hadamard": hadamard}


def cost_q(
    q: Tensor, positions: Tensor, cos_sin: Tensor, weights: Tensor, scale: float, *, hadamard: bool = False
) -> Cost:
    t, h, d = q.shape
    moved = t * h * (3 * d + weights.element_size() + 4) + positions.element_size() * t
    flops = t * h * (d + 3 * d // 2 + (7 * d if hadamard else 0))
    return Cost(flops=float(flops), bytes=float(moved + 256 * min(t, cos_sin.shape[0])), math="bf16")


def _e4m3(generator: torch.Generator, *shape: int) -> Tensor:
    import torch

    return draw.normal(generator, *shape).to(torch.float8_e4m3fn)


def make_mqa(
    device: torch.device,
    generator: torch.Generator,
    *,
    m: int,
    n: int,
    h: int = 64,
    d: int = 128,
    ranges: str = "causal",
    compressed: int | None = None,
    layout: str = "plain",
) -> dict[str, Any]:
    import torch

    q, k = _e4m3(generator, m, h, d), _e4m3(generator, n, d)
    k_scale = draw.powers(generator, -4, 3, n)
    weights = draw.normal(generator, m, h, scale=h**-0.5)
    if ranges == "causal":  # chunked prefill: row i sees all keys before the chunk and its share of the chunk
        ends = (torch.arange(1, m + 1) * n) // max(m, 1)
        starts = torch.zeros(m, dtype=torch.long)
    elif ranges == "random":
        starts = torch.randint(0, n + 1, (m,), generator=generator)
        ends = starts + (draw.uniform(generator, m) * (n + 1 - starts)).long()
    elif ranges == "batch":  # two requests in one call
        half = torch.arange(m) >= m // 2
        starts = torch.where(half, n // 2, 0)
        ends = torch.where(half, n, n // 2)
    elif ranges == "empty":
        starts, ends = torch.full((m,), n // 2), torch.full((m,), n // 2)
        ends[: m // 2] -= 1
    elif ranges == "any":
        some = torch.tensor([0, -1, n // 3, -(2**31), n - 1, 2**31 - 1, n, n + 7])
        starts = some[torch.randint(0, len(some), (m,), generator=generator)]
        ends = some[torch.randint(0, len(some), (m,), generator=generator)]
    else:
        assert ranges == "beyond", ranges
        starts, ends = torch.arange(m) % (n + 1), torch.full((m,), n + 100)
    columns = torch.arange(n)
    seen = ((columns >= starts.unsqueeze(-1)) & (columns < ends.unsqueeze(-1))).any(0)
    k.view(torch.uint8)[~seen] = draw.POISON
    k_scale[~seen] = float("nan")
    if layout == "strided":
        q, k, weights = (
            draw.spread(q.view(torch.uint8)),
            draw.spread(k.view(torch.uint8)),
            draw.spread(weights),
        )
        q, k = q.view(torch.float8_e4m3fn), k.view(torch.float8_e4m3fn)
    made = {"q": q, "k": k, "k_scale": k_scale, "weights": weights}
    made |= {"row_starts": starts.int(), "row_ends": ends.int()}
    moved: dict[str, Any] = {name: draw.move(value, device) for name, value in made.items()}
    if layout == "repeated":  # one key in the memory
        moved["k"] = moved["k"][:1].clone().expand_as(moved["k"])
    return moved | ({"max_seqlen_k": compressed} if compressed is not None else {})


def make_paged(
    device: torch.device,
    generator: torch.Generator,
    *,
    b: int,
    context: int,
    next_n: int = 1,
    h: int = 64,
    d: int = 128,
    page_size: int = 64,
    lens: str = "random",
    flat_lens: bool = False,
    layout: str = "plain",
    columns: int | None = None,
) -> dict[str, Any]:
    """``columns`` of the result; as many as there are keys if not given."""
    import torch

    from .. import layouts

    q = _e4m3(generator, b, next_n, h, d)
    weights = draw.normal(generator, b * next_n, h, scale=h**-0.5)
    if lens == "full":
        lengths = torch.full((b,), context)
    elif lens == "zero":
        lengths = torch.zeros(b, dtype=torch.long)
    else:
        lengths = torch.randint(0, context + 1, (b,), generator=generator)
        lengths[:1] = context
        lengths[1:2] = 0
    blocks = -(-context // page_size)
    pages = 2 * b * blocks + 1  # half of the pages are unused, page 0 included
    stride = page_size * (d + layouts.INDEXER_SCALE_BYTES)
    stride += (-stride % layouts.PAGE_ALIGNMENT) if layout != "packed" else 0
    raw = torch.full((pages, stride), draw.POISON, dtype=torch.uint8)
    cache = raw.as_strided((pages, page_size, d + 4), (stride, d + 4, 1))
    table = (1 + torch.randperm(pages - 1, generator=generator)[: b * blocks]).view(b, blocks)
    # Lengths may be replaced by longer ones below, so every key exists.
    written = torch.full((b,), blocks * page_size) if lens == "any" else lengths
    used = torch.arange(blocks * page_size) < written.unsqueeze(-1)
    slots = (table.unsqueeze(-1) * page_size + torch.arange(page_size)).flatten(1)[used]
    # Quantised in pieces: a full case has millions of keys.
    for part in slots.split(1 << 18):
        layouts.write_indexer_keys(cache, part, draw.normal(generator, len(part), d))
    # Entries for pages that no key needs may hold anything.
    needed = torch.arange(blocks) * page_size < written.unsqueeze(-1)
    table = torch.where(needed, table, 2**31 - 1).int()
    if layout == "heads":
        cache = cache.unsqueeze(2)
    elif layout == "strided":
        table = draw.spread(table)
    # Each row of a request in a multi-token step sees one key more than the row before; the last sees all.
    per_row = (lengths.unsqueeze(-1) - torch.arange(next_n - 1, -1, -1)).clamp(min=0).int()
    context_lens = lengths.int() if flat_lens else per_row
    if lens == "any":
        wide = torch.full((b, blocks + 9), 10**9, dtype=torch.int32)
        wide[:, :blocks] = table
        table = wide[:, :blocks]
        some = torch.tensor([context + 1, -1, 2**31 - 1, -(2**31), blocks * page_size + 600], dtype=torch.int32)
        spoilt = draw.uniform(generator, *context_lens.shape) < 0.5
        context_lens[spoilt] = some[torch.randint(0, len(some), (int(spoilt.sum()),), generator=generator)]
        some = torch.tensor([-1, -(2**31), 2**31 - 1, 10**9, pages], dtype=torch.int32)
        spoilt = draw.uniform(generator, *table.shape) < 0.3
        table[spoilt] = some[torch.randint(0, len(some), (int(spoilt.sum()),), generator=generator)]
    made = {"q": q, "k_cache": cache, "weights": weights, "context_lens": context_lens, "block_table": table}
    moved: dict[str, Any] = {name: draw.move(value, device) for name, value in made.items()}
    return moved | {"max_context_len": context if columns is None else columns}


def make_topk(
    device: torch.device,
    generator: torch.Generator,
    *,
    topk: int,
    scores: str = "normal",
    **params: Any,
) -> dict[str, Any]:
    """``scores``: ``equal`` has one logit for all keys of a row, ``few`` three of them, ``special`` some that are NaN
    or infinite."""
    import torch

    made = make_mqa(device, generator, **params) | {"topk": topk}
    if scores in ("equal", "few"):
        made["q"][:] = 1.0
        made["k"].view(torch.uint8)[:] = torch.ones(1, device=device).to(torch.float8_e4m3fn).view(torch.uint8)
        made["k_scale"][:] = 1.0
        if scores == "few":
            made["k_scale"][1::3], made["k_scale"][2::3] = 0.5, 0.25
    elif scores == "special":
        made["k_scale"][1::5], made["k_scale"][2::7], made["k_scale"][3::4] = float("nan"), float("inf"), 0.0
    return made


def make_paged_topk(device: torch.device, generator: torch.Generator, *, topk: int, **params: Any) -> dict[str, Any]:
    return make_paged(device, generator, **params) | {"topk": topk}


def cost_mqa(
    q: Tensor,
    k: Tensor,
    k_scale: Tensor,
    weights: Tensor,
    row_starts: Tensor,
    row_ends: Tensor,
    *,
    max_seqlen_k: int | None = None,
    **optional: Any,
) -> Cost:
    m, h, d = q.shape
    n = k.shape[0]
    starts, ends = row_starts.clamp(0, n), row_ends.clamp(0, n)
    pairs = float((ends - starts).clamp(min=0).long().sum())
    width = n if max_seqlen_k is None else max_seqlen_k
    moved = float(m * h * d + n * (d + 4) + 4 * m * (h + 2) + 4 * m * width)
    return Cost(flops=2.0 * pairs * h * d, bytes=moved, math="fp8")


def cost_paged(
    q: Tensor,
    k_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    max_context_len: int,
    **optional: Any,
) -> Cost:
    b, next_n, h, d = q.shape
    lens = context_lens.clamp(0, min(max_context_len, k_cache.shape[1] * block_table.shape[1])).long()
    lens = lens if lens.dim() == 2 else lens.unsqueeze(1)
    pairs = float(lens.expand(b, next_n).sum())
    keys = float(lens.amax(-1).sum()) if b else 0.0
    moved = keys * (d + 4) + float(b * next_n * (h * d + 4 * h + 4 * max_context_len))
    return Cost(flops=2.0 * pairs * h * d, bytes=moved, math="fp8")


def cost_topk(
    q: Tensor,
    k: Tensor,
    k_scale: Tensor,
    weights: Tensor,
    row_starts: Tensor,
    row_ends: Tensor,
    topk: int,
    *,
    max_seqlen_k: int | None = None,
    **optional: Any,
) -> Cost:
    """The logits in registers: only keys are read and indices written."""
    m, h, d = q.shape
    n = k.shape[0]
    width = n if max_seqlen_k is None else max_seqlen_k
    keys = (row_ends.clamp(0, n).long() - row_starts.clamp(0, n)).clamp(0, width)
    moved = float(m * h * d + n * (d + 4) + 4 * m * (h + 2 + topk))
    return Cost(flops=2.0 * float(keys.sum()) * h * d, bytes=moved, math="fp8")


def cost_paged_topk(
    q: Tensor,
    k_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    max_context_len: int,
    topk: int,
    **optional: Any,
) -> Cost:
    """As ``cost_topk``, over the paged cache."""
    logits = cost_paged(q, k_cache, weights, context_lens, block_table, max_context_len)
    rows = q.shape[0] * q.shape[1]
    return Cost(flops=logits.flops, bytes=logits.bytes + 4.0 * rows * (topk - max_context_len), math="fp8")


def _case(name: str, level: str, **params: Any) -> Case:
    return Case(name, level, params)


MQA = (
    _case("small", "smoke", m=5, n=37, h=8, d=32),
    _case("no rows", "smoke", m=0, n=37),
    _case("no keys", "smoke", m=3, n=0, ranges="beyond"),
    _case("one of each", "smoke", m=1, n=1, h=1, d=16),
    _case("random ranges", "smoke", m=13, n=150, h=32, d=64, ranges="random"),
    _case("empty ranges", "smoke", m=6, n=70, h=16, ranges="empty"),
    _case("ends beyond the keys", "smoke", m=9, n=65, h=32, ranges="beyond"),
    _case("compressed", "smoke", m=9, n=150, h=16, d=64, ranges="random", compressed=150),
    _case("compressed and cut", "smoke", m=9, n=150, h=16, d=64, ranges="random", compressed=40),
    _case("strided", "smoke", m=7, n=65, h=8, d=64, ranges="random", layout="strided"),
    _case("repeated key", "smoke", m=5, n=65, h=8, d=64, layout="repeated"),
    _case("many repeated keys", "default", m=9, n=700, layout="repeated"),
    _case("hostile values", "smoke", m=40, n=65, h=8, d=64, ranges="any"),
    _case("hostile values compressed", "smoke", m=40, n=65, h=8, d=64, ranges="any", compressed=90),
    _case("v4", "default", m=33, n=513),
    _case("v4 batch", "default", m=64, n=1000, ranges="batch"),
    _case("v4 batch compressed", "default", m=64, n=1000, ranges="batch", compressed=500),
    _case("v4 one row", "default", m=1, n=4097),
    _case("v4 random", "default", m=130, n=777, ranges="random"),
    _case("32 heads", "default", m=50, n=300, h=32),
    _case("odd heads", "default", m=20, n=300, h=7, d=48),
    _case("v4 hostile values", "default", m=100, n=777, ranges="any"),
    _case("v4 hostile values compressed", "default", m=100, n=777, ranges="any", compressed=300),
    _case("v4 1k x 8k", "full", m=1024, n=8192),
    _case("v4 1k x 8k compressed", "full", m=1024, n=8192, ranges="batch", compressed=4096),
    _case("v4 2k x 64k", "full", m=2048, n=65536),
)
Q = (
    _case("small", "smoke", t=3, h=4),
    _case("no tokens", "smoke", t=0, h=4),
    _case("one of each", "smoke", t=1, h=1, max_positions=1),
    _case("odd heads", "smoke", t=5, h=7, hadamard=None),
    _case("positions beyond the table", "smoke", t=9, h=2, positions="any"),
    _case("int32, beyond the table", "smoke", t=9, h=2, dtype="int32", positions="any"),
    _case("bf16 weights", "smoke", t=4, h=8, weights="bfloat16"),
    _case("padded heads", "smoke", t=4, h=8, layout="padded"),
    _case("strided", "smoke", t=4, h=6, layout="strided"),
    _case("unaligned", "smoke", t=4, h=3, layout="unaligned"),
    _case("wide values", "smoke", t=9, h=9, values="wide"),
    _case("hadamard", "smoke", t=4, h=5, hadamard=True),
    _case("hadamard wide values", "smoke", t=5, h=9, values="wide", hadamard=True, weights="bfloat16"),
    _case("v4", "default", t=33, max_positions=2000, weights="bfloat16"),
    _case("v4 one token", "default", t=1, max_positions=2000, weights="bfloat16"),
    _case("v4 hadamard", "default", t=33, max_positions=2000, hadamard=True),
    _case("32 heads", "default", t=50, h=32, max_positions=2000),
    _case("hostile values", "default", t=257, h=16, positions="any", layout="strided"),
    _case("v4 chunk", "full", t=8192, max_positions=70000, weights="bfloat16"),
    _case("v4 chunk hadamard", "full", t=1030, max_positions=70000, hadamard=True),
)
PAGED = (
    _case("small", "smoke", b=3, context=37, h=8, d=32, page_size=4),
    _case("no requests", "smoke", b=0, context=64),
    _case("no context", "smoke", b=2, context=0, h=8),
    _case("one of each", "smoke", b=1, context=1, h=1, d=16, page_size=1),
    _case("zero lengths", "smoke", b=3, context=65, h=16, lens="zero"),
    _case("two tokens", "smoke", b=3, context=150, next_n=2, h=16, d=64),
    _case("flat lengths", "smoke", b=3, context=150, next_n=2, h=16, d=64, flat_lens=True),
    _case("head dimension", "smoke", b=2, context=130, h=8, layout="heads"),
    _case("strided table", "smoke", b=4, context=130, h=8, d=64, page_size=16, layout="strided"),
    _case("packed pages", "smoke", b=2, context=40, h=8, d=64, page_size=8, layout="packed"),
    _case("hostile values", "smoke", b=9, context=120, h=8, d=64, page_size=16, lens="any", columns=300),
    _case("hostile values two tokens", "smoke", b=9, context=128, next_n=2, h=8, lens="any", columns=1024),
    _case("v4", "default", b=4, context=1000),
    _case("v4 full", "default", b=2, context=4096, lens="full"),
    _case("v4 two tokens", "default", b=5, context=777, next_n=2),
    _case("v4 four tokens", "default", b=2, context=300, next_n=4),
    _case("v4 page 32", "default", b=3, context=500, page_size=32),
    _case("32 heads", "default", b=3, context=500, h=32),
    _case("odd", "default", b=3, context=333, h=7, d=48, page_size=61, next_n=3),
    _case("v4 hostile values", "default", b=9, context=1000, lens="any", columns=9000),
    _case("v4 hostile values flat", "default", b=9, context=500, next_n=2, lens="any", flat_lens=True, columns=501),
    _case("v4 hostile values page 32", "default", b=9, context=500, page_size=32, lens="any", columns=2000),
    _case("v4 b=1 16k", "full", b=1, context=16384, lens="full"),
    _case("v4 b=32 16k", "full", b=32, context=16384),
    _case("v4 b=128 4k", "full", b=128, context=4096, next_n=2),
)
TOPK = (
    _case("small", "smoke", m=3, n=37, h=8, d=32, topk=8),
    _case("no rows", "smoke", m=0, n=37, topk=8),
    _case("no keys", "smoke", m=3, n=0, ranges="beyond", topk=4),
    _case("one of each", "smoke", m=1, n=1, h=1, d=16, topk=1),
    _case("the best key", "smoke", m=2, n=300, h=8, d=32, topk=1),
    _case("more than there are", "smoke", m=4, n=40, h=8, d=32, ranges="random", topk=100),
    _case("random ranges", "smoke", m=5, n=150, h=32, d=64, ranges="random", topk=17),
    _case("empty ranges", "smoke", m=3, n=70, h=16, ranges="empty", topk=7),
    _case("ends beyond the keys", "smoke", m=4, n=65, h=32, ranges="beyond", topk=20),
    _case("compressed", "smoke", m=5, n=150, h=16, d=64, ranges="random", compressed=150, topk=17),
    _case("compressed and cut", "smoke", m=5, n=150, h=16, d=64, ranges="random", compressed=40, topk=17),
    _case("strided", "smoke", m=3, n=65, h=8, d=64, ranges="random", layout="strided", topk=16),
    _case("hostile values", "smoke", m=8, n=65, h=8, d=64, ranges="any", topk=9),
    _case("hostile values compressed", "smoke", m=8, n=65, h=8, d=64, ranges="any", compressed=90, topk=9),
    _case("equal logits", "smoke", m=1, n=6000, h=2, d=16, scores="equal", topk=40),
    _case("few logits", "smoke", m=1, n=3000, h=2, d=16, scores="few", topk=40),
    _case("NaN and infinity", "smoke", m=2, n=300, h=8, d=32, scores="special", topk=150),
    _case("v4", "default", m=9, n=3000, topk=512),
    _case("v4 pro", "default", m=4, n=5000, topk=1024),
    _case("v4 batch", "default", m=12, n=1000, ranges="batch", topk=512),
    _case("v4 batch compressed", "default", m=12, n=1000, ranges="batch", compressed=500, topk=512),
    _case("v4 one row", "default", m=1, n=9001, topk=512),
    _case("the largest k", "default", m=2, n=9001, h=8, topk=2048),
    _case("v4 random", "default", m=20, n=2777, ranges="random", topk=512),
    _case("odd heads", "default", m=9, n=900, h=7, d=48, topk=300),
    _case("v4 hostile values", "default", m=20, n=777, ranges="any", topk=512),
    _case("v4 1k x 8k", "full", m=1024, n=8192, topk=512),
    _case("v4 1k x 8k compressed", "full", m=1024, n=8192, ranges="batch", compressed=4096, topk=1024),
    _case("v4 700 x 64k", "full", m=700, n=65536, topk=512),
    _case("v4 equal logits 32k", "full", m=64, n=32768, h=8, scores="equal", topk=512),
)
PAGED_TOPK = (
    _case("small", "smoke", b=3, context=37, h=8, d=32, page_size=4, topk=8),
    _case("no requests", "smoke", b=0, context=64, topk=8),
    _case("no context", "smoke", b=2, context=0, h=8, topk=8),
    _case("one of each", "smoke", b=1, context=1, h=1, d=16, page_size=1, topk=1),
    _case("zero lengths", "smoke", b=3, context=65, h=16, lens="zero", topk=5),
    _case("more than there are", "smoke", b=3, context=65, h=16, topk=100),
    _case("two tokens", "smoke", b=2, context=150, next_n=2, h=16, d=64, topk=20),
    _case("flat lengths", "smoke", b=3, context=150, next_n=2, h=16, d=64, flat_lens=True, topk=20),
    _case("head dimension", "smoke", b=2, context=130, h=8, layout="heads", topk=33),
    _case("strided table", "smoke", b=4, context=130, h=8, d=64, page_size=16, layout="strided", topk=33),
    _case("packed pages", "smoke", b=2, context=40, h=8, d=64, page_size=8, layout="packed", topk=9),
    _case("hostile values", "smoke", b=5, context=120, h=8, d=64, page_size=16, lens="any", columns=300, topk=30),
    _case("hostile values two tokens", "smoke", b=3, context=128, next_n=2, h=8, lens="any", columns=1024, topk=40),
    _case("v4", "default", b=4, context=1000, topk=512),
    _case("v4 pro", "default", b=2, context=4096, lens="full", topk=1024),
    _case("v4 two tokens", "default", b=3, context=1777, next_n=2, topk=512),
    _case("v4 four tokens", "default", b=2, context=900, next_n=4, topk=512),
    _case("v4 page 32", "default", b=3, context=900, page_size=32, topk=512),
    _case("32 heads", "default", b=3, context=900, h=32, topk=512),
    _case("odd", "default", b=3, context=333, h=7, d=48, page_size=61, next_n=3, topk=101),
    _case("v4 hostile values", "default", b=9, context=1000, lens="any", columns=9000, topk=512),
    _case("v4 b=1 16k", "full", b=1, context=16384, lens="full", topk=512),
    _case("v4 b=32 16k", "full", b=32, context=16384, topk=1024),
    _case("v4 b=128 4k", "full", b=128, context=4096, next_n=2, topk=512),
)
