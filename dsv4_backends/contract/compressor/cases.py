"""Seeded cases of the compressor, the tolerances of its results, and the cost of a call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import inputs as draw
from ..spec import Case, Cost, Tolerance
from .meaning import HEAD_DIM, INDEX_DIM

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TOLERANCES = {
    "k_cache": Tolerance(
        rtol=2**-3,
        atol_rms=1e-3,
        calc_diff=1e-4,
        why="fp32 sums differ from exact ones by about 2^-20, which sometimes changes a rounding to bf16 or e4m3: the "
        "value is then one code off, 2^-3 of it, or 2^-9 of its block's scale below e4m3's normal range. calc_diff "
        "bounds how often: one such value in 512 passes, one in 8 fails. Any change of an entry that is not written "
        "is larger, so these are compared exactly.",
    )
}


def _tokens(
    generator: torch.Generator, t: int, r: int, context: int, ratio: int, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Positions and requests of t tokens, and which of them complete a window.

    ``chunk``: each request has a run of positions, the first one from 0 on, and their tokens are interleaved.
    ``decode``: a token a request, every second one at the end of a window.
    """
    import torch

    if kind == "decode":
        requests = torch.arange(t) % max(r, 1)
        positions = torch.randint(0, context, (t,), generator=generator)
        ends = (positions // ratio + 1) * ratio - 1
        positions = torch.where((torch.arange(t) % 2 == 0) & (ends < context), ends, positions)
    else:
        requests = torch.randint(0, max(r, 1), (t,), generator=generator)
        order = torch.zeros(t, dtype=torch.int64)
        starts = torch.randint(0, max(context - t, 0) + 1, (max(r, 1),), generator=generator)
        starts[0] = 0
        for i in range(r):
            mine = requests == i
            order[mine] = torch.arange(int(mine.sum()))
        positions = starts[requests] + order
    return positions, requests, positions % ratio == ratio - 1


def _outside(generator: torch.Generator, x: Tensor, share: float, bad: list[int]) -> Tensor:
    """``x`` with a share of its values replaced by ones of ``bad``."""
    import torch

    picked = torch.tensor(bad)[torch.randint(0, len(bad), x.shape, generator=generator)]
    return torch.where(draw.uniform(generator, *x.shape) < share, picked, x)


def _make(
    device: torch.device,
    generator: torch.Generator,
    dim: int,
    *,
    t: int,
    ratio: int = 4,
    overlap: bool = True,
    r: int = 2,
    context: int = 64,
    state_page: int = 4,
    page_size: int = 4,
    kind: str = "chunk",
    scores: str = "finite",
    hostile: bool = False,
    dtype: str = "int64",
    norm: str = "bfloat16",
    eps: float = 1e-6,
    layout: str = "plain",
) -> dict[str, Any]:
    """
    Args:
        kind: See ``_tokens``.
        scores: ``finite``, or ``masked``: some are -inf, and in some channels all.
        hostile: Whether indices have all kinds of values out of range.
        layout: ``plain``: cache pages padded; ``packed``: not; ``wide``: pages of state and cache that lie far apart,
            as those of all layers of a model together, rows of the tables with gaps; ``heads``: a dimension of 1.
    """
    import torch

    positions, requests, complete = _tokens(generator, t, r, context, ratio, kind)
    rows = ratio * (1 + overlap)
    capacity = max(t, 8) + 5
    pages = -(-capacity // page_size)
    slots = torch.randperm(pages * page_size, generator=generator)[:t]
    slots = torch.where(draw.uniform(generator, t) < 0.1, -1, slots)
    if hostile:
        far = [-1, -(2**31), 2**31 - 1] + ([-(2**63), 2**63 - 1, 2**40 - 1] if dtype == "int64" else [])
        positions = _outside(generator, positions, 0.2, [*far, -ratio - 1, context + 3 * ratio - 1])
        requests = _outside(generator, requests, 0.2, [-1, r, -(2**31), 2**31 - 1])
        slots = _outside(generator, slots, 0.2, [*far, pages * page_size])
        complete = (positions >= 0) & (positions % ratio == ratio - 1)
    writes = complete & (requests >= 0) & (requests < r) & (slots >= 0) & (slots < pages * page_size)

    # The rows that are read: for each window their positions, and whether they belong to the window before.
    blocks = -(-context // state_page)
    at = positions[writes].unsqueeze(1) - torch.arange(rows - 1, -1, -1)
    before = (torch.arange(rows) < rows - ratio).expand_as(at)
    owner = requests[writes].unsqueeze(1).expand_as(at)
    there = (at >= 0) & (at < blocks * state_page)
    at, before, owner = at[there], before[there], owner[there]

    # Pages only for these, in any order. The table is wider than needed; its other entries name no page.
    block = owner * blocks + at // state_page
    used = block.unique()
    most = min(max(r, 1) * blocks, t * (-(-rows // state_page) + 1))
    state_pages = most + 2
    page = torch.randperm(state_pages, generator=generator)[: len(used)]
    nowhere = torch.tensor([-1, state_pages, -(2**31), 2**31 - 1])
    table = nowhere[torch.randint(0, len(nowhere), (r, blocks + 2), generator=generator)]
    inner = table[:, :blocks].flatten().clone()
    inner[used] = page
    if hostile:
        inner = _outside(generator, inner, 0.2, nowhere.tolist())
    table[:, :blocks] = inner.view(r, blocks)

    width = 4 * dim if overlap else 2 * dim
    gap = 3 if layout == "wide" else 1
    raw = torch.full((state_pages * gap, state_page, width), float("nan"), dtype=torch.float32)
    state = raw[::gap]
    row, channels = torch.searchsorted(used, block), torch.arange(dim)
    column = (torch.where(before, 0, width // 2 - dim).unsqueeze(1) + channels) if overlap else channels
    where = (page[row].unsqueeze(1), (at % state_page).unsqueeze(1))
    state[(*where, column)] = draw.normal(generator, len(at), dim)
    score = draw.normal(generator, len(at), dim, scale=2.0)
    if scores == "masked":
        score[draw.uniform(generator, *score.shape) < 0.2] = -float("inf")
        score[:, ::7] = -float("inf")
    state[(*where, column + width // 2)] = score

    weight = (1 + draw.normal(generator, dim, scale=0.3)).to(getattr(torch, norm))
    cos_sin = draw.cos_sin(context, positions[writes] // ratio * ratio)
    if layout == "wide":
        table, cos_sin = draw.spread(table.int()), draw.spread(cos_sin)
    made = {
        "positions": positions.to(getattr(torch, dtype)),
        "requests": requests.int(),
        "slots": slots.to(getattr(torch, dtype)),
        "state": state,
        "block_table": table.int() if table.dtype is torch.int64 else table,
        "norm_weight": weight,
        "cos_sin": cos_sin,
        "k_cache": _cache(generator, dim, pages, page_size, layout),
    }
    return {name: draw.move(value, device) for name, value in made.items()} | {"eps": eps, "ratio": ratio}


def _cache(generator: torch.Generator, dim: int, pages: int, page_size: int, layout: str) -> Tensor:
    """A cache of which about half of the entries are written, the others NaN."""
    import torch

    from .. import layouts

    entry = layouts.KV_BYTES if dim == HEAD_DIM else dim + layouts.INDEXER_SCALE_BYTES
    stride = page_size * entry
    stride += 0 if layout == "packed" else -stride % layouts.PAGE_ALIGNMENT
    stride = 3 * stride + 11 if layout == "wide" else stride
    raw = torch.full((pages * stride,), draw.POISON, dtype=torch.uint8)
    cache = raw.as_strided((pages, page_size, entry), (stride, entry, 1))
    size = pages * page_size
    slots = torch.randperm(size, generator=generator)[: size // 2]
    write = layouts.write_kv if dim == HEAD_DIM else layouts.write_indexer_keys
    write(cache, slots, draw.normal(generator, len(slots), dim).bfloat16())
    return cache.unsqueeze(2) if layout == "heads" else cache


def make_main(device: torch.device, generator: torch.Generator, **params: Any) -> dict[str, Any]:
    return _make(device, generator, HEAD_DIM, **params)


def make_indexer(
    device: torch.device, generator: torch.Generator, *, hadamard: bool = False, **params: Any
) -> dict[str, Any]:
    return _make(device, generator, INDEX_DIM, **params) | {"hadamard": hadamard}


def cost(
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
    **optional: Any,
) -> Cost:
    """A channel of kv and of the scores for each row that is in a window, and an entry for each window."""
    dim, entry = norm_weight.shape[0], k_cache.shape[-1]
    writes = (positions % ratio == ratio - 1) & (slots >= 0)
    rows = ratio * (state.shape[-1] // (2 * dim))
    windows, read = int(writes.sum()), int((positions[writes] + 1).clamp(max=rows).sum())
    tokens = positions.nbytes + requests.nbytes + slots.nbytes
    each = entry + 4 * cos_sin.shape[1] + 4 * -(-rows // state.shape[1])
    return Cost(
        flops=5.0 * read * dim,
        bytes=float(8 * read * dim + each * windows + tokens + norm_weight.nbytes),
        math="bf16",
    )


def _case(name: str, level: str, **params: Any) -> Case:
    return Case(name, level, params)


_FLAT = {"ratio": 128, "overlap": False, "context": 300, "state_page": 8, "page_size": 2}
_ODD = {"ratio": 3, "overlap": False, "state_page": 5, "page_size": 3}
_HOSTILE = {"hostile": True, "layout": "wide"}

_BOTH = (
    _case("small", "smoke", t=13),
    _case("no tokens", "smoke", t=0),
    _case("one of each", "smoke", t=1, r=1, ratio=1, context=1, state_page=1, page_size=1),
    _case("no window is complete", "smoke", t=3, r=1, ratio=4),
    _case("first windows", "smoke", t=17, r=1, context=17),
    _case("interleaved requests", "smoke", t=37, r=5, norm="float32"),
    _case("decode", "smoke", t=9, r=9, kind="decode", layout="packed"),
    _case("int32", "smoke", t=19, dtype="int32", layout="heads"),
    _case("without overlap", "smoke", t=19, ratio=4, overlap=False),
    _case("odd ratio", "smoke", t=19, **_ODD),
    _case("odd ratio with overlap", "smoke", t=19, **{**_ODD, "overlap": True}),
    _case("masked scores", "smoke", t=19, scores="masked"),
    _case("wide pages", "smoke", t=14, layout="wide"),
    _case("ratio 128", "smoke", t=140, r=1, **_FLAT),
    _case("hostile values", "smoke", t=40, r=3, **_HOSTILE),
    _case("hostile values, eps 0", "smoke", t=40, r=3, eps=0.0, **_HOSTILE),
    _case("hostile values int32", "smoke", t=40, r=3, dtype="int32", **_HOSTILE),
    _case("hostile values, no requests", "smoke", t=5, r=0, hostile=True),
    _case("chunk", "default", t=257, r=3, context=300, page_size=64),
    _case("batch", "default", t=128, r=128, context=2000, page_size=64, kind="decode", layout="wide"),
    _case("hostile values batch", "default", t=300, r=32, context=700, page_size=64, kind="decode", **_HOSTILE),
    _case("ratio 128 chunk", "default", t=600, r=2, **{**_FLAT, "context": 700}, norm="float32"),
    _case("ratio 128 batch", "default", t=33, r=33, **{**_FLAT, "context": 3000}, kind="decode", layout="wide"),
    _case("ratio 128 masked", "default", t=9, r=9, **_FLAT, kind="decode", scores="masked"),
    _case("hostile values, ratio 128", "default", t=90, r=5, **_FLAT, **_HOSTILE),
    _case("ratio 128 with overlap", "default", t=300, r=1, **{**_FLAT, "overlap": True}),
    _case("ratio 100", "default", t=300, r=1, **{**_FLAT, "ratio": 100}),
    _case("ratio 7 with overlap", "default", t=300, r=2, ratio=7, context=310),
    _case("full chunk", "full", t=8192, r=1, context=8192, page_size=64),
    _case("full chunk of requests", "full", t=8192, r=7, context=9000, page_size=64, layout="wide"),
    _case("ratio 128 full chunk", "full", t=8192, r=1, **{**_FLAT, "context": 8192}),
    _case("ratio 128 full chunk of requests", "full", t=8192, r=7, **{**_FLAT, "context": 9000}),
    _case("ratio 128 full batch", "full", t=128, r=128, **{**_FLAT, "context": 9000}, kind="decode"),
)
MAIN = _BOTH
INDEXER = (
    *_BOTH,
    _case("hadamard", "smoke", t=37, hadamard=True),
    _case("hostile values, hadamard", "smoke", t=40, r=3, hadamard=True, **_HOSTILE),
    _case("hadamard chunk", "full", t=8192, r=3, context=9000, page_size=64, hadamard=True),
)
