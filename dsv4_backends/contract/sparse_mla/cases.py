"""Seeded cases of sparse MLA, the tolerances of its results, and the cost of a call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import inputs as draw
from ..models import FLASH, PRO
from ..spec import Case, Cost, Tolerance
from .meaning import HEAD_DIM

if TYPE_CHECKING:
    import torch
    from torch import Tensor


DECODE_TOLERANCES = {
    "out": Tolerance(
        rtol=2 / 128,
        atol_rms=2e-2,
        calc_diff=7e-6,
        why="bf16 rounds the output (2^-9) and, in tensor-core kernels, each probability (2^-9), whose sum over "
        "random values has a standard error of 2^-9 of the output's rms: 2e-2 rms is ten of those. FlashMLA's own "
        "bounds are 3/128 relative and 7e-6.",
    ),
    "lse": Tolerance(
        atol=1e-5,
        rtol=8 / 65536,
        why="fp32 sums of exact bf16 products, base-2 exponentials rescaled to natural log; FlashMLA's decode bound.",
    ),
}
PREFILL_TOLERANCES = {
    "out": DECODE_TOLERANCES["out"],
    "max_logits": Tolerance(atol=1e-5, rtol=2 / 65536, why="one fp32 sum of 512 exact products; FlashMLA's bound."),
    "lse": DECODE_TOLERANCES["lse"],
}


def make_prefill(
    device: torch.device,
    generator: torch.Generator,
    *,
    s_q: int,
    h_q: int,
    s_kv: int,
    topk: int,
    invalid: str = "mixed",
    sink: str = "finite",
    length: str = "none",
    layout: str = "plain",
) -> dict[str, Any]:
    import torch

    q = draw.normal(generator, s_q, h_q, HEAD_DIM).bfloat16()
    kv = draw.normal(generator, s_kv, HEAD_DIM).bfloat16()
    # No index names half of the rows.
    pool = torch.randperm(s_kv, generator=generator)[: (s_kv + 1) // 2]
    indices = draw.choices(generator, s_q, topk, pool, s_kv, invalid)
    unnamed = torch.ones(s_kv, dtype=torch.bool)
    named = indices.long().flatten()
    unnamed[named[(named >= 0) & (named < s_kv)]] = False
    kv[unnamed] = float("nan")
    if layout == "strided":  # the gaps between rows of indices hold no valid index
        q, kv, indices = draw.spread(q), draw.spread(kv), draw.spread(indices)
    elif layout == "heads":
        kv, indices = kv.unsqueeze(1), indices.unsqueeze(1)
    made = {"q": q, "kv": kv, "indices": indices, "sm_scale": HEAD_DIM**-0.5}
    made["attn_sink"] = draw.sinks(generator, h_q, sink)
    made["topk_length"] = draw.lengths(generator, s_q, topk, length)
    return {k: draw.move(v, device) if isinstance(v, torch.Tensor) else v for k, v in made.items()}


def _page_stride(page_size: int, layout: str) -> int:
    """Bytes from page to page; ``unaligned``: an odd number, so that bf16 values are at odd addresses too."""
    from .. import layouts

    stride = page_size * layouts.KV_BYTES
    return stride + (0 if layout == "packed" else 1 if layout == "unaligned" else -stride % layouts.PAGE_ALIGNMENT)


def _make_scope(
    generator: torch.Generator,
    rows: int,
    topk: int,
    page_size: int,
    invalid: str,
    lengths: Tensor | None,
    layout: str,
) -> tuple[Tensor, Tensor]:
    """A cache of about two slots for each index, three pages at least, and indices into every second slot of it."""
    import torch

    from .. import layouts

    pages = max(3, -(-2 * min(topk * rows, 2048) // page_size))
    stride = _page_stride(page_size, layout)
    raw = torch.full((pages, stride), draw.POISON, dtype=torch.uint8)
    cache = raw.as_strided((pages, page_size, layouts.KV_BYTES), (stride, layouts.KV_BYTES, 1))
    size = pages * page_size
    pool = 1 + torch.randperm(size - 1, generator=generator)[: size // 2]
    indices = draw.choices(generator, rows, topk, pool, size, invalid)
    used = indices.clone()
    if lengths is not None:
        per_row = lengths.repeat_interleave(rows // len(lengths)) if len(lengths) else lengths
        beyond = torch.arange(topk) >= per_row.unsqueeze(-1)
        used[beyond] = -1
        # A row may hold anything beyond its length; here it does.
        indices[beyond] = 2**31 - 1
    slots = used.long().flatten().unique()
    slots = slots[slots < size]
    layouts.write_kv(cache, slots, draw.normal(generator, len(slots), HEAD_DIM).bfloat16())
    return cache, indices


def make_decode(
    device: torch.device,
    generator: torch.Generator,
    *,
    b: int,
    s_q: int,
    h_q: int,
    topk: int,
    page_size: int = 64,
    extra_topk: int | None = None,
    extra_page_size: int = 64,
    invalid: str = "tail",
    sink: str = "finite",
    length: str = "none",
    extra_length: str = "none",
    layout: str = "plain",
) -> dict[str, Any]:
    import torch

    q = draw.normal(generator, b, s_q, h_q, HEAD_DIM).bfloat16()
    if layout == "strided":
        q = draw.spread(q)
    lens = draw.lengths(generator, b, topk, length)
    cache, indices = _make_scope(generator, b * s_q, topk, page_size, invalid, lens, layout)
    made = {
        "q": q,
        "k_cache": cache.view(torch.float8_e4m3fn) if layout == "e4m3" else cache,
        "indices": indices.view(b, s_q, topk),
        "sm_scale": HEAD_DIM**-0.5,
        "attn_sink": draw.sinks(generator, h_q, sink),
        "topk_length": lens,
    }
    if extra_topk is not None:
        lens = draw.lengths(generator, b, extra_topk, extra_length)
        cache, indices = _make_scope(generator, b * s_q, extra_topk, extra_page_size, invalid, lens, layout)
        made["extra_k_cache"] = cache
        made["extra_indices"] = indices.view(b, s_q, extra_topk)
        made["extra_topk_length"] = lens
    if layout == "wide":  # the gaps between rows of indices hold no valid index
        made |= {k: draw.spread(v) for k, v in made.items() if k.endswith("indices") and isinstance(v, torch.Tensor)}
    if layout == "heads":
        made |= {k: v.unsqueeze(2) for k, v in made.items() if k.endswith("k_cache") and isinstance(v, torch.Tensor)}
    return {k: draw.move(v, device) if isinstance(v, torch.Tensor) else v for k, v in made.items()}


GATHER_TOLERANCES = {
    "out": Tolerance(
        atol=2**-126,
        why="One rounding of an exact product, or a copy: exact. A CPU that flushes denormals gives 0 below 2^-126.",
    )
}


def make_gather(
    device: torch.device,
    generator: torch.Generator,
    *,
    r: int,
    context: int,
    page_size: int = 64,
    lens: str = "random",
    gather: str = "none",
    rows: int | None = None,
    offset: int | None = 0,
    values: str = "normal",
    layout: str = "plain",
) -> dict[str, Any]:
    """``context``: entries that fit the block tables, rounded up to pages; ``rows``: rows of ``out``."""
    import torch

    from .. import layouts

    blocks = -(-context // page_size)
    room = blocks * page_size
    if lens == "full":
        seq_lens = torch.full((r,), context)
    else:
        seq_lens = torch.randint(0, context + 1, (r,), generator=generator)
        seq_lens[:1] = context
        seq_lens[1:2] = 0
    pages = 2 * r * blocks + 1
    stride = _page_stride(page_size, layout)
    raw = torch.full((pages, stride), draw.POISON, dtype=torch.uint8)
    cache = raw.as_strided((pages, page_size, layouts.KV_BYTES), (stride, layouts.KV_BYTES, 1))
    table = (1 + torch.randperm(pages - 1, generator=generator)[: r * blocks]).view(r, blocks)
    counts = None
    if gather != "none":
        counts = (draw.uniform(generator, r) * (seq_lens + 1)).long()
        counts[-1:] = seq_lens[-1:] + 3 if gather == "larger" else 0
        counts[:1] = seq_lens[:1].clamp(max=context // 2)
    first = torch.zeros(r, dtype=torch.long) if counts is None else seq_lens - torch.minimum(counts, seq_lens)
    if lens == "any":  # some are replaced below
        first, last = torch.zeros(r, dtype=torch.long), torch.full((r,), room)
    else:
        last = seq_lens
    entries = torch.arange(room)
    used = (entries >= first.unsqueeze(-1)) & (entries < last.unsqueeze(-1))
    slots = (table.unsqueeze(-1) * page_size + torch.arange(page_size)).flatten(1)[used]
    data, scales = layouts.kv_page_views(cache)
    for part in slots.split(1 << 16):
        if values == "any":  # every code and every scale, NaN included
            codes = torch.randint(0, 256, (len(part), layouts.KV_BYTES), generator=generator).to(torch.uint8)
            data[part // page_size, part % page_size] = codes[:, : layouts.KV_DATA_BYTES]
            scales[part // page_size, part % page_size] = codes[:, layouts.KV_DATA_BYTES :]
        else:
            layouts.write_kv(cache, part, draw.normal(generator, len(part), HEAD_DIM).bfloat16())
    # Unused entries of the table may hold anything.
    needed = torch.arange(blocks) * page_size < last.unsqueeze(-1)
    table = torch.where(needed, table, 2**31 - 1).int()
    seq_lens = seq_lens.int()
    if lens == "any":
        some = torch.tensor([room + 1, -1, 2**31 - 1, -(2**31), room], dtype=torch.int32)
        spoilt = draw.uniform(generator, r) < 0.5
        seq_lens[spoilt] = some[torch.randint(0, len(some), (int(spoilt.sum()),), generator=generator)]
        if counts is not None:
            spoilt = draw.uniform(generator, r) < 0.5
            counts[spoilt] = some[torch.randint(0, len(some), (int(spoilt.sum()),), generator=generator)].long()
        some = torch.tensor([-1, -(2**31), 2**31 - 1, pages], dtype=torch.int32)
        spoilt = draw.uniform(generator, *table.shape) < 0.3
        table[spoilt] = some[torch.randint(0, len(some), (int(spoilt.sum()),), generator=generator)]
    m = context if rows is None else rows
    out = torch.empty((r, m, HEAD_DIM), dtype=torch.bfloat16)
    out.view(torch.uint8).fill_(draw.POISON)
    if layout == "strided":
        out, table = draw.spread(out), draw.spread(table)
    elif layout == "unaligned":
        wide = torch.full((r, m, HEAD_DIM + 7), float("nan"), dtype=torch.bfloat16)
        out = wide[..., 3 : 3 + HEAD_DIM]
    elif layout == "heads":
        cache = cache.unsqueeze(2)
    elif layout == "e4m3":
        cache = cache.view(torch.float8_e4m3fn)
    made = {"k_cache": cache, "seq_lens": seq_lens, "block_table": table, "out": out}
    if counts is not None:
        made["gather_lens"] = counts.int()
    moved: dict[str, Any] = {name: draw.move(value, device) for name, value in made.items()}
    return moved if offset is None else moved | {"offset": offset}


def cost_gather(
    k_cache: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    out: Tensor,
    *,
    gather_lens: Tensor | None = None,
    offset: int = 0,
) -> Cost:
    from ..layouts import KV_BYTES

    lens = seq_lens.long().clamp(0, k_cache.shape[1] * block_table.shape[1])
    rows = lens if gather_lens is None else gather_lens.long().clamp(min=0).minimum(lens)
    rows = rows.clamp(max=max(out.shape[1] - offset, 0))
    entries, pages = float(rows.sum()), float((rows + k_cache.shape[1] - 1).div(k_cache.shape[1]).floor().sum())
    tables = 4.0 * pages + 4.0 * len(seq_lens) * (1 if gather_lens is None else 2)
    return Cost(flops=448.0 * entries, bytes=entries * (KV_BYTES + 2 * HEAD_DIM) + tables, math="bf16")


def _entries(indices: Tensor, length: Tensor | None, each: int = 1) -> float:
    """The entries of index rows that count; each length is that of ``each`` rows."""
    if length is None:
        return float(indices.numel())
    return each * float(length.clamp(0, indices.shape[-1]).sum())


def cost_prefill(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    *,
    topk_length: Tensor | None = None,
    **optional: Any,
) -> Cost:
    s_q, h_q, _ = q.shape
    entries = _entries(indices, topk_length)
    rows = min(kv.shape[0], entries)
    return Cost(
        flops=4.0 * h_q * entries * HEAD_DIM,
        bytes=4.0 * s_q * h_q * HEAD_DIM + 2.0 * rows * HEAD_DIM + 4.0 * entries + 8.0 * s_q * h_q,
        math="bf16",
    )


def cost_decode(
    q: Tensor,
    k_cache: Tensor,
    indices: Tensor,
    sm_scale: float,
    *,
    topk_length: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    **optional: Any,
) -> Cost:
    from ..layouts import KV_BYTES

    b, s_q, h_q, _ = q.shape
    entries, kv_bytes = 0.0, 0.0
    scopes = ((k_cache, indices, topk_length), (extra_k_cache, extra_indices, extra_topk_length))
    for cache, index, length in scopes:
        if cache is not None and index is not None:
            count = _entries(index, length, s_q)
            entries += count
            kv_bytes += KV_BYTES * min(count, cache.shape[0] * cache.shape[1])
    return Cost(
        flops=4.0 * h_q * entries * HEAD_DIM,
        bytes=4.0 * b * s_q * h_q * HEAD_DIM + kv_bytes + 4.0 * entries + 4.0 * b * s_q * h_q,
        math="bf16",
    )


def _prefill_cases() -> tuple[Case, ...]:
    def case(name: str, level: str, **params: Any) -> Case:
        return Case(name, level, params)

    cases = [
        case("small", "smoke", s_q=3, h_q=8, s_kv=37, topk=20),
        case("no queries", "smoke", s_q=0, h_q=8, s_kv=37, topk=20),
        case("one of each", "smoke", s_q=1, h_q=1, s_kv=1, topk=1, invalid="none"),
        case("no indices", "smoke", s_q=2, h_q=4, s_kv=9, topk=0),
        case("no keys", "smoke", s_q=2, h_q=4, s_kv=0, topk=7, invalid="all"),
        case("nothing valid", "smoke", s_q=2, h_q=5, s_kv=64, topk=33, invalid="all"),
        case("any index", "smoke", s_q=5, h_q=16, s_kv=50, topk=70, invalid="extreme", sink="mixed"),
        case("infinite sinks", "smoke", s_q=2, h_q=7, s_kv=64, topk=64, sink="mixed", invalid="none"),
        case("no sink", "smoke", s_q=2, h_q=64, s_kv=130, topk=65, sink="none"),
        case("lengths", "smoke", s_q=6, h_q=8, s_kv=80, topk=48, length="random"),
        case("zero lengths", "smoke", s_q=3, h_q=8, s_kv=80, topk=48, length="zero"),
        case("strided", "smoke", s_q=4, h_q=9, s_kv=61, topk=31, layout="strided"),
        case("head dimension", "smoke", s_q=4, h_q=12, s_kv=61, topk=31, layout="heads"),
        case(
            "hostile values", "smoke", s_q=7, h_q=8, s_kv=61, topk=31, invalid="extreme", length="any", layout="strided"
        ),
    ]
    for model in (FLASH, PRO):
        short = model.name.rpartition("-")[2].lower()
        for tp in (1, 2, 4, 8):
            rank = model.rank(tp)
            common = {"h_q": rank.heads, "topk": rank.topk, "length": "random"}
            cases.append(case(f"{short} tp{tp}", "default", s_q=5, s_kv=2048, **common))
            cases.append(case(f"{short} tp{tp} chunk", "full", s_q=512, s_kv=16384, invalid="tail", **common))
    for heads in (8, 64, 128):
        hostile = {"invalid": "extreme", "length": "any", "layout": "strided"}
        cases.append(case(f"hostile values h={heads}", "default", s_q=13, h_q=heads, s_kv=700, topk=256, **hostile))
    cases += [
        case("flash tp16 heads", "default", s_q=7, h_q=4, s_kv=700, topk=640),
        case("window only", "default", s_q=129, h_q=16, s_kv=129, topk=128, invalid="tail"),
        case("odd heads", "default", s_q=17, h_q=127, s_kv=300, topk=129, sink="mixed"),
        case("wide", "default", s_q=2, h_q=8, s_kv=5000, topk=4097, length="random"),
        case("rows", "default", s_q=213, h_q=8, s_kv=400, topk=62),
        case("flash prefill", "full", s_q=4096, h_q=64, s_kv=32768, topk=640, invalid="none"),
        case("pro prefill", "full", s_q=4096, h_q=128, s_kv=32768, topk=1152, invalid="none"),
    ]
    return tuple(cases)


_HOSTILE = {"invalid": "extreme", "length": "any", "extra_length": "any", "layout": "wide"}


def _decode_cases() -> tuple[Case, ...]:
    def case(name: str, level: str, **params: Any) -> Case:
        return Case(name, level, params)

    cases = [
        case("small", "smoke", b=2, s_q=1, h_q=8, topk=20, page_size=4),
        case("no requests", "smoke", b=0, s_q=1, h_q=8, topk=20),
        case("one of each", "smoke", b=1, s_q=1, h_q=1, topk=1, page_size=1, invalid="none"),
        case("no indices", "smoke", b=2, s_q=1, h_q=4, topk=0),
        case("nothing valid", "smoke", b=2, s_q=1, h_q=5, topk=33, invalid="all", extra_topk=5),
        case("holes", "smoke", b=3, s_q=1, h_q=16, topk=70, invalid="mixed", sink="mixed"),
        case("two scopes", "smoke", b=2, s_q=1, h_q=8, topk=33, extra_topk=47, extra_page_size=2),
        case(
            "lengths",
            "smoke",
            b=4,
            s_q=1,
            h_q=8,
            topk=48,
            length="random",
            extra_topk=20,
            extra_length="random",
        ),
        case(
            "zero lengths",
            "smoke",
            b=2,
            s_q=1,
            h_q=8,
            topk=9,
            length="zero",
            extra_topk=3,
            extra_length="zero",
        ),
        case("second scope only", "smoke", b=2, s_q=1, h_q=8, topk=9, length="zero", extra_topk=40),
        case("several tokens", "smoke", b=2, s_q=3, h_q=8, topk=40, length="random", sink="none"),
        case("e4m3 cache", "smoke", b=2, s_q=1, h_q=9, topk=31, page_size=61, layout="e4m3"),
        case("packed pages", "smoke", b=2, s_q=1, h_q=8, topk=31, page_size=3, layout="packed"),
        case("unaligned pages", "smoke", b=3, s_q=1, h_q=8, topk=31, page_size=3, extra_topk=20, layout="unaligned"),
        case("head dimension", "smoke", b=2, s_q=1, h_q=8, topk=31, extra_topk=4, layout="heads"),
        case("strided", "smoke", b=3, s_q=2, h_q=8, topk=31, layout="strided"),
        case("hostile values", "smoke", b=7, s_q=2, h_q=8, topk=31, extra_topk=20, extra_page_size=7, **_HOSTILE),
    ]
    for model in (FLASH, PRO):
        short = model.name.rpartition("-")[2].lower()
        for tp in (1, 2, 4, 8):
            heads, index_topk = model.rank(tp).heads, model.index_topk
            both = {"h_q": heads, "topk": model.window, "extra_topk": index_topk}
            cases.append(case(f"{short} tp{tp}", "default", b=2, s_q=1, **both))
            cases.append(case(f"{short} tp{tp} mtp", "default", b=2, s_q=2, **both, extra_length="random"))
            cases.append(
                case(
                    f"{short} tp{tp} batch",
                    "full",
                    b=64,
                    s_q=1,
                    **both,
                    length="random",
                    extra_length="random",
                )
            )
        ratio_128 = {"h_q": model.heads, "topk": model.window, "extra_topk": 256, "extra_page_size": 2}
        cases.append(case(f"{short} ratio 128", "default", b=3, s_q=1, **ratio_128, extra_length="random"))
    for heads in (8, 64, 128):
        both = {"h_q": heads, "topk": 128, "extra_topk": 512, "extra_page_size": 2}
        cases.append(case(f"hostile values h={heads}", "default", b=13, s_q=1, **both, **_HOSTILE))
        cases.append(case(f"hostile values h={heads} batch", "full", b=160, s_q=1, **both, **_HOSTILE))
    cases += [
        case("flash tp16 heads", "default", b=3, s_q=1, h_q=4, topk=128, extra_topk=512),
        case("odd", "default", b=5, s_q=3, h_q=67, topk=129, page_size=61, extra_topk=63, extra_page_size=7),
        case("window page", "default", b=2, s_q=1, h_q=64, topk=128, page_size=256),
        case(
            "wide",
            "full",
            b=4,
            s_q=1,
            h_q=64,
            topk=128,
            extra_topk=8192,
            extra_page_size=2,
            extra_length="random",
        ),
        case("flash b=128", "full", b=128, s_q=1, h_q=64, topk=128, extra_topk=512, invalid="none"),
        case("pro b=128", "full", b=128, s_q=1, h_q=128, topk=128, extra_topk=1024, invalid="none"),
    ]
    return tuple(cases)


def _gather_cases() -> tuple[Case, ...]:
    def case(name: str, level: str, **params: Any) -> Case:
        return Case(name, level, params)

    return (
        case("small", "smoke", r=3, context=37, page_size=4),
        case("no requests", "smoke", r=0, context=64),
        case("no entries", "smoke", r=2, context=0),
        case("no rows", "smoke", r=2, context=20, rows=0),
        case("one of each", "smoke", r=1, context=1, page_size=1, lens="full"),
        case("last entries", "smoke", r=5, context=50, page_size=16, gather="given"),
        case("gather beyond the lengths", "smoke", r=4, context=30, page_size=7, gather="larger"),
        case("offset", "smoke", r=3, context=33, page_size=8, rows=50, offset=13, gather="given"),
        case("few rows", "smoke", r=3, context=40, rows=21, offset=4),
        case("offset beyond the rows", "smoke", r=2, context=20, rows=9, offset=10),
        case("many requests", "smoke", r=70, context=9, page_size=4),
        case("any code", "smoke", r=3, context=40, page_size=2, values="any"),
        case("e4m3 cache", "smoke", r=2, context=70, page_size=61, layout="e4m3"),
        case("head dimension", "smoke", r=2, context=20, layout="heads"),
        case("packed pages", "smoke", r=2, context=20, page_size=3, layout="packed", offset=None),
        case("unaligned", "smoke", r=2, context=20, page_size=3, layout="unaligned"),
        case("strided", "smoke", r=3, context=40, page_size=16, layout="strided"),
        case("hostile values", "smoke", r=12, context=40, page_size=8, rows=60, lens="any", gather="given", offset=3),
        case("window", "default", r=4, context=700, gather="given", rows=900, offset=180),
        case("ratio 4", "default", r=3, context=1500),
        case("ratio 128", "default", r=3, context=300, page_size=2),
        case("any code, wide", "default", r=5, context=600, values="any", layout="strided"),
        case("hostile values, wide", "default", r=100, context=90, page_size=16, rows=128, lens="any", gather="given"),
        case("one request of 32k", "full", r=1, context=32768, lens="full"),
        case("four requests of 16k", "full", r=4, context=16384, rows=16400, offset=7),
        case("four windows", "full", r=4, context=9000, gather="given", rows=9000),
        case("ratio 128 of 1M", "full", r=2, context=8192, page_size=2, lens="full"),
    )


PREFILL = _prefill_cases()
DECODE = _decode_cases()
GATHER = _gather_cases()
