"""Plans of the Triton provider: properties that hold for any tiles. Launches are recorded, without a GPU.

That each compiles and fits the shared memory of its architecture is tools/compile_matrix.py's, see test_triton.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
import traffic as serving
from dsv4_backend_triton import ahead, variants
from dsv4_backend_triton.arch import arch_from_capability
from dsv4_backend_triton.launch import Launch, recording
from dsv4_backend_triton.sparse_mla.decode.plan import MOST_SPLITS
from packaging.version import Version
from traffic import Arguments, Limits, served

from dsv4_backends.contract.models import FLASH, PRO
from dsv4_backends.selection.capability import Support, support

CAPABILITIES = ("8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0", "12.1")
RANKS = (FLASH.rank(1), FLASH.rank(8), PRO.rank(1))
LIMITS = Limits(max_tokens=3000, max_requests=200, max_context=30000, next_n=2)


def unusual(op: str) -> Iterator[Arguments]:
    """What only the plain kernels take: rows that cannot be read 16 bytes at a time, sizes beside the tiles."""
    if op == "sparse_mla_prefill":
        apart = torch.empty(4096, 1, 516, dtype=torch.bfloat16, device="meta")[..., :512]
        yield from (serving.prefill(heads, 9, 4096, 640) | {"kv": apart} for heads in (20, 64))
    elif op == "sparse_mla_decode":
        odd = torch.empty(1024, 64 * 584 + 8, dtype=torch.uint8, device="meta")[:, : 64 * 584].view(1024, 64, 1, 584)
        rows = (1, 8, 128)
        yield from (serving.decode(heads, b, 1, 128, (512, 64)) | {"k_cache": odd} for heads in (20, 64) for b in rows)
    elif op == "fp8_einsum":
        yield from (serving.einsum(FLASH.rank(1), tokens, packed=True) for tokens in (7, 32, 300))
    elif op == "hc_prenorm_gemm":
        for m, n, k, stride in ((200, 33, 1024, 0), (200, 24, 96, 0), (8192, 24, 1024, 1028)):
            x = torch.empty_strided((m, k), (stride or k, 1), dtype=torch.bfloat16, device="meta")
            yield {"x": x, "fn": torch.empty(n, k, device="meta"), "num_splits": 4}


@cache
def recorded(op: str, capability: str) -> list[tuple[Arguments, list[Launch]]]:
    """Calls of servers, and what each launches."""
    arch = arch_from_capability(Version(capability))
    calls = [call for rank in RANKS for call in served(op, rank, LIMITS, 40)]
    for rank in RANKS:  # and as warm-up has them, around each size from which on another kernel serves
        calls += serving.calls(op, rank, Limits(max_tokens=300, max_requests=3, max_context=2000))
    return [(call, list(ahead.record(op, [call], arch))) for call in (*calls, *unusual(op))]


def variant_of(op: str, launch: Launch) -> str:
    """The file of a launch's kernel; another op's where one is made of it."""
    folder, _, file = launch.kernel.fn.__module__.partition("dsv4_backend_triton.")[2].rpartition(".")
    return str(file) if folder == variants.OPS[op].folder else ""


@pytest.mark.parametrize("op", variants.OPS)
def test_every_kernel_serves_somewhere_and_only_where_it_is_for(op: str) -> None:
    needs = {variant.name: variant.needs for variant in variants.OPS[op].variants}
    launched = set()
    for capability in CAPABILITIES:
        for _, launches in recorded(op, capability):
            for name in {variant_of(op, one) for one in launches} & set(needs):
                assert support(needs[name], Version(capability)) is Support.SUPPORTED, (name, capability)
                launched.add(name)
    assert launched == set(needs)


def once(blocks: int, tile: int, size: int) -> bool:
    """Whether so many tiles cover so many elements, and none of them is beyond the end."""
    return (blocks - 1) * tile < size <= blocks * tile


def tile_of(one: Launch, *names: str) -> int:
    """The first of these constants that the kernel has, in its arguments or in its file."""
    module = vars(__import__(one.kernel.fn.__module__, fromlist=["_"]))
    found = (one.arguments.get(name, module.get(name)) for name in names)
    return int(next(getattr(value, "value", value) for value in found if value is not None))


def attention(one: Launch, rows: int, heads: int) -> Iterator[bool]:
    high = tile_of(one, "HEADS", "BH", "_HEADS")
    if "n_items" in one.arguments:  # programs that take one item after another
        items, groups = one.arguments["n_items"], one.arguments["GROUPS"]
        yield from (items == rows * groups, 1 <= one.grid[0] <= items, once(groups, high, heads))
        return
    blocks, taken = one.arguments["head_blocks"], one.arguments.get("block_heads", high)
    yield from (one.grid[0] == rows * blocks, once(blocks, taken, heads), taken <= high)


def covered(op: str, call: Arguments, launches: list[Launch]) -> Iterator[bool]:
    """Of the launches of a call: whether each part of the results is computed, and by one program."""
    main, *others = launches
    grid, taken = main.grid, main.arguments
    if op == "sparse_mla_prefill":
        yield from attention(main, *call["q"].shape[:2])
    elif op == "sparse_mla_decode":
        rows, heads = call["q"].shape[0] * call["q"].shape[1], call["q"].shape[2]
        if variant_of(op, main) == "staged":
            keys = taken["topk1"] + taken["topk2"]
            tiles = sum(-(-taken[f"topk{scope}"] // taken["BN"]) for scope in (1, 2))
            yield from (grid == (rows, max(tiles, 1)), others[0].arguments["topk"] == keys)
            yield from attention(others[0], rows, heads)
            return
        yield from attention(main, rows, heads)
        splits = taken["splits"]
        yield from (grid[1] == splits <= MOST_SPLITS, taken["SPLIT"] == (splits > 1) == bool(others))
        for combine in others:  # all partial results of a row fit the registers of one that combines them
            yield combine.grid == (rows * heads,)
            yield combine.arguments["splits"] == splits <= combine.arguments["BS"]
    elif op == "mqa_logits":
        high, wide, chunk = tile_of(main, "ROWS"), tile_of(main, "BLOCK_N", "KEYS"), taken["chunk"]
        yield chunk % wide == 0
        if len(grid) == 2:
            yield from (once(grid[0], high, len(call["q"])), once(grid[1], chunk, taken["n_cols"]))
        else:
            yield 1 <= grid[0] <= -(-len(call["q"]) // high) * -(-taken["n"] // chunk)
    elif op == "paged_mqa_logits":  # programs share the work by the lengths: see the tests of the schedule
        yield from (len(grid) == 1, grid[0] >= 1, taken["max_len"] == call["max_context_len"])
        yield (taken["B"], taken["next_n"]) == tuple(call["q"].shape[:2])
    elif op in ("indexer_topk", "paged_indexer_topk"):  # logits, maxima, candidates, selection: some rows at a time
        names = ["_maxima_kernel", "_candidates_kernel", "_select_kernel"]
        selects = launches[3::4]
        yield sum(one.grid[0] for one in selects) == call["q"].shape[:-2].numel()
        for first in range(0, len(launches), 4):
            maxima, candidates, select = own = launches[first + 1 : first + 4]
            yield [one.kernel.__name__ for one in own] == names
            yield maxima.grid == candidates.grid == (*select.grid, select.arguments["splits"])
            tile, groups, keep = (candidates.arguments[name] for name in ("TILE", "GROUPS", "KEEP"))
            yield tile * maxima.grid[1] == groups >= 2 * call["topk"] <= keep
            yield all(one.arguments["KEEP"] == keep for one in own)
    elif op == "indexer_q_rope_quant":
        yield from (grid == (len(call["q"]) * taken["tiles"],), once(taken["tiles"], taken["ROWS"], call["q"].shape[1]))
    elif op in ("inverse_rope", "inverse_rope_quant"):
        t, h, _ = call["x"].shape
        yield from (grid[0] % h == 0, once(grid[0] // h, taken["ROWS"], t), taken["heads"] * call["groups"] == h)
    elif op == "gather_dequant_kv":  # programs take one tile after another, as many as the lengths make
        yield from (taken["requests"] == len(call["seq_lens"]), taken["rows"] <= call["out"].shape[1])
        yield 1 <= grid[0] <= taken["requests"] * -(-taken["rows"] // taken["ROWS"])
    elif op in ("compress_norm_rope_insert", "indexer_compress_insert"):
        for one in launches:
            yield once(one.grid[0], one.arguments["group"], len(call["positions"]))
            yield from (one.grid[1] * one.arguments["DIM"] == len(call["norm_weight"]), taken["group"] <= call["ratio"])
    elif op == "fp8_einsum":
        (b, h, _), d = call["x"].shape, call["w"].shape[1]
        if variant_of(op, main) == "wgmma_few":
            yield grid[0] == h * -(-d // tile_of(main, "OUTPUTS")) * -(-b // taken["BLOCK_B"])
        elif variant_of(op, main) == "wgmma":
            tiles = h * -(-d // taken["BLOCK_D"]) * -(-b // (2 * tile_of(main, "TOKENS")))
            yield 1 <= grid[0] <= tiles
        else:
            wide, high = tile_of(main, "BLOCK_D", "TILE"), tile_of(main, "BLOCK_B", "TILE")
            yield grid[0] == h * -(-d // wide) * -(-b // high)
    elif op == "hc_prenorm_gemm":
        (m, k), n, results = call["x"].shape, len(call["fn"]), call.get("num_splits") or 1
        pieces, step = grid[1], tile_of(main, "BLOCK_K", "STEP")
        yield from (
            once(grid[0], tile_of(main, "BLOCK_M", "ROWS"), m),
            once(grid[2], tile_of(main, "BLOCK_N", "MIXES"), n),
        )
        yield from (pieces * taken["per"] >= k, taken["per"] % step == 0, bool(others) == (pieces > results))
        for reduce in others:
            yield reduce.arguments["group"] * results == pieces
            yield reduce.arguments["group"] <= reduce.arguments["GROUP"]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("op", variants.OPS)
def test_every_result_is_computed_once(op: str, capability: str) -> None:
    for call, launches in recorded(op, capability):
        checks = list(covered(op, call, launches))
        told = [(one.kernel.__name__, one.grid, one.constants) for one in launches]
        shapes = {name: tuple(value.shape) for name, value in call.items() if isinstance(value, torch.Tensor)}
        assert checks, f"covered() says nothing of {op}"
        assert all(checks), (checks, told, shapes)


def reads_wide(launch: Launch) -> bool:
    """Whether a kernel in Gluon is given tensors whose rows begin at multiples of 16 bytes."""
    tensors = [value for value in launch.arguments.values() if isinstance(value, torch.Tensor) and value.ndim > 1]
    wide = [t for t in tensors if t.dtype in (torch.bfloat16, torch.uint8, torch.float8_e4m3fn)]
    return all(stride * t.element_size() % 16 == 0 for t in wide for stride in t.stride()[:-1])


@pytest.mark.parametrize("capability", ["8.0", "9.0"])
@pytest.mark.parametrize("columns", [1, 2048, 262144, 2**25])
@pytest.mark.parametrize("topk", [1, 512, 2048])
def test_the_workspace_of_a_selection_is_bounded(topk: int, columns: int, capability: str) -> None:
    """Whatever the context and the number of rows."""
    arch, rank = arch_from_capability(Version(capability)), FLASH.rank(1)
    for m in (1, 200) if columns > 2048 else (1, 9000):
        for op, call in (
            ("indexer_topk", serving.mqa(rank, m, columns)),
            ("paged_indexer_topk", serving.paged(rank, m, 2, min(columns, 2**24))),
        ):
            call["topk"] = topk
            with recording([].append, arch):
                assert ahead.workspace(op, call, torch.device("meta")) <= 256 * 2**20


@pytest.mark.parametrize("op", variants.OPS)
def test_rows_that_cannot_be_read_at_once_are_the_plain_kernels(op: str) -> None:
    gluon = {variant.name for variant in variants.OPS[op].variants if variant.gluon}
    for capability in CAPABILITIES:
        for _, launches in recorded(op, capability):
            assert all(reads_wide(one) for one in launches if variant_of(op, one) in gluon)


@pytest.mark.parametrize("op", variants.OPS)
def test_unusual_calls_are_the_plain_kernels(op: str) -> None:
    """Whatever the architecture; staged decode goes on as prefill does."""
    plain = {variant.name for variant in variants.OPS[op].variants if not variant.gluon}
    for capability in CAPABILITIES:
        arch = arch_from_capability(Version(capability))
        for call in unusual(op):
            first = next(iter(ahead.record(op, [call], arch)))
            assert variant_of(op, first) in plain, (capability, first.kernel.__name__)
