"""Sparse multi-head latent attention: prefill over bf16 keys, decode over the packed FP8 cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import inputs as draw
from .models import FLASH, PRO
from .op import Case, Cost, OpContract, Rule, ScalarArg, Tolerance, Values, tensor

if TYPE_CHECKING:
    import torch
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
        extra_k_cache: The second scope's cache, with a page size of its own.
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


_ATTENTION = {
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
_MAX_LOGITS = Tolerance(atol=1e-5, rtol=2 / 65536, why="one fp32 sum of 512 exact products; FlashMLA's bound.")


def _make_prefill(
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
    # Half of the rows are never named.
    pool = torch.randperm(s_kv, generator=generator)[: (s_kv + 1) // 2]
    indices = draw.choices(generator, s_q, topk, pool, s_kv, invalid)
    unnamed = torch.ones(s_kv, dtype=torch.bool)
    named = indices.long().flatten()
    unnamed[named[(named >= 0) & (named < s_kv)]] = False
    kv[unnamed] = float("nan")
    if layout == "strided":  # what lies beside a row of indices is no index either
        q, kv, indices = draw.spread(q), draw.spread(kv), draw.spread(indices)
    elif layout == "heads":
        kv, indices = kv.unsqueeze(1), indices.unsqueeze(1)
    made = {"q": q, "kv": kv, "indices": indices, "sm_scale": HEAD_DIM**-0.5}
    made["attn_sink"] = draw.sinks(generator, h_q, sink)
    made["topk_length"] = draw.lengths(generator, s_q, topk, length)
    return {k: draw.move(v, device) if isinstance(v, torch.Tensor) else v for k, v in made.items()}


def _make_scope(
    generator: torch.Generator,
    rows: int,
    topk: int,
    page_size: int,
    invalid: str,
    lengths: Tensor | None,
    pad: int,
) -> tuple[Tensor, Tensor]:
    """A cache of about two slots for each index, three pages at least, and indices into every second slot of it."""
    import torch

    from . import layouts

    pages = max(3, -(-2 * min(topk * rows, 2048) // page_size))
    stride = page_size * layouts.KV_BYTES
    stride += pad * (-stride % layouts.PAGE_ALIGNMENT)
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
        # Beyond its length a row may hold anything, so it does.
        indices[beyond] = 2**31 - 1
    slots = used.long().flatten().unique()
    slots = slots[slots < size]
    layouts.write_kv(cache, slots, draw.normal(generator, len(slots), HEAD_DIM).bfloat16())
    return cache, indices


def _make_decode(
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
    pad = int(layout != "packed")
    cache, indices = _make_scope(generator, b * s_q, topk, page_size, invalid, lens, pad)
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
        cache, indices = _make_scope(generator, b * s_q, extra_topk, extra_page_size, invalid, lens, pad)
        made["extra_k_cache"] = cache
        made["extra_indices"] = indices.view(b, s_q, extra_topk)
        made["extra_topk_length"] = lens
    if layout == "wide":  # what lies beside a row of indices is no index either
        made |= {k: draw.spread(v) for k, v in made.items() if k.endswith("indices") and isinstance(v, torch.Tensor)}
    if layout == "heads":
        made |= {k: v.unsqueeze(2) for k, v in made.items() if k.endswith("k_cache") and isinstance(v, torch.Tensor)}
    return {k: draw.move(v, device) if isinstance(v, torch.Tensor) else v for k, v in made.items()}


def _cost_prefill(q: Tensor, kv: Tensor, indices: Tensor, sm_scale: float, **optional: Any) -> Cost:
    s_q, h_q, _ = q.shape
    topk = indices.shape[-1]
    rows = min(kv.shape[0], s_q * topk)
    return Cost(
        flops=4.0 * s_q * h_q * topk * HEAD_DIM,
        bytes=4.0 * s_q * h_q * HEAD_DIM + 2.0 * rows * HEAD_DIM + 4.0 * s_q * topk + 8.0 * s_q * h_q,
        math="bf16",
    )


def _cost_decode(
    q: Tensor,
    k_cache: Tensor,
    indices: Tensor,
    sm_scale: float,
    *,
    extra_k_cache: Tensor | None = None,
    extra_indices: Tensor | None = None,
    **optional: Any,
) -> Cost:
    from .layouts import KV_BYTES

    b, s_q, h_q, _ = q.shape
    keys, kv_bytes = 0, 0.0
    for cache, index in ((k_cache, indices), (extra_k_cache, extra_indices)):
        if cache is not None and index is not None:
            keys += index.shape[-1]
            kv_bytes += KV_BYTES * min(index.numel(), cache.shape[0] * cache.shape[1])
    return Cost(
        flops=4.0 * b * s_q * h_q * keys * HEAD_DIM,
        bytes=4.0 * b * s_q * h_q * HEAD_DIM + kv_bytes + 4.0 * b * s_q * (keys + h_q),
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


_CACHE = "pages, page_size, 584 | pages, page_size, 1, 584"
_EXTRA = "extra_pages, extra_page_size, 584 | extra_pages, extra_page_size, 1, 584"
_BYTES = "uint8 int8 float8_e4m3fn"
_HEADS = Rule("q", f"0 < h_q <= {MAX_HEADS}", f"1 to {MAX_HEADS} heads")
_NO_KEY, _CLAMPED = "no key", "clamped"

PREFILL = OpContract(
    function=sparse_mla_prefill,
    args={
        "q": tensor("bfloat16", "s_q, h_q, 512", "queries"),
        "kv": tensor("bfloat16", "s_kv, 512 | s_kv, 1, 512", "keys, also the values"),
        "indices": tensor("int32", "s_q, topk | s_q, 1, topk", "rows of kv; outside [0, s_kv) is invalid"),
        "sm_scale": ScalarArg("float", about="softmax scale"),
        "attn_sink": tensor("float32", "h_q", "natural log, denominator only", layout="vector"),
        "topk_length": tensor("int32", "s_q", "entries of a row that count", layout="vector"),
        "out": tensor("bfloat16", "s_q, h_q, 512", "result buffer"),
    },
    rules=(_HEADS,),
    values=(
        Values("topk_length", "0", "topk", _CLAMPED),
        Values("indices", "-1", "s_kv - 1", _NO_KEY, used="topk_length"),
    ),
    returns=("out", "max_logits", "lse"),
    cases=_prefill_cases(),
    make=_make_prefill,
    tolerances={"out": _ATTENTION["out"], "max_logits": _MAX_LOGITS, "lse": _ATTENTION["lse"]},
    cost=_cost_prefill,
)

DECODE = OpContract(
    function=sparse_mla_decode,
    args={
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
    },
    rules=(
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
    ),
    values=(
        Values("topk_length", "0", "topk", _CLAMPED),
        Values("indices", "-1", "pages * page_size - 1", _NO_KEY, used="topk_length"),
        Values("extra_topk_length", "0", "extra_topk", _CLAMPED),
        Values("extra_indices", "-1", "extra_pages * extra_page_size - 1", _NO_KEY, used="extra_topk_length"),
    ),
    returns=("out", "lse"),
    cases=_decode_cases(),
    make=_make_decode,
    tolerances=_ATTENTION,
    cost=_cost_decode,
)
